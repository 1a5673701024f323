"""The errors that a user can cause, each with its remedy.

One small hierarchy, so that a caller can catch `ZeroSftError` and a test can name the precise kind. Every message says what
was expected, what was found, where, and what to do about it. Errors travel between ranks as plain text
(`distributed.agree`), so each class is built from one string.
"""


class ZeroSftError(Exception):
    """Base of everything this package raises on purpose.

    `lone`: one rank alone has it, and must say it itself. `agreed`: all ranks have it, by agreement, so that rank 0 says it.
    """

    lone = False
    agreed = False


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
