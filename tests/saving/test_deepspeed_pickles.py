"""The classes and functions that a checkpoint of DeepSpeed may name, as different Pythons write them."""

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from zero_sft.errors import CheckpointError
from zero_sft.saving import deepspeed_pickles


class Reduced:
    """An object that is pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


MEMBERS = {
    "as this Python writes it": ZeroStageEnum.weights,
    "as 3.11.2 writes it": Reduced(getattr, ZeroStageEnum, "weights"),
    "as the class is called": Reduced(ZeroStageEnum, 3),
}


@pytest.mark.parametrize("form", MEMBERS)
def test_a_member_of_the_enum(tmp_path, form):
    torch.save({"zero_stage": MEMBERS[form], "scale": LossScaler(1.0)}, tmp_path / "state.pt")
    loaded = deepspeed_pickles.load(tmp_path / "state.pt")
    assert loaded["zero_stage"] is ZeroStageEnum.weights
    assert loaded["scale"].cur_scale == 1.0


@pytest.mark.parametrize(
    "arguments", [(LossScaler, "__init__"), (ZeroStageEnum, "__new__"), (ZeroStageEnum, "__members__"), ("text", "format")]
)
@pytest.mark.parametrize("read", [deepspeed_pickles.load, deepspeed_pickles.require_known_classes])
def test_any_other_attribute_is_refused(tmp_path, arguments, read):
    """DeepSpeed unpickles the file without a list when a run resumes, so that an attribute could lead to any function."""
    torch.save({"a": Reduced(getattr, *arguments)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError) as error:
        read(tmp_path / "state.pt")
    assert error.value.code == "checkpoint.unknown_class"
    assert "getattr" in str(error.value)
