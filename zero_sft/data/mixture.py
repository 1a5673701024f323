"""Make one dataset of several sources: prepare, mix and pack them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from zero_sft.data import cache
from zero_sft.data.dataset import PreparedDataset, make_pipeline, open_cached_source, prepare_source
from zero_sft.data.packing import pack, packed_line
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.samples.parse import DEFAULT_PARSER, SampleParser
from zero_sft.data.sources.data_path import Source, require_sources
from zero_sft.data.templates.choose import Template
from zero_sft.data.workers import usable_processes
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets

_MAX_GROWTH = 1000
"""If a mixture would have more than this many times the samples of its sources, the weights are taken for a mistake."""

_SOURCE = "source"  # temporary column with the index of a row's source, while the sources are mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """All options that determine a dataset, except for the tokenizer and the chat template.

    Args:
        model_max_length: in tokens.
        seed: for a mixture by weights.
        pack: pack samples into rows of `model_max_length` tokens.
        root: the cache folder; None keeps everything in memory.
        processes: the number of worker processes, used if there is enough data.
        embedding_rows: the number of rows in the model's embedding; None if unknown.
    """

    sources: tuple[Source, ...]
    model_max_length: int
    parser: SampleParser = DEFAULT_PARSER
    lazy: bool = False
    seed: int = 0
    pack: bool = False
    root: Path | None = None
    processes: int = 1
    embedding_rows: int | None = None

    @classmethod
    def from_options(cls, options: Any, *, sources: tuple[Source, ...], model_max_length: int, seed: int) -> "DatasetSpec":
        """Make the spec from the options of the job or of the data command: `DataArguments`, or an object with its names."""
        return cls(
            sources=sources,
            model_max_length=model_max_length,
            parser=SampleParser(
                data_format=options.data_format,
                train_on=options.train_on,
                on_bad_sample=options.on_bad_sample,
                overlong=options.overlong,
            ),
            lazy=options.lazy_preprocess,
            seed=seed,
            root=cache.cache_root(options.data_cache_dir),
            processes=options.dataset_num_proc or usable_processes(),
        )

    @property
    def name(self) -> str:
        """The sources as the user wrote them, for messages."""
        return ",".join(source.text for source in self.sources)


def prepare_sources(spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template) -> PreparedDataset:
    """Prepare each source, mix them into one dataset, and pack it if the spec says so. Any rank; does not communicate.

    Raises:
        DataError: as `prepare_source` and `require_sources` raise it.
    """
    pipeline = _pipeline(spec, tokenizer, template)
    require_sources(spec.sources)
    parts = [prepare_source(source.data, pipeline, processes=spec.processes, root=spec.root) for source in spec.sources]
    return _mix_and_pack(parts, spec)


def open_sources(
    spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template, keys: Sequence[str], *, verify: bool = True
) -> PreparedDataset | None:
    """Open the dataset that `prepare_sources` has made, by its cache keys; None unless the cache has all of it.

    Any rank; does not communicate. See `cache.find` for `verify`.
    """
    if spec.root is None or (spec.pack and cache.find(spec.root, _packed_key(spec, keys), verify=False) is None):
        return None
    pipeline = _pipeline(spec, tokenizer, template)
    opened = [
        open_cached_source(spec.root, key, source.data, pipeline, verify=verify)
        for key, source in zip(keys, spec.sources, strict=True)
    ]
    parts = [part for part in opened if part is not None]
    return _mix_and_pack(parts, spec, verify=verify) if len(parts) == len(spec.sources) else None


def _pipeline(spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template) -> Pipeline:
    return make_pipeline(
        tokenizer,
        template,
        model_max_length=spec.model_max_length,
        lazy=spec.lazy,
        parser=spec.parser,
        embedding_rows=spec.embedding_rows,
    )


def _mix_and_pack(parts: Sequence[PreparedDataset], spec: DatasetSpec, *, verify: bool = True) -> PreparedDataset:
    """Mix the sources, and pack the samples if the spec says so; packed rows come from the cache if it has them."""
    mixed = mix(parts, [source.weight for source in spec.sources], spec.seed)
    if not spec.pack:
        return mixed
    if spec.root is None:
        rows = pack(mixed.samples, spec.model_max_length)
    else:
        length, key = spec.model_max_length, _packed_key(spec, mixed.keys)

        def write(file: Path) -> tuple[int, dict[str, Any]]:
            return len(pack(mixed.samples, length, str(file))), {}

        rows, *_ = cache.find_or_store(spec.root, key, write, verify=verify)
    return replace(mixed, rows=rows, packing_note=packed_line(len(mixed.samples), rows, spec.model_max_length))


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
    if None not in weights:
        names = [part.reports[0].file for part in parts]
        mixed, notes = _interleave(unformatted, [weight or 0.0 for weight in weights], seed, names)
    transform = parts[0].transform
    samples = mixed if transform is None else mixed.with_transform(transform)
    return PreparedDataset(
        samples=samples,
        rows=samples,
        reports=tuple(report for part in parts for report in part.reports),
        notes=notes,
        transform=transform,
        keys=[key for part in parts for key in part.keys],
    )


def _interleave(
    parts: Sequence["datasets.Dataset"], weights: Sequence[float], seed: int, names: Sequence[str]
) -> tuple["datasets.Dataset", tuple[str, ...]]:
    """Draw rows by weight until each has been drawn; return the mixture and a line for the log on each part.

    Raises:
        DataError: weights so different from the sources' sizes that the mixture would be far larger than the sources.
    """
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
    counts = Counter(mixed[_SOURCE])
    lines = (
        f"{name}: {counts[number]:,} of {len(mixed):,} rows of the mixture, each sample {counts[number] / len(part):.1f} times"
        for number, (name, part) in enumerate(zip(names, parts, strict=True))
    )
    return mixed.remove_columns(_SOURCE), tuple(lines)
