"""Locate the answers in the text that a chat template writes, by the texts around them. Pure."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zero_sft.data.templates.probe import TemplateTraits
from zero_sft.data.templates.render import HERMES_INSTEAD, VICUNA_INSTEAD
from zero_sft.data.templates.rendered import Span
from zero_sft.data.templates.stand_ins import CALL, ECHO, TEXT, THOUGHTS, TextPiece
from zero_sft.data.templates.thoughts import CLOSE, OPEN, Answers, empty_answer_error, find_thoughts
from zero_sft.errors import DataError

_EMPTY_BLOCK = re.compile(rf"\s*(?:{OPEN}\s*)?{CLOSE}\s*")  # the prompt may have opened it


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedAnswers:
    """The places of a conversation's answers, in order.

    `spans` are what is trained on of each, `bodies` the places of their texts (None: calls alone), and `ends` the index of each
    answer's turn and the character at which it ends. `thoughts` and `dropped_thoughts` are as in `RenderedText`.
    """

    spans: tuple[Span, ...] = ()
    bodies: tuple[Span | None, ...] = ()
    ends: tuple[tuple[int, int], ...] = ()
    thoughts: int = 0
    dropped_thoughts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """The half-open range of characters of a piece."""

    piece: TextPiece
    start: int
    stop: int


def locate_answers(
    text: str,
    around: Sequence[str],
    pieces: Sequence[TextPiece],
    answers: Answers,
    traits: TemplateTraits,
    where: str,
    *,
    headers: Mapping[int, str] | None = None,
) -> LocatedAnswers:
    """Locate all answers in a text that must consist of exactly the `around` texts and the pieces between them.

    Args:
        around: one text more than there are pieces.
        headers: the texts in front of answers that begin with a call, by index, for a template without a generation prompt.

    Raises:
        DataError: the text is something else, or an answer is empty or without an end.
    """
    places = _find_pieces(text, around, pieces, answers, where)
    by_turn = [list(group) for _, group in itertools.groupby(places, key=lambda place: place.piece.turn)]
    starts = [*(group[0].start for group in by_turn[1:]), len(text)]
    spans, bodies, ends, kept, previous = [], [], [], 0, 0
    for group, next_start in zip(by_turn, starts, strict=True):
        turn, last = group[0].piece.turn, group[-1]
        header = (headers or {}).get(turn, traits.generation_prompt)
        begin, has_thoughts = _find_begin(text[previous : group[0].start], group[0].piece, answers, header, where)
        begin += previous
        if not text[begin : last.stop].strip():
            raise empty_answer_error(f"{where}, message {turn + 1}")
        after = text[last.stop : next_start]
        length = (
            _call_end_length(after, traits.calls.ends, where)
            if last.piece.kind == CALL
            else _turn_end_length(after, traits.turn_ends, where)
        )
        spans.append((begin, last.stop + length))
        bodies.append(next(((place.start, place.stop) for place in group if place.piece.kind == TEXT), None))
        ends.append((turn, spans[-1][1]))
        kept += has_thoughts
        previous = last.stop
    thoughts_count = sum(answer.has_thoughts for answer in answers.values())
    return LocatedAnswers(
        spans=tuple(spans),
        bodies=tuple(bodies),
        ends=tuple(ends),
        thoughts=thoughts_count,
        dropped_thoughts=thoughts_count - kept,
    )


def _find_pieces(text: str, around: Sequence[str], pieces: Sequence[TextPiece], answers: Answers, where: str) -> list[_Place]:
    """Find the places of the pieces, without those of echoes; raises `DataError`."""
    if not text.startswith(around[0]):
        raise rewriting_error(where, pieces[0].turn, answers)
    places, start = [], len(around[0])
    for piece, after in zip(pieces, around[1:], strict=True):
        length = _match_length(text, start, piece, after, is_last=piece is pieces[-1])
        if length is None:
            raise rewriting_error(where, piece.turn, answers, has_calls=piece.kind in (CALL, ECHO))
        if piece.kind != ECHO:
            places.append(_Place(piece=piece, start=start, stop=start + length))
        start += length + len(after)
    return places


def _find_begin(before: str, first: TextPiece, answers: Answers, prompt: str, where: str) -> tuple[int, bool]:
    """Find where an answer begins in the text `before` its `first` piece, and whether that text has the answer's thoughts."""
    answer = answers[first.turn]
    if first.kind == THOUGHTS:
        return _after_prompt(before, prompt), True
    thoughts = "" if answer.field else answer.thoughts
    position = find_thoughts(before, thoughts, at_end=first.kind != CALL) if thoughts else None
    if OPEN in thoughts.replace(OPEN, "", 1) and thoughts.strip() not in before:
        # templates take the text after the last "<think>" for the thoughts
        raise rewriting_error(where, first.turn, answers)
    has_thoughts = position is not None and answer.has_thoughts
    if first.kind == CALL:
        header = next((part for part in (prompt, prompt.partition(OPEN)[0]) if part and part in before), None)
        if header is None:
            raise rewriting_error(where, first.turn, answers, has_calls=True)
        begin = before.rindex(header) + len(header)
        empty = None if has_thoughts else _EMPTY_BLOCK.match(before, begin)
        return empty.end() if empty else begin, has_thoughts
    return _begin(before, len(before) if position is None else position, prompt), has_thoughts


