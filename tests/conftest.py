"""Run tests with `@pytest.mark.world_size(n)` on n CPU ranks (gloo); several sizes make several tests.
`slow=(8,)` marks some of them as slow.

A `world_size` test gets its arguments from fixtures as usual, if they can be pickled. `world` is detected on each rank.
"""

import hashlib
import inspect
import os
import tempfile
import time

import pytest

from tests.real_tokenizers import real_models
from tests.slow import slow_except

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_prepared_data = tempfile.TemporaryDirectory(prefix="zero_sft_tests_")  # removed when this process ends
os.environ["HF_DATASETS_CACHE"] = _prepared_data.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__all__ = ["real_models"]  # a fixture for all tests


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("world_size")
    if marker and len(marker.args) > 1:
        quick = set(marker.args) - set(marker.kwargs.get("slow", ()))
        metafunc.fixturenames.append("_world_size")
        metafunc.parametrize("_world_size", slow_except(quick, marker.args), ids=[f"{size}ranks" for size in marker.args])


def pytest_collection_modifyitems(items):
    """Order the files by ZERO_SFT_SLOW_ORDER, if it is set: where time is limited, other files are last each day."""
    order = os.environ.get("ZERO_SFT_SLOW_ORDER")
    if order:
        items.sort(key=lambda item: hashlib.sha256(f"{order} {item.path}".encode()).digest())  # stable within a file


def pytest_runtestloop(session):
    if not session.config.option.collectonly and any(item.get_closest_marker("world_size") for item in session.items):
        from testing.operators import ASYNC_IO, OPERATORS, compile_all
        from testing.runner import ON_DEVICES, context

        if not ON_DEVICES:  # for CPU ranks; tests on devices need no operators
            terminal = session.config.get_terminal_writer()
            terminal.line("DeepSpeed's operators first: minutes, if they have to be compiled", flush=True)
            slow = any(item.get_closest_marker("slow") for item in session.items)
            compile_all(context, (*OPERATORS, ASYNC_IO) if slow else OPERATORS)


_start = time.monotonic()


def pytest_runtest_setup(item):
    """Skip slow tests that begin later than `ZERO_SFT_SLOW_SECONDS` after the start, for a machine with a time limit."""
    limit = float(os.environ.get("ZERO_SFT_SLOW_SECONDS", "inf"))
    if item.get_closest_marker("slow") and time.monotonic() - _start > limit:
        pytest.skip(f"not run: the {limit:.0f} s for slow tests are over")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    marker = pyfuncitem.get_closest_marker("world_size")
    if marker is None:
        return None
    from testing.runner import run_ranks

    size = pyfuncitem.callspec.params["_world_size"] if len(marker.args) > 1 else marker.args[0]
    names = inspect.signature(pyfuncitem.obj).parameters
    kwargs = {name: pyfuncitem.funcargs[name] for name in names}
    run_ranks(size, pyfuncitem.obj, kwargs, marker.kwargs.get("timeout_s", 120.0))
    return True
