"""What a run is resumed from is looked at before the weights are read."""

import pytest

from zero_sft.errors import ArgumentError
from zero_sft.saving.resume import require_resumable


def checkpoint(folder, ranks):
    states = folder / "global_step3"
    states.mkdir(parents=True)
    for rank in range(ranks):
        (states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        (states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    return folder


@pytest.mark.parametrize("wanted", [None, False])
def test_a_new_run(tmp_path, wanted):
    require_resumable(wanted, tmp_path / "nowhere", 2)


def test_the_last_one_or_the_named_one(tmp_path):
    first, _ = checkpoint(tmp_path / "checkpoint-3", 4), checkpoint(tmp_path / "checkpoint-20", 2)
    require_resumable(True, tmp_path, 2)
    require_resumable(str(first), tmp_path, 4)


def test_another_number_of_ranks(tmp_path):
    checkpoint(tmp_path / "checkpoint-3", 2)
    with pytest.raises(ArgumentError, match=r"written by 2 ranks, and here are 3.*Start as many ranks"):
        require_resumable(True, tmp_path, 3)


@pytest.mark.parametrize("wanted", [True, "elsewhere"])
def test_nothing_there(tmp_path, wanted):
    with pytest.raises(ArgumentError, match=r"no .*Leave it out to start anew"):
        require_resumable(wanted, tmp_path, 1)


def test_weights_alone(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ArgumentError, match="holds no state of DeepSpeed's"):
        require_resumable(True, tmp_path, 1)
