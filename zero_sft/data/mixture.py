"""Several sources of samples in one dataset: `a.json,b.jsonl`, or with weights, `a.json:0.7,b.jsonl:0.3`."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from zero_sft.data.dataset import Prepared, Reader, prepare
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

_SOURCE = "source"  # a column that says which dataset a row is of, while they are mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file or folder, and its share of the mixture; None: all of it, once."""

    path: Path
    weight: float | None = None


def parse_sources(text: str) -> list[Source]:
    """The sources that `--data_path` names. An existing path is one source, whatever characters it has.

    Raises:
        DataError: an empty part, a weight that is no number above 0, or weights for some of the sources only.
    """
    if _exists(text):
        return [Source(path=Path(text).expanduser())]
    sources = [_source(part.strip(), text) for part in text.split(",")]
    weighted = sum(each.weight is not None for each in sources)
    if 0 < weighted < len(sources):
        raise DataError(f"{text}: weights for {weighted} of {len(sources)} sources. Give each a weight, or none.")
    return sources


def _exists(text: str) -> bool:
    return Path(text).expanduser().exists()


def _source(part: str, text: str) -> Source:
    path, colon, weight = part.rpartition(":")
    if not part:
        raise DataError(f"{text!r} names an empty path. Write a.json,b.jsonl or a.json:0.7,b.jsonl:0.3.")
    if not colon or _exists(part):
        return Source(path=Path(part).expanduser())
    try:
        share = float(weight)
    except ValueError:
        return Source(path=Path(part).expanduser())
    if not path or not math.isfinite(share) or share <= 0:
        raise DataError(f"{part}: a weight is a number above 0, after a path; got {weight!r}. Write a.json:0.7,b.jsonl:0.3.")
    return Source(path=Path(path).expanduser(), weight=share)


def prepare_sources(
    paths: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None,
    model_max_length: int,
    reader: Reader,
    lazy: bool = False,
    seed: int = 42,
) -> Prepared:
    """`prepare` for each source that `paths` names, and one dataset of all. Any rank by itself; does not communicate.

    Raises:
        DataError: as `prepare`'s and `parse_sources`'.
    """
    sources = parse_sources(paths)
    options = {"chat_template": chat_template, "model_max_length": model_max_length, "reader": reader, "lazy": lazy}
    parts = [prepare(each.path, tokenizer, **options) for each in sources]
    return mix(parts, [each.weight for each in sources], seed)


def mix(parts: Sequence[Prepared], weights: Sequence[float | None], seed: int) -> Prepared:
    """One dataset of several. Pure: the same on every rank.

    Without weights they follow each other. With weights rows are drawn by chance from one or the other until each sample has
    been drawn, so that sources that are small for their weight are repeated.
    """
    import datasets

    if len(parts) == 1:
        return parts[0]
    rows = [each.dataset.with_format(None) for each in parts]
    mixed, lines = datasets.concatenate_datasets(rows), ()
    if None not in weights:
        mixed, lines = _drawn(rows, [weight or 0.0 for weight in weights], seed, [each.reports[0].file for each in parts])
    transform = parts[0].transform
    return Prepared(
        dataset=mixed if transform is None else mixed.with_transform(transform),
        reports=tuple(report for each in parts for report in each.reports),
        mixed=lines,
        transform=transform,
    )


def _drawn(
    parts: Sequence["datasets.Dataset"], weights: Sequence[float], seed: int, names: Sequence[str]
) -> tuple["datasets.Dataset", tuple[str, ...]]:
    """Rows drawn by weight until each has been drawn, and a line for each part."""
    import datasets

    mixed = datasets.interleave_datasets(
        [part.add_column(_SOURCE, [number] * len(part)) for number, part in enumerate(parts)],
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
    counts = Counter(mixed[_SOURCE])
    lines = (
        f"{name}: {counts[number]:,} of {len(mixed):,} rows of the mixture, each sample {counts[number] / len(part):.1f} times"
        for number, (name, part) in enumerate(zip(names, parts, strict=True))
    )
    return mixed.remove_columns(_SOURCE), tuple(lines)
