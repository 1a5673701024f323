"""Locate the answers in the text that a chat template writes, by the texts around them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from zero_sft.data.templates.probe import VICUNA_INSTEAD, TemplateTraits
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.templates.thoughts import CLOSE, OPEN, Answers, empty_answer_error, find_thoughts
from zero_sft.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """A text to locate: an answer, or its thoughts if the message has a field for them."""

    turn: int
    text: str
    is_thoughts: bool = False


def locate_answers(
    text: str, around: Sequence[str], pieces: Sequence[TextPiece], answers: Answers, traits: TemplateTraits, where: str
) -> RenderedText:
    """Locate all answers in a text that must consist of exactly the `around` texts and the pieces between them.

    Args:
        around: one text more than there are pieces.

    Raises:
        DataError: the text is something else, or an answer is empty or without an end.
    """
    if not text.startswith(around[0]):
        raise rewriting_error(where, pieces[0].turn, answers)
    spans, ends, kept = [], [], 0
    end, start, thoughts_begin = 0, len(around[0]), None
    for piece, after in zip(pieces, around[1:], strict=True):
        length = _match_length(text, start, piece.text, after, is_last=piece is pieces[-1])
        if length is None:
            raise rewriting_error(where, piece.turn, answers)
        if piece.is_thoughts:
            thoughts_begin = end + _after_prompt(text[end:start], traits.generation_prompt)
            kept += 1
            start += length + len(after)
            continue
        begin = thoughts_begin
        if begin is None:
            answer, before = answers[piece.turn], text[end:start]
            thoughts = "" if answer.field else answer.thoughts
            position = find_thoughts(before, thoughts) if thoughts else None
            if OPEN in thoughts.replace(OPEN, "", 1) and thoughts.strip() not in before:
                # templates take the text after the last "<think>" for the thoughts
                raise rewriting_error(where, piece.turn, answers)
            kept += position is not None and answer.has_thoughts
            begin = end + _begin(before, len(before) if position is None else position, traits.generation_prompt)
        end, thoughts_begin = start + length, None
        if not text[begin:end].strip():
            raise empty_answer_error(f"{where}, message {piece.turn + 1}")
        spans.append((begin, end + _turn_end_length(after, traits.turn_ends, where)))
        ends.append((piece.turn, spans[-1][1]))
        start = end + len(after)
    thoughts_count = sum(answer.has_thoughts for answer in answers.values())
    return RenderedText(
        text=text, spans=tuple(spans), ends=tuple(ends), thoughts=thoughts_count, dropped_thoughts=thoughts_count - kept
    )


def _match_length(text: str, start: int, answer: str, after: str, *, is_last: bool) -> int | None:
    """Return the length of the answer at `start`, followed by `after`, perhaps stripped of white space; None if not there."""
    for body in dict.fromkeys((answer, answer.strip(), answer.rstrip(), answer.lstrip())):
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
    raise DataError(
        f"{where}: the chat template writes nothing that marks the end of an answer, so the model could not learn to stop."
        " Write {{ eos_token }} after answers and check that the tokenizer has the template's special tokens, or give"
        " --chat_template another template.",
        code="data.template_without_turn_end",
    )


def rewriting_error(where: str, index: int, answers: Answers) -> DataError:
    """Make the error for a template that does not write the answer at `index` as it is."""
    tags = f"The answer contains {CLOSE}, which the template may treat specially. "
    return DataError(
        f"{where}, message {index + 1}: the chat template rewrites the turns of this conversation, so the assistant's answer "
        f"can't be located reliably in its text. {tags if index in answers and CLOSE in answers[index].content else ''}"
        f"{VICUNA_INSTEAD}",
        code="data.template_rewrites_turns",
    )
