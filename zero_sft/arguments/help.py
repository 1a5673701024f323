"""The text of `--help`: the three groups, this project's arguments at length, the inherited ones in a line each."""

import textwrap
from collections.abc import Iterable, Sequence

from zero_sft.arguments.names import IGNORED, REFUSALS, TRANSLATIONS
from zero_sft.arguments.parse import DATA, MODEL, TRAINING, specifications
from zero_sft.arguments.values import Spec

WIDTH = 118

_HEAD = """\
Fine-tune a causal language model on conversations, sharded by DeepSpeed ZeRO-3.

    python -m zero_sft.train [train.yaml | train.json] [--name value | --name=value | --flag | --no_flag] ...

The file holds `name: value`; the command line wins over it. Names that have changed since FastChat's commands were
published are understood and named in the log.
"""


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for `help_text`."""
    return any(word in ("-h", "--help") for word in argv)


def help_text() -> str:
    """All arguments with their defaults, in the groups Model, Data and Training."""
    from zero_sft.arguments.training import OWN_FIELDS

    hidden = REFUSALS.keys() | TRANSLATIONS.keys() | IGNORED
    specs = [spec for spec in specifications().values() if spec.name not in hidden]
    own = [spec for name in OWN_FIELDS for spec in specs if spec.name == name]
    inherited = [spec for spec in specs if spec.group == TRAINING and spec.name not in OWN_FIELDS]
    parts = [_HEAD]
    for title, chosen in (
        ("Model", [spec for spec in specs if spec.group == MODEL]),
        ("Data", [spec for spec in specs if spec.group == DATA]),
        ("Training", own),
    ):
        parts += [f"{title}:", *_at_length(chosen), ""]
    parts += ["Training, inherited from TRL's SFTConfig and the Trainer:", *_in_a_line(inherited), ""]
    return "\n".join(parts)


def _at_length(specs: Iterable[Spec]) -> list[str]:
    lines = []
    for spec in specs:
        choices = f" ({', '.join(spec.choices)})" if spec.choices and len(spec.choices) < 8 else ""
        lines.append(f"  --{spec.name} = {spec.default!r}{choices}")
        lines += textwrap.wrap(spec.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _in_a_line(specs: Iterable[Spec]) -> list[str]:
    lines = []
    for spec in specs:
        start = f"  --{spec.name} = {spec.default!r}  "
        lines.append(start + textwrap.shorten(spec.help, max(20, WIDTH - len(start)), placeholder=" ..."))
    return lines


def answer_help(argv):
    import sys

    sys.stdout.write(help_text())
    return 0
