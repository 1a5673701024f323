"""Hand blocks of a stream from one process of a node to the others, as files in a temporary folder.

The first rank of a node makes the blocks and writes each into a file, under the number of rows before it; the other ranks wait
for the file and map it. Ranks are at most a step apart, so a file is removed some steps after its last row. It gets its name
when it is complete.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow

from zero_sft.data import temporary_folders
from zero_sft.data.report import DataReport
from zero_sft.data.stream import Block, StreamState
from zero_sft.errors import DataError, ZeroSftError

_PREFIX = "zero_sft-stream-"
_POLL_SECONDS = 0.05
_WRITER = "writer"  # a file with the process id of the writer
_ABOUT = b"zero_sft block"


class Spool:
    """The folder of a node in which its first rank puts blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls) -> "Spool":
        """Make the folder, below `TMPDIR`, and remove those of runs that were killed. The writer's process calls it.

        Raises:
            DataError: it can't be written to.
        """
        root = Path(tempfile.gettempdir())
        with _explained(root):
            spool = cls(temporary_folders.make(root, _PREFIX))
            (spool.folder / _WRITER).write_text(str(os.getpid()))
        return spool

    def is_visible(self) -> bool:
        """Whether this process sees the folder, and the process that writes to it."""
        return self._writer_lives()

    def write(self, block: Block) -> None:
        """Write a block; raises `DataError`."""
        about = {"start": block.start.to_json(), "reports": [asdict(report) for report in block.reports]}
        with _explained(self.folder):
            for name, table in (("samples", block.samples), ("rows", block.rows)):  # the file that is waited for last
                target = self._file(name, block.start.row)
                schema = table.schema.with_metadata({_ABOUT: json.dumps(about).encode()})
                with pyarrow.ipc.new_file(str(target.with_suffix(".tmp")), schema) as writer:
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
                target.with_suffix(".tmp").rename(target)

    def write_error(self, error: BaseException, row: int) -> None:
        """Tell the readers that the block after `row` rows can't be made."""
        code = error.code if isinstance(error, ZeroSftError) else "data.stream_failed"
        with contextlib.suppress(OSError):
            temporary = self._file("error", row).with_suffix(".tmp")
            temporary.write_text(json.dumps([str(error) or type(error).__name__, code]))
            temporary.rename(self._file("error", row))

    def read(self, state: StreamState) -> Iterator[Block]:
        """Yield the blocks from a state on, waiting for each.

        Raises:
            DataError: the one that the writer met; or the writer has ended.
        """
        row = state.row
        while True:
            block = self._wait_for(row)
            yield block
            row = block.stop

    def remove(self, block: Block) -> None:
        """Remove the files of a block that all ranks have mapped."""
        for name in ("rows", "samples"):
            self._file(name, block.start.row).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder. The writer's process calls it."""
        temporary_folders.remove(self.folder)

    def _wait_for(self, row: int) -> Block:
        while True:
            is_alive = self._writer_lives()  # asked before the files are looked for, since it may end in between
            if self._file("rows", row).exists():
                return self._map(row)
            if self._file("error", row).exists():
                message, code = json.loads(self._file("error", row).read_text())
                raise DataError(message, code=code)
            if not is_alive:
                raise DataError(
                    "the rank that makes the rows of --streaming for this node has ended. Its own error is the cause.",
                    code="data.stream_writer_ended",
                )
            time.sleep(_POLL_SECONDS)

    def _map(self, row: int) -> Block:
        tables = [pyarrow.ipc.open_file(pyarrow.memory_map(str(self._file(name, row)))) for name in ("rows", "samples")]
        rows, samples = (table.read_all() for table in tables)
        about = json.loads(rows.schema.metadata[_ABOUT])
        return Block(
            rows=rows.replace_schema_metadata(None),
            samples=samples.replace_schema_metadata(None),
            start=StreamState.from_json(about["start"]),
            reports=tuple(DataReport(**values) for values in about["reports"]),
        )

    def _file(self, kind: str, row: int) -> Path:
        return self.folder / f"{kind}-{row}"

    def _writer_lives(self) -> bool:
        try:
            pid = int((self.folder / _WRITER).read_text())
            return Path(f"/proc/{pid}").exists()
        except (OSError, ValueError):
            return False


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"can't write rows of --streaming to {folder}: {error.strerror or error}. Name a local folder with some GB of free "
            "space with the variable TMPDIR.",
            code="data.stream_unwritable",
        ) from error


def shared(blocks: Iterator[Block], spool: Spool, row: int) -> Iterator[Block]:
    """Yield the blocks after `row` rows, and write each, or the error of making it, for the other processes of the node."""
    try:
        for block in blocks:
            spool.write(block)
            row = block.stop
            yield block
    except Exception as error:  # whatever it is, the other processes wait for this block
        spool.write_error(error, row)
        raise
