"""What a run is resumed from is looked at before the weights are read."""

import json
import logging
import os
import zipfile
from pathlib import Path

import pytest
import torch

from tests.errors import error_codes, raises
from zero_sft.cluster.world import World
from zero_sft.saving.resume import agree_on_checkpoint, find_checkpoint


def checkpoint(folder: Path, ranks: int, bf16: bool = True) -> Path:
    """The files of a checkpoint of the Trainer's, each with a little in it."""
    step = int(folder.name.rpartition("-")[2])
    write_states(folder / f"global_step{step}", ranks, bf16)
    (folder / "latest").write_text(f"global_step{step}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    for rank in range(ranks):
        torch.save({"cpu": rank}, folder / (f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"))
    os.utime(folder / "trainer_state.json", (step, step))
    return folder


def write_states(states: Path, ranks: int, bf16: bool = True) -> None:
    states.mkdir(parents=True)
    for rank in range(ranks):
        torch.save({"dp_world_size": ranks}, states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"m": torch.zeros(99)}, states / f"{'bf16_' * bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("wanted", [None, False])
def test_a_new_run(tmp_path, wanted):
    assert agree_on_checkpoint(wanted, tmp_path / "nowhere", World(), {}) is None


def test_the_last_one_or_the_named_one(tmp_path):
    first, last = checkpoint(tmp_path / "checkpoint-3", 4), checkpoint(tmp_path / "checkpoint-20", 2)
    assert find_checkpoint(True, tmp_path, 2).folder == last
    assert find_checkpoint(str(first), tmp_path, 4).folder == first
    alone = checkpoint(tmp_path / "alone" / "checkpoint-3", 1)
    assert find_checkpoint(True, alone.parent, 1).world_size == 1


def test_another_number_of_ranks(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-3", 2)
    with raises("resume.other_world_size", "2 ranks", " 3", f"zero_sft.export {folder} {folder}-model`"):
        find_checkpoint(True, tmp_path, 3)


def test_another_precision(tmp_path):
    checkpoint(tmp_path / "checkpoint-3", 2, bf16=False)
    assert find_checkpoint(True, tmp_path, 2, dtype="float16")
    with raises("resume.other_dtype", "bfloat16", "--bf16 False"):
        find_checkpoint(True, tmp_path, 2, dtype="bfloat16")


@pytest.mark.parametrize(("wanted", "code"), [(True, "resume.no_checkpoint"), ("elsewhere", "resume.no_such_folder")])
def test_nothing_there(tmp_path, wanted, code):
    with raises(code, f"--resume_from_checkpoint {wanted}"):
        find_checkpoint(wanted, tmp_path, 1)


def test_a_finished_run_without_checkpoints(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with raises("resume.no_checkpoint", "--overwrite_output_dir"):
        find_checkpoint(True, tmp_path, 1)


def test_the_folder_of_a_run(tmp_path):
    """It holds a finished model as well: training on from that would lose the optimizer's state."""
    checkpoint(tmp_path / "checkpoint-3", 1)
    last = checkpoint(tmp_path / "checkpoint-20", 1)
    (tmp_path / "model.safetensors").touch()
    with raises("resume.folder_of_checkpoints", str(last)):
        find_checkpoint(str(tmp_path), tmp_path, 1)


@pytest.mark.parametrize("name", ["optim_states.pt", "model_states.pt", "rng_state.pth"])
def test_a_changed_bit(tmp_path, name):
    """torch would load it without a word."""
    folder = checkpoint(tmp_path / "checkpoint-9", 1)
    assert agree_on_checkpoint(True, tmp_path, World(), {})
    path = next(folder.rglob(f"*{name}"))
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(member for member in archive.namelist() if member.endswith("data.pkl")))
    content = bytearray(path.read_bytes())
    content[content.index(pickled) + len(pickled) // 2] ^= 0x40
    path.write_bytes(content)
    with raises("resume.file_damaged", path.name):
        agree_on_checkpoint(True, tmp_path, World(), {})


def test_nothing_of_deepspeed(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with raises("resume.no_deepspeed_state"):
        find_checkpoint(True, tmp_path, 1)


def test_weights_alone(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    for wanted in (True, str(folder)):
        with raises("resume.weights_alone", f"--model_name_or_path {folder}"):
            find_checkpoint(wanted, tmp_path, 1)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


STATES = "global_step9/"
OPTIMIZER, MODEL = (
    STATES + "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    STATES + "zero_pp_rank_1_mp_rank_00_model_states.pt",
)
FAULTS = {
    # the file, what happens to it, the code, what the message must name
    "no latest": ("latest", Path.unlink, "file_missing", "`latest`"),
    "latest of another step": (
        "latest", lambda path: path.write_text("global_step7"), "latest_is_of_another_step", "'global_step7'"
    ),
    "empty latest": ("latest", lambda path: path.write_text(""), "latest_is_of_another_step", "`latest`"),
    "states of another step": (
        "global_step9", lambda path: path.rename(path.with_name("old")), "file_missing", "global_step9"
    ),
    "empty optimizer": (OPTIMIZER, lambda path: path.write_bytes(b""), "file_damaged", OPTIMIZER),
    "cut optimizer": (OPTIMIZER, _cut, "file_damaged", OPTIMIZER),
    "optimizer of zeros": (OPTIMIZER, _zeroed, "file_damaged", OPTIMIZER),
    "no optimizer": (OPTIMIZER, Path.unlink, "file_missing", OPTIMIZER),
    "no model states": (MODEL, Path.unlink, "file_missing", MODEL),
    "no states of rank 0": (
        MODEL.replace("rank_1", "rank_0"), Path.unlink, "file_missing", "rank_0_mp_rank_00_model_states.pt"
    ),
    "cut model states": (MODEL, _cut, "file_damaged", MODEL),
    "no trainer state": ("trainer_state.json", Path.unlink, "file_missing", "trainer_state.json"),
    "cut trainer state": ("trainer_state.json", _cut, "bad_trainer_state", "trainer_state.json"),
    "no random generators": ("rng_state_1.pth", Path.unlink, "file_missing", "rng_state_1.pth"),
    "no scheduler": ("scheduler.pt", Path.unlink, "file_missing", "scheduler.pt"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole(tmp_path, fault, caplog):
    """Named, it is an error that says what is missing; for True the newest whole one is taken, and the log says so."""
    name, damage, kind, value = FAULTS[fault]
    folder, code = checkpoint(tmp_path / "checkpoint-9", 2), f"resume.{kind}"
    assert find_checkpoint(str(folder), tmp_path, 2).folder == folder
    damage(folder / name)
    for wanted in (str(folder), True):
        with raises(code, str(folder), value):
            find_checkpoint(wanted, tmp_path, 2)
    older = checkpoint(tmp_path / "checkpoint-8", 2)
    with raises(code, str(older)):  # the one that is whole is named
        find_checkpoint(str(folder), tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(True, tmp_path, 2).folder == older
    assert error_codes(caplog.text) == [code]
    assert str(folder) in caplog.text
    assert value in caplog.text


def test_none_that_is_whole(tmp_path):
    for step, name in ((8, "scheduler.pt"), (9, "latest")):
        (checkpoint(tmp_path / f"checkpoint-{step}", 2) / name).unlink()
    with raises("resume.no_whole_checkpoint", "checkpoint-8", "scheduler.pt", "checkpoint-9", "`latest`") as caught:
        find_checkpoint(True, tmp_path, 2)
    assert error_codes(caught.value.with_code) == list(caught.value.codes[1:]) == ["resume.file_missing"] * 2


def test_what_is_left_over_in_a_whole_one_does_not_matter(tmp_path):
    """States, and random generators, of an earlier save by more ranks."""
    folder = checkpoint(tmp_path / "checkpoint-9", 2)
    write_states(folder / "global_step5", 4)
    for rank in (2, 3):
        torch.save({}, folder / f"rng_state_{rank}.pth")
    torch.save({}, folder / "global_step9" / "zero_pp_rank_3_mp_rank_00_model_states.pt")
    assert find_checkpoint(True, tmp_path, 2).world_size == 2


def test_a_scheduler_of_deepspeed_is_in_its_states(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-9", 2)
    (folder / "scheduler.pt").unlink()
    assert find_checkpoint(True, tmp_path, 2, {"scheduler": {"type": "WarmupLR"}})


def test_states_on_nvme(tmp_path):
    folder, ds = checkpoint(tmp_path / "checkpoint-9", 2), {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with raises("resume.file_missing", "rank00"):
        find_checkpoint(True, tmp_path, 2, ds)
    for rank in range(2):
        (folder / "global_step9" / "offloaded_tensors" / f"rank{rank:02d}").mkdir(parents=True)
    assert find_checkpoint(True, tmp_path, 2, ds)
