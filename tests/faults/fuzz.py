"""Hostile files: valid ones with bytes, numbers and JSON nodes changed, given to the functions that read them.

    python -m tests.faults.fuzz CASES [TARGET ...]

Each case may end in a result or in an error of `zero_sft.errors`, within seconds; anything else is a fault. Its process may not
allocate far more than it has at the start, nor open a file elsewhere than in the folder of the case and in Python's own.
"""

import contextlib
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies
from safetensors.torch import save_file

from zero_sft.errors import ZeroSftError

SECONDS = 10.0
"""The longest time for one case."""

MORE_BYTES = 4 * 2**30
"""Address space that the process may take in addition."""

HOSTILE = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(2**63), 1e308, 0.5, "", "0", "../../etc/passwd", "/etc/passwd",
    "..", ".", "\x00", "\ud800", "a" * 5000, "model.safetensors", [], {}, [[]], [None], {"a": {}}, [-1, 2**62], [0, 0],
    "float32", "F32", "auto", "{{ 1 }}",
]  # fmt: skip

_EDITS = strategies.lists(
    strategies.one_of(
        strategies.tuples(strategies.just("node"), strategies.integers(0, 2**20), strategies.sampled_from(range(len(HOSTILE)))),
        strategies.tuples(strategies.just("rename"), strategies.integers(0, 2**20), strategies.text(max_size=8)),
        strategies.tuples(strategies.just("drop"), strategies.integers(0, 2**20), strategies.none()),
        strategies.tuples(strategies.just("flip"), strategies.integers(0, 2**32), strategies.integers(1, 255)),
        strategies.tuples(strategies.just("cut"), strategies.integers(0, 2**32), strategies.none()),
        strategies.tuples(strategies.just("insert"), strategies.integers(0, 2**32), strategies.binary(min_size=1, max_size=9)),
        strategies.tuples(strategies.just("length"), strategies.integers(0, 2**64 - 1), strategies.none()),
    ),
    min_size=1,
    max_size=3,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Files to change, and the function that reads them.

    Attributes:
        make: writes valid files into an empty folder.
        changed: the names of those that are changed, one in each case.
        read: reads them.
    """

    make: Callable[[Path], None]
    changed: tuple[str, ...]
    read: Callable[[Path], Any]


def _model(folder: Path) -> None:
    tensors = {f"layer.{number}.weight": torch.arange(12.0).view(3, 4) for number in range(2)}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 96}, "weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _bin(folder: Path) -> None:
    torch.save({"a": torch.arange(12.0).view(3, 4), "b": torch.arange(12.0).view(3, 4).t()}, folder / "pytorch_model.bin")


def _config(folder: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True, "dtype": "bfloat16",
        "eos_token_id": [1, 2], "pad_token_id": 0, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "max_length": 64}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _tokenizer(folder: Path) -> None:
    from tests.data import tiny

    tiny.byte_tokenizer(tiny.CHATML).save_pretrained(folder)
    _config(folder)


def _checkpoint(folder: Path) -> None:
    from tests.commands.test_checkpoints import checkpoint
    from zero_sft.plan.partition import FlatRange
    from zero_sft.saving import optimizer_files
    from zero_sft.saving.optimizer_files import SavedParameter
    from zero_sft.saving.run_record import RunRecord, write_record
    from zero_sft.zero.optimizer_state import ParameterState, StateFormat

    made = checkpoint(folder / "made", 4)
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    write_record(
        folder, RunRecord(model_type="llama", sizes={"a": 1}, optimizer="adamw", schedule="linear", from_ds_config=False)
    )
    own = FlatRange(start=0, stop=6)
    values = torch.arange(6.0)
    layout = optimizer_files.lay_out(
        {"w": SavedParameter(shape=(2, 6), flat_range=own)},
        {"w": StateFormat(dtypes={"exp_avg": torch.float32}, numbers={"step": 4})},
        {"cpu": torch.arange(8, dtype=torch.uint8)},
        {},
        0,
        2,
    )
    state = ParameterState(name="w", flat_range=own, tensors={"exp_avg": values})
    optimizer_files.write(folder / layout.name, layout, [state], {"cpu": torch.arange(8, dtype=torch.uint8)})


def _read_checkpoint(folder: Path) -> None:
    from zero_sft.checkpoint.manifest import find_damage, read_manifest
    from zero_sft.checkpoint.run_state import read_trainer_state, read_training_state
    from zero_sft.plan.partition import FlatRange
    from zero_sft.saving.optimizer_files import SavedOptimizer
    from zero_sft.saving.run_record import read_record
    from zero_sft.zero.optimizer_state import ParameterState

    read_record(folder)
    for read in (read_trainer_state, read_training_state):
        with contextlib.suppress(ZeroSftError):
            read(folder)
    with contextlib.suppress(ZeroSftError):
        find_damage(folder, read_manifest(folder), verify=True)
    saved = SavedOptimizer(folder, 2)
    saved.formats()
    saved.weight_shapes()
    saved.random_states(0)
    saved.fill(ParameterState(name="w", flat_range=FlatRange(start=0, stop=6), tensors={"exp_avg": torch.zeros(6)}), 12)


def _read_index(folder: Path) -> None:
    from zero_sft.checkpoint.header import read_metadata
    from zero_sft.checkpoint.index import read_index

    read_index(folder)
    read_metadata(folder / "model-0.safetensors")


def _read_bin(folder: Path) -> None:
    from zero_sft.storage.torch_zip import read_bin_header

    read_bin_header(folder / "pytorch_model.bin")


def _read_config(folder: Path) -> None:
    from zero_sft.config import prepare_config
    from zero_sft.generation_config import read_generation_config

    read_generation_config(folder)
    prepare_config(str(folder), model_max_length=128)


def _read_tokenizer(folder: Path) -> None:
    from zero_sft.data.templates.choose import choose_template
    from zero_sft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder), model_max_length=64)
    choose_template(None, tokenizer)


TARGETS = {
    "index": Target(make=_model, changed=("model.safetensors.index.json",), read=_read_index),
    "safetensors": Target(make=_model, changed=("model-0.safetensors", "model-1.safetensors"), read=_read_index),
    "bin": Target(make=_bin, changed=("pytorch_model.bin",), read=_read_bin),
    "checkpoint": Target(
        make=_checkpoint,
        changed=(
            "manifest.json", "trainer_state.json", "training_state.json", "zero_sft_run.json",
            "optimizer-00001-of-00002.safetensors",
        ),
        read=_read_checkpoint,
    ),
    "config": Target(make=_config, changed=("config.json", "generation_config.json"), read=_read_config),
    "tokenizer": Target(
        make=_tokenizer, changed=("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), read=_read_tokenizer
    ),
}  # fmt: skip


def edited(content: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    """Return the content with the edits; a safetensors header and its length are kept consistent by those of JSON nodes."""
    for kind, number, value in edits:
        if kind in ("node", "rename", "drop"):
            content = _with_changed_json(content, kind, number, value)
        elif kind == "length":
            content = number.to_bytes(8, "little") + content[8:]
        elif content:
            place = number % len(content)
            if kind == "flip":
                content = content[:place] + bytes([content[place] ^ value]) + content[place + 1 :]
            elif kind == "cut":
                content = content[:place]
            else:
                content = content[:place] + value + content[place:]
    return content


def _with_changed_json(content: bytes, kind: str, number: int, value: Any) -> bytes:
    size = int.from_bytes(content[:8], "little")
    is_safetensors = 0 < size < len(content)
    text = content[8 : 8 + size] if is_safetensors else content
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return content
    nodes = list(_nodes([root], 0))
    parent, key = nodes[number % len(nodes)]
    if kind == "node":
        parent[key] = HOSTILE[value]
    elif kind == "rename" and isinstance(parent, dict):
        parent[value] = parent.pop(key)
    elif parent is not nodes[0][0]:
        del parent[key]
    holder = nodes[0][0]
    changed = json.dumps(holder[0] if holder else None).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + size :] if is_safetensors else changed


def _nodes(parent: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of each node below, in order: its parent and its key there."""
    yield parent, key
    child = parent[key]
    keys = list(child) if isinstance(child, dict) else range(len(child)) if isinstance(child, list) else ()
    for each in keys:
        yield from _nodes(child, each)


_allowed: list[str] = []
_opened_elsewhere: list[str] = []


def _watch_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _allowed and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(tuple(_allowed)):
            _opened_elsewhere.append(path)


def run(name: str, cases: int, seed: int = 0) -> None:
    """Try that many cases on a target; raise AssertionError with the smallest case that is a fault."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        valid, folder = Path(top) / "valid", Path(top) / "case"
        valid.mkdir()
        target.make(valid)
        target.read(valid)  # the unchanged files are good; and the libraries are imported
        python = [sys.prefix, sys.base_prefix, "/usr/", "/proc/", "/sys/", "/dev/", "/etc/mime", str(Path(__file__).parents[2])]
        scratch = f"{tempfile.gettempdir()}/zero_sft_"  # folders that the package makes for libraries which need files
        _allowed[:] = [str(folder), scratch, *map(os.path.abspath, python)]

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases, database=None, deadline=None, derandomize=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(strategies.sampled_from(target.changed), _EDITS)
        def case(changed: str, edits: list[tuple[str, int, Any]]) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(valid, folder)
            path = folder / changed
            path.write_bytes(edited(path.read_bytes(), edits))
            _opened_elsewhere.clear()
            began = time.monotonic()
            with contextlib.suppress(ZeroSftError):
                target.read(folder)
            seconds = time.monotonic() - began
            assert seconds < SECONDS, f"{seconds:.1f} s"
            assert not _opened_elsewhere, _opened_elsewhere[:3]

        try:
            case()
        finally:
            _allowed.clear()


def main() -> None:
    """Fuzz the targets of the command line, or all, with that many cases in all."""
    cases, *names = sys.argv[1:]
    names = names or list(TARGETS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, resource.RLIM_INFINITY))
    sys.addaudithook(_watch_opens)
    logging.disable()
    for name in names:
        began = time.monotonic()
        run(name, int(cases) // len(names), seed=int(os.environ.get("FUZZ_SEED", "0")))
        sys.stdout.write(f"{name}: {int(cases) // len(names)} cases in {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
