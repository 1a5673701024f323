"""DeepSpeed's CPU operators, compiled before the first test on ranks, outside any test's own time.

The first build takes minutes; it goes into the folder that the job itself uses.
"""

import contextlib
import multiprocessing
from collections.abc import Sequence

OPERATORS = ("PinMemoryBuilder", "CPUAdamBuilder", "ShareMemCommBuilder", "AsyncIOBuilder")
BUILD_SECONDS = 15 * 60


def compile_all(context: multiprocessing.context.BaseContext, names: Sequence[str] = OPERATORS) -> None:
    """Build what is not built yet. An operator that can't be (no libaio) is left to the tests that need it."""
    process = context.Process(target=_compile, args=(names,), daemon=True)  # type: ignore[attr-defined]
    process.start()
    process.join(BUILD_SECONDS)
    if process.is_alive():
        process.kill()
        process.join(10)


def _compile(names: Sequence[str]) -> None:
    from deepspeed.accelerator import get_accelerator

    from zero_sft.zero.operators import keep_operators_apart

    keep_operators_apart()
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        with contextlib.suppress(Exception):
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)
