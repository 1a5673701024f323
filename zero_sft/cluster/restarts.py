"""Decide whether `launch.sh --max_restarts` starts the ranks again.

    python -m zero_sft.cluster.restarts FOLDER START STATUS MAX

Rank 0 writes how far each start has come to a folder that launch.sh has made on its machine. A run that ends twice in the same
step, or three times without a new checkpoint, would end there for ever.

Imports neither torch nor transformers.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zero_sft.cluster.starts import FOLDER_VARIABLE, start_number
from zero_sft.printable import first_of, printable, with_count

MOST_WITHOUT_CHECKPOINT = 3
"""The run is not started again after this number of starts in a row without a new checkpoint."""

_NOT_AGAIN = frozenset({"cluster.ended_by_signal", "cluster.interrupted", "cluster.launcher_ended", "cluster.port_taken"})
"""Codes of ends that somebody has asked for, or that a further start does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The last that is known of a start of the run.

    Attributes:
        step: the step that it has begun last; None: none.
        checkpoint: the step of the newest checkpoint; None: there is none.
        samples: those of the step in which an earlier start has ended, if this one has come there.
        code: of the error with which it has ended; "" if no rank has reported one.
    """

    step: int | None = None
    checkpoint: int | None = None
    samples: Sequence[str] = ()
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether the ranks are started again, and the reason, as a message."""

    again: bool
    reason: str


class ProgressFile:
    """The file in which rank 0 keeps its `Progress`; without the variable, nothing is written."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self._path = None if not folder else _progress_file(Path(folder), start_number())
        self._progress = Progress()

    def update(self, **values: Any) -> None:
        """Change some of the fields. An error is ignored: the run is worth more than its restart."""
        self._progress = replace(self._progress, **values)
        if self._path is not None:
            with contextlib.suppress(OSError):
                unfinished = self._path.with_suffix(".new")
                unfinished.write_text(json.dumps(asdict(self._progress)))
                unfinished.replace(self._path)


def note_error(code: str) -> None:
    """Keep the code of the error that this rank reports, if launch.sh asks for it."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        with contextlib.suppress(OSError):
            _error_file(Path(folder), start_number()).write_text(code)


def step_of_last_end() -> int | None:
    """Return the step in which the start before this one has ended; None if that is not known, or this is the first."""
    folder, start = os.environ.get(FOLDER_VARIABLE), start_number()
    return read_progress(Path(folder), start - 1).step if folder and start > 1 else None


def read_progress(folder: Path, start: int) -> Progress:
    """Return how far a start has come; nothing is known of one that has not begun to train."""
    progress, code = Progress(), ""
    with contextlib.suppress(OSError, ValueError, TypeError):
        progress = Progress(**json.loads(_progress_file(folder, start).read_text()))
    with contextlib.suppress(OSError):
        code = _error_file(folder, start).read_text().strip()
    return replace(progress, code=code)


def decide(starts: Sequence[Progress], max_restarts: int) -> Decision:
    """Decide after the last of these starts has failed. Pure."""
    last, count = starts[-1], len(starts)
    place = "before its first step" if last.step is None else f"in step {last.step}"
    if last.code and (not last.code.startswith("cluster.") or last.code in _NOT_AGAIN):
        return Decision(again=False, reason=f"the run is not started again: {last.code} would not change")
    if count > 1 and starts[-2].step == last.step:
        samples = f" The samples of this step: {first_of(last.samples, 16, separator='; ')}." if last.samples else ""
        return Decision(again=False, reason=f"the run has ended twice {place}, so it is not started again.{samples}")
    recent = starts[-MOST_WITHOUT_CHECKPOINT:]
    if len(recent) == MOST_WITHOUT_CHECKPOINT and len({start.checkpoint for start in recent}) == 1:
        return Decision(
            again=False,
            reason=f"{MOST_WITHOUT_CHECKPOINT} starts have ended without a new checkpoint, so the run is not started again: "
            "save more often (--save_steps)",
        )
    if count > max_restarts:
        return Decision(again=False, reason=f"the run has ended {place}, and {with_count(max_restarts, 'restart')} are used up")
    source = "its newest checkpoint, if it has one" if last.checkpoint is None else f"checkpoint-{last.checkpoint}"
    return Decision(again=True, reason=f"the run has ended {place}: restart {count} of {max_restarts}, from {source}")


def main(argv: Sequence[str] | None = None) -> int:
    """Say whether the run is started again, and why. Return 0 for a further start, else 1."""
    folder, start, status, max_restarts = sys.argv[1:] if argv is None else argv
    starts = [read_progress(Path(folder), number) for number in range(1, int(start) + 1)]
    for number in range(1, len(starts)):  # a start that has not begun to train has the checkpoint of the one before
        if starts[number].checkpoint is None:
            starts[number] = replace(starts[number], checkpoint=starts[number - 1].checkpoint)
    decision = decide(starts, int(max_restarts))
    sys.stderr.write(printable(f"launch.sh: {decision.reason} (status {status})\n"))
    return 0 if decision.again else 1


def _progress_file(folder: Path, start: int) -> Path:
    return folder / f"start-{start}.json"


def _error_file(folder: Path, start: int) -> Path:
    return folder / f"start-{start}.error"


if __name__ == "__main__":
    sys.exit(main())
