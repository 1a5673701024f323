"""A finished draft takes its target's place, so that a reader sees the former model or the new one.

Killed between any two steps, the target is the former model as a whole or the new one as a whole, with one exception below.
What else it holds (checkpoints, logs, a user's files) stays.

- **Rename**: the target does not exist, or is empty.
- **Exchange**: what else the target holds is linked into the draft (hard links: no byte is copied), then the two folders are
  exchanged in one step. What others wrote to the former folder meanwhile is moved over before that is removed.
- **In place**, where a folder can't be exchanged (a mount point, NFS): weights files come first, under names that nothing
  reads yet; then one rename of `model.safetensors` or of the index switches from the former weights to the new. Where config
  or tokenizer files change as well, there is no single step: the former weights' entry file is moved away first, so that for
  some milliseconds a reader finds no weights, rather than a mix. Killed in that moment, the target has no weights; the former
  and the new files are complete in the draft.

A reader that opened the config before the switch and the weights after it has the one of the former and the other of the new:
files are opened by path, one after another, and no writer can prevent that.

Everything here runs on rank 0 and does not communicate.
"""

import contextlib
import filecmp
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from zero_sft.checkpoint.index import BIN_FILE, BIN_INDEX_FILE, INDEX_FILE, SINGLE_FILE
from zero_sft.saving.exchange_folders import exchange
from zero_sft.saving.folder import Placing, StagingFolder

logger = logging.getLogger(__name__)

WEIGHTS = re.compile(
    r"(model(-\d{5}-of-\d{5}(-[0-9a-f]{8})?)?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)
"""The files that a checkpoint of a model consists of, under the names that transformers and this package write."""

_ENTRIES = (BIN_INDEX_FILE, BIN_FILE, INDEX_FILE, SINGLE_FILE)
"""What a reader looks for, the last first."""

_TOKENIZER = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates",
})  # fmt: skip
"""A tokenizer's files: those of the former one must not stay next to another's."""

_MOST_LINKS = 20_000
"""Files in the target above which it is written in place: somebody's home or data folder, not a run's."""


def put_in_place(draft: StagingFolder) -> None:
    """Let a finished draft take its target's place; the draft is gone afterwards. Rank 0.

    Raises:
        OSError: the target is as it was, and the draft is kept.
    """
    folder, target = draft.folder, draft.target
    for path in folder.iterdir():
        if path.is_file() and not WEIGHTS.fullmatch(path.name):  # the ranks have synced what they wrote
            _sync(path)
    _sync(folder)
    if draft.placing is not Placing.IN_PLACE and not (target.is_dir() and any(target.iterdir())):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            _copy_attributes(target, folder)
        with contextlib.suppress(OSError):  # somebody has just made it, or holds it
            folder.rename(target)
            _sync(target.parent)
            return
    if draft.placing is Placing.IN_PLACE or not _exchanged(folder, target):
        _in_place(folder, target)


def former_names(target: Path, fresh: Set[str]) -> set[str]:
    """The names in `target` of a former model's files, which the new files `fresh` replace or which must not stay."""
    former = set()
    for path in target.iterdir():
        of_tokenizer = path.name in _TOKENIZER and "tokenizer_config.json" in fresh
        of_generation = path.name == "generation_config.json" and "config.json" in fresh
        if path.name in fresh or WEIGHTS.fullmatch(path.name) or of_tokenizer or of_generation:
            former.add(path.name)
    return former


def _exchanged(folder: Path, target: Path) -> bool:
    """Exchange the draft and the target, and remove the former; False, with all as before, where that can't be done."""
    fresh, former = _distinct_names(folder, target)
    try:
        if sum(1 for _ in itertools.islice(_files(target), _MOST_LINKS + 1)) > _MOST_LINKS:
            return False
        _link_others(target, folder, former)
        _copy_attributes(target, folder)
        _sync(folder)
        exchange(folder, target)
    except OSError as error:
        logger.debug("%s can't be exchanged (%s): its files are replaced one by one", target, error)
        for path in folder.iterdir():
            if path.name not in fresh:
                _remove(path)
        return False
    _sync(target.parent)
    try:
        _take_over(folder, target, former)
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s is in place; the former folder is left in %s (%s). Remove it.", target, folder, error)
    return True


