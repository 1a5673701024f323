"""Run one test function on several ranks: forked from a warm server, joined over a file store, ended together.

The fork server has torch, DeepSpeed and transformers imported already, so that a rank starts in milliseconds. Every rank
runs the whole test function; the first failure ends all of them and is shown with its traceback.
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
"""Ranks take a device each. They are started afresh then: DeepSpeed asks CUDA for devices when it is imported, and a process
that has done so can't be forked."""

context = multiprocessing.get_context("spawn" if ON_DEVICES else "forkserver")
if not ON_DEVICES:
    context.set_forkserver_preload(PRELOAD)


class Skip(str):
    """Why a rank has skipped its test, in place of a failure's traceback."""


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

        from zero_sft.zero.operators import keep_operators_apart

        keep_operators_apart()
        torch.set_num_threads(1)
        device, backend = get_accelerator(), "gloo"
        if ON_DEVICES and device.device_name() != "cpu":
            device.set_device(rank)
            backend = f"cpu:gloo,{device.device_name()}:{device.communication_backend_name()}"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
        # An all-reduce for CPU inference, unused here, which leaves a 69 MB file a rank in /dev/shm. (The attribute
        # `deepspeed.comm.torch` is the torch package; the submodule is found by its full name only.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        deepspeed.init_distributed(verbose=False)
        target(**kwargs)
        dist.barrier()
        sink.send((rank, None))
    except BaseException as error:
        skipped = isinstance(error, pytest.skip.Exception)
        sink.send((rank, Skip(str(error)) if skipped else traceback.format_exc()))
        os._exit(1)
    os._exit(0)  # no destructors of gloo threads, no atexit of DeepSpeed


def run_ranks(size: int, target: Callable[..., None], kwargs: dict[str, Any], timeout_s: float = 120.0) -> None:
    """Run `target(**kwargs)` on `size` ranks; raise AssertionError with the first failing rank's traceback.

    What a rank skips is skipped.
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
