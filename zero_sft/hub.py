"""From a model's name to a local folder: a path as it is, or a hub id, downloaded once per file system.

After this step the rest of the package knows only folders. Rank 0 says which commit a branch stands for (`pin_revision`), and
every rank and every stage takes that one, so a branch that moves meanwhile can't mix two states. What is fetched is what a
stage needs (`CONFIG`, `WEIGHTS`, `TOKENIZER`), so that ranks other than 0 never hold tokenizer files of their own making. The
download itself is huggingface_hub's.
"""

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero_sft import distributed
from zero_sft.errors import ArgumentError, CheckpointError
from zero_sft.world import World

CODE = ("*.py",)
CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BIN_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("config.json", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
             "tekken.json",
             "*.tiktoken", "chat_template*", "*.jinja")  # fmt: skip

FLAG = (bool, "True or False")  # a word that looks like one ("False" from a command line) would count as True
_TEXT = ((str, type(None)), "a text")
_KINDS = {
    "trust_remote_code": FLAG, "local_files_only": FLAG, "token": ((str, bool, type(None)), "a text, True or False"),
    "cache_dir": ((str, os.PathLike, type(None)), "a path"), "revision": _TEXT, "subfolder": _TEXT, "variant": _TEXT,
}  # fmt: skip
_VARIANT = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """How to get at a model; the names and meanings of transformers' `from_pretrained`."""

    trust_remote_code: bool = False
    cache_dir: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)  # never in a log
    local_files_only: bool = False
    subfolder: str = ""
    variant: str | None = None

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], function: Callable[..., Any] | None = None) -> "HubOptions":
        """Typed options from keyword arguments; `function` is the one that took them, whose own are known, too.

        Raises:
            ArgumentError: an unknown name, with the nearest known one; a value of another type.
        """
        own = [each.name for each in dataclasses.fields(cls)]
        named = inspect.signature(function).parameters.values() if function else ()
        known = [*(each.name for each in named if each.kind is inspect.Parameter.KEYWORD_ONLY), *own]
        for name in kwargs:
            if name not in own:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ArgumentError(f"unknown argument {name!r}.{hint} Known: {', '.join(known)}.", code="arguments.unknown")
        for name, value in kwargs.items():
            require_kind(name, value, _KINDS[name])
        variant = kwargs.get("variant")
        if variant is not None and not _VARIANT.fullmatch(variant):
            raise ArgumentError(
                f"variant {variant!r} is no part of a file's name; expected one like fp16.", code="hub.bad_variant"
            )
        return cls(**kwargs)


def require_kind(name: str, value: object, kind: tuple[Any, str]) -> None:
    """Raise `ArgumentError` unless a value is of one of the types that `kind` has, with words for them."""
    types, wanted = kind
    if not isinstance(value, types):
        raise ArgumentError(
            f"{name} must be {wanted}, got {value!r:.80}", code="arguments.wrong_value"
        )  # a token is a text, so never shown


def pin_revision(name_or_path: str, hub: HubOptions, world: World) -> HubOptions:
    """`hub` with the commit that its revision stands for now; as it is for a local folder. Every rank; communicates.

    Rank 0 decides. Where the hub can't be asked, the cache's own record of the branch counts.

    Raises:
        CheckpointError: no such folder, or the hub can't provide it.
    """
    return hub if _local_everywhere(name_or_path, hub, world) else _pinned(name_or_path, hub, world)


def _pinned(name_or_path: str, hub: HubOptions, world: World) -> HubOptions:
    """`pin_revision` for what is known to be a hub id."""
    if _COMMIT.fullmatch(hub.revision or ""):
        return hub
    commit = ""
    with distributed.agreed(world, f"fetching {name_or_path}", distributed.DOWNLOAD_TIMEOUT):
        if world.is_main:
            commit = _snapshot(name_or_path, hub, CONFIG, local_only=False).name
    commit = distributed.broadcast_bytes(world, commit.encode() if world.is_main else None).decode()
    return dataclasses.replace(hub, revision=commit) if _COMMIT.fullmatch(commit) else hub


def resolve_folder(name_or_path: str, hub: HubOptions, world: World, patterns: tuple[str, ...]) -> Path:
    """The local folder of `name_or_path`. Every rank; communicates.

    Raises:
        CheckpointError: no such folder, or the hub can't provide it.
    """
    local = _local_everywhere(name_or_path, hub, world)
    return local or _fetched(name_or_path, _pinned(name_or_path, hub, world), world, patterns)


def _fetched(name_or_path: str, hub: HubOptions, world: World, patterns: tuple[str, ...]) -> Path:
    """`resolve_folder` for what is known to be a hub id, of a pinned revision.

    Rank 0 downloads first; then the first rank of each node, which finds the files at once where the file system is shared;
    then everybody looks. The waiting is on the control group, outside the training group's clock.
    """
    wanted = (*patterns, *CODE) if hub.trust_remote_code else patterns
    folder = None
    for turn in ("rank 0", "node leaders", "everyone"):
        mine = {"rank 0": world.is_main, "node leaders": world.leads_node, "everyone": True}[turn]
        with distributed.agreed(world, f"fetching {name_or_path}", distributed.DOWNLOAD_TIMEOUT):
            if mine and folder is None:
                folder = _snapshot(name_or_path, hub, wanted, local_only=turn == "everyone" and not world.is_main)
    if folder is None:  # can't be: "everyone" has had its turn
        raise CheckpointError(f"{name_or_path} was not found", code="hub.not_found")
    return _inside(folder, hub.subfolder)


