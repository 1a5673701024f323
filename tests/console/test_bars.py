"""Progress: bars on a pseudo-terminal, lines in a file, nothing without a display."""

import os
import pty
import re
import subprocess
import sys

import pytest

from tests import small_job
from zero_sft.console import progress
from zero_sft.console.bars import Lines

SCRIPT = """
import logging, sys, time
from zero_sft.console import progress
from zero_sft.console.log import close_console, open_console
from zero_sft.cluster.world import World

open_console(World())
log = logging.getLogger("zero_sft.test")
with progress.task("building the model"):
    time.sleep(0.3)
with progress.task("reading the weights", 100 * 2**20, progress.BYTES) as task:
    for part in range(4):
        task.advance(25 * 2**20)
        time.sleep(0.3)
        log.info("part %d of a long line [with brackets] :smile: %s", part, "x" * 200)
    print("printed by a library")
close_console()
log.info("the end")
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(command, timeout_s=60.0):
    """The output of a command on a pseudo-terminal of 100 columns."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment, close_fds=True)
    os.close(other)
    output = b""
    try:
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            output += part
        assert process.wait(timeout_s) == 0, output.decode()
    finally:
        process.kill()
        os.close(main)
    return output.decode()


@pytest.mark.timeout(120)
def test_bars_on_a_terminal():
    output = on_terminal([sys.executable, "-c", SCRIPT])
    assert "\x1b[?25l" not in output, "a killed job must not leave the cursor hidden"
    plain = CONTROL.sub("", output).replace("\r", "")
    assert "building the model" in plain
    assert re.search(r"reading the weights ━+.* \d+\.\d MiB of 100\.0 MiB  \d+\.\d MiB/s  \d:\d\d left", plain)
    for part in range(4):
        assert plain.count(f"part {part} of a long line [with brackets] :smile: {'x' * 200}\n") == 1
    assert "printed by a library" in plain
    assert plain.rstrip().endswith("the end")
    assert "reading" not in plain[plain.index("the end") :]


@pytest.mark.slow
def test_the_job_on_a_terminal(tmp_path):
    """One rank, from the load to the export: bars come and go, and log lines stay whole."""
    small_job.make(tmp_path, 24)
    arguments = {
        "model_name_or_path": tmp_path / "model", "data_path": tmp_path / "data.json", "output_dir": tmp_path / "out",
        "save_strategy": "no", "logging_steps": 1, "max_steps": 30, "per_device_train_batch_size": 2, "packing": False,
        "data_cache_dir": tmp_path / "cache",
    }  # fmt: skip
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    output = on_terminal([sys.executable, "-m", "zero_sft.train", *words], timeout_s=500)
    plain = CONTROL.sub("", output).replace("\r", "")
    assert "\x1b[?25l" not in output
    assert re.search(r"starting DeepSpeed ⠋|starting DeepSpeed ", plain)
    assert re.search(r"training ━.* of 30 steps  at step \d+: loss \d+\.\d{3}", plain)
    steps = re.findall(
        r"\d+\.\d s  step (\d+)/30  epoch \d+\.\d\d  loss \d+\.\d{3}  lr [^ ]+  grad [^ ]+  [\d,]+ tok/s/rank", plain
    )
    assert [int(step) for step in steps] == list(range(1, 31))
    assert "it/s]" not in plain, "bars of other libraries"
    after = plain[plain.index("writing the model to") :]
    assert "logs: " in after
    assert "━" not in after[after.index("logs: ") :]


@pytest.mark.timeout(120)
def test_no_bars_and_no_control_characters_in_a_file():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)
    assert len(done.stdout.splitlines()) == 6


def test_lines_now_and_then(caplog):
    """Every 30 seconds at most, when a tenth more is done; a line that was logged otherwise counts; none at the end."""
    now = [0.0]
    lines = Lines()
    with caplog.at_level("INFO", logger="zero_sft"), lines.task("reading the weights", 1000 * 2**20, progress.BYTES) as work:
        work._now, work.start, work._said_at = (lambda: now[0]), 0.0, 0.0
        for second in range(1, 101):
            now[0] = float(second)
            work.advance(10 * 2**20)
            if second == 91:
                work.line_logged()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"reading the weights: {done}.0 MiB of 1,000.0 MiB  10.0 MiB/s  {left} left"
        for done, left in ((300, "1:10"), (600, "0:40"), (900, "0:10"))
    ]


def test_numbers():
    now = [0.0]
    samples = progress.Task("preparing", None, "samples", lambda: now[0])
    assert not samples.numbers()
    now[0] = 2.0
    samples.advance(500)
    assert samples.numbers() == "500 samples  250 samples/s"
    steps = progress.Task("training", 23, "steps", lambda: now[0])
    steps.advance(12)
    steps.note("loss 2.941  2:41 left")
    assert steps.numbers() == "12 of 23 steps  loss 2.941  2:41 left"


def test_nothing_is_shown_without_a_display_and_an_error_leaves_none_behind():
    with progress.task("nobody looks", 3, "things") as task:
        task.advance()
        task.note("")
    closed = []

    class Display(Lines):
        def close(self):
            closed.append(True)

    progress.set_display(Display())
    try:
        assert list(progress.iterate_with_progress([1, 2], "counting", "things")) == [1, 2]
    finally:
        progress.set_display(None)
    assert closed == [True]
