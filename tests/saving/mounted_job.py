"""Run inside `unshare --mount`: `python -m tests.saving.mounted_job FOLDER SIZE` trains into a tmpfs at FOLDER/out."""

import subprocess
import sys
from pathlib import Path

from tests import small_job


def job(folder: Path) -> None:
    """One rank's part of a run that saves a checkpoint of each step, twice into the same mount point."""
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": True}
    small_job.train(folder, "out", per_device_train_batch_size=2, **arguments)


def main(folder: Path, size: str) -> None:
    """Train on two ranks, and open what came of it with plain transformers."""
    from testing.runner import run_ranks

    out = small_job.make(folder, 24) / "out"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)], check=True)
    run_ranks(2, job, {"folder": folder}, 400)
    first = (out / "model.safetensors").stat().st_ino
    run_ranks(2, job, {"folder": folder}, 400)
    assert (out / "model.safetensors").stat().st_ino != first
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not [path for path in [*out.iterdir(), *folder.iterdir()] if path.name.startswith(".")]

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out)
    sys.stdout.write("trained\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
