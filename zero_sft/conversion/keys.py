"""From a checkpoint's names to the model's, with transformers' own rules.

The rules are those of plain `from_pretrained`: the model's renamings in order, then at most one converter, then the base
model's prefix added or stripped; and if the result is no key of the model but the original is, the original (the step that
transformers' own ZeRO-3 path leaves out). Keys are visited in natural order, as there: experts by number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from zero_sft.transformers_internals import internal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Stored tensors that make up one tensor of the model, or several: by themselves, or through a converter.

    `name` is the model's (first) tensor; `members` are the stored names by the converter's pattern that they matched;
    `rivals` are stored names that would make the same tensor another way: a merged tensor beside its parts.
    """

    name: str
    converter: Any = None
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()

    @property
    def stored(self) -> list[str]:
        """All members."""
        return [name for names in self.members.values() for name in names]

    def absent(self) -> list[str]:
        """Names that the members' own numbering promises and the checkpoint lacks: experts 0, 1, 3 promise a 2."""
        numbered = [each for each in map(_numbered, self.members.values()) if each]
        highest = max((number for _, numbers, _ in numbered for number in numbers), default=-1)
        return [
            f"{before}{number}{after}"
            for before, numbers, after in numbered
            for number in range(highest + 1)
            if number not in numbers
        ]


def _numbered(names: Sequence[str]) -> tuple[str, set[int], str] | None:
    """`["a.0.w", "a.2.w"]` → `("a.", {0, 2}, ".w")`; None where the names don't differ in one number alone."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) != 1:
        return None
    varying = [at for at, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1 or not all(parts[varying[0]].isdecimal() for parts in split):
        return None
    at, parts = varying[0], split[0]
    numbers = {int(each[at]) for each in split}
    return "".join(f"{part}." for part in parts[:at]), numbers, "".join(f".{part}" for part in parts[at + 1 :])


@dataclass(slots=True, kw_only=True)
class _GroupBuilder:
    """A group while its names are being collected."""

    converter: Any
    members: dict[str, list[str]] = field(default_factory=dict)
    rivals: list[str] = field(default_factory=list)

    def group(self, name: str) -> TensorGroup:
        members = {pattern: tuple(names) for pattern, names in self.members.items()}
        return TensorGroup(name=name, converter=self.converter, members=members, rivals=tuple(self.rivals))


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How the names of a checkpoint fall on a model: the groups, and names that are no key of the model."""

    groups: tuple[TensorGroup, ...]
    unexpected: frozenset[str]


def match(model: PreTrainedModel, rules: Sequence[Any], wanted: Mapping[str, Any], stored: Iterable[str]) -> Names:
    """Find for every stored name the tensor of the model that it belongs to.

    Args:
        rules: transformers' renamings and converters for this model.
        wanted: the model's state dict, of which only the names count.
    """
    renamings = [rule for rule in rules if isinstance(rule, internal("WeightRenaming"))]
    converters = [rule for rule in rules if isinstance(rule, internal("WeightConverter"))]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    rename = internal("rename_source_key")
    builders: dict[str, _GroupBuilder] = {}
    unexpected: set[str] = set()
    for name in sorted(stored, key=internal("dot_natural_key")):
        renamed, pattern = rename(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        converter = None if pattern is None else by_pattern.get(pattern)
        if renamed in wanted:
            builder = builders.setdefault(renamed, _GroupBuilder(converter=converter))
            if (converter is None) != (builder.converter is None):
                builder.rivals.append(name)
                continue
            builder.members.setdefault(name if converter is None else str(pattern), []).append(name)
        elif converter is not None:
            unexpected |= {renamed.replace(converter.target_patterns[0], each) for each in converter.target_patterns}
        else:
            unexpected.add(renamed)
    groups = tuple(builder.group(name) for name, builder in builders.items())
    return Names(groups=groups, unexpected=frozenset(unexpected))
