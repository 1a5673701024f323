"""From a recipe to a dataset: sources (`a.json,b.jsonl`, or with weights, `a.json:0.7,b.jsonl:0.3`) prepared, mixed, packed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from zero_sft.data import cache
from zero_sft.data.dataset import Prepared, make_pipeline, open_prepared, prepare
from zero_sft.data.packing import pack, packed_line
from zero_sft.data.parse_samples import PLAIN, Reader
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.source import parse_sources
from zero_sft.data.workers import usable_processes
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

_MOST_REPEATED = 1000
"""A mixture of so many times the rows that there are is taken for a mistake in the weights."""

_SOURCE = "source"  # a column that says which dataset a row is of, while they are mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that says how data becomes a dataset, the tokenizer apart. `paths`: see `parse_sources`.

    `pack`: into rows of `model_max_length` tokens. `root`: the folder of the cache; None keeps everything in memory.
    `processes`: how many prepare, where there is much. `embedding_rows`: of the model; None: not known.
    """

    paths: str
    model_max_length: int
    chat_template: str | None = None
    reader: Reader = PLAIN
    lazy: bool = False
    seed: int = 42
    pack: bool = False
    root: Path | None = None
    processes: int = 1
    embedding_rows: int | None = None

    @classmethod
    def from_options(cls, options: Any, *, paths: str, model_max_length: int, seed: int) -> "Recipe":
        """The recipe that arguments ask for, the job's or the data command's: `DataArguments`, or anything with its names."""
        return cls(
            paths=paths,
            model_max_length=model_max_length,
            chat_template=options.chat_template,
            reader=Reader(
                data_format=options.data_format,
                train_on=options.train_on,
                on_bad_sample=options.on_bad_sample,
                long=options.long,
            ),
            lazy=options.lazy_preprocess,
            seed=seed,
            root=cache.cache_root(options.data_cache_dir),
            processes=options.dataset_num_proc or usable_processes(),
        )


def prepare_sources(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`prepare` for each source of a recipe, one dataset of all, packed if wanted. Any rank by itself; does not communicate.

    Raises:
        DataError: as `prepare`'s and `parse_sources`'.
    """
    pipeline, sources = _pipeline(recipe, tokenizer), parse_sources(recipe.paths)
    require_sources(recipe.paths)
    return _finished([prepare(each.data, pipeline, processes=recipe.processes, root=recipe.root) for each in sources], recipe)


def require_sources(paths: str, *, to_evaluate: bool = False) -> None:
    """Raise `DataError` where a path names no file, before work is spent on the others. Any rank; does not communicate.

    Args:
        to_evaluate: a folder with several splits must say which one: `train` is not what is held out.
    """
    for source in parse_sources(paths):
        source.data.state()
        held_out = source.data.held_out() if to_evaluate else None
        if held_out:
            raise DataError(
                f"--eval_data_path {source.data.name} has several splits. Name the one to evaluate on: "
                f"--eval_data_path {source.data.name}:{held_out}.",
                code="data.eval_split_unnamed",
            )


def require_outputs_outside(paths: str, output_dir: str) -> None:
    """Raise `DataError` where what a run writes would be read as data by the next. Any rank; does not communicate."""
    for source in parse_sources(paths):
        source.data.require_outside(Path(output_dir), option="--output_dir", code="data.output_inside_data")


def open_sources(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, keys: Sequence[str], *, verify: bool = True
) -> Prepared | None:
    """What `prepare_sources` has made, by the keys of its parts; None where this machine's cache has not all of it.

    `verify`: as `cache.find`'s.
    """
    if recipe.root is None or (recipe.pack and cache.find(recipe.root, _packed_key(recipe, keys), verify=False) is None):
        return None
    pipeline, sources = _pipeline(recipe, tokenizer), parse_sources(recipe.paths)
    parts = [
        open_prepared(recipe.root, key, each.data, pipeline, verify=verify) for key, each in zip(keys, sources, strict=True)
    ]
    found = [each for each in parts if each is not None]
    return _finished(found, recipe, verify=verify) if len(found) == len(sources) else None


def _pipeline(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Pipeline:
    return make_pipeline(
        tokenizer,
        chat_template=recipe.chat_template,
        model_max_length=recipe.model_max_length,
        lazy=recipe.lazy,
        reader=recipe.reader,
        embedding_rows=recipe.embedding_rows,
    )


def _finished(parts: Sequence[Prepared], recipe: Recipe, *, verify: bool = True) -> Prepared:
    """The sources' rows in one dataset, packed if wanted; from the cache where they are there."""
    mixed = mix(parts, [each.weight for each in parse_sources(recipe.paths)], recipe.seed)
    if not recipe.pack:
        return mixed
    if recipe.root is None:
        rows = pack(mixed.samples, recipe.model_max_length)
    else:
        length, key = recipe.model_max_length, _packed_key(recipe, mixed.keys)

        def write(file: Path) -> tuple[int, dict[str, Any]]:
            return len(pack(mixed.samples, length, str(file))), {}

        rows, *_ = cache.keep(recipe.root, key, write, verify=verify)
    return replace(mixed, rows=rows, packing_note=packed_line(len(mixed.samples), rows, recipe.model_max_length))


def _packed_key(recipe: Recipe, keys: Sequence[str]) -> str:
    weights = [each.weight for each in parse_sources(recipe.paths) if each.weight is not None]
    drawn = [recipe.seed, *(f"{weight / sum(weights):.9f}" for weight in weights)] if weights else []
    return cache.key_of("packed", list(keys), drawn, recipe.model_max_length)


def mix(parts: Sequence[Prepared], weights: Sequence[float | None], seed: int) -> Prepared:
    """One dataset of several. Pure: the same on every rank.

    Without weights they follow each other. With weights rows are drawn by chance from one or the other until each sample has
    been drawn, so that sources that are small for their weight are repeated.
    """
    import datasets

    if len(parts) == 1:
        return parts[0]
    raw = [part.samples.with_format(None) for part in parts]
    mixed, notes = datasets.concatenate_datasets(raw), ()
    if None not in weights:
        mixed, notes = _drawn(raw, [weight or 0.0 for weight in weights], seed, [part.reports[0].file for part in parts])
    transform = parts[0].transform
    samples = mixed if transform is None else mixed.with_transform(transform)
    return Prepared(
        samples=samples,
        rows=samples,
        reports=tuple(report for part in parts for report in part.reports),
        notes=notes,
        transform=transform,
        keys=[key for part in parts for key in part.keys],
    )


def _drawn(
    parts: Sequence["datasets.Dataset"], weights: Sequence[float], seed: int, names: Sequence[str]
) -> tuple["datasets.Dataset", tuple[str, ...]]:
    """Rows drawn by weight until each has been drawn, and a line for each part.

    Raises:
        DataError: weights so far from the sources' sizes that the mixture would be far larger than they.
    """
    import datasets

    rows = [len(part) * sum(weights) / weight for part, weight in zip(parts, weights, strict=True)]
    whole = sum(map(len, parts))
    if max(rows) > _MOST_REPEATED * whole:
        name = names[rows.index(max(rows))]
        raise DataError(
            f"to draw every sample of {name} by its weight takes {max(rows):,.0f} rows, and there are {whole:,} samples. Give "
            "it a larger weight, or leave it out.",
            code="data.weights_too_far_apart",
        )
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
