"""Report on training data before a run: counts, lengths, and samples with the trained tokens marked.

python -m zero_sft.data --model_name_or_path /models/Llama-3.1-8B --data_path my.json --show 3
"""

import itertools
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.arguments.specifications import shared_options, shared_translations
from zero_sft.cluster.world import World
from zero_sft.console.log import open_console, silence_transformers
from zero_sft.console.plots import new_figure, save_figure
from zero_sft.errors import ExportError
from zero_sft.options.command import Command
from zero_sft.options.keywords import pick_options
from zero_sft.options.spec import specs_of
from zero_sft.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from zero_sft.data.dataset import PreparedDataset
    from zero_sft.data.mixture import DatasetSpec
    from zero_sft.data.packing import PackingDecision
    from zero_sft.report.samples import ShownPart, ShownSample

logger = logging.getLogger("zero_sft.data")

BINS = 12
SAMPLES_OF_PAGE = 20
_BAR = 40  # characters of the longest bar
_MOST_OF_DROPPED = 2000  # characters that are shown of a dropped sample

_HUB = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
_TOKENS = ("add_tokens", "add_special_tokens", "resize_vocab")
_DATA = ("data_path", "chat_template", "data_format", "columns", "tools", "reasoning", "merge_turns", "train_on",
         "on_bad_sample", "overlong", "packing", "dataset_num_proc", "data_cache_dir")  # fmt: skip
