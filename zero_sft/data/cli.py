"""What a training will see of its data, beforehand: counts, lengths, and samples with what is trained on marked.

python -m zero_sft.data --model_name_or_path /models/Llama-3.1-8B --data_path my.json --show 3
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.errors import ArgumentError, ZeroSftError

if TYPE_CHECKING:
    from rich.console import Console

BINS = 12
_BAR = 40  # characters of the longest bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    try:
        tokenizer = _tokenizer(options)
        prepared = _prepare(options, tokenizer)
        lengths = prepared.dataset["length"]
        for line in prepared.lines():
            console.print(line, markup=False)
        _print_histogram(lengths, console)
        for number in range(min(options.show, len(prepared.dataset))):
            _print_sample(number, prepared.dataset[number], tokenizer, console)
        if options.plot:
            _draw(lengths, options.plot)
    except ZeroSftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names, meanings and defaults are the job's."""
    result = argparse.ArgumentParser(prog="python -m zero_sft.data", description="What a training will see of its data.")
    add = result.add_argument
    add("--model_name_or_path", required=True, help="whose tokenizer: a folder or a hub id")
    add("--data_path", required=True, help="a file, a folder, or several as a.json:0.7,b.jsonl:0.3")
    add("--model_max_length", type=int, default=512, help="tokens of a sample at most (default 512)")
    add("--chat_template", help="vicuna, chatml, llama3, model or a Jinja file")
    add("--data_format", choices=("sharegpt", "messages", "alpaca", "prompt_completion", "text"))
    add("--train_on", choices=("all", "last"), default="all")
    add("--on_bad_sample", choices=("error", "skip"), default="error")
    add("--long", choices=("truncate", "split", "drop"), default="truncate")
    for name in ("--revision", "--cache_dir", "--subfolder"):
        add(name, help="of the tokenizer, as in transformers")
    add("--trust_remote_code", choices=("True", "False"), default="False", metavar="True|False")
    add(
        "--show", type=int, default=0, metavar="N", help="print the first N samples, what is trained on in colour or ⟦brackets⟧"
    )
    add("--plot", type=Path, metavar="PNG", help="draw the histogram of lengths")
    return result


def _tokenizer(options: argparse.Namespace) -> Any:
    from zero_sft.hub import HubOptions
    from zero_sft.tokenizer import Wanted

    hub = {name: getattr(options, name) for name in ("revision", "cache_dir", "subfolder") if getattr(options, name)}
    wanted = Wanted(
        name=options.model_name_or_path,
        options=HubOptions.from_kwargs(hub | {"trust_remote_code": options.trust_remote_code == "True"}),
        model_max_length=options.model_max_length,
        padding_side="right",
    )
    wanted.check()
    tokenizer, _ = wanted.prepare()
    return tokenizer


def _prepare(options: argparse.Namespace, tokenizer: Any) -> Any:
    from zero_sft.data.dataset import Reader
    from zero_sft.data.mixture import prepare_sources

    reader = Reader(
        data_format=options.data_format, train_on=options.train_on, on_bad_sample=options.on_bad_sample, long=options.long
    )
    return prepare_sources(
        options.data_path,
        tokenizer,
        chat_template=options.chat_template,
        model_max_length=options.model_max_length,
        reader=reader,
    )


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Counts by length, (first, last, how many), in at most `BINS` bins of one width.

    Worked example: lengths 1, 2, 24 → bins of 2: (1, 2, 2), ..., (23, 24, 1).
    """
    width = -(-max(lengths) // BINS)
    counts = [0] * -(-max(lengths) // width)
    for length in lengths:
        counts[max(0, length - 1) // width] += 1
    return [(number * width + 1, (number + 1) * width, count) for number, count in enumerate(counts)]


def _print_histogram(lengths: Sequence[int], console: "Console") -> None:
    ordered = sorted(lengths)
    console.print(
        f"tokens of a sample: least {ordered[0]:,}, median {ordered[len(ordered) // 2]:,}, most {ordered[-1]:,}", markup=False
    )
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        bar = "█" * -(-count * _BAR // most)
        console.print(f"  {first:>9,} to {last:>9,}  {count:>9,}  {bar}", markup=False)


def _print_sample(number: int, sample: Any, tokenizer: Any, console: "Console") -> None:
    from rich.text import Text

    from zero_sft.data.labels import IGNORED

    text = Text(f"\nsample {number + 1}, {len(sample['input_ids']):,} tokens\n", style="bold")
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        if not runs or runs[-1][0] != (label != IGNORED):
            runs.append((label != IGNORED, []))
        runs[-1][1].append(token)
    for trained, tokens in runs:
        words = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        if trained and not console.is_terminal:
            words = f"⟦{words}⟧"
        text.append(words, style="not bold black on green" if trained else "not bold")
    console.print(text)


def _draw(lengths: Sequence[int], path: Path) -> None:
    """The histogram as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.hist(lengths, bins=50, color="tab:green")
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("samples")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--plot {path} can't be written: {error}. Name a .png in a folder that exists.") from error
    finally:
        pyplot.close(figure)
