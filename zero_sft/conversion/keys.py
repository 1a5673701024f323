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
class Group:
    """Stored tensors that make up one tensor of the model, or several: by themselves, or through a converter.

    `name` is the model's (first) tensor; `members` are the stored names by the converter's pattern that they matched.
    """

    name: str
    converter: Any = None
    members: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How the names of a checkpoint fall on a model: the groups, and names that are no key of the model."""

    groups: tuple[Group, ...]
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
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    for name in sorted(stored, key=internal("dot_natural_key")):
        renamed, pattern = rename(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        converter = None if pattern is None else by_pattern.get(pattern)
        if renamed in wanted:
            group = groups.setdefault(renamed, Group(name=renamed, converter=converter))
            group.members.setdefault(name if converter is None else str(pattern), []).append(name)
        elif converter is not None:
            unexpected |= {renamed.replace(converter.target_patterns[0], each) for each in converter.target_patterns}
        else:
            unexpected.add(renamed)
    return Names(groups=tuple(groups.values()), unexpected=frozenset(unexpected))
