"""The command: arguments in, text, a table or a picture out."""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zero_sft.errors import ArgumentError, ZeroSftError
from zero_sft.estimate.storage_profiles import STORAGES, shipped_models

if TYPE_CHECKING:
    from zero_sft.estimate.result import Result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it has no accelerator here
    from zero_sft.estimate.result import document, estimate  # torch and DeepSpeed, which --help does without

    try:
        results = [each for name in _names(options) for each in estimate(name, options)]
        if options.markdown:
            _write(options.markdown, document(results, options))
        if options.plot:
            _plot(results, options)
    except ZeroSftError as error:
        sys.stderr.write(f"error: {error.with_code}\n".replace("--model_name_or_path", "--model"))  # the job's name for it
        return 2
    sys.stdout.write(json.dumps([each.to_dict() for each in results], indent=2) + "\n" if options.json else "")
    for each in [] if options.json else results:
        sys.stdout.write("\n".join(each.lines()) + "\n\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and meanings are the job's where it has them."""
    flag = {"choices": ("True", "False"), "metavar": "True|False"}
    result = argparse.ArgumentParser(
        prog="python -m zero_sft.estimate",
        description="What a ZeRO-3 load and training will need: the real planner for every rank, on headers or a config alone.",
    )
    add = result.add_argument
    add(
        "--model",
        nargs="+",
        required=True,
        metavar="MODEL",
        help=f"a folder, a config.json, a hub id, 'shipped' (all of them), or one of {', '.join(shipped_models())}",
    )
    add("--world_size", type=_positive, nargs="+", required=True, metavar="N", help="GPUs in all; several make a table")
    add("--ranks_per_node", type=_positive, default=8, help="GPUs of a node (default 8)")
    add("--ds_config", "--deepspeed", default="zero3", help="a DeepSpeed config: a JSON file or a shipped name (default zero3)")
    add("--dtype", default="auto", help="auto (the config's), bfloat16, float16 or float32")
    add("--per_device_train_batch_size", type=_positive, default=1, help="rows of a GPU's batch (default 1)")
    add("--model_max_length", type=_positive, default=4096, help="tokens of a row (default 4096)")
    add("--gradient_checkpointing", default="True", **flag)
    add("--packing", default="False", help="rows of several samples, kept apart by a mask", **flag)
    add("--gpu_memory_gib", type=float, default=80.0, help="memory of a GPU (default 80)")
    add("--host_memory_gib", type=float, default=1024.0, help="memory of a node's host (default 1024)")
    add("--storage", default="lustre", help=f"{', '.join(STORAGES)}; or figures of its own: lustre,node_gb_s=10,request_ms=0.5")
    for name in ("--revision", "--cache_dir", "--variant"):
        add(name, help="of a hub id, as in transformers")
    add("--trust_remote_code", default="False", **flag)
    add("--plot", type=Path, metavar="PNG", help="draw one model in one world")
    add("--markdown", type=Path, metavar="FILE", help="write the results as a Markdown document")
    add("--json", action="store_true", help="print the results as JSON")
    return result


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _names(options: argparse.Namespace) -> list[str]:
    return [each for name in options.model for each in (shipped_models() if name == "shipped" else [name])]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"--markdown {path} can't be written: {error.strerror or error}", code="estimate.markdown_unwritable"
        ) from error


def _plot(results: "Sequence[Result]", options: argparse.Namespace) -> None:
    from zero_sft.estimate.plot import draw

    if len(results) != 1:
        raise ArgumentError(
            f"--plot draws one model in one world; these are {len(results)}. Name one of each.", code="estimate.plot_of_several"
        )
    (only,) = results
    draw(f"{only.of.name} on {only.run.world_size:,} GPUs", only.loads, only.device, only.run.device_bytes, options.plot)
