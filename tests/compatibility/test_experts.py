"""Mixtures of experts train while most experts are idle, on each rank others."""

import pytest

from tests.compatibility.experts import outcomes, types
from tests.compatibility.test_setups import DAY
from tests.slow import slow

TYPES = types()
QUICK = ["flint", "qwen3_next"]
"""flint waited forever, and qwen3_next ended in an error, when DeepSpeed traced each call of an activation."""


@pytest.mark.parametrize("names", [QUICK, slow(TYPES[DAY % 4 :: 4])], ids=["quick", "a quarter"])
def test_idle_experts(tmp_path, names):
    """`make compatibility` trains all types."""
    assert len(TYPES) > 50, "the scan finds the mixtures of experts"
    results = outcomes(names, tmp_path)
    assert {name: result for name, result in results.items() if result != "equal"} == {}
