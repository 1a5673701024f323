"""Turn objects of a file into rows of a dataset, with plain data and pure functions that can be sent to worker processes.

A row of a pipeline is a tokenised sample: `input_ids`, `labels`, `weights`, `length`, and its `place` for messages. With lazy
tokenising it is the sample as JSON text, and `Pipeline.__call__`, which datasets calls as a transform, makes ids and labels
when they are needed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from zero_sft.data.report import CUT_OFF, MOST_PLACES, NO_ANSWER, TOO_LONG, DataReport, total
from zero_sft.data.samples.conversation import SYSTEM, Conversation, PromptCompletion, Sample, TokenIds, ToolCall, Turn
from zero_sft.data.samples.embedded_tokens import require_embedded, require_ids
from zero_sft.data.samples.overlong import DROP, SPLIT, TRUNCATE, split_rounds
from zero_sft.data.samples.parse import SampleParser, apply_to_usable
from zero_sft.data.templates.choose import Template, render
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.tokenize import WEIGHTS, TokenizedSample, label_ids, tokenize_rendered

_IDS = pyarrow.list_(pyarrow.int32())
TOKENS = pyarrow.schema(
    [("input_ids", _IDS), ("labels", _IDS), (WEIGHTS, pyarrow.list_(pyarrow.float32())), ("length", pyarrow.int32())]
    + [("place", pyarrow.string())]
)
TEXTS = pyarrow.schema([("sample", pyarrow.string())])

_UNUSED = "which the template does not use"

_SUMMED = ("trained_tokens", "cut_tokens", "cut_trained_tokens", "thoughts", "dropped_thoughts")
"""The counts of a `TokenizedSample` that a report sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Rows made from a batch of objects, with `Pipeline.schema`, and the report on those objects."""

    rows: pyarrow.RecordBatch
    report: DataReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The steps from objects to rows: parse, render, tokenise, label.

    Args:
        model_max_length: in tokens.
        overlong: "truncate", "split" between rounds or "drop" samples longer than that.
        lazy: postpone tokenising until a row is needed.
        id_limit: token ids from here on are refused, since the model has no embedding for them. None: the tokenizer has no
            such ids, so none is checked.
        embedding_rows: of the model, for samples that are tokenised already; None: not known.
    """

    parser: SampleParser
    tokenizer: PreTrainedTokenizerBase
    template: Template
    model_max_length: int
    overlong: str = TRUNCATE
    lazy: bool = False
    id_limit: int | None = None
    embedding_rows: int | None = None

    @property
    def schema(self) -> pyarrow.Schema:
        """The Arrow schema of the rows."""
        return TEXTS if self.lazy else TOKENS

    def make_rows(self, objects: Sequence[tuple[Any, str]]) -> RowBatch:
        """Make the rows of a batch of objects, each with its place for messages, in order.

        Raises:
            DataError: a bad sample, unless bad samples are skipped.
        """
        parsed = self.parser.read(objects)
        answered = [sample for sample in parsed.samples if self._is_answered(sample)]
        columns, report = self._text_rows(answered) if self.lazy else self._token_rows(answered)
        rows = pyarrow.RecordBatch.from_pydict(columns, schema=self.schema)
        parsing = DataReport(
            formats=parsed.formats,
            samples=len(parsed.samples) + len(parsed.bad),
            dropped_turns=parsed.dropped_turns,
            unread_keys=parsed.unread_keys,
            changes=parsed.changes,
            bad=len(parsed.bad),
            first_bad=tuple(parsed.bad),
            dropped={NO_ANSWER: len(parsed.samples) - len(answered)},
            dropped_places=_places((NO_ANSWER, sample) for sample in parsed.samples if not self._is_answered(sample)),
        )
        return RowBatch(rows=rows, report=total([parsing, replace(report, kept=rows.num_rows)]))

    def _text_rows(self, samples: Sequence[Sample]) -> tuple[dict[str, list], DataReport]:
        """Keep samples as text, to be tokenised later, but check now that they can be used.

        - `id_limit` is set: all samples are tokenised, since their ids must be checked.
        - Bad samples are skipped: all samples are rendered, to find the bad ones.
        - In any case samples are tokenised until one has something to train on: an error that affects all is raised now.
        """
        usable, bad_messages = list(samples), list[str]()
        if self.id_limit is not None or self.parser.skips_bad:
            check = self._render if self.id_limit is None else self._tokenize
            checked, bad_messages = check(samples, skip_bad=self.parser.skips_bad)
            usable = [sample for sample, _ in checked]
        has_trained, lengths = False, list[int]()
        for sample in usable:
            tokenized = self._tokenize_one(sample)
            if tokenized.trained_tokens:
                has_trained = True
                break
            lengths.append(tokenized.full_length)
        return {"sample": [json.dumps(asdict(sample)) for sample in usable]}, replace(
            self._report(usable, bad_messages),
            highest_id=_highest_id(usable),
            has_trained=has_trained,
            shortest=None if has_trained else min(lengths, default=None),
        )

    def _token_rows(self, samples: Sequence[Sample]) -> tuple[dict[str, list], DataReport]:
        """Tokenise and label samples, treat long ones as `overlong` says, and drop those in which nothing is trained on."""
        skip_bad = self.parser.skips_bad
        tokenized, bad_messages = self._tokenize(samples, skip_bad=skip_bad)
        fitting = [pair for pair in tokenized if self.overlong != DROP or not pair[1].cut_tokens]
        parted, split_errors = apply_to_usable(lambda pair: (*pair, self._split(*pair)), fitting, skip_bad=skip_bad)
        used, kept, places, split_samples = list[Sample](), list[TokenizedSample](), list[str](), 0
        too_long = [(TOO_LONG, sample) for sample, tokens in tokenized if self.overlong == DROP and tokens.cut_tokens]
        dropped, dropped_parts = Counter({TOO_LONG: len(too_long)}), Counter[str]()
        without = list[tuple[str, Sample]]()
        for sample, whole, parts in parted:
            answered = [tokens for part, tokens in parts if self._is_answered(part)]
            trained = [tokens for tokens in answered if tokens.trained_tokens]
            dropped_parts[NO_ANSWER] += len(parts) - len(answered)
            if trained:
                used.append(sample)
                kept += trained
                places += [sample.where] * len(trained)
                split_samples += len(parts) > 1
                dropped_parts[CUT_OFF] += len(answered) - len(trained)
            else:
                without.append((CUT_OFF if whole.cut_tokens else NO_ANSWER, sample))
        dropped.update(reason for reason, _ in without)
        columns = {
            "input_ids": [sample.input_ids for sample in kept],
            "labels": [sample.labels for sample in kept],
            WEIGHTS: [sample.weights for sample in kept],
            "length": [len(sample.input_ids) for sample in kept],
            "place": places,
        }
        return columns, replace(
            self._report(used, [*bad_messages, *split_errors]),
            split=split_samples,
            dropped=dropped,
            dropped_places=_places([*too_long, *without]),
            dropped_parts=dropped_parts,
            tokens=sum(columns["length"]),
            cut_samples=sum(sample.cut_tokens > 0 for sample in kept),
            **{name: sum(getattr(sample, name) for sample in kept) for name in _SUMMED},
            weighted=sum(sample.weights is not None for sample in kept),
            has_trained=bool(kept),
            highest_id=_highest_id(used),
            shortest=min((sample.full_length for _, sample in tokenized), default=None),
            longest=max((sample.full_length for sample in kept), default=None),
        )

    def _report(self, used: Sequence[Sample], bad_messages: Sequence[str]) -> DataReport:
        """Report on the turns of the samples that are used, on variables without a use, and on the errors of bad samples."""
        conversations = [sample for sample in used if isinstance(sample, Conversation)]
        turns = (turn for sample in conversations for turn in sample.turns)
        unused = (name for each in conversations if each.template_kwargs for name in self.template.unused_variables(each))
        return DataReport(
            changes=Counter(
                f"samples with `{name}` in chat_template_kwargs, which the template does not use" for name in unused
            ),
            turns=sum(turn.role != SYSTEM for turn in turns),
            empty_answers=sum(sample.count_empty_answers(blank_counts=self.template.trains_on_blanks) for sample in used),
            bad=len(bad_messages),
            first_bad=tuple(bad_messages),
        )

    def _split(self, sample: Sample, whole: TokenizedSample) -> Sequence[tuple[Sample, TokenizedSample]]:
        """Split a conversation that is too long between its rounds, if `overlong` asks for it; else return it whole."""
        if self.overlong == SPLIT and whole.cut_tokens and isinstance(sample, Conversation):
            parts = split_rounds(sample, whole, self.model_max_length, self._tokenize_one)
            if len(parts) > 1:
                return parts
        return [(sample, whole)]

    def _is_answered(self, sample: Sample) -> bool:
        return sample.is_answered(blank_counts=self.template.trains_on_blanks)

    def _tokenize_one(self, sample: Sample) -> TokenizedSample:
        ((_, tokenized),), _ = self._tokenize([sample])
        return tokenized

    def _tokenize(
        self, samples: Sequence[Sample], *, skip_bad: bool = False
    ) -> tuple[list[tuple[Sample, TokenizedSample]], list[str]]:
        """Tokenise samples in order. With `skip_bad`, leave bad samples out and return their errors; else raise the first."""
        rendered, bad_messages = self._render(samples, skip_bad=skip_bad)
        texts = [text for _, text in rendered if text is not None]
        of_texts = iter(tokenize_rendered(texts, self.tokenizer, self.model_max_length))
        pairs = ((sample, self._take(sample) if isinstance(sample, TokenIds) else next(of_texts)) for sample, _ in rendered)
        tokenized, embedding_errors = apply_to_usable(self._require_embedded, pairs, skip_bad=skip_bad)
        return tokenized, [*bad_messages, *embedding_errors]

    def _take(self, sample: TokenIds) -> TokenizedSample:
        """Return a sample that is tokenised already, truncated."""
        return label_ids(sample.input_ids, sample.labels, sample.weight, self.model_max_length)

    def _require_embedded(self, pair: tuple[Sample, TokenizedSample]) -> tuple[Sample, TokenizedSample]:
        sample, tokenized = pair
        if isinstance(sample, TokenIds):
            require_ids(sample.input_ids, self.embedding_rows, sample.where)
        else:
            require_embedded(tokenized.input_ids, self.tokenizer, self.id_limit, sample.where)
        return pair

    def _render(
        self, samples: Sequence[Sample], *, skip_bad: bool
    ) -> tuple[list[tuple[Sample, RenderedText | None]], list[str]]:
        """Render samples as text, None for one that is tokenised already; `skip_bad` is as in `_tokenize`."""
        return apply_to_usable(
            lambda sample: (sample, None if isinstance(sample, TokenIds) else render(sample, self.template, self.tokenizer)),
            samples,
            skip_bad=skip_bad,
        )

    def __call__(self, rows: Mapping[str, list]) -> dict[str, list]:
        """Tokenise rows of `TEXTS` that are needed now; return columns of ids, labels and weights."""
        tokenized, _ = self._tokenize([_sample_from_fields(json.loads(text)) for text in rows["sample"]])
        return {
            "input_ids": [sample.input_ids for _, sample in tokenized],
            "labels": [sample.labels for _, sample in tokenized],
            WEIGHTS: [sample.weights for _, sample in tokenized],
        }


