"""Put a finished staging folder in the place of its target, so that readers see either the earlier model or the new one.

If the job is killed between any two steps, the target holds the complete earlier model or the complete new one, with one
exception below. Other files in the target (checkpoints, logs, a user's files) stay.

- **Rename**: if the target does not exist or is empty, and the staging folder is next to it.
- **Swap**: the target's other files are hard-linked into the staging folder (no byte is copied), then the two folders are
  swapped in one step. Files that others wrote to the earlier folder meanwhile are moved over before it is removed.
- **File by file**, if the folders can't be swapped (a mount point, NFS) or the swap fails: the weights come first, under names
  that nothing reads yet; then one rename of `model.safetensors` or of the index switches from the earlier weights to the new
  ones. If config or tokenizer files change as well, one step is not enough: the earlier weights' entry file is moved away
  first, so that for some milliseconds a reader finds no weights instead of a mix. If the job is killed in that moment, the
  target has no weights; the earlier and the new files are complete in the staging folder.

A reader that opens the config before the switch and the weights after it gets the earlier config with the new weights: it opens
files by path, one after another, and no writer can prevent that.

Everything here runs on rank 0 and does not communicate.
"""

import contextlib
import errno
import filecmp
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Set
from pathlib import Path

from zero_sft.checkpoint.folder_kind import ADAPTER_CONFIG, ADAPTER_FILE
from zero_sft.checkpoint.index import BIN_FILE, BIN_INDEX_FILE, INDEX_FILE, SINGLE_FILE
from zero_sft.errors import ExportError
from zero_sft.generation_config import GENERATION_CONFIG
from zero_sft.printable import first_of
from zero_sft.saving.folder import Placing, StagingFolder, sync
from zero_sft.saving.swap_folders import swap

logger = logging.getLogger(__name__)

WEIGHTS = re.compile(
    r"(model(-\d{5}-of-\d{5}(-[0-9a-f]{8})?)?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
    r"|adapter_model\.(safetensors|bin)"
)
"""Names that transformers, PEFT and this package give to weight files and their indices."""

_ENTRIES = (BIN_INDEX_FILE, BIN_FILE, INDEX_FILE, SINGLE_FILE, ADAPTER_FILE)
"""The files by which a reader finds the weights; of a model, it looks for the last of these first."""

TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates",
})  # fmt: skip
"""Files of a tokenizer. Those of the earlier tokenizer must not stay next to the new one's."""

TOKENIZER_FOLDERS = frozenset({"additional_chat_templates"})
"""Names under which an export has a folder, not a file."""

_MOST_LINKS = 20_000
"""With more files than this, the target is not swapped: it is a home or data folder, not a run's."""


SETTINGS = frozenset({"config.json", GENERATION_CONFIG, "tokenizer_config.json"})
"""Files that an export of a model with its tokenizer writes, whatever its weight files are called."""

ADAPTER_SETTINGS = frozenset({ADAPTER_CONFIG, "tokenizer_config.json"})
"""Files that an export of an adapter with the tokenizer writes."""


def require_replaceable(target: Path, fresh: Set[str]) -> None:
    """Refuse to replace a folder in `target` by a file of the model, or to write a model next to an adapter. Rank 0.

    Args:
        fresh: the names that the export writes.

    Raises:
        ExportError: a folder, whose content would be lost, has the name of a file that the export writes or removes; or an
            adapter is there, which readers would load on top of the model.
    """
    if "config.json" in fresh and (target / ADAPTER_CONFIG).exists():
        raise ExportError(
            f"{target} holds an adapter ({ADAPTER_CONFIG}), which transformers would load on top of the model that is "
            "written next to it. Name another folder.",
            code="export.target_holds_adapter",
        )
    if folders := _folders_in_place_of_files(target, fresh):
        raise ExportError(
            f"{target} has folders where the model's files belong: {first_of(folders)}. Move them away, or name another folder "
            "for the model.",
            code="export.folder_in_place_of_file",
        )


