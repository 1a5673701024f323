"""The one place that talks to the person: rank 0 says what is happening, the other ranks speak up only when something is wrong.

Nothing here is printed by the library itself; a program calls `open_console` once.
"""

import logging
import os
import sys
import time
import warnings

from zero_sft.world import World

_NOISY = ("deepspeed", "DeepSpeed", "accelerate", "httpx", "filelock", "matplotlib", "torch.distributed")


class _Elapsed(logging.Formatter):
    """`  12.3 s  message`, counted from the start of the process; warnings and errors carry their level."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._prefix = "" if rank == 0 else f"[rank {rank}] "
        self._start = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        lines = super().format(record).splitlines() or [""]
        first = f"{time.monotonic() - self._start:7.1f} s  {self._prefix}{level}{lines[0]}"
        return "\n".join([first, *("           " + line for line in lines[1:])])


def open_console(world: World) -> None:
    """Send this package's log to stdout on rank 0, warnings of other ranks to stderr, and quieten the libraries."""
    handler = logging.StreamHandler(sys.stdout if world.is_main else sys.stderr)
    handler.setFormatter(_Elapsed(world.rank))
    ours = logging.getLogger("zero_sft")
    ours.handlers[:] = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if world.is_main else logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if world.is_main else "false")
    if not sys.stderr.isatty():  # in a file every state of a progress bar is a line
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Deprecations between libraries are no news to who fine-tunes a model.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def quieten_transformers(world: World) -> None:
    """Progress bars and warnings of transformers on rank 0 alone."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not world.is_main:
        transformers_logging.disable_progress_bar()