def resolve_weights(name_or_path: str, hub: HubOptions, world: World) -> Path:
    """`resolve_folder` for the weights: a hub's `pytorch_model.bin` is fetched only where there are no safetensors. Every rank.

    Raises:
        CheckpointError: no such folder, or the hub can't provide it.
    """
    local = _local_everywhere(name_or_path, hub, world)
    if local:
        return local
    hub = _pinned(name_or_path, hub, world)
    wanted = _patterns(WEIGHTS, hub.variant)
    folder = _fetched(name_or_path, hub, world, (*CONFIG, *wanted))
    if any(distributed.exchange(world, not any(next(folder.glob(each), None) for each in wanted))):
        folder = _fetched(name_or_path, hub, world, (*CONFIG, *_patterns(BIN_WEIGHTS, hub.variant)))
    return folder


def _patterns(names: tuple[str, ...], variant: str | None) -> tuple[str, ...]:
    """The files' names under a variant: `model.fp16.safetensors`, and parts with the variant before or after their numbers."""
    if variant is None:
        return names
    result = []
    for name in names:
        stem, kind = name.rsplit(".", 1)
        result.append(f"{stem}.{variant}.{kind}")
        if "*" in name:
            result.append(f"{stem.replace('-*', '')}.{variant}-*.{kind}")
    return tuple(result)


def _local_everywhere(name_or_path: str, hub: HubOptions, world: World) -> Path | None:
    """The folder of that name, if every rank sees one: a relative path and a hub id can look alike. Communicates."""
    with distributed.agreed(world, f"looking for {name_or_path}") as told:
        local = local_folder(name_or_path, hub)
        told.mine = local is not None
    found = told.everyone
    if any(found) and not all(found):
        absent = [rank for rank, each in enumerate(found) if not each]
        raise CheckpointError(
            f"{name_or_path} is a folder on some ranks, and not on rank {', '.join(map(str, absent[:8]))}. Put the model on a "
            "file system that all nodes share, or copy it to every node.",
            code="hub.folder_not_on_all_nodes",
        )
    return local


def local_folder(name_or_path: str, hub: HubOptions) -> Path | None:
    """The folder of that name on this machine, or None where the name is a hub id. Does not communicate.

    Raises:
        CheckpointError: a path that does not exist.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _inside(path, hub.subfolder)
    if _looks_like_a_path(name_or_path):
        raise CheckpointError(
            f"no such folder: {name_or_path}. Name an existing folder, or a hub id such as 'org/model'.",
            code="hub.no_such_folder",
        )
    return None


def resolve_folder_alone(name_or_path: str, hub: HubOptions, patterns: tuple[str, ...]) -> Path:
    """`resolve_folder` for one rank by itself (the tokenizer's rank 0). Does not communicate."""
    return resolve_folder(name_or_path, hub, World(), patterns)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or Path(name).exists() or not name


def _inside(folder: Path, subfolder: str) -> Path:
    """`folder/subfolder`, which must not lead out of `folder`."""
    if not subfolder:
        return folder
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(
            f"subfolder {subfolder!r} leads out of {folder}. Name a folder inside it.", code="hub.subfolder_leaves_folder"
        )
    if not (folder / subfolder).is_dir():
        raise CheckpointError(f"{folder} has no folder {subfolder!r}. Check --subfolder.", code="hub.no_such_subfolder")
    return folder / subfolder


def _snapshot(repo: str, hub: HubOptions, patterns: tuple[str, ...], *, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    prefix = f"{hub.subfolder.rstrip('/')}/" if hub.subfolder else ""
    try:
        found = snapshot_download(
            repo,
            revision=hub.revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            local_files_only=hub.local_files_only or local_only,
            allow_patterns=[prefix + each for each in patterns],
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is neither an existing folder nor a hub id ('org/model'): {error}", code="hub.not_found"
        ) from error
    except (OSError, ValueError) as error:
        raise _unavailable(repo, hub, error) from error
    return Path(found)


def _unavailable(repo: str, hub: HubOptions, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"the model {repo!r} is gated: accept its terms on the hub, and give a token that may read it (HF_TOKEN in the "
            "environment, or `hf auth login`).",
            code="hub.gated",
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"the model {repo!r} has no revision {hub.revision!r}. Check --revision: a branch, a tag or a commit's hash.",
            code="hub.no_such_revision",
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"no local folder {repo!r}, and no such model on the Hugging Face hub, or it is private and needs a token "
            "(HF_TOKEN). Check --model_name_or_path.",
            code="hub.no_such_model",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"can't get the model {repo!r} from the Hugging Face hub: {reason}\nIf this machine has no internet, download the "
        "model elsewhere and name its local folder: --model_name_or_path /path/to/the/folder",
        code="hub.unavailable",
    )
