"""Run inside `unshare --mount`: `python -m tests.faults.disks KIND FOLDER` trains onto a small disk that fails meanwhile."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.launching import Started, deepspeed
from zero_sft.checkpoint.manifest import find_damage, read_manifest

SLOW = "slow:rank=0,step=1,seconds=1"


def main(kind: str, folder: Path) -> None:
    """Train 8 steps with a checkpoint in every second one; the disk fails after the first. Print the output and the status."""
    out = folder / "out"
    out.mkdir()
    _mount(kind, folder / "image", out)
    given = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "logging_steps": 1, "bf16": False,
        "output_dir": folder / "elsewhere" if kind == "cache" else out, "per_device_train_batch_size": 1, "packing": False,
        "max_steps": 8, "save_steps": 2, "simulate_fault": SLOW,
    }  # fmt: skip
    if kind == "cache":
        given["data_cache_dir"] = out
    os.chdir(folder)  # where the model is rescued
    run = Started(deepspeed(2, *(word for name, value in given.items() for word in (f"--{name}", str(value)))), folder / "log")
    try:
        if kind != "cache":
            run.wait_for(lambda: "checkpoint-2: " in run.output)
            _fail(kind, out)
        status = run.wait(200)
        sys.stdout.write(f"{run.output}\nstatus {status}, left {run.left_after(10)}\n")
        for checkpoint in sorted(out.glob("checkpoint-*")):
            sys.stdout.write(f"{checkpoint.name} damage {find_damage(checkpoint, read_manifest(checkpoint), verify=True)}\n")
    finally:
        run.kill()


def _mount(kind: str, image: Path, out: Path) -> None:
    """Mount a small file system of the kind that can fail this way."""
    if kind in ("readonly", "quota"):
        with image.open("wb") as file:
            file.truncate(200 << 20)
        _run(*{"readonly": ["mkfs.ext4", "-q"], "quota": ["mkfs.btrfs", "-q"]}[kind], image)
        _run("mount", "-o", "loop,errors=remount-ro" if kind == "readonly" else "loop", image, out)
        if kind == "quota":
            _run("btrfs", "quota", "enable", out)
    else:
        _run("mount", "-t", "tmpfs", "-o", f"size={'900k' if kind == 'cache' else '20m'}", "tmpfs", out)


def _fail(kind: str, out: Path) -> None:
    if kind == "full":
        threading.Thread(target=_fill, args=(out / "filler",), daemon=True).start()
    elif kind == "vanished":
        _run("umount", "--lazy", out)
    elif kind == "readonly":  # what ext4 does when it finds itself damaged, while files are open
        device = subprocess.run(["findmnt", "-no", "SOURCE", out], capture_output=True, text=True, check=True).stdout.strip()
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")
    elif kind == "quota":
        _run("btrfs", "qgroup", "limit", "500k", "0/5", out)


def _fill(path: Path) -> None:
    """Keep the disk full, whatever is removed from it."""
    with path.open("wb", buffering=0) as file:
        while True:
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * 4096)
            time.sleep(0.01)


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(os.path.abspath(sys.argv[2])))
