"""Weight the tokens of a batch in the loss of TRL's trainer, which takes the mean of all trained tokens.

TRL's fused output layer returns the log-probability of each label, so that multiplying these by weights is enough: no logits
are kept. The loss of a step is the weighted mean over the tokens of all ranks, however they are spread over ranks and batches.
"""

from collections.abc import Sequence
from typing import Any

import torch

from zero_sft.data.collator import LOSS_WEIGHTS
from zero_sft.data.tokenize import IGNORE_INDEX
from zero_sft.errors import ArgumentError


class WeightedModel:
    """A model whose outputs have weighted log-probabilities. `weights` is (rows, length), of the tokens as labels.

    Called as TRL calls the model.
    """

    def __init__(self, model: Any, weights: torch.Tensor) -> None:
        self._model, self._weights = model, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._model(*args, **kwargs)
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is not None:
            # without `shift_labels`, there is none for the first token
            outputs.log_probs = log_probs * self._weights[:, -log_probs.shape[1] :].to(log_probs)
        return outputs


def sum_of_weights(batches: Sequence[dict[str, Any]]) -> torch.Tensor | None:
    """Return the sum of the weights of all trained tokens of this rank's batches, (), float64; None if they have no weights.

    The first token of a row has no context to be predicted from, so it does not count.
    """
    if not batches or LOSS_WEIGHTS not in batches[0]:
        return None
    return torch.stack([weight_of_batch(batch) for batch in batches]).sum()


def weight_of_batch(batch: dict[str, Any]) -> torch.Tensor:
    """Return the sum of the weights of a batch's trained tokens, (), float64; their number if it has no weights."""
    trained = is_trained(batch)
    weights = batch[LOSS_WEIGHTS][:, -trained.shape[1] :] if LOSS_WEIGHTS in batch else 1.0
    return (trained.double() * weights).sum()


def is_trained(batch: dict[str, Any]) -> torch.Tensor:
    """Return which labels of a batch are trained on, bool: (rows, length - 1), or (rows, length) with `shift_labels`."""
    return batch.get("shift_labels", batch["labels"][:, 1:]) != IGNORE_INDEX


def require_weights_possible(column_names: Sequence[str], column: str, loss_type: str) -> None:
    """Raise `ArgumentError` if samples have weights and the loss is one that they can't multiply."""
    if column in column_names and loss_type != "nll":
        raise ArgumentError(
            f"--loss_type {loss_type} takes no weights, but the data has some (`weight` of a sample or a turn). Leave "
            "--loss_type out, or remove the weights.",
            code="data.weights_with_other_loss",
        )
