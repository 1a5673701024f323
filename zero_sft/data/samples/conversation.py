"""What a sample is, whatever file it came from: a conversation, or a passage of plain text. Plain data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zero_sft.errors import DataError

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

LEADING, UNANSWERED = "leading, not the user's", "last, unanswered"
"""Which turns `dialogue` drops, as the log names them."""

_FOLLOWS = {None: (USER,), USER: (ASSISTANT,), ASSISTANT: (USER, TOOL), TOOL: (ASSISTANT, TOOL)}
"""Who may speak after whom; None: at the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One speaker's text; `role` is one of this module's. `trained`: whether an answer goes into the loss."""

    role: str
    text: str
    trained: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns of users, answers and tools, after at most one system text, ending with an answer; `where` names it in messages."""

    turns: tuple[Turn, ...]
    where: str

    def answers(self, *, blank_counts: bool = False) -> int:
        """How many answers there are to train on; `blank_counts`: also those of white space alone."""
        return sum(turn.trained and has_text(turn, blank_counts=blank_counts) for turn in self.turns if turn.role == ASSISTANT)

    def empty_answers(self, *, blank_counts: bool = False) -> int:
        """How many answers have no text."""
        return sum(not has_text(turn, blank_counts=blank_counts) for turn in self.turns if turn.role == ASSISTANT)


def has_text(turn: Turn, *, blank_counts: bool) -> bool:
    """Whether a turn has a text; `blank_counts`: white space is one."""
    return bool(turn.text if blank_counts else turn.text.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCompletion:
    """Plain text that no template is put around: what follows `prompt` is trained on, with the token that ends it."""

    prompt: str
    completion: str
    where: str

    def answers(self, **_: bool) -> int:
        """1 if there is something to train on."""
        return int(bool(self.completion.strip()))

    def empty_answers(self, **_: bool) -> int:
        """1 if the completion has no text."""
        return int(not self.completion.strip())


Sample = Conversation | PromptCompletion


def dialogue(turns: Sequence[Turn], where: str, words: Mapping[str, str]) -> tuple[tuple[Turn, ...], Counter[str]]:
    """A system text if there is one, then questions and answers in turn, between them what tools say; and the dropped turns.

    The latter are how many turns were dropped as `LEADING`, before the first question, and as `UNANSWERED`, after the last
    answer.

    As in FastChat a leading turn that isn't the user's is dropped; unlike there, turns of users and tools after the last answer
    cost those turns, however many there are, and not the conversation.

    `words`: what the data calls a role, where that is another word.

    Worked example: gpt, human, gpt, human, human → human, gpt; 1 leading, 2 unanswered.

    Raises:
        DataError: turns of one speaker that follow each other, but for those after an answer that is the last, or a system text
            among the turns.
    """
    start = 1 if turns and turns[0].role == SYSTEM else 0
    head, rest = list(turns[:start]), list(turns[start:])
    leading = 1 if rest and rest[0].role != USER else 0
    if leading and rest[0].role == SYSTEM:
        raise DataError(
            f"{where}, turn {start + 1}: a second system text. Join them, or remove one.", code="data.second_system_text"
        )
    rest = rest[leading:]
    answered = max((number for number, turn in enumerate(rest, start=1) if turn.role == ASSISTANT), default=0)
    before = None
    for number, turn in enumerate(rest):
        is_tail = answered and number >= answered and turn.role != SYSTEM
        if not is_tail and turn.role not in _FOLLOWS[before]:
            expected = " or ".join(words.get(each, each) for each in _FOLLOWS[before])
            remedy = "Join or remove turns of one speaker that follow each other."
            if turn.role == SYSTEM:
                remedy = "A system text stands before the first turn."
            elif turn.role == TOOL:
                remedy = "A tool speaks after an answer."
            raise DataError(
                f"{where}, turn {start + leading + number + 1}: roles must alternate; expected {expected}, got "
                f"{words.get(turn.role, turn.role)}. {remedy}",
                code="data.roles_do_not_alternate",
            )
        before = turn.role
    return (*head, *rest[:answered]), Counter({LEADING: leading, UNANSWERED: len(rest) - answered})
