"""Make one dataset of several sources: prepare, mix and pack them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from zero_sft.data import cache
from zero_sft.data.dataset import PreparedDataset, dataset_of_entry, prepare_source
from zero_sft.data.packing import pack, packed_line
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.columns import parse_columns
from zero_sft.data.samples.embedded_tokens import id_limit
from zero_sft.data.samples.overlong import TRUNCATE
from zero_sft.data.samples.parse import DEFAULT_PARSER, SampleParser
from zero_sft.data.samples.sample_formats import FORMAT_KEYS
from zero_sft.data.sources.data_path import Source, require_sources
from zero_sft.data.templates.choose import Template
from zero_sft.data.tokenize import WEIGHTS
from zero_sft.data.workers import usable_processes
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

_MAX_GROWTH = 1000
"""If a mixture would have more than this many times the samples of its sources, the weights are taken for a mistake."""

_SOURCE = "source"  # temporary column with the index of a row's source, while the sources are mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """All options that determine a dataset, except for the tokenizer and the chat template. For others, see `Pipeline`.

    Args:
        root: the cache folder.
        seed: for a mixture by weights.
        pack: pack samples into rows of `model_max_length` tokens.
        processes: the number of worker processes, used if there is enough data.
        embedding_rows: the number of rows in the model's embedding; None if unknown.
    """

    sources: tuple[Source, ...]
    model_max_length: int
    root: Path
    parser: SampleParser = DEFAULT_PARSER
    overlong: str = TRUNCATE
    lazy: bool = False
    seed: int = 0
    pack: bool = False
    processes: int = 1
    embedding_rows: int | None = None

    @classmethod
    def from_options(
        cls, data: Any, training: Any, *, sources: tuple[Source, ...], pack: bool = False, embedding_rows: int | None = None
    ) -> "DatasetSpec":
        """Make the spec from options of the names in `DataArguments` and `TrainingArguments`; one object may have both."""
        return cls(
            sources=sources,
            model_max_length=training.model_max_length,
            root=cache.cache_root(data.data_cache_dir),
            parser=SampleParser(
                options=ReadOptions(
                    data_format=data.data_format,
                    columns=parse_columns(data.columns, FORMAT_KEYS),
                    tools=data.tools,
                    reasoning=data.reasoning,
                    merge_turns=data.merge_turns,
                ),
                train_on=data.train_on,
                on_bad_sample=data.on_bad_sample,
            ),
            overlong=data.overlong,
            lazy=data.lazy_preprocess,
            seed=sampling_seed(training),
            pack=pack,
            processes=data.dataset_num_proc or usable_processes(),
            embedding_rows=embedding_rows,
        )

    @property
    def name(self) -> str:
        """The sources as the user wrote them, for messages."""
        return ",".join(source.text for source in self.sources)

    def pipeline(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> Pipeline:
        """Make the pipeline from objects to rows; raise `DataError` for contradictory options."""
        if self.lazy and self.overlong != TRUNCATE:
            raise DataError(
                f"--overlong {self.overlong} needs the samples' lengths, which --lazy_preprocess does not know at the start. "
                "Leave out one of the two options.",
                code="data.overlong_needs_lengths",
            )
        return Pipeline(
            parser=self.parser,
            tokenizer=tokenizer,
            template=template,
            model_max_length=self.model_max_length,
            overlong=self.overlong,
            lazy=self.lazy,
            embedding_rows=self.embedding_rows,
            id_limit=id_limit(tokenizer, self.embedding_rows),
        )


def sampling_seed(training: Any) -> int:
    """Return `--data_seed`, or `--seed` without it."""
    return training.seed if training.data_seed is None else training.data_seed


def prepare_sources(spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template) -> PreparedDataset:
    """Prepare each source, mix them into one dataset, and pack it if the spec says so. Any rank; does not communicate.

    Raises:
        DataError: as `prepare_source` and `require_sources` raise it.
    """
    pipeline = spec.pipeline(tokenizer, template)
    require_sources(spec.sources)
    parts = [prepare_source(source.data, pipeline, spec.root, processes=spec.processes) for source in spec.sources]
    return _mix_and_pack(parts, spec)


def open_sources(
    spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template, keys: Sequence[str], *, verify: bool = True
) -> PreparedDataset | None:
    """Open the dataset that `prepare_sources` has made, by its cache keys; None unless the cache has all of it.

    Any rank; does not communicate. See `cache.find` for `verify`.
    """
    if spec.pack and cache.find(spec.root, _packed_key(spec, keys), verify=False) is None:
        return None
    pipeline, parts = spec.pipeline(tokenizer, template), []
    for key, source in zip(keys, spec.sources, strict=True):
        entry = cache.find(spec.root, key, verify=verify)
        if entry is None:
            return None
        parts.append(dataset_of_entry(*entry, spec.root / key, source.data, pipeline))
    return _mix_and_pack(parts, spec, verify=verify)


def _mix_and_pack(parts: Sequence[PreparedDataset], spec: DatasetSpec, *, verify: bool = True) -> PreparedDataset:
    """Mix the sources, and pack the samples if the spec says so; packed rows come from the cache if it has them."""
    mixed = _without_unused_weights(mix(parts, [source.weight for source in spec.sources], spec.seed))
    if not spec.pack:
        return mixed

    def write(file: Path) -> tuple[int, dict[str, Any]]:
        return len(pack(mixed.samples, spec.model_max_length, str(file))), {}

    rows, *_ = cache.find_or_store(spec.root, _packed_key(spec, mixed.keys), write, verify=verify)
    return replace(mixed, rows=rows, packing_note=packed_line(len(mixed.samples), rows, spec.model_max_length))


def _without_unused_weights(prepared: PreparedDataset) -> PreparedDataset:
    """Leave out the column of weights if all weigh 1, so that the loss needs none."""
    if any(report.weighted for report in prepared.reports) or WEIGHTS not in prepared.samples.column_names:
        return prepared
    samples = prepared.samples.remove_columns(WEIGHTS)
    return replace(prepared, samples=samples, rows=samples)


def _packed_key(spec: DatasetSpec, keys: Sequence[str]) -> str:
    weights = [source.weight for source in spec.sources if source.weight is not None]
    mixture = [spec.seed, *(f"{weight / sum(weights):.9f}" for weight in weights)] if weights else []
    return cache.key_of("packed", list(keys), mixture, spec.model_max_length)


def mix(parts: Sequence[PreparedDataset], weights: Sequence[float | None], seed: int) -> PreparedDataset:
    """Mix several datasets into one. Pure, so the result is the same on every rank.

    Without weights, the datasets are concatenated. With weights, rows are drawn at random until every sample has been drawn, so
    sources that are small for their weight are repeated.
    """
    import datasets

    if len(parts) == 1:
        return parts[0]
    unformatted = [part.samples.with_format(None) for part in parts]
    mixed, notes = datasets.concatenate_datasets(unformatted), ()
    counts = [len(part) for part in unformatted]
    if None not in weights:
        names = [part.reports[0].file for part in parts]
        mixed, counts, notes = _interleave(unformatted, [weight or 0.0 for weight in weights], seed, names)
    transform = parts[0].transform
    samples = mixed.with_transform(transform) if transform else mixed
    return PreparedDataset(
        samples=samples,
        rows=samples,
        reports=tuple(report for part in parts for report in part.reports),
        notes=notes,
        source_rows=tuple(counts),
        transform=transform,
        keys=[key for part in parts for key in part.keys],
    )


def _interleave(
    parts: Sequence["datasets.Dataset"], weights: Sequence[float], seed: int, names: Sequence[str]
) -> tuple["datasets.Dataset", list[int], tuple[str, ...]]:
    """Draw rows by weight until each has been drawn; return the mixture, and for each part its rows and a line for the log."""
    import datasets

    rows = [len(part) * sum(weights) / weight for part, weight in zip(parts, weights, strict=True)]
    total = sum(map(len, parts))
    if max(rows) > _MAX_GROWTH * total:
        name = names[rows.index(max(rows))]
        raise DataError(
            f"the weight of {name} is too small: drawing each of its samples takes {max(rows):,.0f} rows, but there are "
            f"{total:,} samples. Give it a larger weight, or leave it out.",
            code="data.weights_too_far_apart",
        )
    mixed = datasets.interleave_datasets(
        [part.add_column(_SOURCE, [number] * len(part)) for number, part in enumerate(parts)],
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
    drawn = Counter(mixed[_SOURCE])
    counts = [drawn[number] for number in range(len(parts))]
    lines = (
        f"{name}: {count:,} of {len(mixed):,} rows of the mixture, each sample {count / len(part):.1f} times"
        for name, part, count in zip(names, parts, counts, strict=True)
    )
    return mixed.remove_columns(_SOURCE), counts, tuple(lines)
