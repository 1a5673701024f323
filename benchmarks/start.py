"""From the start of the processes to a loaded model: this loader, and a plain script with transformers alone, side by side.

python -m benchmarks.start zero_sft FOLDER     # one rank, with a launcher's variables
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.ways import DS_CONFIG, OURS

_PATIENCE_S = 300


def run(way: str, folder: Path, ranks: int) -> float:
    """Seconds until the slowest of `ranks` fresh processes has its model.

    Raises:
        RuntimeError: a rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.start", way, str(folder)]
    common = {
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        environment = os.environ | {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, env=environment, text=True, **quiet))
    seconds = 0.0
    for process in processes:
        line = next((line for line in process.stdout or () if line.startswith("loaded")), "")
        seconds = max(seconds, time.perf_counter() - started)
        if process.wait(_PATIENCE_S) or not line:
            raise RuntimeError(f"a rank of {way} failed")
    return seconds


def main() -> None:
    """One rank."""
    way, folder = sys.argv[1:]
    if way == OURS:
        from zero_sft import load_model

        model = load_model(folder, ds_config=DS_CONFIG)
    else:
        import deepspeed
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed("gloo", verbose=False)
        switch = HfDeepSpeedConfig({**DS_CONFIG, "train_micro_batch_size_per_gpu": 1})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert switch
    assert next(model.parameters()).ds_tensor.numel()
    sys.stdout.write("loaded\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
