"""Locate a model once per run: a local folder, or one commit of a hub repository.

A branch that moves during a run can't mix two states: rank 0 resolves it to a commit, and every rank and every stage uses that
commit. Each stage fetches only the files that it needs (`CONFIG`, weights, `TOKENIZER`); only rank 0 opens tokenizer files.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zero_sft.checkpoint.folder_kind import describe_broken_link
from zero_sft.checkpoint.index import BIN_FILE, BIN_INDEX_FILE, INDEX_FILE, SINGLE_FILE, of_variant
from zero_sft.cluster.control_group import LONG_WAIT, all_gather_json
from zero_sft.cluster.stages import collective_stage, run_stage
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.hub.download import download_snapshot
from zero_sft.hub.options import HubOptions
from zero_sft.options.keywords import require_path
from zero_sft.printable import first_of

CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
TOKENIZER = ("config.json", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
             "tekken.json",
             "*.tiktoken", "chat_template*", "*.jinja")  # fmt: skip

_CODE = ("*.py",)
_WEIGHTS = (SINGLE_FILE, "model-*.safetensors", INDEX_FILE)
_BIN_WEIGHTS = (BIN_FILE, "pytorch_model-*.bin", BIN_INDEX_FILE)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The source of a model's files.

    Attributes:
        name: the local path or hub id, as the user gave it.
        options: access options; for a hub id, `revision` is the commit that all stages use.
        folder: the local folder, including `options.subfolder`; None for a hub id.
    """

    name: str
    options: HubOptions
    folder: Path | None


def require_name(name: object) -> str:
    """Return a model's name as text; raise `ArgumentError` unless it is text or a path. Any rank; does not communicate."""
    return require_path("model_name_or_path", name, "text or a path: a local folder or a hub id")


def locate_model(name: str, options: HubOptions, world: World) -> ModelSource:
    """Locate a model, and resolve its revision to a commit. Every rank; communicates unless it is `World.alone()`.

    Rank 0 asks the hub. If the hub can't be reached, the commit that the cache records for the branch is used.

    Raises:
        CheckpointError: the folder does not exist, only some ranks see it, or the hub can't provide the model.
    """
    with collective_stage(world, f"looking for {name}") as exchange:
        folder = local_folder(name, options)
        exchange.local = folder is not None
    return agree_on_source(name, options, folder, exchange.gathered, world)


def agree_on_source(
    name: str, options: HubOptions, folder: Path | None, sees_folder: Sequence[bool], world: World
) -> ModelSource:
    """Return the source of a model that every rank has looked for locally, as `locate_model` does.

    Every rank; communicates for a hub id.

    Args:
        folder: the `local_folder` of this rank.
        sees_folder: for each rank, whether it has a local folder.
    """
    if any(sees_folder) and not all(sees_folder):
        blind_ranks = [rank for rank, sees in enumerate(sees_folder) if not sees]
        raise CheckpointError(
            f"{name} is a folder on some ranks, but not on rank {first_of(blind_ranks, 8)}. Put the model on a "
            "file system that all nodes share, or copy it to every node.",
            code="hub.folder_not_on_all_nodes",
        )
    return ModelSource(name=name, options=options if folder else _pin_revision(name, options, world), folder=folder)


def _pin_revision(name: str, options: HubOptions, world: World) -> HubOptions:
    """Return the options with their revision resolved to a commit. Every rank; communicates."""
    if _COMMIT.fullmatch(options.revision or ""):
        return options
    with collective_stage(world, f"fetching {name}", LONG_WAIT) as exchange:
        if world.is_main:
            exchange.local = download_snapshot(name, options, CONFIG, local_only=False).name
    commit = exchange.gathered[0]
    return dataclasses.replace(options, revision=commit) if _COMMIT.fullmatch(commit) else options


def fetch_files(source: ModelSource, world: World, patterns: tuple[str, ...]) -> Path:
    """Return the local folder with the source's files that match `patterns`. Every rank; communicates for a hub id.

    Rank 0 downloads first, then the first rank of each node, which finds the files in the cache if the file system is shared;
    then all ranks look. They wait on the control group, so that the training group's timeout does not count.

    Raises:
        CheckpointError: the hub can't provide the files.
    """
    if source.folder is not None:
        return source.folder
    patterns = (*patterns, *_CODE) if source.options.trust_remote_code else patterns
    downloads = world.is_main or world.leads_node
    folder = run_stage(
        world,
        f"fetching {source.name}",
        lambda: download_snapshot(source.name, source.options, patterns, local_only=not downloads),
        main_first=True,
        timeout=LONG_WAIT,
    )
    return _inside(folder, source.options.subfolder)


def fetch_weights(source: ModelSource, world: World) -> Path:
    """Return the local folder of the weights; fetch `pytorch_model.bin` only if there are no safetensors.

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
    """Return the file names under a variant: `model.fp16.safetensors`; numbered files have it before or after the number."""
    if variant is None:
        return names
    after_number = [of_variant(name, variant) for name in names]
    return (*after_number, *(name.replace("-*", f".{variant}-*") for name in names if "*" in name))


def local_folder(name: str, options: HubOptions) -> Path | None:
    """Return the local folder called `name`, or None for a hub id. Any rank; does not communicate.

    Raises:
        CheckpointError: `name` is a path that does not exist, or a file.
    """
    if not name:  # as a path, it would be the working directory
        raise CheckpointError(
            "the name of the model is empty: check that its variable is set. Give a folder, or a hub id such as 'org/model'.",
            code="hub.no_such_folder",
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _inside(path, options.subfolder)
    if path.is_file():
        raise CheckpointError(
            f"{name} is a file, expected the model's folder. Name the folder that holds it: {path.parent}",
            code="hub.no_such_folder",
        )
    if link := describe_broken_link(path):
        raise CheckpointError(link, code="hub.no_such_folder")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    if looks_like_a_path or path.exists():
        raise CheckpointError(
            f"no such folder: {name}. Name an existing folder, or a hub id such as 'org/model'.", code="hub.no_such_folder"
        )
    return None


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
