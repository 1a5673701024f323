"""Name a model folder, or a file in one, for what it is when it is not what was expected.

Model repositories hold many formats, and a folder without `config.json` or weights is usually one of them: an adapter, GGUF,
the checkpoint of a trainer. A file may be a placeholder: git without LFS leaves a pointer of 130 bytes, a proxy leaves an HTML
page. Each is told from names or first bytes alone, so this needs no library.
"""

import json
from collections.abc import Sequence
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"

_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype", b"<html", b"<?xml")

_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("model_index.json",),
        "a diffusers pipeline. Its models are in subfolders (text_encoder, ...): name one of them, or use --subfolder",
    ),
    (("*.gguf",), "a GGUF model, for llama.cpp. Take the safetensors repository that it was converted from"),
    (
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "a model in its authors' own format (consolidated.*, params.json). Take its Hugging Face version, whose repository "
        "has config.json and model.safetensors (for Llama often named ...-hf)",
    ),
    (
        ("global_step*", "*/global_step*/*_model_states.pt", "zero_pp_rank_*", "mp_rank_*_model_states.pt", "zero_to_fp32.py"),
        "a DeepSpeed checkpoint. To go on training give it to --resume_from_checkpoint; for its weights run its script, "
        "`python zero_to_fp32.py . model`, and copy config.json and the tokenizer's files there",
    ),
    (
        ("trainer_state.json", "optimizer.pt", "scheduler.pt"),
        "a trainer's checkpoint without weights. Give it to --resume_from_checkpoint, next to the model it was started from",
    ),
    (
        ("pytorch_model_fsdp*", "*/__0_0.distcp", "*.distcp", "*.metadata"),
        "an FSDP checkpoint. Merge it: accelerate merge-weights",
    ),
    (("tf_model*.h5",), "a TensorFlow model. Convert it with an older transformers: from_pretrained(..., from_tf=True)"),
    (("flax_model*.msgpack",), "a Flax model. Convert it with an older transformers: from_pretrained(..., from_flax=True)"),
    (("*.onnx", "onnx/*.onnx"), "an ONNX model, for inference. Take the PyTorch model that it was exported from"),
    (("*.ckpt", "*.nemo"), "a checkpoint of another framework (.ckpt, .nemo). Convert it to Hugging Face's format"),
    (("modules.json", "config_sentence_transformers.json"), "a sentence-transformers model. Take a causal language model"),
)


def folder_kind(folder: Path) -> str:
    """What a folder without a usable model is, and what to do; "" where nothing is recognised."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = adapter_base(folder)
        return (
            f"{folder} is an adapter (PEFT, {ADAPTER_CONFIG}), not a model; its base model is {base}. Merge it first, once, "
            "in Python, and name the folder that this writes:\n"
            f"  from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
            ".merge_and_unload().save_pretrained('merged')"
        )
    inside = _checkpoints(folder)
    if inside and not any(folder.glob("*.gguf")):
        return f"{folder} holds a run's checkpoints ({', '.join(inside[:3])}), but no model itself. Name one of them."
    for patterns, text in _FORMATS:
        found = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
        if found:
            return f"{folder} is {text} (found {found[0]})."
    return ""


def adapter_base(folder: Path) -> str:
    """The name of an adapter's base model, as its config gives it."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return repr(base) if isinstance(base, str) and base else f"not named in {ADAPTER_CONFIG}"


def adapter_warning(folder: Path) -> str:
    """A warning for a folder with a model and an adapter next to it, or ""."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    return (
        f"{folder} holds an adapter next to the model ({ADAPTER_CONFIG}, base model {adapter_base(folder)}). It is NOT "
        "applied: the model's own weights are loaded. With PEFT installed, transformers would load the base model and the "
        "adapter. To train from the adapted model, merge it first (merge_and_unload) and name the result; else remove the "
        "adapter's files."
    )


def placeholder(path: Path) -> str:
    """What stands in a file instead of its content, and what to do; "" where its first bytes look like content."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""  # whoever reads it says so
    if not start:
        return f"{path} is truncated or corrupt: it is empty. Download or copy it again."
    if start.startswith(_LFS):
        return (
            f"{path} is a git-LFS pointer, not the file itself: the repository was cloned without git-lfs. Run "
            "`git lfs install` and `git lfs pull` in it, or download the model with `hf download`."
        )
    if start.lstrip().lower().startswith(_HTML):
        return f"{path} is a web page (HTML), not the file itself. Download it again, with `hf download`."
    return ""


def first_placeholder(paths: Sequence[Path]) -> str:
    """`placeholder` of the first of these files that is one."""
    return next(filter(None, map(placeholder, paths)), "")


def _checkpoints(folder: Path) -> list[str]:
    steps = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return [path.name for path in sorted(steps, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)]
