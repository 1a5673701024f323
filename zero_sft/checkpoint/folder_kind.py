"""Recognise folders and files that are not the expected model, and suggest a remedy.

A folder without `config.json` or weights usually holds another format: an adapter, GGUF, a trainer's checkpoint. A file may be
a placeholder: git without LFS leaves a pointer of 130 bytes, a proxy leaves an HTML page. In an incomplete cache of the hub it
is a link to nothing. File names and first bytes are enough to recognise each of them, so no library is needed.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from zero_sft.printable import first_of

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter (PEFT)."""

BASE_CONFIG = "base_config.json"
"""The base model's config as an adapter was trained with it, next to the adapter: with its RoPE scaling, for instance."""

_LFS = b"version https://git-lfs.github.com/spec/"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HTML = (b"<!doctype", b"<html", b"<?xml")

_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("model_index.json",),
        "a diffusers pipeline. Its models are in subfolders (text_encoder, ...): name one of those, or use --subfolder",
    ),
    (("*.gguf",), "a GGUF model, for llama.cpp. Use the safetensors repository that it was converted from"),
    (
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "a model in its authors' format (consolidated.*, params.json). Use its Hugging Face version, whose repository has "
        "config.json and model.safetensors (for Llama often named ...-hf)",
    ),
    (
        ("global_step*", "*/global_step*/*_model_states.pt", "zero_pp_rank_*", "mp_rank_*_model_states.pt", "zero_to_fp32.py"),
        "a DeepSpeed checkpoint. To continue its training, pass it as --resume_from_checkpoint. To make a model of it: "
        "`python -m zero_sft.export CHECKPOINT MODEL`",
    ),
    (
        ("trainer_state.json", "optimizer.pt", "scheduler.pt"),
        "a trainer's checkpoint without weights. Pass it as --resume_from_checkpoint, together with the model it started from",
    ),
    (
        ("pytorch_model_fsdp*", "*/__0_0.distcp", "*.distcp", "*.metadata"),
        "an FSDP checkpoint. Merge it with `accelerate merge-weights`",
    ),
    (("tf_model*.h5",), "a TensorFlow model. Convert it with an older transformers: from_pretrained(..., from_tf=True)"),
    (("flax_model*.msgpack",), "a Flax model. Convert it with an older transformers: from_pretrained(..., from_flax=True)"),
    (("*.onnx", "onnx/*.onnx"), "an ONNX model, for inference. Use the PyTorch model that it was exported from"),
    (("*.ckpt", "*.nemo"), "a checkpoint of another framework (.ckpt, .nemo). Convert it to Hugging Face's format"),
    (("modules.json", "config_sentence_transformers.json"), "a sentence-transformers model. Use a causal language model"),
)


def describe_folder(folder: Path) -> str:
    """Describe a folder without a usable model and the remedy; "" if the folder is not recognised."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = adapter_base(folder)
        return (
            f"{folder} is an adapter (PEFT, {ADAPTER_CONFIG}), not a model; its base model is {base}. To train on from it, "
            f"name the base model, and give --lora_weight_path {folder}. Or merge the two, and name what this writes: "
            f"`python -m zero_sft.export {folder} MERGED --merge_adapter`"
        )
    checkpoints = [path.name for path in checkpoints_in(folder)]
    if checkpoints and not any(folder.glob("*.gguf")):
        return f"{folder} holds a run's checkpoints ({first_of(checkpoints)}), but not a model. Name one checkpoint."
    for patterns, description in _FORMATS:
        matches = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
        if matches:
            return f"{folder} is {description} (found {matches[0]})."
    return ""


def adapter_base(folder: Path) -> str:
    """Return the quoted name of an adapter's base model from its config, or a remark that it is missing."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return repr(base) if isinstance(base, str) and base else f"not named in {ADAPTER_CONFIG}"


def adapter_warning(folder: Path) -> str:
    """Return a warning if `folder`, which holds a model, also holds an adapter; "" otherwise."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    return (
        f"{folder} holds an adapter next to the model ({ADAPTER_CONFIG}, base model {adapter_base(folder)}). The adapter is "
        "NOT applied: the weights in the folder are loaded. With PEFT installed, transformers would load the base model and "
        "the adapter. To train from the adapted model, merge it first (python -m zero_sft.export); otherwise remove "
        "the adapter's files."
    )


def describe_placeholder(path: Path) -> str:
    """Describe a file that holds a placeholder, and the remedy; "" if its first bytes look like real content."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""  # the code that reads the file reports this
    if not start:
        return f"{path} is truncated or corrupt: it is empty. Download or copy the file again."
    if start.startswith(_LFS):
        return (
            f"{path} is a git-LFS pointer, not the real file: the repository was cloned without git-lfs. Run "
            "`git lfs install` and `git lfs pull` in it, or download the model with `hf download`."
        )
    if start.lstrip().lower().startswith(_HTML):
        return f"{path} is a web page (HTML), not the real file. Download it again with `hf download`."
    return ""


def describe_broken_link(path: Path) -> str:
    """Describe a link whose target does not exist, and the remedy; "" for anything else."""
    if not path.is_symlink() or path.exists():
        return ""
    return f"{path} is a link to {path.readlink()}, which does not exist. Download or copy it again, or correct the link."


def first_placeholder(paths: Sequence[Path]) -> str:
    """Return the description of the first file that is a placeholder, or ""."""
    return next((text for text in map(describe_placeholder, paths) if text), "")


def checkpoints_in(folder: Path) -> list[Path]:
    """List the Trainer's `checkpoint-N` folders in a folder, which need not exist, the highest number first."""
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*") if path.is_dir())
    return [path for _, path in sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)]


def is_folder(path: Path) -> bool:
    """Return whether the path is a folder; False for a name that no file system takes, which a damaged file may hold."""
    try:
        return path.is_dir()
    except OSError:  # too long
        return False
