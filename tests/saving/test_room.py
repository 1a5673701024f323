"""What a run needs on the disk: counts as the Trainer saves, sizes as files have them, and one message where room lacks."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest

from tests.errors import raises
from zero_sft.saving.room import SaveSizes, checkpoints_at_once, require_room


def saved_steps(steps, every, first):
    """The steps after which the Trainer saves: its default callback's rule."""
    return [step for step in range(first + 1, steps + 1) if step % every == 0 or step == steps]


@pytest.mark.parametrize("steps", [1, 7, 12])
@pytest.mark.parametrize("every", [1, 3, 4, 20])
@pytest.mark.parametrize("first", [0, 3, 12])
def test_checkpoints_of_steps(steps, every, first):
    expected = len(saved_steps(steps, every, first))
    assert checkpoints_at_once("steps", steps, every, 1, None, first) == expected
    assert checkpoints_at_once("steps", steps, every, 1, 2, first) == min(expected, 3)


def test_checkpoints_of_other_strategies():
    assert checkpoints_at_once("no", 10, 2, 1, None) == 0
    assert checkpoints_at_once("epoch", 30, 500, 3, None) == 3
    assert checkpoints_at_once("epoch", 30, 500, 3, 1) == 2
    assert checkpoints_at_once("steps", 10, 0.25, 1, None) == len(saved_steps(10, math.ceil(2.5), 0))


def test_too_little_room(tmp_path):
    sizes = SaveSizes(export_bytes=10**9, checkpoint_bytes=6 * 10**9, checkpoints=4)
    disk = SimpleNamespace(total=10**12, free=24 * 10**9)
    with mock.patch("shutil.disk_usage", return_value=disk):
        require_room(tmp_path / "out", sizes, freed_bytes=10**9)
        with raises("export.no_room", str(tmp_path / "out"), "24.0 GB", "25.0 GB", "1.0 GB", "4 checkpoints of 6.0 GB"):
            require_room(tmp_path / "out", sizes)
        disk.free = 19 * 10**9
        with raises("export.no_room", "--save_total_limit 2,"):
            require_room(tmp_path / "out", sizes)
        disk.free = 2 * 10**9
        with raises("export.no_room", "--save_strategy no,"):
            require_room(tmp_path / "out", sizes)
        disk.total = 0
        require_room(tmp_path / "out", sizes)
