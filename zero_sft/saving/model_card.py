"""The card of a trained model, README.md: what was run, on which data, and its losses.

Local paths are shortened to their last part, since they may say more about a cluster than its owner wants to publish.
"""

import importlib.metadata
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft.checkpoint.folder_kind import ADAPTER_CONFIG, BASE_CONFIG
from zero_sft.printable import with_count
from zero_sft.saving.placing import WEIGHTS
from zero_sft.saving.run_record import RunRecord
from zero_sft.saving.settings import settings_in

CARD_FILE = "README.md"
CURVE_FILE = "loss.png"
_OTHERS = (CARD_FILE, CURVE_FILE, ADAPTER_CONFIG, BASE_CONFIG)
_MARK = "<!-- written by zero_sft -->"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RELEASES = ("zero_sft", "transformers", "trl", "deepspeed", "torch")


def model_card(
    name: str,
    record: RunRecord,
    history: Sequence[Mapping[str, Any]],
    *,
    ranks: int | None,
    curve: str | None = None,
    is_adapter: bool = False,
) -> str:
    """Return the card's Markdown.

    Args:
        name: the model's name, for the heading.
        history: the Trainer's log.
        ranks: the number of GPUs; None if it is not known.
        curve: the file of the loss curve, next to the card.
        is_adapter: whether the folder holds an adapter, not a model.
    """
    base = _public(record.model)
    datasets = [each for each in record.data if _HUB_ID.fullmatch(each)]
    front = ["library_name: peft" if is_adapter else "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}"] * bool(_HUB_ID.fullmatch(base))
    front += ["datasets:", *(f"- {each}" for each in dict.fromkeys(datasets))] if datasets else []
    front += ["tags:", "- sft", "- deepspeed", *["- lora"] * bool(record.adapter)]
    rows = {
        "base model": base or record.model_type,
        "data": ", ".join(_public(each) for each in record.data) or "?",
        "samples": _samples(record),
        "steps": f"{_last_step(history, record):,} of {record.samples_a_step:,} samples",
        "longest sample": f"{record.settings.get('model_max_length', '?')} tokens",
        "adapter": f"LoRA, rank {record.adapter['r']}, alpha {record.adapter['lora_alpha']}" if record.adapter else "",
        "optimizer": f"{record.optimizer}, learning rate {record.learning_rate:g}, schedule {record.schedule}",
        "loss": _course([entry["loss"] for entry in history if "loss" in entry]),
        "loss on held-out samples": _course([entry["eval_loss"] for entry in history if "eval_loss" in entry]),
        "hardware": with_count(ranks, "rank") if ranks else "",
        "releases": ", ".join(f"{package} {_release(package)}" for package in _RELEASES),
    }
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name}",
        "",
        "A supervised fine-tuning with DeepSpeed ZeRO-3.",
        "",
        "| | |",
        "| --- | --- |",
    ]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    lines += ["", f"![loss]({curve})"] if curve else []
    return "\n".join([*lines, "", _MARK]) + "\n"


def _public(name: str) -> str:
    """Return a hub id as it is, and of a path its last part."""
    return name if _HUB_ID.fullmatch(name) else name.rstrip("/").rpartition("/")[2]


def _samples(record: RunRecord) -> str:
    tokens = f", {record.tokens:,} tokens" if record.tokens else ""
    return f"{record.rows:,} rows{tokens}" if record.rows else "?"


def _last_step(history: Sequence[Mapping[str, Any]], record: RunRecord) -> int:
    return max((int(entry["step"]) for entry in history if "step" in entry), default=record.max_steps)


def _course(losses: Sequence[float]) -> str:
    """Describe losses by the first and the last."""
    if not losses:
        return ""
    return f"{losses[0]:.3f}" if len(losses) == 1 else f"{losses[0]:.3f} at first, {losses[-1]:.3f} at the end"


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _cell(text: str) -> str:
    """Return text that stays in one cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")


def add_card(
    folder: Path, name: str, record: RunRecord, history: Sequence[Mapping[str, Any]], ranks: int | None, curve: Path | None
) -> None:
    """Write the card to a model's folder, and the loss curve next to it. A card that somebody else wrote stays. Rank 0.

    Raises:
        OSError: the folder can't be written.
    """
    path = folder / CARD_FILE
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    has_curve = curve is not None and curve.is_file()
    if curve is not None and has_curve:
        shutil.copyfile(curve, folder / curve.name)
    curve_name = curve.name if curve is not None and has_curve else None
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    text = model_card(name, record, history, ranks=ranks, curve=curve_name, is_adapter=is_adapter)
    path.write_text(text, encoding="utf-8")


def files_of_model(folder: Path) -> list[str]:
    """Return the paths of a model's files in its folder: weights, config, tokenizer, code, card and loss curve. Rank 0."""
    names = {path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) or path.name in _OTHERS}
    return sorted(names | settings_in(folder).keys())
