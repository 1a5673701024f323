"""The weights in a checkpoint that DeepSpeed has written: ZeRO stage 3, of any number of ranks, or universal.

| format | file | content |
| --- | --- | --- |
| ZeRO-3 | `zero_pp_rank_R_mp_rank_00_model_states.pt` | names and shapes by subgroup, buffers, shards of frozen parameters |
| ZeRO-3 | `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` | a flat fp32 tensor per subgroup: shards one after the other |
| universal | `zero/NAME/fp32.pt` | one parameter, flat |
| universal | `*_model_states.pt` | as above |

The layout is that of DeepSpeed's `utils/zero_to_fp32.py`, which needs memory for all weights.
"""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zero_sft.checkpoint.folder_kind import is_folder
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import full_range, partition_numel, shard_range
from zero_sft.saving import deepspeed_pickles

_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM_STATES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def find_states(folder: Path) -> Path | None:
    """Return the folder with DeepSpeed's files in a checkpoint: itself, or the one that `latest` names. None: it has none."""
    candidates = [folder]
    for name in ("latest_universal", "latest"):
        tag = folder / name
        if tag.is_file():
            candidates.append(folder / Path(tag.read_text(encoding="utf-8", errors="replace").strip()).name)
    candidates += sorted(folder.glob("global_step*"), reverse=True)
    for candidate in candidates:
        if is_folder(candidate) and any(_MODEL_STATES.fullmatch(path.name) for path in candidate.iterdir()):
            return candidate
    return None


class _ModelStates:
    """The model states of all ranks: names and shapes, and the tensors that are not trained."""

    def __init__(self, folder: Path) -> None:
        paths = {int(match[1] or 0): path for path in sorted(folder.iterdir()) if (match := _MODEL_STATES.fullmatch(path.name))}
        parallel = [path.name for path in folder.iterdir() if (match := _MODEL_STATES.fullmatch(path.name)) and int(match[2])]
        if parallel:
            raise CheckpointError(
                f"{folder} is of a run with tensor or pipeline parallelism ({parallel[0]}), whose weights are split in other "
                "ways. Convert it with the tool that wrote it.",
                code="export.other_parallelism",
            )
        missing = set(range(len(paths))) - paths.keys()
        if missing:
            raise CheckpointError(
                f"{folder} lacks the model states of rank {min(missing)}. Copy the files of all ranks to one folder.",
                code="export.file_missing",
            )
        self._states = [deepspeed_pickles.load(paths[rank]) for rank in range(len(paths))]
        first = self._states[0]
        self.groups: list[dict[str, tuple[int, ...]]] = [
            {name: tuple(shape) for name, shape in group.items()} for group in first.get("param_shapes") or []
        ]
        if not self.groups:
            raise CheckpointError(
                f"{folder} does not say which parameters its optimizer trained: it is not of ZeRO. Export it with the tool "
                "that wrote it.",
                code="export.not_zero3",
            )
        self.frozen: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in (first.get("frozen_param_shapes") or {}).items()
        }
        self.buffers: dict[str, torch.Tensor] = {
            name: first["module"][name] for name in first.get("buffer_names") or [] if name in first["module"]
        }
        trained = next(iter(self.groups[0]))
        self.dtype: torch.dtype = first["module"][trained].dtype if trained in first["module"] else torch.float32

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors."""
        buffers = {name: tuple(tensor.shape) for name, tensor in self.buffers.items()}
        return {name: shape for group in self.groups for name, shape in group.items()} | self.frozen | buffers

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that is not trained, flat."""
        if name in self.buffers:
            return self.buffers[name].reshape(-1)
        fragments = [state["frozen_param_fragments"][name] for state in self._states]
        numel = math.prod(self.frozen[name])
        values = torch.empty(numel, dtype=fragments[0].dtype)
        for rank, fragment in enumerate(fragments):
            part = shard_range(numel, rank, len(fragments))
            values[part.start : part.stop] = fragment.reshape(-1)[: part.numel]
        return values


