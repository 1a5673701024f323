import pytest

from tests.faults.kills import kill_at_random


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills(tmp_path):
    """The run ends as the one that nobody has killed; the others end within 30 seconds, with one message."""
    kills = kill_at_random(tmp_path, 10, seed=5)
    assert max(kills.seconds) < 30, kills.seconds
    assert kills.codes.count("cluster.rank_lost") >= 5, kills.codes
    assert len(set(kills.steps)) > 2, kills.steps
