"""Locate a model once per run: a local folder, or one commit of a hub repository.

A branch that moves during a run can't mix two states: rank 0 asks which commit it stands for, and every rank and every stage
takes that one. Each stage fetches only the files that it needs (`CONFIG`, `WEIGHTS`, `TOKENIZER`), so that ranks other than 0
never open tokenizer files.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from zero_sft.cluster.control_group import DOWNLOAD_TIMEOUT, all_gather_json, broadcast_bytes
from zero_sft.cluster.stages import collective_stage, run_stage
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.hub.download import download_snapshot
from zero_sft.hub.options import HubOptions

CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
TOKENIZER = ("config.json", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
             "tekken.json",
             "*.tiktoken", "chat_template*", "*.jinja")  # fmt: skip

_CODE = ("*.py",)
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_BIN_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files come from.

    Attributes:
        name: the local path or hub id as the user gave it.
        options: how to get at it; of a hub id, `revision` is the commit that all stages take.
        folder: the local folder, `options.subfolder` included; None for a hub id.
    """

    name: str
    options: HubOptions
    folder: Path | None


def locate_model(name: str, options: HubOptions, world: World) -> ModelSource:
    """Find out where a model is, and which commit its revision stands for. Every rank; communicates.

    Rank 0 asks the hub. Where the hub can't be reached, the branch's record in the cache counts.

    Raises:
        CheckpointError: no such folder, a folder that only some ranks see, or the hub can't provide the model.
    """
    with collective_stage(world, f"looking for {name}") as stage:
        folder = local_folder(name, options)
        stage.local = folder is not None
    found = stage.gathered
    if any(found) and not all(found):
        absent = [rank for rank, is_there in enumerate(found) if not is_there]
        raise CheckpointError(
            f"{name} is a folder on some ranks, and not on rank {', '.join(map(str, absent[:8]))}. Put the model on a "
            "file system that all nodes share, or copy it to every node.",
            code="hub.folder_not_on_all_nodes",
        )
    return ModelSource(name=name, options=options if folder else _pinned(name, options, world), folder=folder)


def locate_model_alone(name: str, options: HubOptions) -> ModelSource:
    """Locate a model on one rank. Does not communicate; errors as `locate_model`'s."""
    return locate_model(name, options, World())


def _pinned(name: str, options: HubOptions, world: World) -> HubOptions:
    """The options with the commit that their revision stands for. Every rank; communicates."""
    if _COMMIT.fullmatch(options.revision or ""):
        return options
    commit = ""
    with collective_stage(world, f"fetching {name}", DOWNLOAD_TIMEOUT):
        if world.is_main:
            commit = download_snapshot(name, options, CONFIG, local_only=False).name
    commit = broadcast_bytes(world, commit.encode() if world.is_main else None).decode()
    return dataclasses.replace(options, revision=commit) if _COMMIT.fullmatch(commit) else options


def fetch_files(source: ModelSource, world: World, patterns: tuple[str, ...]) -> Path:
    """Return the local folder that holds the source's files of these patterns. Every rank; communicates for a hub id.

    Rank 0 downloads first, then the first rank of each node, which finds the files at once where the file system is shared;
    then all look. The waiting is on the control group, outside the training group's clock.

    Raises:
        CheckpointError: the hub can't provide the files.
    """
    if source.folder is not None:
        return source.folder
    wanted = (*patterns, *_CODE) if source.options.trust_remote_code else patterns
    downloads = world.is_main or world.leads_node
    folder = run_stage(
        world,
        f"fetching {source.name}",
        lambda: download_snapshot(source.name, source.options, wanted, local_only=not downloads),
        main_first=True,
        timeout=DOWNLOAD_TIMEOUT,
    )
    return _inside(folder, source.options.subfolder)


def fetch_weights(source: ModelSource, world: World) -> Path:
    """Return the local folder of the weights; a `pytorch_model.bin` is fetched only where there are no safetensors.

    Every rank; communicates for a hub id.

    Raises:
        CheckpointError: the hub can't provide the files.
    """
    if source.folder is not None:
        return source.folder
    safetensors, bins = (with_variant(names, source.options.variant) for names in (_WEIGHTS, _BIN_WEIGHTS))
    folder = fetch_files(source, world, (*CONFIG, *safetensors))
    if any(all_gather_json(world, not any(next(folder.glob(pattern), None) for pattern in safetensors))):
        folder = fetch_files(source, world, (*CONFIG, *bins))
    return folder


def with_variant(names: tuple[str, ...], variant: str | None) -> tuple[str, ...]:
    """The files' names under a variant: `model.fp16.safetensors`, and parts with the variant before or after their numbers."""
    if variant is None:
        return names
    result = []
    for name in names:
        stem, suffix = name.rsplit(".", 1)
        result.append(f"{stem}.{variant}.{suffix}")
        if "*" in name:
            result.append(f"{stem.replace('-*', '')}.{variant}-*.{suffix}")
    return tuple(result)


def local_folder(name: str, options: HubOptions) -> Path | None:
    """Return the folder of that name on this machine, or None for a hub id. Does not communicate.

    Raises:
        CheckpointError: a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _inside(path, options.subfolder)
    if _looks_like_a_path(name):
        raise CheckpointError(
            f"no such folder: {name}. Name an existing folder, or a hub id such as 'org/model'.",
            code="hub.no_such_folder",
        )
    return None


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or Path(name).exists() or not name


def _inside(folder: Path, subfolder: str | None) -> Path:
    """Return `folder/subfolder`, which must not lead out of `folder`."""
    if not subfolder:
        return folder
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(
            f"subfolder {subfolder!r} leads out of {folder}. Name a folder inside it.", code="hub.subfolder_leaves_folder"
        )
    if not (folder / subfolder).is_dir():
        raise CheckpointError(f"{folder} has no folder {subfolder!r}. Check --subfolder.", code="hub.no_such_subfolder")
    return folder / subfolder
