"""Command `python -m zero_sft.estimate`: print an estimate as text or JSON, or write a table or a plot."""

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.adapters.options import unusable_in_4_bits
from zero_sft.arguments.specifications import shared_options, shared_translations
from zero_sft.console import progress
from zero_sft.errors import ArgumentError
from zero_sft.estimate.storage_profiles import STORAGES, shipped_models
from zero_sft.options.command import Command
from zero_sft.options.resolve import Translation
from zero_sft.options.spec import specs_of
from zero_sft.printable import with_count

if TYPE_CHECKING:
    from zero_sft.estimate.result import Result

_MODEL = (
    "trust_remote_code", "revision", "token", "cache_dir", "variant", "dtype", "attn_implementation", "load_in_4bit",
    "bnb_4bit_use_double_quant",
)  # fmt: skip
_TRAINING = (
    "deepspeed",
    "per_device_train_batch_size",
    "model_max_length",
    "activation_checkpointing",
    "packing",
    "save_async",
    "local_save_dir",
    "sequence_parallel_size",
    "tiled_mlp",
)
_LORA = ("lora_r", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "lora_bias", "use_dora")


LARGEST_WORLD_SIZE = 131_072
"""More GPUs than any cluster has, as a mistyped number may ask for; every rank is planned, in milliseconds each."""

_RANKS_IN_A_MOMENT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateArguments:
    """Options of the cluster and of the output."""

    world_size: list[int] = field(metadata={"help": "Total number of GPUs; several numbers give several estimates."})
    ranks_per_node: int = field(default=8, metadata={"help": "GPUs per node."})
    gpu_memory_gib: float = field(default=80.0, metadata={"help": "Memory of each GPU in GiB."})
    host_memory_gib: float = field(default=1024.0, metadata={"help": "Host memory of each node in GiB."})
    storage: str = field(
        default="lustre",
        metadata={"help": f"{', '.join(STORAGES)}; or your own figures: lustre,node_gb_s=10,request_ms=0.5"},
    )
    plot: str | None = field(default=None, metadata={"help": "File for a plot of one model with one world size."})
    markdown: str | None = field(default=None, metadata={"help": "Markdown file for the results."})
    json: bool = field(default=False, metadata={"help": "Print the results as JSON."})


def command() -> Command:
    """Return the command and its options."""
    models = ", ".join(shipped_models())
    names = shared_options(
        ["model_name_or_path"],
        kinds=frozenset({"list"}),
        default=None,
        help=f"Models: folders, config.json files, hub ids, names out of {models}, or `shipped` for all of these names.",
    )
    model, training = [*names, *shared_options(_MODEL)], [*shared_options(_TRAINING), *shared_options(_LORA)]
    return Command(
        program="python -m zero_sft.estimate",
        description="Estimate what loading and training with ZeRO-3 need on every rank, from headers or only a config.",
        groups={"Model": model, "Training": training, "Cluster and output": list(specs_of(EstimateArguments).values())},
        required={
            "model_name_or_path": "a folder, a hub id or a shipped name, such as --model_name_or_path Llama-3.1-8B",
            "world_size": "the total number of GPUs, such as --world_size 64",
        },
        positive=("world_size", "ranks_per_node", "per_device_train_batch_size", "model_max_length", "gpu_memory_gib",
                  "host_memory_gib", "sequence_parallel_size", "tiled_mlp"),
        largest={"world_size": LARGEST_WORLD_SIZE},
        translations={
            **shared_translations([*model, *training]),
            "model": Translation(name="model_name_or_path"),
            "ds_config": Translation(name="deepspeed"),
        },
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return command().run(argv, _report)


def _report(options: Any, notes: Sequence[str]) -> None:
    for note in notes:
        sys.stderr.write(f"{note}\n")
    for line in _remarks(options):
        sys.stderr.write(f"{line}\n")
    if options.load_in_4bit:
        for error in unusable_in_4_bits(vars(options), adapters=options.lora_r is not None):
            raise error
    models = [model for name in options.model_name_or_path for model in (shipped_models() if name == "shipped" else [name])]
    _check_outputs(options, len(models) * len(options.world_size))
    results = _estimate(models, options)
    if options.markdown:
        with _explained("markdown", options.markdown):
            from zero_sft.estimate.result import document

            Path(options.markdown).write_text(document(results, options, _as_words(options)), encoding="utf-8")
    if options.plot:
        with _explained("plot", options.plot):
            _plot(results[0], Path(options.plot))
    if options.json:
        sys.stdout.write(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
    else:
        sys.stdout.writelines("\n".join(result.lines()) + "\n\n" for result in results)


def _remarks(options: Any) -> Iterator[str]:
    """Yield lines about nodes that are not full, and about computations of more than a few seconds."""
    per_node = options.ranks_per_node
    for world_size in options.world_size:
        if world_size > per_node and world_size % per_node:
            yield (
                f"--world_size {world_size:,} is not a multiple of --ranks_per_node {per_node}: the last node is estimated "
                f"with {with_count(world_size % per_node, 'GPU')}"
            )
    if max(options.world_size) > _RANKS_IN_A_MOMENT:
        yield f"planning the reads of each of {max(options.world_size):,} ranks: this may take minutes"


def _check_outputs(options: Any, estimates: int) -> None:
    """Check what the results will be written to, before the minutes that many estimates may take.

    Raises:
        ArgumentError: a plot of several estimates, or a file that can't be written.
    """
    if options.plot and estimates != 1:
        raise ArgumentError(
            f"--plot draws one estimate, but there are {estimates}: give one model and one --world_size.",
            code="estimate.plot_of_several",
        )
    for option in ("markdown", "plot"):
        if name := getattr(options, option):
            path = Path(name)
            with _explained(option, name):
                if path.is_file() or path.is_dir():
                    path.open("a").close()
                elif not path.exists():  # else a device, such as /dev/stdout
                    tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def _explained(option: str, path: str) -> Iterator[None]:
    """Turn an OSError into an ArgumentError that names the option."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(
            f"--{option} {path} can't be written: {error.strerror or error}", code="estimate.output_unwritable"
        ) from error


def _estimate(models: Sequence[str], options: Any) -> "list[Result]":
    warnings.filterwarnings("ignore")
    # Hide DeepSpeed's warning that there is no accelerator.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from zero_sft.estimate.result import estimate  # imports torch and DeepSpeed, which --help doesn't need

    if sys.stderr.isatty():
        from zero_sft.console.bars import display_for

        progress.set_display(display_for(sys.stderr))
    try:
        return [result for model in models for result in estimate(model, options)]
    finally:
        progress.set_display(None)


def _as_words(options: Any) -> str:
    """Return the command line of a document: every option that differs from its default, but not the token."""
    words = ["python -m zero_sft.estimate"]
    for name, spec in command().specs.items():
        value = getattr(options, name)
        if value != spec.default and name not in ("json", "plot", "token"):
            words.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)


def _plot(result: "Result", path: Path) -> None:
    from zero_sft.estimate.plot import draw

    title = f"{result.model.name} on {result.run.world_size:,} GPUs"
    draw(title, result.loads, result.device, result.run.device_bytes, path)
