"""The index of a checkpoint folder: tensor name → file, offset, shape, dtype, over one file or many.

Which files belong to a checkpoint follows transformers: `model.safetensors` first, else the files that
`model.safetensors.index.json` lists, else `pytorch_model.bin` and its index. The index file's own claims (`weight_map`) are
held against the headers, so that a shard of another revision is noticed.
With a variant, "fp16", they are `model.fp16.safetensors`, `model.safetensors.index.fp16.json` and so on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from zero_sft.checkpoint.file_identity import FileIdentity, stat_identity
from zero_sft.checkpoint.folder_kind import folder_kind, placeholder
from zero_sft.checkpoint.header import StoredTensor, read_header
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

    `identities` say, by path, which files they were; `duplicate_keys` are the names that stand in several files.
    """

    folder: str
    identities: Mapping[str, FileIdentity]
    tensors: Mapping[str, StoredTensor]
    duplicate_keys: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors.values())

    def digest(self) -> str:
        """A hash of all names, dtypes, shapes and offsets: equal on ranks that see the same files, wherever mounted."""
        rows = sorted((name, Path(t.file).name, t.dtype, t.shape, t.offset_bytes) for name, t in self.tensors.items())
        return hashlib.sha256(repr(rows).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """The files of a checkpoint, before their headers are read.

    `read` finds the tensors of one; `promised` is the index file's word on which tensor is where, `index` its path.
    """

    folder: Path
    paths: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]
    read: ReadHeader
    index: Path | None = None
    promised: Mapping[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its name."""
        return {path.name: each.size_bytes for path, each in zip(self.paths, self.identities, strict=True)}


def find_checkpoint_files(
    folder: str | Path, read_bin: ReadHeader | None = None, variant: str | None = None
) -> CheckpointFiles:
    """Find the checkpoint in `folder`; `read_bin` is for `pytorch_model.bin`, which takes torch.

    Raises:
        CheckpointError: no weights, or an index that names a missing or outside file.
    """
    folder = Path(folder)
    layouts: list[tuple[str, str, ReadHeader]] = [(SINGLE_FILE, INDEX_FILE, read_header)]
    if read_bin is not None:
        layouts.append((BIN_FILE, BIN_INDEX_FILE, read_bin))
    for plain_single, plain_index, read in layouts:
        single, index = folder / of_variant(plain_single, variant), folder / of_variant(plain_index, variant)
        if single.is_dir():
            raise CheckpointError(
                f"{single} is a folder, expected a file. Name the folder that holds the weights.",
                code="checkpoint.folder_in_place_of_file",
            )
        if single.is_file():
            return CheckpointFiles(folder=folder, paths=(single,), identities=(stat_identity(single),), read=read)
        if index.is_file():
            promised = read_weight_map(index)
            paths = _named_by(index, promised)
            identities = tuple(map(stat_identity, paths))
            return CheckpointFiles(folder=folder, paths=paths, identities=identities, read=read, index=index, promised=promised)
    raise CheckpointError(_no_weights(folder, variant), code="checkpoint.no_weights")


def read_headers(files: CheckpointFiles) -> Sequence[Mapping[str, StoredTensor]]:
    """The tensors of every file, in the files' order.

    Raises:
        CheckpointError: a damaged file.
    """
    return [files.read(path) for path in files.paths]


def build_index(files: CheckpointFiles, headers: Sequence[Mapping[str, StoredTensor]]) -> CheckpointIndex:
    """Put the headers of all files together, in their order. Pure.

    Of a name that stands in several files the last one's counts, as in plain `from_pretrained`.

    Raises:
        CheckpointError: no tensors, or one that is not where the index file says.
    """
    tensors: dict[str, StoredTensor] = {}
    duplicate_keys: set[str] = set()
    for found in headers:
        duplicate_keys |= found.keys() & tensors.keys()
        tensors |= found
    if not tensors:
        raise CheckpointError(
            f"{files.paths[0]} holds no tensors, only a header. Fetch it again, or name the folder that has the weights.",
            code="checkpoint.no_tensors",
        )
    astray = sorted(
        name
        for name, file in files.promised.items()
        if name not in duplicate_keys and (name not in tensors or tensors[name].file != str(files.folder / file))
    )
    if astray:
        more = f" (and {len(astray) - 1} others)" if len(astray) > 1 else ""
        raise CheckpointError(
            f"{files.index} promises {astray[0]!r} in {files.promised[astray[0]]}, whose header has no such tensor{more}. "
            "The files are of different versions: fetch the checkpoint again.",
            code="checkpoint.index_promises_other_tensors",
        )
    identities = {str(path): each for path, each in zip(files.paths, files.identities, strict=True)}
    return CheckpointIndex(
        folder=str(files.folder), identities=identities, tensors=tensors, duplicate_keys=tuple(sorted(duplicate_keys))
    )


def read_index(folder: str | Path, read_bin: ReadHeader | None = None, variant: str | None = None) -> CheckpointIndex:
    """`find_checkpoint_files`, `read_headers` and `build_index`; errors as theirs."""
    files = find_checkpoint_files(folder, read_bin, variant)
    return build_index(files, read_headers(files))


def of_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` → `model.fp16.safetensors`; None changes nothing."""
    stem, kind = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{kind}"


def _named_by(index: Path, weight_map: Mapping[str, str]) -> tuple[Path, ...]:
    paths = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    for path in paths:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else f"is not in {index.parent}"
            raise CheckpointError(
                f"{index} names {path.name!r}, which {found}. The download is incomplete: fetch it again.",
                code="checkpoint.shard_missing",
            )
    return paths


def read_weight_map(path: Path) -> dict[str, str]:
    """An index file's word on which file holds which tensor.

    Raises:
        CheckpointError: it can't be read, is none, or names a file outside its folder.
    """
    try:
        content = json.loads(path.read_bytes())
        weight_map = content["weight_map"]
        if not weight_map or not all(isinstance(k, str) and v and isinstance(v, str) for k, v in weight_map.items()):
            raise TypeError("weight_map is empty or maps to something other than file names")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.", code="checkpoint.file_unreadable") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if placeholder(path):
            raise CheckpointError(
                f"{path} is not an index of weights: {placeholder(path)}", code="checkpoint.placeholder_file"
            ) from error
        raise CheckpointError(
            f"{path} is not an index of weights ({error!r}). Fetch it again.", code="checkpoint.index_malformed"
        ) from error
    for name in set(weight_map.values()):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise CheckpointError(
                f"{path} names {name!r}, which lies outside its folder. Don't use this checkpoint.",
                code="checkpoint.index_leaves_folder",
            )
    return weight_map


def _no_weights(folder: Path, variant: str | None) -> str:
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    expected = f"{of_variant(SINGLE_FILE, variant)}, {of_variant(BIN_FILE, variant)}"
    message = f"no weights in {folder}: expected {expected} or an index of them"
    kind = folder_kind(folder) if folder.is_dir() else ""
    if kind:
        return f"{message}.\n{kind}"
    parts = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if parts and variant is None:
        return (
            f"{message}, found {', '.join(parts[:4])}. If these are parts of one model, its index file "
            f"({INDEX_FILE}) is missing: download it as well. If they are a variant's, give --variant."
        )
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{message}, found {shown or 'nothing'}. Name the folder that holds the weights."
