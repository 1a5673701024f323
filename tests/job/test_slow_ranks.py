"""The rank that the others wait for is named."""

import contextlib
import io
import os

import pytest

from testing.runner import run_ranks
from tests import small_job
from zero_sft.job.slow_ranks import slow_ranks


@pytest.mark.parametrize(
    ("outside", "products", "named"),
    [
        ([0.01, 0.02, 0.01, 0.01], [0.003] * 4, []),
        ([0.01, 0.9, 0.01, 0.01], [0.003] * 4, ["the others wait for rank 1 on node1: it spends 0.90 s of each step (2.00 s)"]),
        ([0.3, 0.3, 0.3, 0.6], [0.003] * 4, []),
        ([0.01] * 4, [0.003, 0.003, 0.0045, 0.003], ["the device of rank 2 on node2 is slow: a matrix product takes 4.50 ms"]),
        ([0.01, 0.9], [0.003, 0.006], ["wait for rank 1", "the device of rank 1"]),
    ],
)
def test_who_is_behind(outside, products, named):
    rows = [(out, product, 2.0, f"node{rank}") for rank, (out, product) in enumerate(zip(outside, products, strict=True))]
    lines = slow_ranks(rows)
    assert len(lines) == len(named)
    for line, part in zip(lines, named, strict=True):
        assert part in line


def job(folder):
    from unittest import mock

    from zero_sft.job import slow_ranks as module

    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(module, "EVERY", 4):
        small_job.train(
            folder, "out", per_device_train_batch_size=1, packing=False, max_steps=8, save_strategy="no",
            simulate_fault="slow:rank=1,step=5,seconds=1",
        )  # fmt: skip
    if os.environ["RANK"] == "0":
        lines = [line for line in said.getvalue().splitlines() if "the others wait for" in line]
        assert any("after step 8: the others wait for rank 1 on" in line for line in lines), said.getvalue()
        assert not any("after step 4" in line for line in lines)


@pytest.mark.slow
def test_a_rank_that_sleeps(tmp_path):
    small_job.make(tmp_path, 24)
    run_ranks(2, job, {"folder": tmp_path}, 200)
