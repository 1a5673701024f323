"""DeepSpeed's CPU operators, compiled before the first test on ranks, outside any test's own time.

A build takes minutes, as often as the environment's folder changes. A test that is ended within one leaves torch's lock
behind, and all later tests wait for it.
"""

import contextlib
import multiprocessing
import time
from pathlib import Path

import psutil

OPERATORS = ("PinMemoryBuilder", "CPUAdamBuilder", "ShareMemCommBuilder", "AsyncIOBuilder")
BUILD_SECONDS = 15 * 60
_SETTLED_SECONDS = 30


def compile_all(context: multiprocessing.context.ForkServerContext) -> None:
    """Build what is not built yet. An operator that can't be (no libaio) is left to the tests that need it."""
    remove_abandoned_locks()
    process = context.Process(target=_compile, daemon=True)
    process.start()
    process.join(BUILD_SECONDS)
    if process.is_alive():
        process.kill()
        process.join(10)
    remove_abandoned_locks(settled_seconds=0)


def remove_abandoned_locks(settled_seconds: float = _SETTLED_SECONDS) -> None:
    """Remove each lock of at least that age in whose folder no process works: ninja runs there while a build goes on."""
    from zero_sft.zero.operators import locks

    at_work = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            at_work.add(process.cwd())
    for lock in locks():
        with contextlib.suppress(FileNotFoundError):
            if str(Path(lock.parent).resolve()) not in at_work and time.time() - lock.stat().st_mtime >= settled_seconds:
                lock.unlink()


def _compile() -> None:
    from zero_sft.zero.operators import prefer_own_ninja

    prefer_own_ninja()
    from deepspeed.accelerator import get_accelerator

    for name in OPERATORS:
        builder = get_accelerator().create_op_builder(name)
        with contextlib.suppress(Exception):
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)