_TRAINING = ("model_max_length", "per_device_train_batch_size", "seed", "data_seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportArguments:
    """Options of the report."""

    show: int = field(default=0, metadata={"help": "Print this many samples, with the trained tokens in colour or ⟦brackets⟧."})
    show_dropped: int = field(default=0, metadata={"help": "Print this many dropped samples for each reason, at most 20."})
    ids: bool = field(default=False, metadata={"help": "Print the token ids below the samples that are shown."})
    html: str | None = field(default=None, metadata={"help": "File for a page with the report, the lengths and 20 samples."})
    plot: str | None = field(default=None, metadata={"help": "File for a plot of the histogram of lengths."})


def command() -> Command:
    """Return the command and its options."""
    model = [*shared_options(["model_name_or_path"], default=None), *shared_options(_HUB), *shared_options(_TOKENS)]
    data, training = shared_options(_DATA), shared_options(_TRAINING)
    return Command(
        program="python -m zero_sft.data",
        description="Report on training data before a run: counts, lengths, and samples with the trained tokens marked.",
        groups={"Model": model, "Data": data, "Training": training, "Output": list(specs_of(ReportArguments).values())},
        required={
            "model_name_or_path": "a folder or a hub id, such as --model_name_or_path meta-llama/Llama-3.1-8B",
            "data_path": "a file or a folder of samples, such as --data_path data.json",
        },
        positive=("model_max_length", "per_device_train_batch_size", "dataset_num_proc"),
        translations=shared_translations([*model, *data, *training]),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return command().run(argv, _report)


def _report(options: Any, notes: Sequence[str]) -> None:
    from rich.console import Console

    from zero_sft.arguments.vocabulary import added_tokens, required_rows
    from zero_sft.config import prepare_config_from
    from zero_sft.data.mixture import DatasetSpec, prepare_sources
    from zero_sft.data.packing import resolve_packing
    from zero_sft.data.sources.data_path import parse_sources
    from zero_sft.data.templates.choose import choose_template
    from zero_sft.hub.options import HubOptions
    from zero_sft.hub.source import locate_model
    from zero_sft.rope import text_config
    from zero_sft.tokenizer import TokenizerSpec

    open_console(World.alone())
    silence_transformers(World.alone())
    for note in notes:
        logger.info(note)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    options.lazy_preprocess = False  # the report needs the lengths
    source = locate_model(options.model_name_or_path, pick_options(HubOptions, options), World.alone())
    tokenizer_spec = TokenizerSpec.of(source, options.model_max_length, padding_side="right", added=added_tokens(options))
    tokenizer_spec.require_valid()
    tokenizer, _ = tokenizer_spec.prepare(source)
    config = text_config(prepare_config_from(source, World.alone(), model_max_length=options.model_max_length))
    # The job's decision, unless it is given --attn_implementation, which the report does not take.
    packing = resolve_packing(options.packing, config, attention=None, lazy=False)
    template = choose_template(options.chat_template, tokenizer)
    sources = parse_sources(options.data_path)
    rows = required_rows(options, tokenizer, config, has_adapters=False) or getattr(config, "vocab_size", None)
    spec = DatasetSpec.from_options(options, options, sources=sources, pack=packing.enabled, embedding_rows=rows)
    prepared = prepare_sources(spec, tokenizer, template)
    samples, lengths = prepared.samples, prepared.samples["length"]
    lines = [*prepared.lines(), *prepared.warnings(), *_notes(packing, prepared, options)]
    for line in lines:
        console.print(printable(line), markup=False)
    _print_histogram(lengths, console)
    shown_count = min(max(options.show, SAMPLES_OF_PAGE if options.html else 0), len(samples))
    shown = _shown_samples(samples.select(range(shown_count)), spec, tokenizer)
    for number, sample in enumerate(shown[: options.show]):
        _print_sample(number, sample, console, samples[number]["input_ids"] if options.ids else ())
    _print_dropped(prepared, spec, options.show_dropped, console)
    if options.html:
        _write_page(Path(options.html), spec, lines, prepared, shown[:SAMPLES_OF_PAGE])
        console.print(f"page: {options.html}", markup=False)
    if options.plot:
        _draw(lengths, Path(options.plot), f"{len(lengths):,} samples of {spec.name}")
        console.print(f"lengths drawn in {options.plot}", markup=False)


def _shown_samples(samples: Any, spec: "DatasetSpec", tokenizer: Any) -> "list[ShownSample]":
    """Decode samples, and find in them tools, calls, results and thoughts."""
    from zero_sft.report.kinds import find_kinds
    from zero_sft.report.samples import ShownSample

    objects = find_objects(spec, [str(sample["place"]) for sample in samples])
    shown = []
    for sample in samples:
        parts, place = _parts(sample, tokenizer), str(sample["place"])
        found = spec.parser.read([(objects[place], place)]).samples if place in objects else ()
        kinds = find_kinds(found[0] if found else None, "".join(text for text, _ in parts))
        shown.append(ShownSample(place=place, tokens=len(sample["input_ids"]), parts=tuple(_cut(parts, kinds))))
    return shown


def find_objects(spec: "DatasetSpec", places: Sequence[str]) -> dict[str, Any]:
    """Read the sources until the objects at these places are found, and return them by their places."""
    wanted, found = set(places), {}
    for source in spec.sources:
        if wanted:
            for value, place in source.data.objects():
                if place in wanted:
                    wanted.remove(place)
                    found[place] = value
                    if not wanted:
                        break
    return found


def _cut(parts: Sequence[tuple[str, float]], kinds: Sequence[tuple[int, int, str]]) -> "Iterator[ShownPart]":
    """Cut the parts of a text, with their weights, where a kind begins or ends."""
    from zero_sft.report.samples import ShownPart

    start, borders = 0, sorted({border for first, stop, _ in kinds for border in (first, stop)})
    for text, weight in parts:
        stop = start + len(text)
        inner = [border for border in borders if start < border < stop]
        for first, last in itertools.pairwise([start, *inner, stop]):
            kind = next((kind for begin, end, kind in kinds if begin <= first and last <= end), "")
            yield ShownPart(text=text[first - start : last - start], weight=weight, kind=kind)
        start = stop


def _write_page(
    path: Path, spec: "DatasetSpec", lines: Sequence[str], prepared: "PreparedDataset", shown: "Sequence[ShownSample]"
) -> None:
    """Write the page of `--html`; raise `ExportError` if it can't be written."""
    from zero_sft.report.samples import ShownSource, samples_page

    rows = prepared.source_rows or [report.kept for report in prepared.reports]
    sources = [
        ShownSource(
            name=report.file,
            samples=report.samples,
            kept=report.kept,
            tokens=report.tokens or 0,
            trained_tokens=report.trained_tokens or 0,
            share=count / sum(rows),
        )
        for report, count in zip(prepared.reports, rows, strict=True)
    ]
    bins = histogram(prepared.samples["length"])
    page = samples_page(f"Training data: {spec.name}", lines, sources, bins, shown)
    try:
        path.expanduser().write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {error.strerror or error}. Name another --html.", code="export.unwritable"
        ) from error


def _parts(sample: Any, tokenizer: Any) -> list[tuple[str, float]]:
    """Decode a sample in parts of tokens that have one weight in the loss; 0 stands for what is not trained on."""
    from zero_sft.data.tokenize import IGNORE_INDEX, WEIGHTS

    labels, weights = sample["labels"], sample.get(WEIGHTS) or [1.0] * len(sample["labels"])
    given = [float(weight) * (label != IGNORE_INDEX) for label, weight in zip(labels, weights, strict=True)]
    parts = []
    for weight, run in itertools.groupby(zip(sample["input_ids"], given, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append((printable(text), weight))
    return parts


def _notes(packing: "PackingDecision", prepared: "PreparedDataset", options: Any) -> list[str]:
    """Return lines on how the job forms batches, as far as one rank shows, and on the cost per trained token."""
    from zero_sft.data.packing import packing_unless_too_few
    from zero_sft.data.padding_cost import ALIKE, AT_RANDOM, PACKED, cost_lines

    samples, batch = prepared.samples, options.per_device_train_batch_size
    job = packing_unless_too_few(packing, options.packing, len(prepared.rows), batch)
    lines = [prepared.packing_note if job.enabled else f"not packed: {job.reason}"]
    if len(samples) < batch:
        lines.append(f"too few to train on: a batch of one rank needs {batch} (--per_device_train_batch_size)")
    return lines + cost_lines(
        samples["length"],
        trained_tokens=_trained_tokens(samples),
        window=options.model_max_length,
        packed_rows=len(prepared.rows) if packing.enabled else None,
        batch_size=batch,
        chosen=PACKED if job.enabled else ALIKE if options.packing is None else AT_RANDOM,
    )


def _trained_tokens(dataset: Any) -> int:
    """Count the trained tokens of all rows; rows that a mixture repeats count each time."""
    from zero_sft.data.tokenize import IGNORE_INDEX

    batches = dataset.select_columns(["labels"]).with_format("arrow").iter(10_000)
    chunks = (chunk for batch in batches for chunk in batch.column("labels").chunks)
    return sum(int((chunk.flatten().to_numpy() != IGNORE_INDEX).sum()) for chunk in chunks)


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return a histogram as (first, last, count) of at most `BINS` bins of equal width, from the least length up.

    Worked example: lengths 1, 2, 24 → bins of 2: (1, 2, 2), ..., (23, 24, 1).
    """
    least = min(lengths)
    span = max(lengths) - least + 1
    width = -(-span // BINS)
    counts = [0] * -(-span // width)
    for length in lengths:
        counts[(length - least) // width] += 1
    starts = range(least, least + span, width)
    return [(start, min(start + width, least + span) - 1, count) for start, count in zip(starts, counts, strict=True)]


def _print_histogram(lengths: Sequence[int], console: "Console") -> None:
    ordered = sorted(lengths)
    console.print(
        f"tokens per sample: least {ordered[0]:,}, median {statistics.median(ordered):,.0f}, most {ordered[-1]:,}",
        markup=False,
    )
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        bar = "█" * -(-count * _BAR // most)
        console.print(f"  {first:>9,} to {last:>9,}  {count:>9,}  {bar}", markup=False)


_STYLES = {"": "", "tools": " blue", "call": " bold magenta", "result": " cyan", "thoughts": " italic"}
"""The style of a part of each kind, without the colour behind it."""


def _print_sample(number: int, sample: "ShownSample", console: "Console", ids: Sequence[int]) -> None:
    from rich.text import Text

    text = Text(f"\nsample {number + 1}, {sample.tokens:,} tokens\n", style="bold")
    for weight, run in itertools.groupby(sample.parts, key=lambda part: part.weight):
        parts = list(run)
        if weight and not console.is_terminal:
            words = "".join(part.text for part in parts)
            text.append(f"⟦{words}⟧" if weight == 1 else f"⟦{weight:g}: {words}⟧", style="not bold")
            continue
        behind = " on green" if weight == 1 else " on yellow" if weight else ""
        for part in parts:
            front = _STYLES[part.kind] or (" black" if weight else "")
            text.append(part.text, style=f"not bold{front}{behind}")
    if ids:
        text.append("\n" + " ".join(map(str, ids)), style="not bold dim")
    console.print(text)


def _print_dropped(prepared: "PreparedDataset", spec: "DatasetSpec", count: int, console: "Console") -> None:
    """Print the first dropped samples for each reason, and those that can't be used with their errors."""
    if count < 1:
        return
    dropped = [
        (reason, place)
        for report in prepared.reports
        for reason, places in report.dropped_places.items()
        for place in places[:count]
    ]
    objects = find_objects(spec, [place for _, place in dropped])
    for reason, place in dropped:
        words = json.dumps(objects.get(place), ensure_ascii=False, indent=1, default=str)
        console.print(f"\ndropped, {reason}: {place}", style="bold", markup=False)
        console.print(printable(words if len(words) <= _MOST_OF_DROPPED else f"{words[:_MOST_OF_DROPPED]} ..."), markup=False)
    for message in (message for report in prepared.reports for message in report.first_bad[:count]):
        console.print("\nskipped, since it is bad:", style="bold", markup=False)
        console.print(printable(message), markup=False)
    if not dropped and not any(report.first_bad for report in prepared.reports):
        console.print("\nno sample was dropped", markup=False)


def _draw(lengths: Sequence[int], path: Path, title: str) -> None:
    """Draw the histogram of lengths into a file."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.hist(lengths, bins=50, color="tab:green")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.set_xlabel("tokens per sample, at most --model_max_length")
    axes.set_ylabel("samples")
    save_figure(figure, path)