def _folders_in_place_of_files(target: Path, fresh: Set[str]) -> list[str]:
    if not target.is_dir():
        return []
    replaced = earlier_names(target, fresh) - TOKENIZER_FOLDERS
    return sorted(name for name in replaced if (target / name).is_dir() and not (target / name).is_symlink())


def put_in_place(staging: StagingFolder) -> None:
    """Put a finished staging folder in the place of its target, and remove what is left of it. Rank 0.

    Raises:
        OSError: it failed; the target is unchanged, and the staging folder is kept.
    """
    folder, target = staging.folder, staging.target
    if folders := _folders_in_place_of_files(target, {path.name for path in folder.iterdir()}):  # made during the export
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target / folders[0]))
    for path in folder.iterdir():
        if path.is_file() and not WEIGHTS.fullmatch(path.name):  # the ranks have synced the weights
            _sync(path)
    _sync(folder)
    is_next_to_target = staging.preferred is not Placing.FILE_BY_FILE
    if is_next_to_target and not (target.is_dir() and any(target.iterdir())) and _try_rename(folder, target):
        return
    earlier = earlier_names(target, {path.name for path in folder.iterdir()})
    fresh = _make_names_distinct(folder, earlier)
    if not (is_next_to_target and _try_swap(folder, target, fresh, earlier)):
        _replace_files(folder, target, fresh, earlier)


def _try_rename(folder: Path, target: Path) -> bool:
    """Rename the staging folder to a target that does not exist or is empty. Return False, with no change, if that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        _copy_attributes(target, folder)
    try:
        folder.rename(target)
    except OSError as error:  # another process has just created the target, or uses it
        logger.debug("%s can't be renamed to %s (%s)", folder, target, error)
        return False
    _sync(target.parent)
    return True


def earlier_names(target: Path, fresh: Set[str]) -> set[str]:
    """List the earlier model's files in `target`: those that `fresh` replaces, and those that must not stay next to it."""
    earlier = set()
    for path in target.iterdir():
        of_tokenizer = path.name in TOKENIZER_FILES and "tokenizer_config.json" in fresh
        of_generation = path.name == GENERATION_CONFIG and "config.json" in fresh
        if path.name in fresh or WEIGHTS.fullmatch(path.name) or of_tokenizer or of_generation:
            earlier.add(path.name)
    return earlier


def _try_swap(folder: Path, target: Path, fresh: Set[str], earlier: Set[str]) -> bool:
    """Swap staging folder and target, and remove the earlier target. Return False, with no change, if that fails."""
    try:
        file_names = (name for _, _, names in os.walk(target) for name in names)
        if len(list(itertools.islice(file_names, _MOST_LINKS + 1))) > _MOST_LINKS:
            return False
        _link_others(target, folder, earlier)
        _copy_attributes(target, folder)
        _sync(folder)
        swap(folder, target)
    except OSError as error:
        logger.debug("%s can't be swapped (%s): its files are replaced one by one", target, error)
        for path in folder.iterdir():
            if path.name not in fresh:
                _remove(path)
        return False
    _sync(target.parent)
    try:
        _move_late_files(folder, target, earlier)
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s is in place; the earlier folder is left in %s (%s). Remove it.", target, folder, error)
    return True


def _link_others(source: Path, copy: Path, left_out: Set[str] = frozenset()) -> None:
    """Link the files of `source` into the folder `copy`, and make its subfolders there."""
    for path in source.iterdir():
        if path.name in left_out:
            continue
        if path.is_dir() and not path.is_symlink():
            (copy / path.name).mkdir()
            _link_others(path, copy / path.name)
            _copy_attributes(path, copy / path.name)
        else:
            os.link(path, copy / path.name, follow_symlinks=False)


def _move_late_files(earlier: Path, target: Path, left_out: Set[str] = frozenset()) -> None:
    """Move the files that were written to the folder `earlier` after its other files had been linked."""
    for path in earlier.iterdir():
        destination = target / path.name
        if path.name in left_out:
            continue
        if path.is_dir() and not path.is_symlink() and destination.is_dir():
            _move_late_files(path, destination)
        elif not os.path.lexists(destination) or not os.path.samestat(path.lstat(), destination.lstat()):
            path.rename(destination)


