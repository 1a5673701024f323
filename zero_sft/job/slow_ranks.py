"""Name the rank that the others wait for. Importing this module imports transformers.

In ZeRO-3 every rank takes part in each layer's communication, so all ranks have equal step times, and a slow one does not show.
So each rank measures what does not depend on the others: its time outside of the model (data, callbacks, host), and a small
matrix product on its device, which shows a device that is throttled or shared.
"""

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.world import World

if TYPE_CHECKING:
    from zero_sft.job.trainer import JobTrainer

logger = logging.getLogger("zero_sft.train")

EVERY = 100
"""The number of steps after which the ranks are compared."""

BEHIND = 0.2
"""A rank is named if it is this share behind the median rank."""

_PRODUCT_SIZE = {"cpu": 256, "cuda": 4096}
_REPEATS = 5


class SlowRanks(TrainerCallback):
    """Compare the ranks, and log a warning if one is behind. Every rank; communicates after every `EVERY` steps."""

    def __init__(self, trainer: "JobTrainer", world: World) -> None:
        self._trainer, self._world = trainer, world
        self._began = self._optimizer_began = self._in_optimizer = self._in_model_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to measure."""
        self._restart()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out what was measured up to here, which has an evaluation in it."""
        self._restart()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to measure the optimizer."""
        self._optimizer_began = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the optimizer's time."""
        self._in_optimizer += time.monotonic() - self._optimizer_began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare the ranks."""
        if state.global_step % EVERY or self._world.world_size == 1:
            return
        seconds = time.monotonic() - self._began
        in_model = self._trainer.seconds_in_model - self._in_model_before
        outside = max(0.0, seconds - in_model - self._in_optimizer) / EVERY
        product = _product_seconds(self._trainer.args.device)
        rows = all_gather_json(self._world, [outside, product, seconds / EVERY, socket.gethostname()])
        if self._world.is_main:
            for line in slow_ranks(rows):
                logger.warning("after step %d: %s", state.global_step, line)
        self._restart()

    def _restart(self) -> None:
        self._began, self._in_optimizer, self._in_model_before = time.monotonic(), 0.0, self._trainer.seconds_in_model


def slow_ranks(rows: Sequence[tuple[float, float, float, str]]) -> list[str]:
    """Return a sentence for the rank that is furthest behind in each respect. Pure.

    Args:
        rows: for each rank its seconds per step outside of the model, those of a matrix product, those per step, its host.
    """
    outside, products, steps, hosts = zip(*rows, strict=True)
    lines, step = [], statistics.median(steps)
    middle, rank = statistics.median_low(outside), max(range(len(rows)), key=outside.__getitem__)
    if outside[rank] - middle > BEHIND * step:
        lines.append(
            f"the others wait for rank {rank} on {hosts[rank]}: it spends {outside[rank]:.2f} s of each step ({step:.2f} s) "
            f"on its data and its host, the median rank {middle:.2f} s"
        )
    middle, rank = statistics.median_low(products), max(range(len(rows)), key=products.__getitem__)
    if products[rank] > (1 + BEHIND) * middle:
        lines.append(
            f"the device of rank {rank} on {hosts[rank]} is slow: a matrix product takes {1000 * products[rank]:.2f} ms there, "
            f"and {1000 * middle:.2f} ms on the median rank"
        )
    return lines


def _product_seconds(device: torch.device) -> float:
    """Return the shortest time of several equal matrix products on a device."""
    size = _PRODUCT_SIZE.get(device.type, 1024)
    matrix = torch.ones(size, size, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        began = time.perf_counter()
        _ = matrix @ matrix
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
