"""What a training will see of its data, beforehand: counts, lengths, and samples with what is trained on marked.

python -m zero_sft.data --model_name_or_path /models/Llama-3.1-8B --data_path my.json --show 3
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.cluster.world import World
from zero_sft.console.log import open_console, quieten_transformers
from zero_sft.console.printable import printable
from zero_sft.errors import ArgumentError, ZeroSftError

if TYPE_CHECKING:
    from rich.console import Console

    from zero_sft.data.dataset import Prepared
    from zero_sft.data.packing import Packing
    from zero_sft.hub.source import ModelSource

BINS = 12
_BAR = 40  # characters of the longest bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    from rich.console import Console

    from zero_sft.data.mixture import DatasetSpec, prepare_sources
    from zero_sft.data.sources.data_path import parse_sources
    from zero_sft.data.templates.choose import choose_template

    open_console(World())
    quieten_transformers(World())
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    try:
        source = _source(options)
        tokenizer, config = _tokenizer(source, options), _config(source, options)
        packing = _packing(options, config)
        template = choose_template(options.chat_template, tokenizer)
        sources = parse_sources(options.data_path)
        spec = DatasetSpec.from_options(options, sources=sources, model_max_length=options.model_max_length, seed=options.seed)
        rows = getattr(config, "vocab_size", None)
        prepared = prepare_sources(replace(spec, pack=packing.on, embedding_rows=rows), tokenizer, template)
        samples, lengths = prepared.samples, prepared.samples["length"]
        notes = _notes(packing, prepared, options)
        for line in [*prepared.lines(), *prepared.warnings(), *notes]:
            console.print(printable(line), markup=False)
        _print_histogram(lengths, console)
        for number in range(min(options.show, len(samples))):
            _print_sample(number, samples[number], tokenizer, console)
        if options.plot:
            _draw(lengths, options.plot, f"{len(lengths):,} samples of {options.data_path}")
            console.print(f"lengths drawn in {options.plot}", markup=False)
    except ZeroSftError as error:
        sys.stderr.write(f"error: {error.with_code}\n")
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names, meanings and defaults are the job's."""
    from zero_sft.arguments.inherited import listed_specifications

    specs = listed_specifications()
    length, batch, seed = (specs[name].default for name in ("model_max_length", "per_device_train_batch_size", "seed"))
    result = argparse.ArgumentParser(prog="python -m zero_sft.data", description="What a training will see of its data.")
    add = result.add_argument
    add("--model_name_or_path", required=True, help="whose tokenizer: a folder or a hub id")
    add("--data_path", required=True, help="a file, a folder, or several as a.json:0.7,b.jsonl:0.3")
    add("--model_max_length", type=int, default=length, help=f"tokens of a sample at most (default {length})")
    add("--chat_template", help="vicuna, chatml, llama3, model or a Jinja file")
    add("--data_format", choices=("sharegpt", "messages", "alpaca", "prompt_completion", "text"))
    add("--train_on", choices=("all", "last"), default="all")
    add("--on_bad_sample", choices=("error", "skip"), default="error")
    add("--long", choices=("truncate", "split", "drop"), default="truncate")
    for name in ("--revision", "--cache_dir", "--subfolder"):
        add(name, help="of the tokenizer, as in transformers")
    add("--trust_remote_code", choices=("True", "False"), default="False", metavar="True|False")
    add(
        "--show",
        type=_number,
        default=0,
        metavar="N",
        help="print the first N samples, what is trained on in colour or ⟦brackets⟧",
    )
    add("--packing", choices=("True", "False"), help="by default where the model keeps packed samples apart")
    add(
        "--per_device_train_batch_size",
        type=_count,
        default=batch,
        help=f"samples of a batch, for the cost of padding (default {batch})",
    )
    add("--seed", type=_number, default=seed, help="of weighted mixtures; the job's --data_seed or --seed")
    add("--dataset_num_proc", type=_count, help="processes that prepare; by default one a core, 16 at most")
    add("--data_cache_dir", help="where prepared data is kept, for the job to find")
    result.set_defaults(lazy_preprocess=False)  # the lengths are what one is here for
    add("--plot", type=Path, metavar="PNG", help="draw the histogram of lengths")
    return result


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _source(options: argparse.Namespace) -> "ModelSource":
    from zero_sft.hub.options import HubOptions
    from zero_sft.hub.source import locate_model_alone

    given = {name: getattr(options, name) for name in ("revision", "cache_dir", "subfolder") if getattr(options, name)}
    hub = HubOptions(trust_remote_code=options.trust_remote_code == "True", **given)
    return locate_model_alone(options.model_name_or_path, hub)


