"""`zero_sft.hub.HubOptions`: what is no flag or no text is refused before anything is fetched or run."""

import pytest

from tests.errors import raises
from zero_sft.hub.options import HubOptions


@pytest.mark.parametrize("name", ["trust_remote_code", "local_files_only"])
@pytest.mark.parametrize("value", ["False", "0", 0, 1, None])
def test_a_flag_is_a_flag(name, value):
    """A text from a command line would count as True, and run code."""
    with raises("arguments.wrong_value", name, "True or False", repr(value)):
        HubOptions(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("revision", 3), ("subfolder", b"x"), ("variant", True), ("cache_dir", 1)])
def test_other_types(name, value):
    with raises("arguments.wrong_value", name):
        HubOptions(**{name: value})


def test_what_passes(tmp_path):
    given = {
        "trust_remote_code": True,
        "token": False,
        "cache_dir": tmp_path,
        "revision": None,
        "subfolder": "a",
        "variant": "fp16",
    }
    assert {name: getattr(HubOptions(**given), name) for name in given} == given | {"cache_dir": str(tmp_path)}
