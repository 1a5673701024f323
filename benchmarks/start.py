"""From the start of the processes to a loaded model, and to an engine: this loader, and a plain script with transformers alone.

python -m benchmarks.start zero_sft FOLDER     # one rank, with a launcher's variables
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ways import DS_CONFIG, OURS

_PATIENCE_S = 300
_LIBRARIES = "import deepspeed, torch, transformers.models.llama.modeling_llama"  # into the page cache, before anybody's turn


class Seconds(NamedTuple):
    """Since the start of the processes, of the slowest: until the model is loaded, and until DeepSpeed's engine stands."""

    loaded: float
    engine: float


def run(way: str, folder: Path, ranks: int) -> Seconds:
    """Load in that way in `ranks` fresh processes.

    Raises:
        RuntimeError: a rank that failed.
    """
    subprocess.run([sys.executable, "-c", _LIBRARIES], check=True, capture_output=True, timeout=_PATIENCE_S)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.time()
    command = [sys.executable, "-m", "benchmarks.start", way, str(folder)]
    common = {
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        environment = os.environ | {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, env=environment, text=True, **quiet))
    times = []
    for process in processes:
        output, _ = process.communicate(timeout=_PATIENCE_S)
        marks = [line.split() for line in output.splitlines() if line.startswith("at ")]
        if process.returncode or len(marks) != len(Seconds._fields):
            raise RuntimeError(f"a rank of {way} failed")
        times.append([float(second) - started for _, second in marks])
    return Seconds(*(max(each) for each in zip(*times, strict=True)))


def main() -> None:
    """One rank."""
    way, folder = sys.argv[1:]
    model = _load(way, folder)
    assert next(model.parameters()).ds_tensor.numel()
    sys.stdout.write(f"at {time.time()}\n")
    import deepspeed
    import torch

    ds_config = DS_CONFIG | {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    sys.stdout.write(f"at {time.time()}\n")
    sys.stdout.flush()
    os._exit(0)


def _load(way: str, folder: str) -> Any:
    if way == OURS:
        from zero_sft import load_model

        return load_model(folder, ds_config=DS_CONFIG)
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo", verbose=False)
    switch = HfDeepSpeedConfig({**DS_CONFIG, "train_micro_batch_size_per_gpu": 1})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert switch
    return model


if __name__ == "__main__":
    main()
