"""The index of a checkpoint folder: tensor name → file, offset, shape, dtype, over one file or many.

Which files belong to a checkpoint follows transformers: `model.safetensors` first, else the files that
`model.safetensors.index.json` lists, else `pytorch_model.bin` and its index. The index file's own claims (`weight_map`) are
held against the headers, so that a shard of another revision is noticed.
With a variant, "fp16", they are `model.fp16.safetensors`, `model.safetensors.index.fp16.json` and so on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from zero_sft.checkpoint.header import StoredTensor, read_header
from zero_sft.checkpoint.stamp import Stamp, stamp
from zero_sft.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"

ReadHeader = Callable[[str | Path], dict[str, StoredTensor]]
"""Finds the tensors of one file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by its name, as the files' headers have them.

    `stamps` say, by path, which files they were; `doubled` are the names that stand in several files, or elsewhere than the
    index says.
    """

    folder: str
    stamps: Mapping[str, Stamp]
    tensors: Mapping[str, StoredTensor]
    doubled: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors.values())

    def digest(self) -> str:
        """A hash of all names, dtypes, shapes and offsets: equal on ranks that see the same files, wherever mounted."""
        rows = sorted((name, Path(t.file).name, t.dtype, t.shape, t.offset_bytes) for name, t in self.tensors.items())
        return hashlib.sha256(repr(rows).encode()).hexdigest()


def open_index(folder: str | Path, read_bin: ReadHeader | None = None, variant: str | None = None) -> CheckpointIndex:
    """Read the headers of the checkpoint in `folder`; `read_bin` is for `pytorch_model.bin`, which takes torch.

    Raises:
        CheckpointError: no weights, an index that names a missing or outside file, or a damaged file.
    """
    folder = Path(folder)
    layouts: list[tuple[str, str, ReadHeader]] = [(SINGLE_FILE, INDEX_FILE, read_header)]
    if read_bin is not None:
        layouts.append((BIN_FILE, BIN_INDEX_FILE, read_bin))
    for plain_single, plain_index, read in layouts:
        single, index = _of_variant(plain_single, variant), _of_variant(plain_index, variant)
        if (folder / single).is_dir():
            raise CheckpointError(f"{folder / single} is a folder, expected a file. Name the folder that holds the weights.")
        if (folder / single).is_file():
            return _open_files([folder / single], read)
        if (folder / index).is_file():
            return _open_shards(folder / index, read)
    raise CheckpointError(_no_weights(folder, variant))


def _of_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` → `model.fp16.safetensors`."""
    stem, kind = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{kind}"


def _open_files(paths: Sequence[Path], read: ReadHeader) -> CheckpointIndex:
    """The tensors of all files. Of a name that stands in several the last file's counts, as in plain `from_pretrained`."""
    tensors: dict[str, StoredTensor] = {}
    stamps: dict[str, Stamp] = {}
    doubled: set[str] = set()
    for path in paths:
        stamps[str(path)] = stamp(path)
        found = read(path)
        doubled |= found.keys() & tensors.keys()
        tensors |= found
    if not tensors:
        raise CheckpointError(
            f"{paths[0]} holds no tensors, only a header. Fetch it again, or name the folder that has the weights."
        )
    return CheckpointIndex(folder=str(paths[0].parent), stamps=stamps, tensors=tensors, doubled=tuple(sorted(doubled)))


def _open_shards(index: Path, read: ReadHeader) -> CheckpointIndex:
    folder, weight_map = index.parent, _weight_map(index)
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else f"is not in {folder}"
            raise CheckpointError(f"{index} names {path.name!r}, which {found}. The download is incomplete: fetch it again.")
    result = _open_files(paths, read)
    astray = sorted(
        name for name, file in weight_map.items() if name not in result.doubled and _file_of(result, name) != str(folder / file)
    )
    if astray:
        more = f" (and {len(astray) - 1} others)" if len(astray) > 1 else ""
        raise CheckpointError(
            f"{index} promises {astray[0]!r} in {weight_map[astray[0]]}, whose header has no such tensor{more}. "
            "The files are of different versions: fetch the checkpoint again."
        )
    return result


def _file_of(index: CheckpointIndex, name: str) -> str | None:
    return index.tensors[name].file if name in index.tensors else None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
        weight_map = content["weight_map"]
        if not weight_map or not all(isinstance(k, str) and v and isinstance(v, str) for k, v in weight_map.items()):
            raise TypeError("weight_map is empty or maps to something other than file names")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of weights ({error!r}). Fetch it again.") from error
    for name in set(weight_map.values()):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path} names {name!r}, which lies outside its folder. Don't use this checkpoint.")
    return weight_map


def _no_weights(folder: Path, variant: str | None) -> str:
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    expected = f"{_of_variant(SINGLE_FILE, variant)}, {_of_variant(BIN_FILE, variant)}"
    message = f"no weights in {folder}: expected {expected} or an index of them"
    if "adapter_config.json" in names:
        return f"{message}, found an adapter. Merge it into its base model with PEFT's merge_and_unload and save that."
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{message}, found {shown or 'nothing'}. Name the folder that holds the weights."
