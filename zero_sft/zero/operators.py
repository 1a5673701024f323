"""DeepSpeed's operators, which torch compiles at first use, and the locks that a killed compilation leaves behind.

torch marks a build under way by a file `lock` in the operator's folder, and waits for it to go away, without a word and without
end. A process that is killed meanwhile leaves it there, and every later run on the machine hangs.
"""

import logging
import os
import sys
import time
from pathlib import Path

from zero_sft.errors import ConfigError

logger = logging.getLogger(__name__)

YOUNG_SECONDS = 30
"""A lock that young is this job's own: another of its ranks has just begun to compile."""

STALE_SECONDS = 20 * 60
"""No operator of DeepSpeed takes that long to compile."""


def prefer_own_ninja() -> None:
    """Put this environment's folder of programs before the others of PATH. Does not communicate.

    torch compiles with the first ninja there, and another version of it than the last time's builds everything anew, minutes.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if (Path(own) / "ninja").exists() and path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join(filter(None, (own, path)))


def require_no_stale_lock() -> None:
    """Look at the locks of DeepSpeed's operators on this machine; one that is young is only named. Does not communicate.

    Raises:
        ConfigError: a lock older than `STALE_SECONDS`.
    """
    for lock in locks():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # that build has just ended
            continue
        remedy = f"If nothing compiles there any more, a killed run has left it, and this one would wait for ever: rm {lock}"
        if age < YOUNG_SECONDS:
            continue
        if age > STALE_SECONDS:
            raise ConfigError(f"DeepSpeed's operator {lock.parent.name} has been locked for {age / 60:.0f} minutes. {remedy}")
        logger.warning("waiting for another process that compiles DeepSpeed's operator %s. %s", lock.parent.name, remedy)


def locks() -> list[Path]:
    """The locks of DeepSpeed's operators that lie on this machine, of builds under way and of killed ones."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(lock for depth in ("*/lock", "*/*/lock") for lock in root.glob(depth) if lock.parent.name in ALL_OPS)
