"""Set up the log for the user: rank 0 logs what happens, the other ranks log only errors.

INFO lines of the job need no check of the rank, since the levels set here decide. The loader checks it, since it
also runs in programs that set up their own log. A program calls `open_console` once, and `close_console` at its end. State that
lasts in between: handlers and levels of loggers, warning filters, the display of `progress`, and two environment variables.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import psutil

from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.printable import printable

_NOISY = ("deepspeed", "DeepSpeed", "accelerate", "httpx", "filelock", "matplotlib", "torch.distributed")
_REDUNDANT_WARNING = "Setting accelerator to CPU"
"""Start of a warning that DeepSpeed logs on every rank of a machine without a GPU; the job itself logs the device."""


_MOST_EARLY_LINES = 2000
"""The most lines that are kept for a file which may be named later."""


class _Elapsed(logging.Formatter):
    """Format `  12.3 s  message`, with seconds since the process started; warnings and errors show their level."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = "" if rank == 0 else f"[rank {rank}] "
        self._start = psutil.Process().create_time()  # before any import

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        lines = printable(super().format(record)).splitlines() or [""]
        seconds = time.time() - self._start
        elapsed = f"{seconds:7.1f} s" if seconds < 1000 else f"{progress.format_duration(seconds):>9}"
        first = f"{elapsed}  {self._prefix}{level}{lines[0]}"
        return "\n".join([first, *("           " + line for line in lines[1:])])


class _Handler(logging.Handler):
    """Write to stdout on rank 0 and to stderr on other ranks, above the progress bars if there are any."""

    def __init__(self, world: World, display: Any) -> None:
        super().__init__()
        self.setFormatter(_Elapsed(world.rank))
        self._is_main, self._display = world.is_main, display
        self._early: list[str] | None = []  # the lines before there is a file
        self._file: TextIO | None = None

    def copy_to(self, path: Path, *, append: bool) -> None:
        """Copy all lines of this process, past and future, to a file; an error is raised now, and later ends the copy."""
        file = path.open("a" if append else "w", encoding="utf-8", errors="replace")
        file.writelines(line + "\n" for line in self._early or [])
        file.flush()
        self._early, self._file = None, file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        super().close()

    def _copy(self, text: str) -> None:
        if self._early is not None:
            if self._is_main and len(self._early) < _MOST_EARLY_LINES:
                self._early.append(text)
        elif self._file is not None:
            try:
                self._file.write(text + "\n")
                self._file.flush()
            except OSError:  # a full disk: the console still has the lines
                self._file = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            self._copy(text)
            print_above = getattr(self._display, "print_above", None)
            if print_above is not None and print_above(text):
                return
            stream = sys.stdout if self._is_main else sys.stderr
            stream.write(text + "\n")
            stream.flush()
        except Exception:  # noqa: BLE001 - a log line that can't be written must not end the job
            self.handleError(record)


def open_console(world: World, *, bars: bool = True) -> None:
    """Send this package's log to stdout on rank 0, and errors of other ranks to stderr; silence the libraries.

    Args:
        bars: show progress as bars if stderr is a terminal; otherwise progress is shown as log lines.
    """
    display = _display(bars) if world.is_main else None
    progress.set_display(display)
    package_logger = logging.getLogger("zero_sft")
    package_logger.handlers[:] = [_Handler(world, display)]
    package_logger.propagate = False
    package_logger.setLevel(logging.INFO if world.is_main else logging.ERROR)  # only rank 0 logs what all ranks warn of
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # At its import, which PEFT does, it warns that it has no kernel for CPUs, whether 4 bits are used or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("deepspeed", "DeepSpeed"):
        logging.getLogger(name).addFilter(_is_not_redundant)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if world.is_main else "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # this package shows its own progress
    # Users can't act on deprecations between libraries. Other warnings appear once, from rank 0.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not world.is_main:
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.ERROR)


def copy_log_to(path: Path, *, append: bool) -> None:
    """Copy the log, from its first line, to a file as well. Rank 0.

    Raises:
        OSError: the file can't be written.
    """
    for handler in logging.getLogger("zero_sft").handlers:
        if isinstance(handler, _Handler):
            handler.copy_to(path, append=append)


def close_console() -> None:
    """Stop showing progress, and close the file with a copy of the log."""
    progress.set_display(None)
    for handler in logging.getLogger("zero_sft").handlers:
        handler.close()


def _display(bars: bool) -> Any:
    try:
        from zero_sft.console.bars import Lines, display_for
    except ImportError:  # only the job needs rich; the loader works without it
        return None
    return display_for(sys.stderr) if bars else Lines()


def _is_not_redundant(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_REDUNDANT_WARNING)


def silence_transformers(world: World) -> None:
    """Switch off transformers' warnings and its progress bars, which count files instead of the job's work.

    Download bars of the hub stay on rank 0 if stderr is a terminal.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # also disables the hub's bars
    if world.is_main and sys.stderr.isatty():
        enable_progress_bars()
