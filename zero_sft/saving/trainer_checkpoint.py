"""Check, file by file, that a `checkpoint-N` folder is complete.

The files of a Trainer checkpoint under DeepSpeed ZeRO-3, in the order in which they are written:

| file | written by | content |
| --- | --- | --- |
| `config.json`, tokenizer files | rank 0 | not read again |
| `zero_sft_run.json` | rank 0 | the run's settings (`run_record.py`); missing in checkpoints of earlier releases |
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
import dataclasses
import itertools
import pickle
import re
import socket
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.folder_kind import ADAPTER_FILE
from zero_sft.checkpoint.index import INDEX_FILE, SINGLE_FILE
from zero_sft.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    find_damage,
    has_manifest,
    hosts_of_missing_files,
    optimizer_file,
    read_manifest,
)
from zero_sft.checkpoint.run_state import (
    TRAINER_STATE_FILE,
    TRAINING_STATE_FILE,
    read_trainer_state,
    read_training_state,
)
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError, CheckpointError

_MODEL_STATES = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt")
_OPTIM_STATES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")
_RNG_STATE = re.compile(r"rng_state_(\d+)\.pth")

WEIGHTS_ALONE = "resume.weights_alone"
"""Error code of a checkpoint that was saved without the optimizer's state."""


SAME_HOSTS = (
    "Start the ranks on the hosts that saved it, in the same order; or copy the folders of all hosts into one that all ranks "
    "see, and name it with --resume_from_checkpoint."
)
"""The remedy where hosts have parts of a checkpoint that others need."""


class IncompleteCheckpointError(ArgumentError):
    """A folder is not a complete checkpoint; the message gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerCheckpoint:
    """A complete checkpoint: its step, the number of ranks that wrote it, and the dtype in which its engine trained.

    DeepSpeed's format tells bf16 from the others, but not fp16 from fp32: `dtype` is then "float32". With `on_each_node`, each
    host may have its own folder, with the files of its ranks.
    """

    folder: Path
    global_step: int
    world_size: int
    dtype: str
    sharded: bool = False
    on_each_node: bool = False

    @property
    def bf16(self) -> bool:
        """Whether the engine trained in bf16."""
        return self.dtype == "bfloat16"

    def own_files(self, rank: int) -> tuple[Path, ...]:
        """Return the files of this checkpoint that a rank reads, without an optimizer's state that is on NVMe."""
        if self.sharded:
            return (self.folder / MANIFEST_FILE,)
        states = self.folder / f"global_step{self.global_step}"
        rng = f"rng_state_{rank}.pth" if self.world_size > 1 else "rng_state.pth"
        schedule = self.folder / "scheduler.pt"  # every rank reads it; there is none if the DeepSpeed config has a schedule
        return (
            *([schedule] if schedule.exists() else []),
            states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            states / f"{'bf16_' * self.bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            self.folder / rng,
        )


def inspect_checkpoint(folder: Path, ds_config: Mapping[str, Any] | None = None) -> TrainerCheckpoint:
    """Check every file of a checkpoint, in either format.

    Args:
        ds_config: decides which files this run needs in addition to those of every run.

    Raises:
        IncompleteCheckpointError: a file is missing, damaged or of another step; the message names the first one.
    """
    if has_manifest(folder):
        return _inspect_manifest(folder)
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
    dtype = "bfloat16" if bf16 else "float32"
    checkpoint = TrainerCheckpoint(folder=folder, global_step=step, world_size=world_size, dtype=dtype)
    for rank in range(checkpoint.world_size):
        for path in checkpoint.own_files(rank):
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


def _inspect_manifest(folder: Path) -> TrainerCheckpoint:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise IncompleteCheckpointError(str(error), code=error.code) from error
    if unlisted := _unlisted(manifest):
        raise IncompleteCheckpointError(
            f"{MANIFEST_FILE} does not list {unlisted}, which every checkpoint has", code="resume.file_unlisted"
        )
    if damage := find_damage(folder, manifest):
        raise IncompleteCheckpointError(damage, code="resume.file_damaged")
    try:
        step = read_trainer_state(folder)["global_step"]
        read_training_state(folder)
    except CheckpointError as error:
        raise IncompleteCheckpointError(str(error), code=error.code) from error
    if step != manifest.step:
        raise IncompleteCheckpointError(
            f"{TRAINER_STATE_FILE} is of step {step}, and {MANIFEST_FILE} of step {manifest.step}",
            code="resume.bad_trainer_state",
        )
    return TrainerCheckpoint(
        folder=folder,
        global_step=manifest.step,
        world_size=manifest.world_size,
        dtype=manifest.dtype,
        sharded=True,
        on_each_node=bool(manifest.hosts),
    )


