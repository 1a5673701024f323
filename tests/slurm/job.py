"""Submit `launch.sh` with a small job to a cluster."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.launching import ROOT
from tests.slurm.cluster import Cluster

GIVEN = {
    "logging_steps": 1, "per_device_train_batch_size": 1, "packing": False, "max_steps": 4, "bf16": False, "seed": 3,
    "learning_rate": 0.001, "save_strategy": "no",
}  # fmt: skip


def words(folder: Path, out: Path, **options: Any) -> list[str]:
    """Return the arguments of the job."""
    given = {**GIVEN, "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": out, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def submit(cluster: Cluster, log: Path, arguments: list[str], *sbatch: str, cwd: Path | None = None, **env: str) -> int:
    """Submit launch.sh with one rank a task, without GPUs unless they are asked for, and return the job's number."""
    shape = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
    return cluster.submit(
        *shape, *sbatch, f"--output={log}", ROOT / "launch.sh", *arguments, cwd=cwd,
        **{"ZERO_SFT_PYTHON": str(ROOT / ".venv" / "bin" / "python"), **env},
    )  # fmt: skip


def losses(out: Path) -> list[tuple[int, float]]:
    """Return the logged losses of a run, by step."""
    entries: list[Mapping[str, Any]] = json.loads((out / "logs" / "history.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
