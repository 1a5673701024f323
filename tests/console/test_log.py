"""Tests of the log: its streams, the time and level in each line, and the rank that writes it."""

import logging
import re
import subprocess
import sys

import psutil
import pytest

RANK = """
import logging, sys, warnings
from zero_sft.console.log import open_console
from zero_sft.cluster.world import World

open_console(World(rank=int(sys.argv[1]), world_size=2))
log = logging.getLogger("zero_sft.test")
log.info("what happens\\nin two lines")
log.warning("what all ranks warn of")
log.error("what one rank finds wrong")
warnings.warn("a library's warning")
warnings.warn("a deprecation", FutureWarning)
deepspeed = logging.getLogger("DeepSpeed")
deepspeed.addHandler(logging.StreamHandler(sys.stdout))
deepspeed.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
deepspeed.warning("1 pytorch allocator cache flushes since last step")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_says(rank):
    done = subprocess.run([sys.executable, "-c", RANK, str(rank)], capture_output=True, text=True, timeout=60, check=True)
    time = r"^ +\d+\.\d s  "
    assert "deprecation" not in done.stderr
    assert "Setting accelerator" not in done.stdout
    assert "gemm_4bit" not in done.stderr
    if rank:
        assert re.fullmatch(time + r"\[rank 1\] error: what one rank finds wrong\n", done.stderr)
        return
    lines = done.stdout.splitlines()
    assert re.match(time + "what happens$", lines[0])
    assert lines[1] == " " * 11 + "in two lines"
    assert re.match(time + "warning: what all ranks warn of$", lines[2])
    assert re.match(time + "error: what one rank finds wrong$", lines[3])
    assert lines[4] == "1 pytorch allocator cache flushes since last step"
    assert done.stderr.count("a library's warning") == 1


def test_a_long_run_has_hours(monkeypatch):
    from zero_sft.console import log as console

    start = psutil.Process().create_time()
    monkeypatch.setattr(console.time, "time", lambda: start + 93_784.0)
    record = logging.LogRecord("zero_sft", logging.INFO, "", 0, "said", None, None)
    assert console._Elapsed(0).format(record) == "1 d 2:03:04  said"
