"""From a checkpoint's names to the model's, with transformers' own renaming rules.

The rules are those of plain `from_pretrained`: the model's renamings in order, then at most one converter, then the base
model's prefix added or stripped; and if the result is no key of the model but the original is, the original (the step that
transformers' own ZeRO-3 path leaves out). Keys are visited in natural order, as there. Left out as yet: operations that
merge or split tensors; a checkpoint that needs one is refused by name, not loaded wrongly.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.errors import CheckpointError
from zero_sft.storage.dtypes import TORCH_DTYPES
from zero_sft.transformers_internals import internal


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A tensor whose stored shape is not the model's."""

    name: str
    expected: tuple[int, ...]
    got: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a checkpoint gives a model: stored name by model name, and what does not fit."""

    sources: Mapping[str, str]
    unexpected: frozenset[str]
    mismatched: tuple[Mismatch, ...]


def resolve(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]) -> Resolution:
    """Find for every key of the model (`shapes`: its state dict's names and full shapes) the stored tensor that fills it.

    Raises:
        CheckpointError: the checkpoint needs an operation, or holds a dtype, that this loader can't handle.
    """
    rules = internal("get_model_conversion_mapping")(model)
    renamings = [rule for rule in rules if isinstance(rule, internal("WeightRenaming"))]
    converters = [rule for rule in rules if isinstance(rule, internal("WeightConverter"))]
    rename = internal("rename_source_key")
    sources: dict[str, str] = {}
    unexpected: set[str] = set()
    mismatched: list[Mismatch] = []
    for name in sorted(stored, key=internal("dot_natural_key")):
        renamed, pattern = rename(name, renamings, converters, model.base_model_prefix, shapes)
        if renamed not in shapes and name in shapes:
            renamed, pattern = rename(name, [], [], base_model_prefix=model.base_model_prefix, meta_state_dict=shapes)
        if renamed not in shapes:
            unexpected.add(renamed)
        elif pattern is not None:
            raise CheckpointError(_needs_conversion(stored[name], renamed))
        elif shapes[renamed] != stored[name].shape:
            mismatched.append(Mismatch(name=renamed, expected=shapes[renamed], got=stored[name].shape))
        else:
            _check_dtype(stored[name])
            sources.setdefault(renamed, name)
    return Resolution(sources=sources, unexpected=frozenset(unexpected), mismatched=tuple(mismatched))


def _needs_conversion(tensor: StoredTensor, target: str) -> str:
    return (
        f"{tensor.file}: {tensor.name!r} has to be merged or split to make {target!r}, which the sharded loader does not do "
        "yet. Load with --loader stock, and save the result once with save_pretrained in the model's own layout."
    )


def _check_dtype(tensor: StoredTensor) -> None:
    if tensor.dtype not in TORCH_DTYPES or tensor.dtype.startswith("F8"):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}, which needs dequantising; the sharded loader takes "
            "floating-point, integer and boolean tensors as they are. Convert the checkpoint to BF16 first."
        )
