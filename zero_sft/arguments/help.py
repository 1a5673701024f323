"""Text of `--help`: an overview, all arguments (`--help all`), or one argument (`--help NAME`).

It needs no heavy library (see `specifications.py`). The overview shows this project's arguments in full, the first sentence of
each inherited argument, and the names that have changed. `--help NAME` also searches: `--help learning` lists every argument
with that word in its name or text.
"""

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from zero_sft.arguments.names import IGNORED, REFUSALS, TRANSLATIONS
from zero_sft.arguments.specifications import ALWAYS_SET, DATA, LORA, MODEL, TRAINING, specifications_from_table
from zero_sft.cluster.world import World
from zero_sft.errors import ConfigError
from zero_sft.options.format_help import in_brief, in_full, wrap_lines, write_help
from zero_sft.options.resolve import Translation
from zero_sft.options.spec import OptionSpec

ALL = "all"

_HEAD = """\
Fine-tune a causal language model on conversations, sharded by DeepSpeed ZeRO-3.

    python -m zero_sft.train [train.yaml | train.json] [--name value | --name=value | --flag | --no_flag] ...

    --help all      every argument with its full text, and the names that are refused
    --help NAME     one argument; `--help learning` lists those that have the word in their name or text

The file holds `name: value` lines; the command line overrides it.
"""

_GROUPS = {
    MODEL: "Model",
    DATA: "Data",
    LORA: "Adapters (LoRA)",
    TRAINING: "Training, inherited from TRL's SFTConfig and the Trainer",
}


def answer_help(argv: Sequence[str]) -> int:
    """Write the requested help to stdout on rank 0, and return the exit status: 0, or 2 if nothing matches a name."""
    world = World()
    with contextlib.suppress(ConfigError):  # print the help even if the launcher's variables are unusable
        world = World.detect()
    return write_help(argv, help_text, quiet=not world.is_main)


def help_text(topic: str | None = None) -> str | None:
    """Return the overview, everything for "all", else the help for a name or word; None if nothing matches."""
    unusable = REFUSALS.keys() | TRANSLATIONS.keys() | IGNORED
    specs = {name: spec for name, spec in specifications_from_table().items() if name not in unusable}
    if topic is None:
        return _overview(specs)
    if topic.lower() == ALL:
        return _everything(specs)
    name = topic.replace("-", "_").lower()
    exact = _about(name, specs)
    return "\n".join([*exact, ""]) if exact else _search(name, specs)


def _overview(specs: Mapping[str, OptionSpec]) -> str:
    inherited = [spec for spec in specs.values() if spec.group == TRAINING and spec.name not in ALWAYS_SET]
    parts = [_HEAD]
    for title, chosen in (
        ("Model", [spec for spec in specs.values() if spec.group == MODEL]),
        ("Data", [spec for spec in specs.values() if spec.group == DATA]),
        (_GROUPS[LORA], [spec for spec in specs.values() if spec.group == LORA]),
        ("Training", [specs[name] for name in ALWAYS_SET]),
    ):
        parts += [f"{title}:", *in_full(chosen), ""]
    parts += [f"{_GROUPS[TRAINING]} (the first sentence of each):", *in_brief(inherited), ""]
    parts += ["Former names that are still accepted:", *_changed(), ""]
    refused = ", ".join(f"--{name}" for name in sorted(REFUSALS))
    parts += ["Names that are refused (`--help NAME` says why):", *wrap_lines(refused, 2), ""]
    return "\n".join(parts)


def _everything(specs: Mapping[str, OptionSpec]) -> str:
    parts = [_HEAD]
    for group, title in _GROUPS.items():
        parts += [f"{title}:", *in_full(spec for spec in specs.values() if spec.group == group), ""]
    parts += ["Former names that are still accepted:", *_changed(), ""]
    parts += ["Names that are refused:"]
    reasons: dict[str, list[str]] = {}
    for name, refusal in REFUSALS.items():
        reasons.setdefault(refusal.reason, []).append(f"--{name}")
    for reason, names in reasons.items():
        parts += [*wrap_lines(", ".join(names), 2), *wrap_lines(reason, 6)]
    return "\n".join([*parts, ""])


def _about(name: str, specs: Mapping[str, OptionSpec]) -> list[str]:
    """Return the help for one exact name, or nothing if the name is unknown."""
    if name in specs:
        old_names = [f"--{old}" for old, translation in TRANSLATIONS.items() if translation.name == name]
        also = [f"      Also understood: {', '.join(old_names)}"] if old_names else []
        return [*in_full([specs[name]]), f"      Expected: {specs[name].expected}.", *also]
    if name in TRANSLATIONS:
        return [*_changed([name]), *_about(TRANSLATIONS[name].name, specs)]
    if name in REFUSALS:
        return [f"  --{name} is refused: {REFUSALS[name].reason}."]
    if name in IGNORED:
        return [f"  --{name} is ignored: launchers add it."]
    return []


def _search(word: str, specs: Mapping[str, OptionSpec]) -> str | None:
    """Return arguments with a word in their name or text, and those with a similar name; None if there are none."""
    names = [*specs, *TRANSLATIONS, *REFUSALS]
    matches = dict.fromkeys([name for name in names if word in name] + difflib.get_close_matches(word, names, n=5))
    phrase = word.replace("_", " ")
    mentioned = [
        spec for name, spec in specs.items() if name not in matches and re.search(rf"\b{re.escape(phrase)}", spec.help, re.I)
    ]
    if not matches and not mentioned:
        return None
    lines = [f"No argument is called --{word}. Arguments with a similar name, or with the word in it:"] if matches else []
    for name in matches:
        lines += in_brief([specs[name]]) if name in specs else _about(name, {})
    if mentioned:
        lines += [f"Arguments with {phrase!r} in their text:", *in_brief(mentioned)]
    return "\n".join([*lines, ""])


def _changed(names: Iterable[str] = TRANSLATIONS) -> list[str]:
    return [f"  --{name}  is  {_current(TRANSLATIONS[name])}" for name in names]


def _current(translation: Translation) -> str:
    if translation.values:
        values = [(old, new) for old, new in translation.values.items() if new is not None]
        return ", ".join(f"--{translation.name} {new} (for {old})" for old, new in values)
    return f"--{translation.name}" + " (a number below 1 is a fraction of all steps)" * (translation.below is not None)
