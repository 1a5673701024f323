"""Samples in one form for all file formats: a conversation, plain text as prompt and completion, or tokens. Plain data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_sft.errors import DataError

IGNORE_INDEX = -100
"""The label of a token that isn't trained on; PyTorch's cross entropy skips it."""

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

LEADING, UNANSWERED = "leading, not the user's", "last, unanswered"
"""Names, in the log, of the two kinds of turns that `dialogue` drops."""

THOUGHTS_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""The fields of a message from which chat templates read thoughts."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation as chat templates take it: by message a `role`, a `content`, perhaps thoughts in a field, and `tool_calls`."""

_FOLLOWS = {None: (USER,), USER: (ASSISTANT,), ASSISTANT: (USER, TOOL), TOOL: (ASSISTANT, TOOL)}
"""The roles that may follow each role; None stands for the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool in an answer. `arguments` is a JSON object as text. `call_id` may be empty."""

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The text of one speaker. `role` is one of this module's constants. Answers are trained on unless `left_out_of_loss`.

    `weight`, from 0 to 1, is the answer's in the loss. `trained_ranges` are the half-open ranges of characters of the text that
    are trained on; None stands for the whole answer. An answer may have `thoughts`, given to the template apart from the text,
    and `calls` of tools. A tool's turn may have the tool's `name` and the `call_id` of the call that it answers.
    """

    role: str
    text: str
    weight: float = 1.0
    trained_ranges: tuple[tuple[int, int], ...] | None = None
    thoughts: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""

    @property
    def left_out_of_loss(self) -> bool:
        """Whether nothing of the turn is trained on."""
        return self.weight == 0 or self.trained_ranges == ()

    def has_content(self, *, blank_counts: bool) -> bool:
        """Whether the turn has a text or calls. With `blank_counts`, white space alone counts as a text."""
        return bool(self.calls or (self.text if blank_counts else self.text.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """At most one system text, then turns of users, assistant and tools, ending with an answer; `where` is for messages.

    `tools` is the list of tools that the assistant may call, and `template_kwargs` an object of variables for the chat
    template; both are JSON as text, or empty. `weight`, above 0 and up to 1, multiplies those of the answers.
    """

    turns: tuple[Turn, ...]
    where: str
    tools: str = ""
    template_kwargs: str = ""
    weight: float = 1.0

    def is_answered(self, *, blank_counts: bool) -> bool:
        """Whether there is an answer to train on. With `blank_counts`, white space alone counts as an answer."""
        answers = (turn for turn in self.turns if turn.role == ASSISTANT and not turn.left_out_of_loss)
        return self.weight > 0 and any(turn.has_content(blank_counts=blank_counts) for turn in answers)

    def count_empty_answers(self, *, blank_counts: bool) -> int:
        """Count the answers without a text and calls."""
        return sum(not turn.has_content(blank_counts=blank_counts) for turn in self.turns if turn.role == ASSISTANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCompletion:
    """Plain text without a chat template: the completion is trained on, together with the token that ends it."""

    prompt: str
    completion: str
    where: str
    weight: float = 1.0

    def is_answered(self, **_: bool) -> bool:
        """Whether there is a completion to train on."""
        return self.weight > 0 and bool(self.completion.strip())

    def count_empty_answers(self, **_: bool) -> int:
        """Return 1 if the completion has no text, else 0."""
        return int(not self.completion.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """A sample that is tokenised already; a label is its token's id, or -100 for a token that is not trained on."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str
    weight: float = 1.0

    def is_answered(self, **_: bool) -> bool:
        """Whether there is a token to train on; the first has no context to be predicted from."""
        return self.weight > 0 and any(label != IGNORE_INDEX for label in self.labels[1:])

    def count_empty_answers(self, **_: bool) -> int:
        """Return 0: what its answers are is not known."""
        return 0


Sample = Conversation | PromptCompletion | TokenIds


def dialogue(
    turns: Sequence[Turn], numbers: Sequence[int], where: str, words: Mapping[str, str]
) -> tuple[tuple[Turn, ...], Counter[str]]:
    """Check the order of the turns and drop those that can't be used.

    Returns an optional system text followed by alternating questions and answers, with tool turns between answers, and the
    number of dropped turns by kind. As in FastChat, a leading turn that isn't the user's is dropped. Turns of users and tools
    after the last answer are dropped, however many there are; in FastChat they can cost the whole conversation.

    `numbers` are the turns' numbers in the data, and `words` the data's names of roles, if they differ from ours; for messages.

    Worked example: gpt, human, gpt, human, human → human, gpt; 1 leading, 2 unanswered.

    Raises:
        DataError: consecutive turns of one speaker before the last answer, or a system text among the turns.
    """
    start = 1 if turns and turns[0].role == SYSTEM else 0
    head, rest = list(turns[:start]), list(turns[start:])
    leading = 1 if rest and rest[0].role != USER else 0
    if leading and rest[0].role == SYSTEM:
        raise DataError(
            f"{where}, turn {numbers[start]}: a second system text; expected one at most. Join them, remove one, or give "
            "--merge_turns True.",
            code="data.second_system_text",
        )
    rest, numbers = rest[leading:], numbers[start + leading :]
    answered = max((position for position, turn in enumerate(rest, start=1) if turn.role == ASSISTANT), default=0)
    previous_role = None
    for position, turn in enumerate(rest):
        is_tail = answered and position >= answered and turn.role != SYSTEM
        if not is_tail and turn.role not in _FOLLOWS[previous_role]:
            expected = " or ".join(words.get(role, role) for role in _FOLLOWS[previous_role])
            remedy = "Join or remove consecutive turns of the same speaker, or give --merge_turns True."
            if turn.role == SYSTEM:
                remedy = "Move the system text before the first turn."
            elif turn.role == TOOL:
                remedy = "A tool turn must follow an answer or another tool turn."
            elif previous_role == TOOL:
                remedy = "An answer must follow what a tool has returned."
            raise DataError(
                f"{where}, turn {numbers[position]}: roles must alternate; expected {expected}, got "
                f"{words.get(turn.role, turn.role)}. {remedy}",
                code="data.roles_do_not_alternate",
            )
        previous_role = turn.role
    return (*head, *rest[:answered]), Counter({LEADING: leading, UNANSWERED: len(rest) - answered})
