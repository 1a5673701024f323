"""The text of `--help`: an overview, `--help all`, or one argument with `--help NAME`.

It needs none of the heavy libraries: see `inherited.py`. The overview has this project's arguments at length, of each
inherited one its first sentence, and the names that have changed. Names are searched, too: `--help learning` lists every
argument that has the word in its name or its text.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from zero_sft.arguments.inherited import DATA, MODEL, TRAINING, listed_specifications
from zero_sft.arguments.names import IGNORED, REFUSALS, TRANSLATIONS
from zero_sft.options.help import in_brief, in_full, wrap_lines, write_help
from zero_sft.options.names import Translation
from zero_sft.options.spec import OptionSpec

ALL = "all"

OWN_FIELDS = (
    "output_dir",
    "overwrite_output_dir",
    "model_max_length",
    "optim",
    "deepspeed",
    "resume_from_checkpoint",
)
"""Arguments of the training group that the overview shows at length."""

_HEAD = """\
Fine-tune a causal language model on conversations, sharded by DeepSpeed ZeRO-3.

    python -m zero_sft.train [train.yaml | train.json] [--name value | --name=value | --flag | --no_flag] ...

    --help all      every argument with its whole text, and the names that are refused
    --help NAME     one argument; `--help learning` lists those that have the word in their name or text

The file holds `name: value`; the command line wins over it.
"""

_GROUPS = {
    MODEL: "Model",
    DATA: "Data",
    TRAINING: "Training, inherited from TRL's SFTConfig and the Trainer",
}


def answer_help(argv: Sequence[str]) -> int:
    """Write what a command line asks for to stdout, on rank 0; returns the exit status, 2 for a name that nothing matches."""
    return write_help(argv, help_text)


def help_text(topic: str | None = None) -> str | None:
    """The overview; everything for "all"; else what there is about an argument's name or a word, None for nothing."""
    specs = {name: spec for name, spec in listed_specifications().items() if name not in _hidden()}
    if topic is None:
        return _overview(specs)
    if topic.lower() == ALL:
        return _everything(specs)
    name = topic.replace("-", "_").lower()
    exact = _about(name, specs)
    return "\n".join([*exact, ""]) if exact else _search(name, specs)


def _hidden() -> frozenset[str]:
    """Names that are arguments of the Trainer and can't be used."""
    return frozenset(REFUSALS.keys() | TRANSLATIONS.keys() | IGNORED)


def _overview(specs: Mapping[str, OptionSpec]) -> str:
    inherited = [spec for spec in specs.values() if spec.group == TRAINING and spec.name not in OWN_FIELDS]
    parts = [_HEAD]
    for title, chosen in (
        ("Model", [spec for spec in specs.values() if spec.group == MODEL]),
        ("Data", [spec for spec in specs.values() if spec.group == DATA]),
        ("Training", [specs[name] for name in OWN_FIELDS]),
    ):
        parts += [f"{title}:", *in_full(chosen), ""]
    parts += [f"{_GROUPS[TRAINING]} (the first sentence of each):", *in_brief(inherited), ""]
    parts += ["Names that have changed, and are understood:", *_changed(), ""]
    refused = ", ".join(f"--{name}" for name in sorted(REFUSALS))
    parts += ["Names that are refused (`--help NAME` says why):", *wrap_lines(refused, 2), ""]
    return "\n".join(parts)


def _everything(specs: Mapping[str, OptionSpec]) -> str:
    parts = [_HEAD]
    for group, title in _GROUPS.items():
        parts += [f"{title}:", *in_full(spec for spec in specs.values() if spec.group == group), ""]
    parts += ["Names that have changed, and are understood:", *_changed(), ""]
    parts += ["Names that are refused:"]
    reasons: dict[str, list[str]] = {}
    for name, refusal in REFUSALS.items():
        reasons.setdefault(refusal.reason, []).append(f"--{name}")
    for reason, names in reasons.items():
        parts += [*wrap_lines(", ".join(names), 2), *wrap_lines(reason, 6)]
    return "\n".join([*parts, ""])


def _about(name: str, specs: Mapping[str, OptionSpec]) -> list[str]:
    """All that there is to say about one name; nothing where there is none."""
    if name in specs:
        old = [f"--{each}" for each, translation in TRANSLATIONS.items() if translation.name == name]
        also = [f"      Also understood: {', '.join(old)}"] if old else []
        return [*in_full([specs[name]]), f"      Expected: {specs[name].expected}.", *also]
    if name in TRANSLATIONS:
        today = TRANSLATIONS[name].name
        return [*_changed([name]), *_about(today, specs)]
    if name in REFUSALS:
        return [f"  --{name} is refused: {REFUSALS[name].reason}."]
    if name in IGNORED:
        return [f"  --{name} is ignored: launchers add it."]
    return []


def _search(word: str, specs: Mapping[str, OptionSpec]) -> str | None:
    """Arguments with a word in their name, names that are nearly it, and arguments with the word in their text."""
    names = [*specs, *TRANSLATIONS, *REFUSALS]
    found = dict.fromkeys([name for name in names if word in name] + difflib.get_close_matches(word, names, n=5))
    spoken = word.replace("_", " ")
    mentioned = [
        spec for name, spec in specs.items() if name not in found and re.search(rf"\b{re.escape(spoken)}", spec.help, re.I)
    ]
    if not found and not mentioned:
        return None
    lines = (
        [f"No argument is called --{word}. Those that are called nearly so, or have the word in their name:"] if found else []
    )
    for name in found:
        lines += in_brief([specs[name]]) if name in specs else _about(name, {})
    if mentioned:
        lines += [f"Arguments with {spoken!r} in their text:", *in_brief(mentioned)]
    return "\n".join([*lines, ""])


def _changed(names: Iterable[str] = TRANSLATIONS) -> list[str]:
    return [f"  --{name}  is  {_today(TRANSLATIONS[name])}" for name in names]


def _today(translation: Translation) -> str:
    if translation.values:
        values = [(old, new) for old, new in translation.values.items() if new is not None]
        return ", ".join(f"--{translation.name} {new} (for {old})" for old, new in values)
    return f"--{translation.name}" + " (a number below 1 is a share of all steps)" * (translation.below is not None)
