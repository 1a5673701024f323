"""Errors that a user can cause, each with a remedy and a stable code.

All derive from `ZeroSftError`, so that a caller can catch that class. The `code` gives the exact kind ("data.unknown_role") and
stays the same when the message changes. Every message says what was expected, what was found, where, and what to do. Between
ranks and processes, an error is sent as its class name, message and codes.
"""

import enum
import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

from zero_sft.printable import printable

_TOKEN = re.compile(r"\bhf_\w{4,}")


class Scope(enum.Enum):
    """The ranks that have an error, which decides which of them reports it."""

    THIS_RANK = "only the rank that raises it, which reports it"
    ALL_RANKS = "all ranks, which raise it together; rank 0 reports it"
    UNKNOWN = "probably all ranks; rank 0 reports it, or another rank if rank 0 does not have it"


class ZeroSftError(Exception):
    """Base class of every error that this package raises on purpose.

    Control characters in the message are escaped, since it may quote a file name or text from the data.

    Args:
        code: the kind of the error, `topic.what_is_wrong`. Only torch's DataLoader omits it, when it recreates the error of a
            worker process from the message.
        listed: the codes of the problems that the message lists, if there are several.
        scope: the ranks that have the error.
    """

    def __init__(self, message: str, *, code: str = "", listed: Iterable[str] = (), scope: Scope = Scope.UNKNOWN) -> None:
        super().__init__(printable(message))
        self.codes = (code, *listed)
        self.scope = scope

    def __reduce__(self) -> Any:
        return _restore, (type(self), str(self), self.codes)

    @property
    def code(self) -> str:
        """The kind of the error: the first of `codes`; the codes of listed problems follow it."""
        return self.codes[0]

    @property
    def with_code(self) -> str:
        """The message followed by its code; in a list, each problem has its own code."""
        message = without_tokens(str(self))
        return message if self.codes[1:] else f"{message} [{self.code}]"

    @classmethod
    def listing(cls, problems: Sequence["ZeroSftError"], heading: str, *, remedy: str = "", code: str) -> Self:
        """Make one error that lists several problems. A single problem keeps its code and, without a `remedy`, its message."""
        if len(problems) == 1:
            (problem,) = problems
            return cls(f"{heading}\n- {problem}\n{remedy}" if remedy else str(problem), code=problem.code)
        lines = [heading, *(f"- {problem.with_code}" for problem in problems), *filter(None, [remedy])]
        return cls("\n".join(lines), code=code, listed=[problem.code for problem in problems])


def without_tokens(text: str) -> str:
    """Mask access tokens of the hub, which messages of other libraries may quote."""
    return _TOKEN.sub("hf_***", text)


def is_failure(error: BaseException) -> bool:
    """Return whether an exception is a failure, and no request to end the program.

    A library in Rust (tokenizers, safetensors) that meets what it did not expect raises a PanicException, which is no
    `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _restore(cls: type[ZeroSftError], message: str, codes: Sequence[str]) -> ZeroSftError:
    return cls(message, code=codes[0], listed=codes[1:])


class ConfigError(ZeroSftError):
    """A model config, DeepSpeed config or argument that can't be used."""


class ArgumentError(ConfigError):
    """A command-line or file argument that is unknown, contradictory or out of range."""


class CheckpointError(ZeroSftError):
    """A checkpoint that is missing, truncated, corrupt, or does not fit the model."""


class TokenizerError(ZeroSftError):
    """A tokenizer that can't be set up or is not identical on every rank."""


class DataError(ZeroSftError):
    """Training data that can't be read or understood."""


class ExportError(ZeroSftError):
    """An output folder that can't be written."""


class NotPlacedError(ExportError):
    """A complete export that could not replace the existing folder; the message says where it is."""


class UnsupportedVersionError(ZeroSftError):
    """A DeepSpeed or transformers release whose internals differ from those that this package needs."""


class DistributedError(ZeroSftError):
    """Ranks that disagree, or a rank that failed with an error other than a `ZeroSftError`."""


class TrainingError(ZeroSftError):
    """A training whose numbers are no longer usable, such as a gradient that is not finite."""


class EndedEarlyError(DistributedError):
    """A run that was asked to end before its last step, and can go on from a checkpoint."""


class RankLostError(DistributedError):
    """A rank that has ended, or does not reach the point where the others wait for it."""