def _places(dropped: Iterable[tuple[str, Sample]]) -> dict[str, list[str]]:
    """Return the places of the first few dropped samples, by reason."""
    places: dict[str, list[str]] = {}
    for reason, sample in dropped:
        if len(places.setdefault(reason, [])) < MOST_PLACES:
            places[reason].append(sample.where)
    return places


def _highest_id(samples: Sequence[Sample]) -> int | None:
    """Return the highest id of the samples that were tokenised already; None without any."""
    return max((max(sample.input_ids) for sample in samples if isinstance(sample, TokenIds)), default=None)


def _sample_from_fields(fields: dict) -> Sample:
    """Restore a sample from its `asdict`."""
    if "input_ids" in fields:
        return TokenIds(**{**fields, **{name: tuple(fields[name]) for name in ("input_ids", "labels")}})
    if "turns" not in fields:
        return PromptCompletion(**fields)
    return Conversation(**{**fields, "turns": tuple(map(_turn_from_fields, fields["turns"]))})


def _turn_from_fields(fields: dict) -> Turn:
    ranges = fields["trained_ranges"]
    return Turn(
        **{
            **fields,
            "calls": tuple(ToolCall(**call) for call in fields["calls"]),
            "trained_ranges": None if ranges is None else tuple((start, stop) for start, stop in ranges),
        }
    )
