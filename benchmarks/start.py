"""Measure the seconds from process start to a loaded model, an engine and its first step, with this loader and transformers.

python -m benchmarks.start zero_sft FOLDER     # one rank, with a launcher's variables
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ways import DS_CONFIG, OURS

_TIMEOUT_S = 300
_ATTEMPTS = 3
_STEP_TOKENS = 8  # few, so that the step costs what its start costs
_LIBRARIES = "import deepspeed, torch, transformers.models.llama.modeling_llama"  # brought into the page cache beforehand


class Seconds(NamedTuple):
    """Seconds of the slowest rank from process start: until the model is loaded, the engine is ready, a step is done."""

    loaded: float
    engine: float
    step: float


def run(way: str, folder: Path, ranks: int) -> Seconds:
    """Load a model with the loader `way` in `ranks` new processes.

    Raises:
        RuntimeError: a rank failed in each of `_ATTEMPTS`; the message ends with what it printed last.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return _start(way, folder, ranks)
        except RuntimeError as error:
            sys.stderr.write(f"{error}\n")
    return _start(way, folder, ranks)


def _start(way: str, folder: Path, ranks: int) -> Seconds:
    """Start the ranks, wait for them, and return their seconds; raise RuntimeError if one fails."""
    subprocess.run([sys.executable, "-c", _LIBRARIES], check=True, capture_output=True, timeout=_TIMEOUT_S)
    with tempfile.TemporaryDirectory() as logs:
        return _run_ranks(way, folder, ranks, Path(logs))


def _run_ranks(way: str, folder: Path, ranks: int, logs: Path) -> Seconds:
    """Run the ranks; each prints its errors to a file in `logs`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.time()
    command = [sys.executable, "-m", "benchmarks.start", way, str(folder)]
    variables = {
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        rank_variables = variables | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {key: str(value) for key, value in rank_variables.items()}
        with (logs / f"{rank}").open("w") as log:
            process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=log)
        processes.append(process)
    times = []
    for rank, process in enumerate(processes):
        try:
            output, _ = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            output = ""
        marks = [line.split() for line in output.splitlines() if line.startswith("at ")]
        if process.returncode or len(marks) != len(Seconds._fields):
            failed = next((number for number, other in enumerate(processes) if other.poll()), rank)  # not one that waits for it
            for other in processes:
                other.kill()
                other.wait()
            printed = "\n".join((logs / f"{failed}").read_text(errors="replace").splitlines()[-12:])
            raise RuntimeError(f"rank {failed} of {way} failed with status {processes[failed].returncode}:\n{printed}")
        times.append([float(second) - started for _, second in marks])
    return Seconds(*map(max, zip(*times, strict=True)))


def main() -> None:
    """Load, start the engine and train one step as one rank, and print the time after each."""
    way, folder = sys.argv[1:]
    model = _load(way, folder)
    assert next(model.parameters()).ds_tensor.numel()
    sys.stdout.write(f"at {time.time()}\n")
    import deepspeed
    import torch

    ds_config = DS_CONFIG | {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    sys.stdout.write(f"at {time.time()}\n")
    tokens = torch.arange(_STEP_TOKENS)[None]
    engine.train()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
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
    zero3_config = HfDeepSpeedConfig({**DS_CONFIG, "train_micro_batch_size_per_gpu": 1})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert zero3_config, "transformers partitions only while this object is alive"
    return model


if __name__ == "__main__":
    main()
