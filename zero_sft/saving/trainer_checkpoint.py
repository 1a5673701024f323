"""Check, file by file, that a `checkpoint-N` folder is complete.

The files of a Trainer checkpoint under DeepSpeed ZeRO-3, in the order in which they are written:

| file | written by | content |
| --- | --- | --- |
| `config.json`, tokenizer files | rank 0 | not read again |
| `global_stepN/zero_pp_rank_R_mp_rank_00_model_states.pt` | every rank R | buffers, shapes, counters |
| `global_stepN/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` | every rank R | fp32 weights and the optimizer's state |
| `global_stepN/offloaded_tensors/rankR/` | every rank R | the optimizer's state, if it is offloaded to NVMe |
| `latest` | rank 0 | the name of the valid `global_stepN` folder; others are leftovers |
| `scheduler.pt` | rank 0 | the schedule, unless the DeepSpeed config has a scheduler |
| `rng_state_R.pth` (one rank: `rng_state.pth`) | every rank R | random generators |
| `trainer_state.json` | rank 0 | the step, the log |

`.pt` and `.pth` files are zip archives with their directory at the end: a file that is truncated or empty has none. Only one
file is unpickled, with torch's allow-list: rank 0's model states, which hold the number of ranks. Everything here runs on one
rank and does not communicate.
"""

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.index import INDEX_FILE, SINGLE_FILE
from zero_sft.errors import ArgumentError

_MODEL_STATES = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt")
_OPTIM_STATES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")
_RNG_STATE = re.compile(r"rng_state_(\d+)\.pth")

WEIGHTS_ALONE = "resume.weights_alone"
"""Error code of a checkpoint that was saved without the optimizer's state."""


class IncompleteCheckpointError(ArgumentError):
    """A folder is not a complete checkpoint; the message gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerCheckpoint:
    """A complete checkpoint: its step, the number of ranks that wrote it, and whether its engine trained in bf16."""

    folder: Path
    global_step: int
    world_size: int
    bf16: bool

    def files_of(self, rank: int) -> tuple[Path, ...]:
        """Return the files that a rank reads when it resumes from this checkpoint."""
        states = self.folder / f"global_step{self.global_step}"
        rng = f"rng_state_{rank}.pth" if self.world_size > 1 else "rng_state.pth"
        return (
            states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            states / f"{'bf16_' * self.bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            self.folder / rng,
        )


def inspect_checkpoint(folder: Path, ds_config: Mapping[str, Any] | None = None) -> TrainerCheckpoint:
    """Check every file of a checkpoint. `ds_config` decides which files this run needs in addition to those of every run.

    Raises:
        IncompleteCheckpointError: a file is missing, damaged or of another step; the message names the first one.
    """
    _require_states(folder)
    step = _global_step(folder)
    states = _latest(folder, step)
    names = [path.name for path in states.iterdir()]
    model_ranks = {int(match[1]) for name in names if (match := _MODEL_STATES.fullmatch(name))}
    optimizer_is_bf16 = {int(match[2]): bool(match[1]) for name in names if (match := _OPTIM_STATES.fullmatch(name))}
    if not model_ranks | optimizer_is_bf16.keys():
        raise IncompleteCheckpointError(f"{states.name} holds no states of DeepSpeed", code="resume.no_deepspeed_state")
    rng_ranks = {int(match[1]) for path in folder.iterdir() if (match := _RNG_STATE.fullmatch(path.name))}
    world_size = _recorded_world_size(states, folder) or 1 + max(model_ranks | optimizer_is_bf16.keys() | rng_ranks)
    bf16 = optimizer_is_bf16.get(0, any(optimizer_is_bf16.values()))
    checkpoint = TrainerCheckpoint(folder=folder, global_step=step, world_size=world_size, bf16=bf16)
    for rank in range(checkpoint.world_size):
        for path in checkpoint.files_of(rank):
            _require_archive(path, folder)
    sections = ds_config or {}
    if "scheduler" not in sections:
        _require_archive(folder / "scheduler.pt", folder)
    if ((sections.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device") == "nvme":
        for rank in range(checkpoint.world_size):
            if not (states / "offloaded_tensors" / f"rank{rank:02d}").is_dir():
                raise IncompleteCheckpointError(
                    f"{states.name}/offloaded_tensors/rank{rank:02d} is missing", code="resume.file_missing"
                )
    return checkpoint


def _require_states(folder: Path) -> None:
    if (folder / "latest").exists() or any(folder.glob("global_step*")):
        return
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise IncompleteCheckpointError(
            "it holds weights without the optimizer's state (--save_only_model)", code=WEIGHTS_ALONE
        )
    raise IncompleteCheckpointError("it holds no state of DeepSpeed's", code="resume.no_deepspeed_state")


@contextlib.contextmanager
def _explain_unreadable(name: str, code: str = "resume.file_unreadable") -> Iterator[None]:
    """Turn an error while a file is read or parsed into an IncompleteCheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise IncompleteCheckpointError(f"{name} is missing", code="resume.file_missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpointError(f"{name} can't be read ({error!r:.100})", code=code) from error


def _global_step(folder: Path) -> int:
    with _explain_unreadable("trainer_state.json", "resume.bad_trainer_state"):
        step = json.loads((folder / "trainer_state.json").read_bytes())["global_step"]
    if type(step) is not int:
        raise IncompleteCheckpointError(
            f"trainer_state.json has the global_step {step!r}, expected a number", code="resume.bad_trainer_state"
        )
    return step


def _latest(folder: Path, step: int) -> Path:
    """Return the folder with DeepSpeed's states, which the file `latest` names."""
    with _explain_unreadable("the file `latest`"):
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    if tag != f"global_step{step}":
        raise IncompleteCheckpointError(
            f"the file `latest` names {tag!r:.60}, and trainer_state.json is of step {step}",
            code="resume.latest_is_of_another_step",
        )
    if not (folder / tag).is_dir():
        raise IncompleteCheckpointError(f"the folder {tag} is missing", code="resume.file_missing")
    return folder / tag


def _recorded_world_size(states: Path, folder: Path) -> int | None:
    """Return the number of ranks in rank 0's model states; None if it can't be read safely."""
    path = states / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    _require_archive(path, folder)
    try:
        size = torch.load(path, map_location="meta", mmap=True, weights_only=True)["dp_world_size"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, OSError):
        return None
    return size if type(size) is int and size > 0 else None


def _require_archive(path: Path, folder: Path) -> None:
    name = path.relative_to(folder)
    with _explain_unreadable(str(name)):
        size = path.stat().st_size
        try:
            zipfile.ZipFile(path).close()
        except zipfile.BadZipFile as error:
            raise IncompleteCheckpointError(
                f"{name} is empty" if size == 0 else f"{name} is truncated or damaged ({size:,} bytes)",
                code="resume.file_damaged",
            ) from error
