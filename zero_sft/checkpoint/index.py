"""The index of a checkpoint folder, of one file or many: tensor name → file, offset, shape, dtype.

The files of a checkpoint are found as in transformers: `model.safetensors`, else the files that `model.safetensors.index.json`
lists, else `pytorch_model.bin` or the files of its index. A variant such as "fp16" changes the names to
`model.fp16.safetensors`, `model.safetensors.index.fp16.json` and so on.
The index file's `weight_map` is compared with the headers, which detects a file of another revision.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from zero_sft.checkpoint.file_identity import FileIdentity, explain_read_errors, stat_identity
from zero_sft.checkpoint.folder_kind import describe_broken_link, describe_folder, describe_placeholder
from zero_sft.checkpoint.header import StoredTensor, read_header
from zero_sft.errors import CheckpointError
from zero_sft.printable import first_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"

ReadHeader = Callable[[str], dict[str, StoredTensor]]
"""Read the header of one file: its tensors by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by name, according to the headers.

    `identities` are those of the files, by path. `duplicate_keys` are the names that occur in several files.
    """

    folder: str
    identities: Mapping[str, FileIdentity]
    tensors: Mapping[str, StoredTensor]
    duplicate_keys: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Total bytes of the files."""
        return sum(identity.size_bytes for identity in self.identities.values())

    def digest(self) -> str:
        """Hash all names, dtypes, shapes and offsets: equal on ranks that see the same files, even under different paths."""
        rows = sorted((name, Path(t.file).name, t.dtype, t.shape, t.offset_bytes) for name, t in self.tensors.items())
        return hashlib.sha256(repr(rows).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """The files of a checkpoint, before their headers are read.

    `identities` are those of the files, by path. `read_header` reads the header of one file. `index_path` is the path of the
    index file, `weight_map` its mapping of tensors to files.
    """

    folder: Path
    identities: Mapping[str, FileIdentity]
    read_header: ReadHeader
    index_path: Path | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict[str, str])

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by name."""
        return {Path(path).name: identity.size_bytes for path, identity in self.identities.items()}


def find_checkpoint_files(
    folder: str | Path, read_bin_header: ReadHeader | None = None, variant: str | None = None
) -> CheckpointFiles:
    """Find the checkpoint files in `folder`.

    Args:
        read_bin_header: reads the header of a `.bin` file, which needs torch. None ignores such files.

    Raises:
        CheckpointError: the folder has no weights, or its index names a file that is missing or outside of the folder.
    """
    folder = Path(folder)
    formats: list[tuple[str, str, ReadHeader]] = [(SINGLE_FILE, INDEX_FILE, read_header)]
    if read_bin_header is not None:
        formats.append((BIN_FILE, BIN_INDEX_FILE, read_bin_header))
    for plain_single, plain_index, header_reader in formats:
        single, index = folder / of_variant(plain_single, variant), folder / of_variant(plain_index, variant)
        if single.is_dir():
            raise CheckpointError(
                f"{single} is a folder, expected a file. Name the folder that holds the weights.",
                code="checkpoint.folder_in_place_of_file",
            )
        if single.is_file():
            return CheckpointFiles(folder=folder, identities={str(single): stat_identity(single)}, read_header=header_reader)
        if index.is_file():
            weight_map = read_weight_map(index)
            identities = {str(path): stat_identity(path) for path in _weight_files(index, weight_map)}
            return CheckpointFiles(
                folder=folder, identities=identities, read_header=header_reader, index_path=index, weight_map=weight_map
            )
    raise CheckpointError(_no_weights(folder, variant), code="checkpoint.no_weights")


def build_index(files: CheckpointFiles, headers: Iterable[Mapping[str, StoredTensor]]) -> CheckpointIndex:
    """Merge the headers of all files, in the order of `files.identities`, into one index. Pure.

    If a name occurs in several files, the last file wins, as in plain `from_pretrained`.

    Raises:
        CheckpointError: there are no tensors, or a tensor is not in the file that the index file names.
    """
    tensors: dict[str, StoredTensor] = {}
    duplicate_keys: set[str] = set()
    for header in headers:
        duplicate_keys |= header.keys() & tensors.keys()
        tensors |= header
    if not tensors:
        raise CheckpointError(
            f"{next(iter(files.identities))} holds no tensors, only a header. Download it again, or name the folder that holds "
            "the weights.",
            code="checkpoint.no_tensors",
        )
    misplaced = sorted(
        name
        for name, file in files.weight_map.items()
        if name not in duplicate_keys and (name not in tensors or tensors[name].file != str(files.folder / file))
    )
    if misplaced:
        more = f" (and {len(misplaced) - 1} others)" if len(misplaced) > 1 else ""
        raise CheckpointError(
            f"{files.index_path} lists {misplaced[0]!r} in {files.weight_map[misplaced[0]]}, whose header has no such tensor"
            f"{more}. The files are of different versions: download the checkpoint again.",
            code="checkpoint.index_promises_other_tensors",
        )
    return CheckpointIndex(
        folder=str(files.folder), identities=files.identities, tensors=tensors, duplicate_keys=tuple(sorted(duplicate_keys))
    )


def read_index(folder: str | Path, read_bin_header: ReadHeader | None = None, variant: str | None = None) -> CheckpointIndex:
    """Find a checkpoint's files, read their headers and build the index. Does not communicate.

    Raises:
        CheckpointError: as `find_checkpoint_files` and `build_index` do, or a file is damaged.
    """
    files = find_checkpoint_files(folder, read_bin_header, variant)
    return build_index(files, map(files.read_header, files.identities))


def of_variant(name: str, variant: str | None) -> str:
    """Insert a variant into a file name: `model.safetensors` → `model.fp16.safetensors`. None changes nothing."""
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _weight_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        with explain_read_errors(path):
            is_there = path.is_file()
        if not is_there:
            problem = "is a folder" if path.is_dir() else f"is not in {index.parent}"
            if path.is_symlink() and not path.is_dir():
                problem = f"is a link to {path.readlink()}, and that does not exist"
            raise CheckpointError(
                f"{index} names {path.name!r}, which {problem}. The download is incomplete: download the checkpoint again.",
                code="checkpoint.weight_file_missing",
            )
    return paths


def read_weight_map(path: Path) -> dict[str, str]:
    """Read the `weight_map` of an index file: tensor name → file name.

    Raises:
        CheckpointError: the file can't be read, is not an index, or names a file outside of its folder.
    """
    try:
        with explain_read_errors(path):
            content = json.loads(path.read_bytes())
        weight_map = content["weight_map"]
        if not weight_map or not all(isinstance(k, str) and v and isinstance(v, str) for k, v in weight_map.items()):
            raise TypeError("weight_map is empty or maps to something other than file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if describe_placeholder(path):
            raise CheckpointError(
                f"{path} is not an index of weights: {describe_placeholder(path)}", code="checkpoint.placeholder_file"
            ) from error
        raise CheckpointError(
            f"{path} is not an index of weights ({error!r}). Download it again.", code="checkpoint.index_malformed"
        ) from error
    for file in set(weight_map.values()):
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{path} names {file!r}, which lies outside of its folder. Don't use this checkpoint.",
                code="checkpoint.index_leaves_folder",
            )
    return weight_map


def _no_weights(folder: Path, variant: str | None) -> str:
    names = sorted(path.name for path in folder.glob("*"))
    expected = f"{of_variant(SINGLE_FILE, variant)}, {of_variant(BIN_FILE, variant)}"
    message = f"no weights in {folder}: expected {expected} or an index of them"
    entries = (of_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE, BIN_FILE, BIN_INDEX_FILE))
    if link := next(filter(None, (describe_broken_link(folder / name) for name in entries)), ""):
        return f"{message}. {link}"
    if kind := describe_folder(folder):
        return f"{message}.\n{kind}"
    weight_files = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if weight_files and variant is None:
        return (
            f"{message}, found {first_of(weight_files, 4)}. If these are the weights of one model, its index file "
            f"({INDEX_FILE}) is missing: download it as well. If they belong to a variant, set --variant."
        )
    return f"{message}, found {first_of(names, 8) or 'nothing'}. Name the folder that holds the weights."
