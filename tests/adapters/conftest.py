import pytest

from tests.adapters.test_attach import CASES, save_calm


@pytest.fixture
def folder(case, tmp_path):
    """The model of a case of `CASES`."""
    return save_calm(CASES[case][0], tmp_path / "model")
