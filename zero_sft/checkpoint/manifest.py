"""The manifest of a run's checkpoint: which files it consists of, with the size and the CRC-32 of each.

`manifest.json` is written last, into a folder that gets its name only then. So a folder with a manifest is complete, unless a
file was changed or removed later, which its size (or, with `--verify`, its CRC-32) shows.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.checksum import crc32_of_file
from zero_sft.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
_FORMAT = "zero_sft checkpoint"
_VERSION = 1

DTYPES = frozenset({"bfloat16", "float16", "float32"})
"""Names of the dtypes in which an engine trains."""


def optimizer_file(rank: int, world_size: int) -> str:
    """Return the name of the file with a rank's part of the optimizer's state."""
    return f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The size of a file in bytes, and its CRC-32 as eight hexadecimal digits."""

    nbytes: int
    crc32: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: the number of optimizer steps that were taken.
        world_size: the number of ranks that wrote it.
        samples: training samples up to here.
        loss: the last loss that was logged.
        dtype: in which the engine trains: "bfloat16", "float16" or "float32".
        written: when it was complete, in UTC (ISO 8601).
        files: every file of the folder except this one, by its path in the folder.
        hosts: the hosts that wrote the ranks' files, by path; empty if all are in one folder. Else (`--save_on_each_node`) each
            host has its own folder, with the files of its ranks.
    """

    step: int
    world_size: int
    samples: int
    loss: float | None
    dtype: str
    written: str
    files: Mapping[str, FileRecord]
    hosts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        """Total bytes of the files."""
        return sum(file.nbytes for file in self.files.values())

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=2) + "\n"


def has_manifest(folder: Path) -> bool:
    """Return whether a folder is a checkpoint with a manifest, complete or not."""
    return (folder / MANIFEST_FILE).exists()


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        CheckpointError: there is none, it can't be read, or it is of a later version.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        raw: Any = json.loads(path.read_bytes())
        if raw["format"] != _FORMAT:
            raise ValueError(f"format {raw['format']!r:.60}")
        if raw["version"] != _VERSION:
            raise CheckpointError(
                f"{path} is of version {raw['version']!r:.20}, and this release reads version {_VERSION}. Install the release "
                "that wrote it.",
                code="manifest.other_version",
            )
        files = {str(name): FileRecord(nbytes=row["nbytes"], crc32=row["crc32"]) for name, row in raw["files"].items()}
        for name, file in files.items():
            is_path = name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts
            if type(file.nbytes) is not int or not is_path:
                raise ValueError(f"the file {name!r:.60}")
        fields: dict[str, Any] = {name: raw[name] for name in ("step", "world_size", "samples", "loss", "dtype", "written")}
        if any(type(fields[name]) is not int or not 0 <= fields[name] < 2**63 for name in ("step", "world_size", "samples")):
            raise ValueError("step, world_size or samples is not a number")
        if fields["world_size"] < 1 or fields["dtype"] not in DTYPES:
            raise ValueError(f"world_size {fields['world_size']}, dtype {fields['dtype']!r:.60}")
        if not (fields["loss"] is None or type(fields["loss"]) is float or type(fields["loss"]) is int):
            raise ValueError(f"loss {fields['loss']!r:.60}")
        fields["loss"] = None if fields["loss"] is None else float(fields["loss"])
        if datetime.datetime.fromisoformat(fields["written"]).timestamp() < 0:
            raise ValueError(f"written {fields['written']}")
        hosts = {str(name): str(host) for name, host in raw.get("hosts", {}).items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", code="manifest.missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} can't be read ({type(error).__name__}: {error!s:.100}). Take another checkpoint.",
            code="manifest.unreadable",
        ) from error
    return Manifest(files=files, hosts=hosts, **fields)


def find_damage(folder: Path, manifest: Manifest, *, verify: bool = False) -> str | None:
    """Return the reason why a checkpoint is not complete, naming the first such file; None if it is.

    Files that are only on other hosts (`hosts_of_missing_files`) are passed over.

    Args:
        verify: also read all files and compare their CRC-32.
    """
    for name, file in manifest.files.items():
        path = folder / name
        try:
            nbytes = path.stat().st_size
            if nbytes != file.nbytes:
                return f"{name} has {nbytes:,} bytes, and the manifest says {file.nbytes:,}"
            if verify and (crc32 := f"{crc32_of_file(path):08x}") != file.crc32:
                return f"{name} has the CRC-32 {crc32}, and the manifest says {file.crc32}: its contents were changed"
        except FileNotFoundError:
            if name not in manifest.hosts:
                return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read ({error.strerror or error})"
    return None


def hosts_of_missing_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return the ranks' files that a folder lacks, with the hosts that wrote them; empty if all are there."""
    return {name: host for name, host in manifest.hosts.items() if not (folder / name).is_file()}