class ZeroWeights:
    """The weights in DeepSpeed's files of ZeRO stage 3; `SavedWeights` describes the methods."""

    def __init__(self, folder: Path) -> None:
        """Open the files of all ranks.

        Raises:
            CheckpointError: a file is missing or can't be read, or they are of another ZeRO stage.
        """
        self._states = _ModelStates(folder)
        self.dtype, self.rules, self.shapes = self._states.dtype, None, self._states.shapes
        paths = {int(match[2]): path for path in folder.iterdir() if (match := _OPTIM_STATES.fullmatch(path.name))}
        missing = set(range(len(paths))) - paths.keys()
        if missing or not paths:
            raise CheckpointError(
                f"{folder} lacks the optimizer states of rank {min(missing, default=0)}. Copy the files of all ranks to one "
                "folder.",
                code="export.file_missing",
            )
        self._flat: list[list[torch.Tensor]] = [
            _flat_groups(paths[rank], deepspeed_pickles.load(paths[rank]), len(paths)) for rank in range(len(paths))
        ]
        self._places: dict[str, tuple[int, int]] = {}
        for index, group in enumerate(self._states.groups):
            sizes = [partition_numel(math.prod(shape), len(paths)) for shape in group.values()]
            for name, start in zip(group, itertools.accumulate(sizes, initial=0), strict=False):
                self._places[name] = (index, start)
            for rank, flat in enumerate(self._flat):
                if index >= len(flat) or flat[index].numel() < sum(sizes):
                    raise CheckpointError(
                        f"{paths[rank]} has fewer weights than {sum(sizes):,} in subgroup {index}. If the run kept its "
                        "optimizer on NVMe, they are not in the file: export the model at the end of the run.",
                        code="export.file_damaged",
                    )

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat: of a trained one, the fp32 weights of the optimizer."""
        if name not in self._places:
            return self._states.read(name)
        (group, start), numel = self._places[name], math.prod(self.shapes[name])
        values = torch.empty(numel, dtype=torch.float32)
        for rank, flat in enumerate(self._flat):
            part = shard_range(numel, rank, len(self._flat))
            values[part.start : part.stop] = flat[group][start : start + part.numel]
        return values


class UniversalWeights:
    """The weights in a universal checkpoint of a ZeRO-3 run; `SavedWeights` describes the methods."""

    def __init__(self, folder: Path) -> None:
        """List the files."""
        self._folder, self._states = folder / "zero", _ModelStates(folder)
        self.dtype, self.rules = self._states.dtype, None
        self._trained = {path.parent.name for path in self._folder.glob("*/fp32.pt")}
        self.shapes = {
            name: shape
            for name, shape in self._states.shapes.items()
            if name in self._trained or name in self._states.frozen or name in self._states.buffers
        }

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat."""
        if name not in self._trained:
            return self._states.read(name)
        path, numel = self._folder / name / "fp32.pt", math.prod(self.shapes[name])
        content: Any = deepspeed_pickles.load(path)
        values = content["param"] if isinstance(content, Mapping) else content
        if values.numel() < numel:
            raise CheckpointError(
                f"{path} has {values.numel():,} elements, and the parameter has {numel:,}. Convert the checkpoint again.",
                code="export.file_damaged",
            )
        return values.reshape(-1)[full_range(numel).start : numel]


def _flat_groups(path: Path, content: Any, ranks: int) -> list[torch.Tensor]:
    """Return a rank's flat fp32 tensors, one for each subgroup.

    Raises:
        CheckpointError: they are not those of ZeRO stage 3 over all ranks.
    """
    states = content.get("optimizer_state_dict") or {} if isinstance(content, Mapping) else {}
    stage = int(states.get("zero_stage", 0))
    if stage != 3 or "fp32_flat_groups" not in states:
        raise CheckpointError(
            f"{path} is of ZeRO stage {stage}; only stage 3 can be exported here. Of another stage, any rank's model states "
            "hold all weights: `python zero_to_fp32.py` in the checkpoint's folder writes them.",
            code="export.not_zero3",
        )
    counts = {group.get("partition_count", ranks) for group in states.get("ds_zero_partition_groups") or []}
    if counts - {ranks}:
        raise CheckpointError(
            f"{path}: its weights are divided over {min(counts)} ranks, and there are files of {ranks} (MiCS or expert "
            "parallelism). Export the model at the end of the run.",
            code="export.other_parallelism",
        )
    return list(states["fp32_flat_groups"])