def _tokenizer(source: "ModelSource", options: argparse.Namespace) -> Any:
    from zero_sft.tokenizer import TokenizerSpec

    spec = TokenizerSpec.of(source, options.model_max_length, padding_side="right")
    spec.check()
    tokenizer, _ = spec.prepare(source)
    return tokenizer


def _wanted(options: argparse.Namespace) -> bool | None:
    """What `--packing` says."""
    return None if options.packing is None else options.packing == "True"


def _config(source: "ModelSource", options: argparse.Namespace) -> Any:
    """The language model's."""
    from zero_sft.config import prepare_config_from, text_config

    return text_config(prepare_config_from(source, World(), model_max_length=options.model_max_length))


def _packing(options: argparse.Namespace, config: Any) -> "Packing":
    """As the job would decide."""
    from zero_sft.data.packing import choose_packing

    return choose_packing(_wanted(options), config, attention=None, lazy=options.lazy_preprocess)


def _notes(packing: "Packing", prepared: "Prepared", options: argparse.Namespace) -> list[str]:
    """How the job makes its batches, as far as those of one rank tell, and what a trained token costs."""
    from zero_sft.data.packing import unless_too_few
    from zero_sft.data.padding_cost import ALIKE, AT_RANDOM, PACKED, cost_lines

    samples, batch = prepared.samples, options.per_device_train_batch_size
    job = unless_too_few(packing, _wanted(options), len(prepared.rows), batch)
    lines = [prepared.packing_note if job.on else f"not packed: {job.reason}"]
    if len(samples) < batch:
        lines.append(f"too few to train on: a batch of one rank needs {batch} (--per_device_train_batch_size)")
    return lines + cost_lines(
        samples["length"],
        trained_tokens=_trained_tokens(samples),
        window=options.model_max_length,
        packed_rows=len(prepared.rows) if packing.on else None,
        batch_size=batch,
        chosen=PACKED if job.on else ALIKE if _wanted(options) is None else AT_RANDOM,
    )


def _trained_tokens(dataset: Any) -> int:
    """Of all rows, those of a mixture as often as they are in it."""
    from zero_sft.data.tokenize import IGNORED

    batches = dataset.select_columns(["labels"]).with_format("arrow").iter(10_000)
    return sum(
        int((chunk.flatten().to_numpy() != IGNORED).sum()) for batch in batches for chunk in batch.column("labels").chunks
    )


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Counts by length, (first, last, how many), in at most `BINS` bins of one width, from the least length on.

    Worked example: lengths 1, 2, 24 → bins of 2: (1, 2, 2), ..., (23, 24, 1).
    """
    least = min(lengths)
    span = max(lengths) - least + 1
    width = -(-span // BINS)
    counts = [0] * -(-span // width)
    for length in lengths:
        counts[(length - least) // width] += 1
    most = least + span - 1
    return [(least + n * width, min(most, least + (n + 1) * width - 1), count) for n, count in enumerate(counts)]


def _print_histogram(lengths: Sequence[int], console: "Console") -> None:
    ordered = sorted(lengths)
    console.print(
        f"tokens of a sample: least {ordered[0]:,}, median {statistics.median(ordered):,.0f}, most {ordered[-1]:,}",
        markup=False,
    )
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        bar = "█" * -(-count * _BAR // most)
        console.print(f"  {first:>9,} to {last:>9,}  {count:>9,}  {bar}", markup=False)


def _print_sample(number: int, sample: Any, tokenizer: Any, console: "Console") -> None:
    from rich.text import Text

    from zero_sft.data.tokenize import IGNORED

    text = Text(f"\nsample {number + 1}, {len(sample['input_ids']):,} tokens\n", style="bold")
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        if not runs or runs[-1][0] != (label != IGNORED):
            runs.append((label != IGNORED, []))
        runs[-1][1].append(token)
    for trained, tokens in runs:
        words = printable(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        if trained and not console.is_terminal:
            words = f"⟦{words}⟧"
        text.append(words, style="not bold black on green" if trained else "not bold")
    console.print(text)


def _draw(lengths: Sequence[int], path: Path, title: str) -> None:
    """The histogram as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.hist(lengths, bins=50, color="tab:green")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.set_xlabel("tokens of a sample, at most --model_max_length")
    axes.set_ylabel("samples")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"--plot {path} can't be written: {error}. Name a .png in a folder that exists.", code="arguments.plot_unwritable"
        ) from error
    finally:
        pyplot.close(figure)
