"""The errors that a user can cause, each with its remedy and a stable code.

One small hierarchy, so that a caller can catch `ZeroSftError`, and a `code` for the precise kind ("data.unknown_role"), which
stays when a sentence changes. Every message says what was expected, what was found, where, and what to do about it. Errors
travel between ranks and processes as their class's name, their text and their codes.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

from zero_sft.printable import printable


class ZeroSftError(Exception):
    """Base of everything this package raises on purpose.

    What a terminal would act on is escaped in the message: it may quote a file's name, or a text of the data.

    `rank_local`: only this rank has the error, so that this rank reports it. `collective`: all ranks raise it together, so
    that rank 0 reports it.

    Args:
        code: the kind of the error, `topic.what_is_wrong`. Only torch's DataLoader leaves it out, which makes the error of a
            worker process again from its text.
        listed: the codes of the problems that the message lists, if there are several.
    """

    rank_local = False
    collective = False

    def __init__(self, message: str, *, code: str = "", listed: Iterable[str] = ()) -> None:
        super().__init__(printable(message))
        self.codes = (code, *listed)

    def __reduce__(self) -> Any:
        return _restored, (type(self), str(self), self.codes)

    @property
    def code(self) -> str:
        """The kind of the error; the first of `codes`, which has those of listed problems behind it."""
        return self.codes[0]

    @property
    def with_code(self) -> str:
        """The message for a person, with the code behind it; each listed problem has its own."""
        message = without_tokens(str(self))
        return message if self.codes[1:] else f"{message} [{self.code}]"

    @classmethod
    def listing(cls, problems: Sequence["ZeroSftError"], heading: str, *, remedy: str = "", code: str) -> Self:
        """One error for several problems, a line each; a single one keeps its code, and without a `remedy` its sentence."""
        if len(problems) == 1:
            code = problems[0].code
        if len(problems) == 1 and not remedy:
            return cls(str(problems[0]), code=code)
        lines = [
            heading,
            *(f"- {problem.with_code if len(problems) > 1 else problem}" for problem in problems),
            *([remedy] if remedy else []),
        ]
        return cls("\n".join(lines), code=code, listed=[problem.code for problem in problems] if len(problems) > 1 else ())


def without_tokens(text: str) -> str:
    """The text without access tokens of the hub, which other libraries' messages may quote."""
    return _TOKEN.sub("hf_***", text)


_TOKEN = re.compile(r"\bhf_\w{4,}")


def _restored(cls: type[ZeroSftError], message: str, codes: Sequence[str]) -> ZeroSftError:
    return cls(message, code=codes[0], listed=codes[1:])


class ConfigError(ZeroSftError):
    """A model config, DeepSpeed config or argument that can't be used as it is."""


class ArgumentError(ConfigError):
    """A command-line or file argument that is unknown, contradictory or out of range."""


class CheckpointError(ZeroSftError):
    """A checkpoint that is missing, truncated, corrupt, or does not fit the model."""


class TokenizerError(ZeroSftError):
    """A tokenizer that can't be set up or does not arrive identical on every rank."""


class DataError(ZeroSftError):
    """Training data that can't be read or understood."""


class ExportError(ZeroSftError):
    """An output folder that can't be written."""


class NotPlacedError(ExportError):
    """A complete export that could not take its folder's place; the message says where it is."""


class UnsupportedVersionError(ZeroSftError):
    """A DeepSpeed or transformers release whose internals are not where this package needs them."""


class DistributedError(ZeroSftError):
    """Ranks that disagree, or a rank that failed with something other than a `ZeroSftError`."""


class RankLostError(DistributedError):
    """A rank that has ended, or does not come to where the others wait for it."""