def _replace_files(folder: Path, target: Path, fresh: Set[str], earlier: Set[str]) -> None:
    """Move the files one by one, the entry file of the weights last. Undo all moves if one fails.

    1. Move the new weights, under names that nothing reads yet.
    2. If config or tokenizer files change: move the entry files and the earlier settings away, then the new settings in.
    3. Move the entry file, which switches to the new weights.
    4. Remove the earlier weights and the staging folder.
    """
    entry = next(name for name in (INDEX_FILE, SINGLE_FILE, ADAPTER_FILE) if name in fresh)
    weight_files = {name for name in fresh if WEIGHTS.fullmatch(name) and name != entry}
    settings = sorted(name for name in fresh if not WEIGHTS.fullmatch(name) and _differs(folder / name, target / name))
    stale = sorted(name for name in earlier - fresh if not WEIGHTS.fullmatch(name))
    replaced = folder / "replaced"
    replaced.mkdir()
    with contextlib.ExitStack() as undo:
        for name in sorted(weight_files):  # step 1
            _move(folder / name, target / name, undo)
        if settings or stale:  # step 2
            for name in (*_ENTRIES, *settings, *stale):
                _move_if_there(target / name, replaced / name, undo)
        for name in settings:
            _move(folder / name, target / name, undo)
        if entry == INDEX_FILE and (target / SINGLE_FILE).exists():  # step 3; readers prefer this file to the index
            _move_if_there(target / INDEX_FILE, replaced / INDEX_FILE, undo)
            _move(folder / INDEX_FILE, target / INDEX_FILE, undo)
            _move(target / SINGLE_FILE, replaced / SINGLE_FILE, undo)
        else:
            (folder / entry).replace(target / entry)
        undo.pop_all()
    _sync(target)
    for name in earlier - weight_files - {entry}:  # step 4
        if WEIGHTS.fullmatch(name):
            with contextlib.suppress(OSError):
                (target / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _move(source: Path, destination: Path, undo: contextlib.ExitStack) -> None:
    """Rename a file, and add the way back to `undo`."""
    source.rename(destination)
    undo.callback(_move_back, destination, source)


def _move_if_there(source: Path, destination: Path, undo: contextlib.ExitStack) -> None:
    if os.path.lexists(source):
        _move(source, destination, undo)


def _move_back(source: Path, destination: Path) -> None:
    with contextlib.suppress(OSError):
        source.rename(destination)


def _make_names_distinct(folder: Path, earlier: Set[str]) -> set[str]:
    """Rename new weight files so that only the entry file has a name that the earlier model uses; return all new names.

    If there is an earlier model, new weight files get a unique suffix, in the index as well. So a reader that holds an older
    index never opens a new file by it.
    """
    fresh = {path.name for path in folder.iterdir()}
    weight_files = {name for name in fresh if WEIGHTS.fullmatch(name) and name not in _ENTRIES}
    if not weight_files or not any(WEIGHTS.fullmatch(name) for name in earlier):
        return fresh
    token = secrets.token_hex(4)
    names = {name: f"{name.removesuffix('.safetensors')}-{token}.safetensors" for name in weight_files}
    content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    content["weight_map"] = {tensor: names[file] for tensor, file in content["weight_map"].items()}
    index = folder / f"{INDEX_FILE}.renamed"
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, renamed in names.items():
        (folder / name).rename(folder / renamed)
    index.replace(folder / INDEX_FILE)
    return fresh - weight_files | set(names.values())


def _differs(first: Path, second: Path) -> bool:
    return not (first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _copy_attributes(source: Path, copy: Path) -> None:
    """Copy permissions, owner and extended attributes, as far as this user may set them."""
    with contextlib.suppress(OSError):
        shutil.copystat(source, copy)
    with contextlib.suppress(OSError):
        owner = source.stat()
        os.chown(copy, owner.st_uid, owner.st_gid)


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk, if the file system can."""
    with contextlib.suppress(OSError):
        sync(path)
