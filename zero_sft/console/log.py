"""The one place that talks to the person: rank 0 says what is happening, the other ranks speak of errors alone.

Nothing here is printed by the library; a program calls `open_console` once, and `close_console` when it ends. What lasts
between the two: handlers and levels of loggers, warning filters, the display of `progress`, two environment variables.
"""

import logging
import os
import sys
import time
import warnings
from typing import Any

from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.printable import printable

_NOISY = ("deepspeed", "DeepSpeed", "accelerate", "httpx", "filelock", "matplotlib", "torch.distributed")
_SAID_OTHERWISE = "Setting accelerator to CPU"
"""How a warning of DeepSpeed's begins that every rank gives on a machine without a GPU; the job says the device itself."""


class _Elapsed(logging.Formatter):
    """`  12.3 s  message`, counted from the start of the process; warnings and errors carry their level."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = "" if rank == 0 else f"[rank {rank}] "
        self._start = _process_start()

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        lines = printable(super().format(record)).splitlines() or [""]
        seconds = time.time() - self._start
        elapsed = f"{seconds:7.1f} s" if seconds < 1000 else f"{progress.clock(seconds):>9}"
        first = f"{elapsed}  {self._prefix}{level}{lines[0]}"
        return "\n".join([first, *("           " + line for line in lines[1:])])


def _process_start() -> float:
    """When this process was started, in seconds of `time.time`; imports are after it."""
    try:
        import psutil

        return psutil.Process().create_time()
    except ImportError:
        return time.time()


class _Handler(logging.Handler):
    """Writes to stdout on rank 0, to stderr on others; above the progress bars, where there are any."""

    def __init__(self, world: World, display: Any) -> None:
        super().__init__()
        self.setFormatter(_Elapsed(world.rank))
        self._is_main, self._display = world.is_main, display

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            print_above = getattr(self._display, "print_above", None)
            if print_above is not None and print_above(text):
                return
            stream = sys.stdout if self._is_main else sys.stderr
            stream.write(text + "\n")
            stream.flush()
        except Exception:  # noqa: BLE001 - a log line that can't be written must not end the job
            self.handleError(record)


def open_console(world: World, *, bars: bool = True) -> None:
    """Send this package's log to stdout on rank 0, errors of other ranks to stderr, and quieten the libraries.

    Args:
        bars: progress is shown by bars where stderr is a terminal; else, and in any file, by lines in the log.
    """
    display = _display(bars) if world.is_main else None
    progress.set_display(display)
    ours = logging.getLogger("zero_sft")
    ours.handlers[:] = [_Handler(world, display)]
    ours.propagate = False
    ours.setLevel(logging.INFO if world.is_main else logging.ERROR)  # what all ranks warn of is said once
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("deepspeed", "DeepSpeed"):
        logging.getLogger(name).addFilter(_not_said_otherwise)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if world.is_main else "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # this package shows its own
    # Deprecations between libraries don't concern whoever fine-tunes a model; other warnings are said once, by rank 0.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not world.is_main:
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.ERROR)


def close_console() -> None:
    """Show no more progress."""
    progress.set_display(None)


def _display(bars: bool) -> Any:
    try:
        from zero_sft.console.bars import Lines, display_for
    except ImportError:  # rich is for the job; the loader needs none of it
        return None
    return display_for(sys.stderr) if bars else Lines()


def _not_said_otherwise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_SAID_OTHERWISE)


def quieten_transformers(world: World) -> None:
    """Switch off transformers' warnings and its progress bars, which count files, not what the job does.

    Bars of downloads from the hub stay, on rank 0, where stderr is a terminal.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # and the hub's with them
    if world.is_main and sys.stderr.isatty():
        enable_progress_bars()
