"""What the trainer takes: a dataset of token ids and labels, a collator that pads it, and an account of the data.

Every rank reads the file by itself; nothing here communicates, so the caller wraps it in an agreement. By default all samples
are tokenised at the start, and those without a trained token are left out. With `lazy` a sample is rendered and tokenised
each time it is needed and nothing is kept: memory is that of the texts, and a sample cut off before its first answer
stays in, without labels. Padding is told from content by position, never by id: where the pad token is the end-of-turn
token, as in OPT, the model must still learn to write it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from zero_sft.data.formats import ASSISTANT, Conversation, Reading, Turn, read_conversations
from zero_sft.data.labels import IGNORED, Example, tokenise
from zero_sft.data.templates import ModelTemplate, VicunaTemplate, choose_template
from zero_sft.errors import DataError

if TYPE_CHECKING:
    import datasets
    import torch

NO_ANSWER = "without an answer"
CUT_OFF = "cut off before the first answer"

_AT_ONCE = 1000
"""Conversations rendered and tokenised together; enough for the tokenizer's threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a file. What only tokenising shows is None where samples are tokenised lazily."""

    file: str
    layouts: tuple[str, ...]
    template: str
    samples: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    leading_turns: int = 0
    unanswered_turns: int = 0
    empty_answers: int = 0
    tokens: int | None = None
    trained_tokens: int | None = None
    cut_samples: int | None = None
    cut_tokens: int | None = None
    cut_trained_tokens: int | None = None

    def lines(self) -> list[str]:
        """The report for the log: what there is, then only what was left out."""
        found = f"under {' and '.join(f'`{layout}`' for layout in self.layouts)}, template {self.template}"
        lines = [f"{self.file}: {self.kept:,} of {self.samples:,} conversations ({found})"]
        if self.tokens is not None:
            lines.append(f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained on")
        if self.dropped:
            lines.append("conversations dropped: " + _listed(self.dropped))
        if self.cut_samples:
            lines.append(
                f"{self.cut_samples:,} conversations longer than --model_max_length: {self.cut_tokens:,} tokens cut off, "
                f"{self.cut_trained_tokens:,} of them answers"
            )
        turns = {"leading, not the user's": self.leading_turns, "last, unanswered": self.unanswered_turns}
        if any(turns.values()):
            lines.append("turns dropped: " + _listed(turns))
        if self.empty_answers:
            lines.append(f"{self.empty_answers:,} empty answers, not trained on")
        return lines


def _listed(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {what}" for what, count in counts.items() if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A dataset for the trainer, with `input_ids`, `labels` and, unless lazy, `length`; and its report."""

    dataset: "datasets.Dataset"
    report: DataReport


def prepare(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    model_max_length: int,
    lazy: bool = False,
) -> Prepared:
    """Read, render, tokenise and label a file of conversations. Any rank by itself; does not communicate.

    Args:
        path: JSON or JSONL, see `formats`.
        tokenizer: a fast one.
        chat_template: "vicuna", "model", or None for the tokenizer's own if it has one, else Vicuna's.
        model_max_length: in tokens; what is longer loses its end.
        lazy: tokenise when a sample is needed.

    Raises:
        DataError: a file that can't be used, a template that can't be masked, or nothing left to train on.
    """
    reading = read_conversations(path)
    template = choose_template(chat_template, tokenizer)
    pipeline = Pipeline(tokenizer=tokenizer, template=template, model_max_length=model_max_length)
    answered = [each for each in reading.conversations if _answers(each, empty=False)]
    dropped = Counter({NO_ANSWER: len(reading.conversations) - len(answered)})
    examples: list[Example] = []
    if lazy:
        list(pipeline.examples(answered[:1]))  # what fails on every sample fails now
        dataset, counts = _lazy_dataset(answered, pipeline), {}
    else:
        examples = list(pipeline.examples(answered))
        trainable = [each for each in examples if each.trained_tokens]
        dropped[CUT_OFF] = len(examples) - len(trainable)
        dataset, counts = _dataset(trainable), _counts(trainable)
    report = _report(path, reading, pipeline, dropped, counts)
    if not report.kept:
        message = f"{path}: no conversation is left in which anything is trained on ({_listed(report.dropped)})."
        if dropped[CUT_OFF]:
            shortest = min(len(each.input_ids) + each.cut_tokens for each in examples)
            raise DataError(
                f"{message} --model_max_length is {model_max_length}, and the shortest conversation has {shortest} tokens: "
                "raise it."
            )
        raise DataError(f"{message} Only the assistant's text is trained on: give conversations with answers.")
    return Prepared(dataset=dataset, report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """From conversations to tokens: plain data that travels to the data loader's workers."""

    tokenizer: PreTrainedTokenizerBase
    template: VicunaTemplate | ModelTemplate
    model_max_length: int

    def examples(self, conversations: Sequence[Conversation]) -> Iterator[Example]:
        """Render and tokenise, in order."""
        for start in range(0, len(conversations), _AT_ONCE):
            rendered = [self.template.render(each) for each in conversations[start : start + _AT_ONCE]]
            yield from tokenise(rendered, self.tokenizer, self.template, self.model_max_length)

    def __call__(self, rows: Mapping[str, list]) -> dict[str, list]:
        """Columns of ids and labels from the columns of `_lazy_dataset`, for the rows that are needed now."""
        conversations = [
            Conversation(turns=tuple(Turn(role=role, text=text) for role, text in zip(roles, texts, strict=True)), where=where)
            for roles, texts, where in zip(rows["roles"], rows["texts"], rows["where"], strict=True)
        ]
        examples = list(self.examples(conversations))
        return {"input_ids": [each.input_ids for each in examples], "labels": [each.labels for each in examples]}


def _report(
    path: Path, reading: Reading, pipeline: Pipeline, dropped: Mapping[str, int], counts: Mapping[str, int]
) -> DataReport:
    return DataReport(
        file=str(path),
        layouts=reading.layouts,
        template=pipeline.template.name,
        samples=len(reading.conversations),
        kept=len(reading.conversations) - sum(dropped.values()),
        dropped={reason: count for reason, count in dropped.items() if count},
        leading_turns=reading.leading_turns,
        unanswered_turns=reading.unanswered_turns,
        empty_answers=sum(_answers(each, empty=True) for each in reading.conversations),
        **counts,
    )


def require_one_batch(report: DataReport, *, world_size: int, per_device_batch_size: int) -> None:
    """Raise unless the samples fill one batch on every rank. Pure: the same on every rank.

    Raises:
        DataError: fewer samples than `world_size * per_device_batch_size`.
    """
    needed = world_size * per_device_batch_size
    if report.kept < needed:
        tokens = "" if report.tokens is None else f" ({report.tokens:,} tokens)"
        raise DataError(
            f"{report.file}: {report.kept} usable conversations{tokens}, and one batch needs {needed}: {per_device_batch_size} "
            f"on each of {world_size} ranks. Give more data, a smaller --per_device_train_batch_size, or fewer ranks."
        )


def _answers(conversation: Conversation, *, empty: bool) -> int:
    return sum(turn.role == ASSISTANT and (not turn.text) == empty for turn in conversation.turns)


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    return {
        "tokens": sum(len(each.input_ids) for each in examples),
        "trained_tokens": sum(each.trained_tokens for each in examples),
        "cut_samples": sum(each.cut_tokens > 0 for each in examples),
        "cut_tokens": sum(each.cut_tokens for each in examples),
        "cut_trained_tokens": sum(each.cut_trained_tokens for each in examples),
    }


def _dataset(examples: Sequence[Example]) -> "datasets.Dataset":
    import datasets

    return datasets.Dataset.from_dict(
        {
            "input_ids": [each.input_ids for each in examples],
            "labels": [each.labels for each in examples],
            "length": [len(each.input_ids) for each in examples],
        }
    )


def _lazy_dataset(conversations: Sequence[Conversation], pipeline: Pipeline) -> "datasets.Dataset":
    import datasets

    texts = datasets.Dataset.from_dict(
        {
            "roles": [[turn.role for turn in each.turns] for each in conversations],
            "texts": [[turn.text for turn in each.turns] for each in conversations],
            "where": [each.where for each in conversations],
        }
    )
    return texts.with_transform(pipeline)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingCollator:
    """Samples of several lengths to one batch, padded to the longest, or to a multiple of `multiple_of` beyond it."""

    pad_token_id: int
    padding_side: str = "right"
    multiple_of: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, "torch.Tensor"]:
        """`input_ids`, `labels` and `attention_mask`, each (samples, longest) int64; the mask follows the lengths alone."""
        import torch

        lengths = [len(each["input_ids"]) for each in samples]
        unit = self.multiple_of or 1
        width = -(-max(lengths) // unit) * unit
        shape = (len(samples), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(width - length, width) if self.padding_side == "left" else slice(length)
            batch["input_ids"][row, place] = torch.tensor(sample["input_ids"], dtype=torch.int64)
            batch["labels"][row, place] = torch.tensor(sample["labels"], dtype=torch.int64)
            batch["attention_mask"][row, place] = 1
        return batch