def _unlisted(manifest: Manifest) -> str | None:
    """Return the first file that a manifest should list and does not; None if it lists all."""
    if not manifest.hosts and not manifest.files.keys() & {SINGLE_FILE, INDEX_FILE, ADAPTER_FILE}:
        return SINGLE_FILE
    ranks = range(min(manifest.world_size, len(manifest.files) + 1))  # one of these is missing if the number is hostile
    names = itertools.chain(
        (TRAINER_STATE_FILE, TRAINING_STATE_FILE), (optimizer_file(rank, manifest.world_size) for rank in ranks)
    )
    return next((name for name in names if name not in manifest.files), None)


def require_own_share_intact(folder: Path, world: World) -> None:
    """Read this rank's share of the files of a sharded checkpoint, and compare them with the manifest. Any rank.

    Where each node has its own folder, the share is what this rank will read in it.

    Raises:
        ArgumentError: a file was changed, or is on another host.
    """
    manifest = read_manifest(folder)
    names = sorted(manifest.files, key=lambda name: manifest.files[name].nbytes)[world.rank :: world.world_size]
    if manifest.hosts:
        own = (
            [optimizer_file(world.rank, world.world_size)] if world.world_size == manifest.world_size else list(manifest.hosts)
        )
        _require_here(folder, own, manifest, world)
        names = [*own, *(name for name in manifest.files if name not in manifest.hosts and world.leads_node)]
    share = dataclasses.replace(manifest, files={name: manifest.files[name] for name in names})
    if damage := find_damage(folder, share, verify=True):
        raise ArgumentError(
            f"{folder} is damaged: {damage}. Name another checkpoint-* folder with --resume_from_checkpoint.",
            code="resume.file_damaged",
        )


def _require_here(folder: Path, names: Sequence[str], manifest: Manifest, world: World) -> None:
    """Check that this host has the files of the ranks from which this rank reads."""
    missing = [name for name in names if name in hosts_of_missing_files(folder, manifest)]
    if missing:
        raise ArgumentError(
            f"rank {world.rank} on {socket.gethostname()} needs {missing[0]} of {folder.name}, which "
            f"{manifest.hosts[missing[0]]} wrote as one of {manifest.world_size} ranks (--save_on_each_node). " + SAME_HOSTS,
            code="resume.on_another_host",
        )


def has_states(folder: Path) -> bool:
    """Return whether a folder has states of an optimizer, complete or not."""
    return has_manifest(folder) or (folder / "latest").exists() or any(folder.glob("global_step*"))


def require_no_checkpoint(folder: Path, remedy: str) -> None:
    """Refuse to write a model into a checkpoint, whose weights would no longer be those of its optimizer.

    Raises:
        ArgumentError: the folder, or one that it is in, has states of an optimizer.
    """
    resolved = folder.resolve()
    for each in (resolved, *(parent for parent in resolved.parents if parent.name.startswith("checkpoint-"))):
        if _is_checkpoint(each):
            raise ArgumentError(
                f"{folder} is a checkpoint, or in one ({each}), whose files would be replaced. {remedy}",
                code="export.into_a_checkpoint",
            )


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has states of an optimizer. Other programs write files named `manifest.json` as well."""
    with contextlib.suppress(CheckpointError):
        read_manifest(folder)
        return True
    return any(folder.glob("global_step*"))


def require_intact(path: Path) -> None:
    """Read a `.pt` or `.pth` file and compare its contents with the checksums in it, which torch does not do.

    Raises:
        ArgumentError: the contents were changed.
    """
    with _explain_unreadable(path.name), zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error) as error:
            damaged = str(error)
    if damaged is not None:
        raise ArgumentError(
            f"{path} is damaged: its contents do not have the checksum that was saved with them. Name another checkpoint-* "
            "folder with --resume_from_checkpoint.",
            code="resume.file_damaged",
        )


def _require_states(folder: Path) -> None:
    if has_states(folder):
        return
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE, ADAPTER_FILE)):
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
    try:
        return read_trainer_state(folder)["global_step"]
    except CheckpointError as error:
        raise IncompleteCheckpointError(str(error), code=error.code) from error


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
    import torch  # only DeepSpeed's format needs it

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
