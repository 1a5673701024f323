"""A run whose ranks are killed at random moments, again and again, until it has ended."""

import json
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import small_job
from tests.errors import error_codes
from tests.launching import ROOT, Started, deepspeed, torchrun
from zero_sft.checkpoint.manifest import find_damage, read_manifest
from zero_sft.saving.resume import find_checkpoint

STEPS = 40
RANKS = 2


@dataclass(slots=True)
class Kills:
    """The kills of a run: seconds until the last of the other processes had ended, and the message of each."""

    seconds: list[float] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def summary(self) -> str:
        """Return the figures in a sentence."""
        median, worst = statistics.median(self.seconds), max(self.seconds)
        return (
            f"{len(self.seconds)} kills of a random rank at random moments; the other ranks had ended after {median:.1f} s "
            f"(median) and {worst:.1f} s (worst)"
        )


def _command(launcher: str, words: list[str]) -> list[str]:
    if launcher == "launch.sh":
        variables = [f"ZERO_SFT_PYTHON={sys.executable}", f"PATH={os.environ['PATH']}"]
        return ["env", *variables, str(ROOT / "launch.sh"), "--num_gpus", str(RANKS), *words]
    return {"deepspeed": deepspeed, "torchrun": torchrun}[launcher](RANKS, *words)


def _words(folder: Path, out: str) -> list[str]:
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out,
        "per_device_train_batch_size": 2, "packing": False, "max_steps": STEPS, "save_steps": 2, "save_total_limit": 2,
        "bf16": False, "logging_steps": 1, "learning_rate": 0.001, "resume_from_checkpoint": "auto", "seed": 3,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def kill_at_random(folder: Path, kills: int, seed: int) -> Kills:
    """Kill ranks of a run until there have been `kills`, let it end, and compare it with a run that nobody has killed.

    Each kill comes some seconds after the start, or in a step: a run in 40 steps with a checkpoint in every second one. When it
    has ended before all kills were done, another run is begun.
    """
    draw, found = random.Random(seed), Kills()
    small_job.make(folder, 24)
    whole = Started(_command("deepspeed", _words(folder, "whole")), folder / "whole.log")
    assert whole.wait(300) == 0, whole.output[-3000:]
    runs = 0
    while len(found.seconds) < kills:
        runs += 1
        out, newest = f"killed{runs}", 0
        while True:
            is_last = len(found.seconds) == kills
            run = Started(
                _command(draw.choice(["deepspeed", "torchrun", "launch.sh"]), _words(folder, out)), folder / f"{out}.log"
            )
            try:
                has_ended = False if is_last else not _kill(run, draw, newest, found)
                if is_last or has_ended:
                    assert run.wait(300) == 0, run.output[-3000:]
                    break
            finally:
                run.kill()
            newest = _require_whole(folder / out, newest)
            found.steps.append(newest)
        mine, others = _weights(folder / out), _weights(folder / "whole")
        assert all(torch.equal(mine[name], others[name]) for name in others), out
        losses = [
            [
                (entry["step"], entry["loss"])
                for entry in json.loads((folder / each / "logs" / "history.json").read_text())
                if "loss" in entry
            ]
            for each in (out, "whole")
        ]
        assert losses[0] == losses[1]
    return found


def _kill(run: Started, draw: random.Random, newest: int, found: Kills) -> bool:
    """Kill a rank at a random moment; return False if the run has ended before."""
    step = newest + draw.randint(1, 12)
    deadline = time.monotonic() + (draw.uniform(1, 12) if draw.random() < 0.3 else 200)
    while time.monotonic() < deadline and f"step {step}/{STEPS}" not in run.output:
        if run.process.poll() is not None:
            return False
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.3))
    ranks = run.ranks()
    if len(ranks) < RANKS:
        return run.process.poll() != 0 and _kill(run, draw, newest, found)
    has_joined = "ranks on CPU" in run.output
    dead = draw.choice(sorted(ranks))
    ranks[dead].send_signal(signal.SIGKILL)
    began = time.monotonic()
    status = run.wait(60)
    left = run.left_after(30)
    found.seconds.append(time.monotonic() - began)
    assert left == [], run.output[-3000:]
    assert status != 0, run.output[-3000:]
    codes = error_codes(run.output)
    assert len(codes) <= 1, run.output[-5000:]
    if has_joined:
        assert codes == ["cluster.rank_lost"], run.output[-5000:]
        assert f"rank {dead} (process {ranks[dead].pid}) on " in run.output, run.output[-5000:]
    found.codes.append(codes[0] if codes else "none: before the ranks had joined")
    return True


def _require_whole(out: Path, newest: int) -> int:
    """Check that the newest complete checkpoint is no older than before, and whole. Return its step."""
    checkpoint = find_checkpoint("auto", out, RANKS)
    step = 0 if checkpoint is None else checkpoint.global_step
    assert step >= newest
    if checkpoint is not None:
        assert find_damage(checkpoint.folder, read_manifest(checkpoint.folder), verify=True) is None
    return step
