"""The weights in a checkpoint under the model's names, whatever its format: read one after the other, in full."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from zero_sft.errors import CheckpointError


class SavedWeights(Protocol):
    """The weights in a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the run trained."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes that the checkpoint states, by the model's names. Names that it lacks are missing."""
        ...

    @property
    def rules(self) -> Sequence[Any] | None:
        """transformers' conversion rules for the published files of the run's model; None if they are not known."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return all elements of a tensor, flat, in the precision of the optimizer if the checkpoint has it.

        Raises:
            CheckpointError: a file can't be read.
        """
        ...


class MeanWeights:
    """The mean of the weights in several checkpoints of one run, computed in fp32."""

    def __init__(self, members: Sequence[SavedWeights]) -> None:
        """Take checkpoints with the same tensors.

        Raises:
            CheckpointError: their tensors differ.
        """
        last = members[-1]
        self.dtype, self.rules, self.shapes, self._members = last.dtype, last.rules, last.shapes, members
        for member in members:
            if dict(member.shapes) != dict(self.shapes):
                raise CheckpointError(
                    "the checkpoints to average have different tensors: name checkpoints of one run.",
                    code="export.other_tensors",
                )

    def read(self, name: str) -> torch.Tensor:
        """Return the mean of a tensor's elements, flat; of numbers that are not floating-point, the last checkpoint's."""
        last = self._members[-1].read(name)
        if not last.is_floating_point():
            return last
        total = last.float()
        for member in self._members[:-1]:
            total += member.read(name)
        return total.div_(len(self._members))
