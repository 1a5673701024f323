"""Run a test function on several ranks, which are forked from a warm server, joined over a file store, and ended together.

The fork server has already imported torch, DeepSpeed and transformers, so that a rank starts in milliseconds. Every rank runs
the whole test function. The first failure ends all ranks and is reported with its traceback.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

PRELOAD = ["torch", "torch.distributed", "transformers", "deepspeed", "zero_sft", "testing.preload"]

ON_DEVICES = bool(os.environ.get("ZERO_SFT_TEST_DEVICES"))
"""Whether each rank uses a device. Ranks then start as new processes, since importing DeepSpeed initialises CUDA, and a process
with CUDA can't be forked."""

context = multiprocessing.get_context("spawn" if ON_DEVICES else "forkserver")
if not ON_DEVICES:
    context.set_forkserver_preload(PRELOAD)


class Skip(str):
    """The reason why a rank has skipped its test, instead of a failure's traceback."""


def _rank_main(rank: int, size: int, port: int, store: str, target: Callable[..., None], kwargs: dict, sink: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    try:
        import deepspeed
        import torch
        import torch.distributed as dist
        from deepspeed.accelerator import get_accelerator

        from zero_sft.zero.operators import install_operator_builder

        install_operator_builder()
        torch.set_num_threads(1)
        device, backend = get_accelerator(), "gloo"
        if ON_DEVICES and device.device_name() != "cpu":
            device.set_device(rank)
            backend = f"cpu:gloo,{device.device_name()}:{device.communication_backend_name()}"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
        # Disable an all-reduce for CPU inference, which is unused here and leaves a 69 MB file per rank in /dev/shm.
        # (The attribute `deepspeed.comm.torch` is the torch package, so the submodule is looked up by its full name.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        deepspeed.init_distributed(verbose=False)
        target(**kwargs)
        dist.barrier()
        sink.send((rank, None))
    except BaseException as error:
        skipped = isinstance(error, pytest.skip.Exception)
        sink.send((rank, Skip(str(error)) if skipped else traceback.format_exc()))
        os._exit(1)
    os._exit(0)  # skip the destructors of gloo's threads and DeepSpeed's atexit handlers


def run_ranks(size: int, target: Callable[..., None], kwargs: dict[str, Any], timeout_s: float = 120.0) -> None:
    """Run `target(**kwargs)` on `size` ranks; raise AssertionError with the first failing rank's traceback.

    If a rank skips the test, the test is skipped.
    """
    port = random.randint(20000, 50000)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, ranks = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, size, port, f"{folder}/store", target, kwargs, sender)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            ranks.append(process)
        try:
            failure = _first_failure(pipes, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.join(0.5)
                if process.is_alive():
                    process.kill()
                process.join(10)
    if isinstance(failure, Skip):
        pytest.skip(failure)
    if failure:
        raise AssertionError(failure)


def _first_failure(pipes: list, deadline: float) -> str | None:
    waiting = dict(enumerate(pipes))
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            return f"timeout: ranks {sorted(waiting)} did not finish"
        for pipe in multiprocessing.connection.wait(list(waiting.values()), timeout=left):
            rank = next(each for each, other in waiting.items() if other is pipe)
            del waiting[rank]
            try:
                _, failure = pipe.recv()
            except EOFError:
                failure = "the process died without a word"
            if failure:
                return failure if isinstance(failure, Skip) else f"rank {rank} failed:\n{failure}"
    return None