def _match_length(text: str, start: int, piece: TextPiece, after: str, *, is_last: bool) -> int | None:
    """Return the length of the piece at `start`, followed by `after`, in one of its forms; None if it is not there."""
    for body in piece.forms:
        end = start + len(body)
        if text.startswith(body, start) and text.startswith(after, end) and (not is_last or end + len(after) == len(text)):
            return len(body)
    return None


def _begin(before: str, start: int, prompt: str) -> int:
    """Find where the model begins to write, in the text between the previous answer and this one, thoughts included.

    `start` is where the thoughts begin, or the answer if there are none. White space after the prompt belongs to the model's
    text, since most tokenizers join it with the first word.
    """
    if not prompt:
        return len(before[:start].rstrip())
    position = before.rfind(prompt, 0, start + len(prompt))  # not inside the thoughts
    first = position + len(prompt)
    return first if position >= 0 and (first > start or not before[first:start].strip()) else start


def _after_prompt(before: str, prompt: str) -> int:
    """Find where the model begins to write, in the text before thoughts that the template reads from a field."""
    position = before.rfind(prompt) if prompt else -1
    return position + len(prompt) if position >= 0 else len(before.rstrip())


def _turn_end_length(after: str, turn_ends: Sequence[str], where: str) -> int:
    for turn_end in turn_ends:
        if after.startswith(turn_end):
            return len(turn_end)
    raise _endless_error(where)


def _call_end_length(after: str, ends: Sequence[str], where: str) -> int:
    """Return the length of what the template writes after the last text of a call, up to the text that ends the answer."""
    found = [after.index(end) + len(end) for end in ends if end in after]
    if not found:
        raise _endless_error(where)
    return min(found)


def _endless_error(where: str) -> DataError:
    return DataError(
        f"{where}: the chat template writes nothing that marks the end of an answer, so the model could not learn to stop."
        " Write {{ eos_token }} after answers and check that the tokenizer has the template's special tokens, or give"
        " --chat_template another template.",
        code="data.template_without_turn_end",
    )


def rewriting_error(where: str, index: int, answers: Answers, *, has_calls: bool = False) -> DataError:
    """Make the error for a template that does not write the answer at `index` as it is."""
    tags = f"The answer contains {CLOSE}, which the template may treat specially. "
    return DataError(
        f"{where}, message {index + 1}: the chat template rewrites the turns of this conversation, so the assistant's answer "
        f"can't be located reliably in its text. {tags if index in answers and CLOSE in answers[index].content else ''}"
        f"{HERMES_INSTEAD if has_calls else VICUNA_INSTEAD}",
        code="data.template_rewrites_turns",
    )
