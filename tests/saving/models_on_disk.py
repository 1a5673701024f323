"""Models that are only files: each says which model it is of, and is found in the order that transformers looks for it."""

import json
import shutil
from pathlib import Path

ENTRIES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def write(folder: Path, number: int, files: int = 1, kind: str = "safetensors", settings: int | None = None) -> Path:
    """The model of that number in `files` files; its config and tokenizer say `settings`, by default its number, too."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if files == 1:
        (folder / f"{stem}.{kind}").write_text(str(number))
    else:
        names = [f"{stem}-{i:05d}-of-{files:05d}.{kind}" for i in range(1, files + 1)]
        for name in names:
            (folder / name).write_text(str(number))
        index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}, "metadata": {"number": number}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text(json.dumps({"number": number if settings is None else settings}))
    return folder


def read(folder: Path) -> tuple[set[int], set[int]]:
    """The numbers that weights and settings say, as a reader finds them. FileNotFoundError where there are no weights."""
    settings = {json.loads(path.read_text())["number"] for path in folder.glob("*.json") if "index" not in path.name}
    for entry in ENTRIES:
        if (folder / entry).is_file():
            break
    else:
        raise FileNotFoundError(folder)
    if not entry.endswith(".json"):
        return {int((folder / entry).read_text())}, settings
    index = json.loads((folder / entry).read_text())
    files = sorted(set(index["weight_map"].values()))
    return {index["metadata"]["number"], *(int((folder / name).read_text()) for name in files)}, settings


def write_others(folder: Path) -> dict[str, str]:
    """What else a run's folder holds; returns it as `others` does."""
    for name in ("notes.txt", "checkpoint-5/global_step5/state.pt", "checkpoint-5/latest", "logs/loss.png", "model-backup.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to("notes.txt")
    (folder / "empty").mkdir()
    return others(folder)


def others(folder: Path) -> dict[str, str]:
    """Relative path and content of what is not the model's."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        top = name.split("/")[0]
        if top.startswith((".", "model.", "model-0", "pytorch", "config", "tokenizer", "generation")):
            continue
        found[name] = "folder" if path.is_dir() else path.read_text()
    return found


def cleared(folder: Path) -> Path:
    """An empty folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
