import pytest

from tests.errors import raises
from zero_sft.arguments.faults import Fault, parse_faults, require_ranks


def test_faults():
    assert parse_faults("kill:rank=1,step=5") == (Fault(kind="kill", rank=1, step=5),)
    assert parse_faults(" slow:seconds=3, rank=0,step=8 ;nan:rank=2,step=1,start=0") == (
        Fault(kind="slow", rank=0, step=8, seconds=3),
        Fault(kind="nan", rank=2, step=1, start=0),
    )


@pytest.mark.parametrize("text", [
    "", "kill", "kill:", "kill:rank=1", "kill:step=1", "explode:rank=1,step=5", "kill:rank=1,step=0", "kill:rank=-1,step=5",
    "kill:rank=1,step=5,step=6", "kill:rank=1,step=5;", "kill:rank=1;step=5", "kill:rank=a,step=5", "kill:rank=1,step=5,x=1",
    "kill:rank=1,step=99999999999",
])  # fmt: skip
def test_no_faults(text):
    with raises("arguments.bad_fault", "--simulate_fault"):
        parse_faults(text)


def test_a_rank_that_is_not_there():
    """The run would end well, and nothing would have been tried."""
    faults = parse_faults("kill:rank=1,step=2; hang:rank=2,step=3")
    require_ranks(faults, 3)
    with raises("arguments.bad_fault", "rank 2", "2 ranks, from 0 on"):
        require_ranks(faults, 2)
