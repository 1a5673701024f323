"""Match a checkpoint's names to a model's, with transformers' rules.

The rules are those of plain `from_pretrained`: the model's renamings in order, then at most one converter, then the base
model's prefix is added or removed. If the result is not a key of the model but the stored name is, the stored name is used;
transformers' ZeRO-3 path omits this last step. As in transformers, names are visited in natural order: experts by number.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from zero_sft.transformers_internals import internal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Stored tensors that make one or several tensors of the model, unchanged or through a converter.

    `name` is the (first) tensor of the model. `members` are the stored names, by the converter's pattern that they matched.
    `rivals` are stored names that make the same tensor in another way, such as a merged tensor stored next to its parts.
    """

    name: str
    converter: Any
    members: Mapping[str, Sequence[str]]
    rivals: Sequence[str]

    @property
    def stored_names(self) -> list[str]:
        """The names of all members."""
        return [name for names in self.members.values() for name in names]

    def missing_members(self) -> list[str]:
        """List names that are missing from the members' numbering: with experts 0, 1 and 3, that is expert 2."""
        numbered = [series for series in map(_numbered, self.members.values()) if series]
        highest = max((number for _, numbers, _ in numbered for number in numbers), default=-1)
        return [
            f"{before}{number}{after}"
            for before, numbers, after in numbered
            for number in range(highest + 1)
            if number not in numbers
        ]


def _numbered(names: Sequence[str]) -> tuple[str, set[int], str] | None:
    """Find the one number in which names differ: `["a.0.w", "a.2.w"]` → `("a.", {0, 2}, ".w")`; None if there is none."""
    split_names = [name.split(".") for name in names]
    if len({len(parts) for parts in split_names}) != 1:
        return None
    varying = [position for position, column in enumerate(zip(*split_names, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1 or not all(parts[varying[0]].isdecimal() for parts in split_names):
        return None
    position, first = varying[0], split_names[0]
    numbers = {int(parts[position]) for parts in split_names}
    return "".join(f"{part}." for part in first[:position]), numbers, "".join(f".{part}" for part in first[position + 1 :])


def match(
    model: PreTrainedModel, rules: Sequence[Any], state: Mapping[str, Any], stored_names: Iterable[str]
) -> tuple[tuple[TensorGroup, ...], set[str]]:
    """Find the tensor of the model that each stored name belongs to.

    Args:
        rules: transformers' renamings and converters for this model.
        state: the model's state dict. Only its names are used.
        stored_names: the names in the checkpoint.

    Returns:
        The groups; and the names that are not in the model, as transformers' rules rename them, not as they are stored.
    """
    renamings = [rule for rule in rules if isinstance(rule, internal("WeightRenaming"))]
    converters = [rule for rule in rules if isinstance(rule, internal("WeightConverter"))]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    rename = internal("rename_source_key")
    used: dict[str, Any] = {}  # the converter of each group
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    rivals: dict[str, list[str]] = defaultdict(list)
    unexpected: set[str] = set()
    for name in sorted(stored_names, key=internal("dot_natural_key")):
        renamed, pattern = rename(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        converter = None if pattern is None else by_pattern.get(pattern)
        if renamed in state:
            first = used.setdefault(renamed, converter)  # as in transformers, all names of a group use its first converter
            if (converter is None) != (first is None):
                rivals[renamed].append(name)
            else:
                members[renamed][name if converter is None else str(pattern)].append(name)
        elif converter is not None:
            unexpected |= {renamed.replace(converter.target_patterns[0], target) for target in converter.target_patterns}
        else:
            unexpected.add(renamed)
    groups = tuple(
        TensorGroup(name=name, converter=converter, members=members[name], rivals=rivals[name])
        for name, converter in used.items()
    )
    return groups, unexpected
