"""Compile DeepSpeed's CPU operators before the first test on ranks, so that no test's timeout includes it.

The first build takes minutes; it goes into the folder that the job uses.
"""

import contextlib
import multiprocessing
from collections.abc import Sequence

OPERATORS = ("PinMemoryBuilder", "CPUAdamBuilder", "ShareMemCommBuilder")
ASYNC_IO = "AsyncIOBuilder"
"""For NVMe, which slow tests alone use. It takes longer to compile than all others together."""

BUILD_SECONDS = 15 * 60


def compile_all(context: multiprocessing.context.BaseContext, names: Sequence[str] = OPERATORS) -> None:
    """Build the operators that are not built yet. Skip those that can't be built (no libaio): their tests handle that."""
    process = context.Process(target=_compile, args=(names,), daemon=True)  # type: ignore[attr-defined]
    process.start()
    process.join(BUILD_SECONDS)
    if process.is_alive():
        process.kill()
        process.join(10)


def _compile(names: Sequence[str]) -> None:
    from deepspeed.accelerator import get_accelerator

    from zero_sft.zero.operators import install_operator_builder

    install_operator_builder()
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        with contextlib.suppress(Exception):
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)