def _link_others(source: Path, copy: Path, left_out: Set[str] = frozenset()) -> None:
    """Give the folder `copy` what `source` holds: the same files, in new folders."""
    for path in source.iterdir():
        if path.name in left_out:
            continue
        if path.is_dir() and not path.is_symlink():
            (copy / path.name).mkdir()
            _link_others(path, copy / path.name)
            _copy_attributes(path, copy / path.name)
        else:
            os.link(path, copy / path.name, follow_symlinks=False)


def _take_over(former: Path, target: Path, left_out: Set[str] = frozenset()) -> None:
    """Move what was written to the folder `former` after its files had been linked."""
    for path in former.iterdir():
        found = target / path.name
        if path.name in left_out:
            continue
        if path.is_dir() and not path.is_symlink() and found.is_dir():
            _take_over(path, found)
        elif not os.path.lexists(found) or not os.path.samestat(path.lstat(), found.lstat()):
            path.rename(found)


def _in_place(folder: Path, target: Path) -> None:
    """Move the files one by one, the one that readers look for last; all moves are undone if one fails."""
    fresh, former = _distinct_names(folder, target)
    entry = INDEX_FILE if INDEX_FILE in fresh else SINGLE_FILE
    shards = {name for name in fresh if WEIGHTS.fullmatch(name) and name != entry}
    settings = sorted(name for name in fresh - shards if not WEIGHTS.fullmatch(name) and _differs(folder / name, target / name))
    stale = sorted(name for name in former - fresh if not WEIGHTS.fullmatch(name))
    away = folder / "replaced"
    away.mkdir()
    moves = _Moves()
    try:
        for name in sorted(shards):
            moves.move(folder / name, target / name)
        if settings or stale:
            for name in _ENTRIES:
                moves.move_if_there(target / name, away / name)
        for name in (*settings, *stale):
            moves.move_if_there(target / name, away / name)
        for name in settings:
            moves.move(folder / name, target / name)
        if entry == INDEX_FILE and (target / SINGLE_FILE).exists():  # which readers prefer to the index
            moves.move_if_there(target / INDEX_FILE, away / INDEX_FILE)
            moves.move(folder / INDEX_FILE, target / INDEX_FILE)
            moves.move(target / SINGLE_FILE, away / SINGLE_FILE)
        else:
            (folder / entry).replace(target / entry)
    except OSError:
        moves.undo()
        raise
    _sync(target)
    for name in former - shards - {entry}:
        if WEIGHTS.fullmatch(name):
            with contextlib.suppress(OSError):
                (target / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class _Moves:
    """Renames that can be undone."""

    def __init__(self) -> None:
        self._done: list[tuple[Path, Path]] = []

    def move(self, source: Path, destination: Path) -> None:
        source.rename(destination)
        self._done.append((source, destination))

    def move_if_there(self, source: Path, destination: Path) -> None:
        if os.path.lexists(source):
            self.move(source, destination)

    def undo(self) -> None:
        for source, destination in reversed(self._done):
            with contextlib.suppress(OSError):
                destination.rename(source)


def _distinct_names(folder: Path, target: Path) -> tuple[set[str], set[str]]:
    """The names in the draft, and those of the former model in the target, with no weights file but the entry in both.

    Where there is a former model, the draft's files get names of their own, in the index as well: a reader that has the index
    of the former one, or of one before that, never opens a new file by it.
    """
    fresh = {path.name for path in folder.iterdir()}
    former = former_names(target, fresh)
    shards = {name for name in fresh if WEIGHTS.fullmatch(name) and name not in _ENTRIES}
    if not shards or not any(WEIGHTS.fullmatch(name) for name in former):
        return fresh, former
    token = secrets.token_hex(4)
    names = {name: f"{name.removesuffix('.safetensors')}-{token}.safetensors" for name in shards}
    content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    content["weight_map"] = {tensor: names[file] for tensor, file in content["weight_map"].items()}
    index = folder / f"{INDEX_FILE}.renamed"
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, renamed in names.items():
        (folder / name).rename(folder / renamed)
    index.replace(folder / INDEX_FILE)
    return fresh - shards | set(names.values()), former


def _differs(one: Path, other: Path) -> bool:
    return not (one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False))


def _files(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from names


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _copy_attributes(source: Path, copy: Path) -> None:
    """Rights, owner and extended attributes, as far as this user may set them."""
    with contextlib.suppress(OSError):
        shutil.copystat(source, copy)
    with contextlib.suppress(OSError):
        owner = source.stat()
        os.chown(copy, owner.st_uid, owner.st_gid)


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
