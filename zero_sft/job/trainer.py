"""Train with TRL's `SFTTrainer` on this project's batches, with exact losses and token counts.

`job/checkpoints.py` adds the checkpoints. Importing this module imports TRL.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from zero_sft.data.collator import LOSS_WEIGHTS, Collator
from zero_sft.data.mixture import sampling_seed
from zero_sft.data.packing import is_flash
from zero_sft.data.tokenize import IGNORE_INDEX, WEIGHTS
from zero_sft.errors import DataError, Scope
from zero_sft.job.checkpoints import SavingTrainer
from zero_sft.job.device_use import has_idle_experts
from zero_sft.job.sequence_parallel import DataRank, SharedSequences
from zero_sft.job.simulated_faults import SimulatedFaults
from zero_sft.job.trainer_internals import computed_tokens, set_computed_tokens, set_logged_tokens, share_batches
from zero_sft.job.weighted_loss import WeightedModel, is_trained, require_weights_possible, sum_of_weights, weight_of_batch
from zero_sft.rope import text_config
from zero_sft.transformers_internals import configured_attention
from zero_sft.zero.shards import weight_numel

logger = logging.getLogger("zero_sft.train")

LENGTHS = "length"
"""The column with the samples' lengths, in tokens."""


class JobTrainer(SavingTrainer):
    """An `SFTTrainer` that writes no model card, refuses a step without trained tokens, and evaluates each token once.

    Args:
        faults: those that the run has on purpose.
    """

    step_batches: list[dict[str, Any]]
    """This rank's batches of the present step."""
    step_losses: list[torch.Tensor]
    """Their losses so far."""
    _evaluated: dict[str, Any]  # the current evaluation: the dataset's samples, and this rank's summed loss and tokens so far

    def __init__(self, *, faults: SimulatedFaults, **kwargs: Any) -> None:
        self._faults, self.step_batches, self.step_losses = faults, [], []
        self.seconds_waited_for_data = self.seconds_in_model = 0.0
        self._whole_batches: list[dict[str, Any]] = []  # of a step whose sequences are shared between ranks
        self._trained_tokens: Any = 0  # since the last logged loss; on a GPU a tensor
        self._tokens_at_loss: int | None = None
        self._weight_scale: torch.Tensor | None = None
        self._evaluated_sets: list[tuple[float, float]] = []  # the summed loss and weight of each set
        super().__init__(**kwargs)
        self.checkpoints.write_with(faults.failing)
        self.remove_callback(PrinterCallback)  # both print dicts; `job/steps.py` logs lines
        self.remove_callback(ProgressCallback)
        self.add_callback(TokenCount())
        require_weights_possible(kwargs["train_dataset"].column_names, WEIGHTS, kwargs["args"].loss_type)
        parts = self.args.sequence_parallel_size  # type: ignore[attr-defined]  # of this package's arguments
        self._place = DataRank.of(self.args.process_index, self.args.world_size, parts)
        self._shared = None
        if self._place.parts > 1:
            self._shared = SharedSequences(self.model, self._place, self._world)
            share_batches(self.accelerator, self._place)

    @property
    def tokens(self) -> int:
        """The tokens that all ranks have computed in the whole run, before and after a resume, as TRL counts them."""
        return max(computed_tokens(self), self._token_count().tokens)

    def _token_count(self) -> "TokenCount":
        """Find the callback that keeps the count; the Trainer may have replaced it by one from a checkpoint."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TokenCount))

    @functools.cached_property
    def _flops_per_token(self) -> int:
        """Operations per token: 2 per parameter and pass, without embeddings. A frozen parameter gets no gradient."""
        model: Any = self.model
        embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
        params = [param for param in model.parameters() if id(param) not in embeddings]
        return sum((6 if param.requires_grad else 4) * weight_numel(param) for param in params)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return the operations of a batch: of a model that is trained as a whole, transformers' estimate.

        transformers counts the elements that a parameter has on this rank at present: none if it is partitioned.
        """
        return inputs["input_ids"].numel() * self._flops_per_token

    @property
    def flops_per_token(self) -> int | None:
        """Operations for a token, as in `floating_point_ops`; None for a model with experts, of which a token uses a part."""
        model: Any = self.model
        return None if has_idle_experts(text_config(model.config)) else self._flops_per_token

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card, since TRL's card would be taken for a description of the exported model."""

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the batches of one step, and the number of their trained tokens on all ranks. Every rank; communicates.

        Raises:
            DataError: no batch on any rank holds a trained token.
        """
        began = time.monotonic()
        if self._tokens_at_loss is None:
            self._tokens_at_loss = self.tokens
        batches, trained = super().get_batch_samples(self._local_batches(epoch_iterator), *args, **kwargs)
        self._weight_scale = self._scale_of_weights(batches, trained)
        self.seconds_waited_for_data += time.monotonic() - began
        self.step_batches, self.step_losses = self._whole_batches or [dict(batch) for batch in batches], []
        self._whole_batches = []
        self._trained_tokens += 0 if trained is None else trained  # on a GPU without waiting for it
        # Samples tokenised in advance always hold a trained token. Skip the check for them: `int(trained)` syncs the device.
        dataset: Any = self.train_dataset
        is_lazy = "input_ids" not in dataset.column_names
        if batches and trained is not None and is_lazy and int(trained) == 0:
            raise DataError(
                f"the batches of step {self.state.global_step + 1} hold no trained token: all samples were cut off before "
                "their first answer. Raise --model_max_length, or leave out --lazy_preprocess to drop such samples.",
                code="data.nothing_trained_on",
            )
        return batches, trained

    def _scale_of_weights(self, batches: list[dict[str, Any]], trained: Any) -> torch.Tensor | None:
        """Return the number of a step's trained tokens for each unit of their weights; None without weights. Communicates.

        TRL divides the loss by the number of tokens.
        """
        weights = sum_of_weights(batches)
        if weights is None or trained is None:
            return None
        return trained / self.accelerator.gather(weights.to(self.args.device)).sum()  # type: ignore[union-attr]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; with a loss also the share of the tokens since the last loss that were trained on."""
        if "loss" in logs:
            computed, trained = self.tokens - (self._tokens_at_loss or 0), int(self._trained_tokens)
            if computed > 0 and trained:
                logs["trained_share"] = trained / computed
            self._tokens_at_loss, self._trained_tokens = self.tokens, 0
        super().log(logs, *args, **kwargs)

    def _local_batches(self, batches: Iterator) -> Iterator:
        """Yield this rank's batches with repeated samples masked, and mark an error in the data as local to this rank.

        Any rank; does not communicate.

        Raises:
            DataError: a sample can't be tokenised.
        """
        samples, size = len(self.train_dataset), self.args.train_batch_size  # type: ignore[arg-type]
        try:
            for batch in batches:
                require_weights_possible(batch.keys(), LOSS_WEIGHTS, self.args.loss_type)  # type: ignore[attr-defined]
                whole = self._mask_in_last_batch(batch, samples, size, self.args.dataloader_drop_last)
                if self._shared is not None:
                    self._whole_batches.append(whole)
                yield whole if self._shared is None else self._shared.own_part(whole)
        except DataError as error:
            message = str(error).rpartition("DataError: ")[2].strip()  # without the traceback of a worker process
            # a stream has the same rows on all ranks, so all of them have the error
            scope = Scope.UNKNOWN if hasattr(self.train_dataset, "states_at") else Scope.THIS_RANK
            raise DataError(message, code=error.code or "data.unusable_sample", scope=scope) from None

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do the Trainer's forward and backward pass of a batch, and keep its loss. Every rank; communicates."""
        began = time.monotonic()
        with contextlib.nullcontext() if self._shared is None else self._shared.exchanging(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.seconds_in_model += time.monotonic() - began
        self.step_losses.append(loss.detach())
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss, and count the tokens of all rows of a packed batch. Every rank; communicates.

        TRL counts a single row's tokens in such a batch.
        """
        is_packed = "attention_mask" not in inputs  # the collator gives position ids instead
        rows = len(inputs["labels"]) if model.training and is_packed else 1
        tokens_before = self.tokens
        set_computed_tokens(self, tokens_before)  # TRL's count starts at 0 in a resumed run
        if LOSS_WEIGHTS in inputs:
            weights = inputs[LOSS_WEIGHTS] * (self._weight_scale if model.training and self._weight_scale is not None else 1)
            inputs = {name: value for name, value in inputs.items() if name != LOSS_WEIGHTS}
            loss = super().compute_loss(cast(Any, WeightedModel(model, weights)), inputs, *args, **kwargs)
        else:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if rows > 1:
            set_computed_tokens(self, tokens_before + rows * (computed_tokens(self) - tokens_before))
            set_logged_tokens(self, computed_tokens(self))
        self._token_count().tokens = computed_tokens(self)
        return loss * math.nan if self._faults.makes_nan and model.training else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, but report the mean loss over all trained tokens. Every rank; communicates.

        The Trainer reports the mean of the batches' means, which depends on how samples are spread over batches and ranks. The
        routers' auxiliary loss depends on that as well, so it is left out.
        """
        self._evaluated = {"samples": len(dataloader.dataset), "loss": 0.0, "weight": 0.0}
        aux_loss_enabled, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            result = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.aux_loss_enabled = aux_loss_enabled
        sums = torch.tensor([self._evaluated["loss"], self._evaluated["weight"]], dtype=torch.float64, device=self.args.device)
        loss, weight = self.accelerator.reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        self._evaluated_sets.append((loss, weight))
        if result.metrics and f"{metric_key_prefix}_loss" in result.metrics:
            result.metrics[f"{metric_key_prefix}_loss"] = loss / weight if weight else math.nan
        return result

    def evaluate(self, eval_dataset: Any = None, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; of several named sets, log the mean loss of all trained tokens as well. Every rank."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._evaluated_sets = []
        metrics = super().evaluate(None, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, weight = (sum(values) for values in zip(*self._evaluated_sets, strict=True))
        overall = {f"{metric_key_prefix}_loss": loss / weight if weight else math.nan}
        self.log(dict(overall))
        return {**metrics, **overall}

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Build the Trainer's loader without `--dataloader_drop_last`: that option is about training steps."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run TRL's prediction step with repeated samples masked, and sum up the loss. Every rank; communicates."""
        inputs = self._mask_in_last_batch(inputs, self._evaluated["samples"], self.args.eval_batch_size, drop_last=False)
        if self._shared is not None:
            inputs = self._shared.own_part(inputs)
        tokens, weight = int(is_trained(inputs).sum()), float(weight_of_batch(inputs))
        with contextlib.nullcontext() if self._shared is None else self._shared.exchanging(inputs):
            result = super().prediction_step(model, inputs, *args, **kwargs)
        if tokens:
            self._evaluated["loss"] += float(result[0]) * tokens
            self._evaluated["weight"] += weight
        return result

    def _mask_in_last_batch(self, batch: dict[str, Any], samples: int, size: int, drop_last: bool) -> dict[str, Any]:
        """Mask the repeated samples in this rank's last batch; `drop_last` leaves none. Any rank; does not communicate."""
        is_last = self.accelerator.gradient_state.end_of_dataloader and not drop_last
        place = self._place
        return mask_repeated_samples(batch, samples, size=size, rank=place.rank, ranks=place.ranks, is_last=is_last)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return this module's sampler for "group_by_length", else the Trainer's. Any rank; does not communicate."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy != "group_by_length" or LENGTHS not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        step_samples = self._record.order_samples or self._record.samples_a_step
        return SeededLengthGroupedSampler(
            step_samples, lengths=list(dataset[LENGTHS]), seed=sampling_seed(args), epoch=lambda: int(self.state.epoch or 0)
        )


def mask_repeated_samples(
    batch: dict[str, Any], samples: int, *, size: int, rank: int, ranks: int, is_last: bool
) -> dict[str, Any]:
    """Mask the labels of the samples that accelerate repeats to fill the last batches of an epoch.

    In the last batches, in rank order, the first `samples % (ranks * size)` samples are real and the others are repeated.
    accelerate's `remainder` holds the same number, but is wrong after a resume.

    Args:
        samples: the number of samples in the dataset.
        size: the number of samples of a full batch on one rank.
        is_last: whether this is the rank's last batch of the epoch; no other batch is changed.
    """
    row_lengths = batch.pop("row_lengths", None)
    real_samples = samples % (ranks * size)
    rows = len(batch["labels"] if row_lengths is None else row_lengths)
    if is_last and real_samples and ranks > 1 and rows == size:
        kept = max(0, real_samples - rank * size)
        if row_lengths is None:
            batch["labels"][kept:] = IGNORE_INDEX
        else:  # a flat batch: all samples in one row
            batch["labels"][:, int(row_lengths[:kept].sum()) :] = IGNORE_INDEX
    return batch


class TokenCount(TrainerCallback, ExportableState):
    """Keep the number of computed tokens in each checkpoint's trainer state, since TRL counts from 0 in each process."""

    def __init__(self) -> None:
        self.tokens = 0

    def state(self) -> dict[str, Any]:
        """Return the count for the trainer state; the Trainer calls this when it saves a checkpoint."""
        return {"args": {}, "attributes": {"tokens": self.tokens}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over the count of the resumed checkpoint, or the last logged count of one that was saved without it."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        logged = [int(entry["num_tokens"]) for entry in state.log_history if "num_tokens" in entry]
        self.tokens = max(self.tokens, int(saved["attributes"]["tokens"]), *logged[-1:])


class LogLastStep(TrainerCallback):
    """Log the loss of the last step, whatever `logging_steps` is.

    The Trainer would add the steps that it has not logged to `train_loss` with rank 0's loss, which is not the mean.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report a resumed run that is finished. The Trainer calls this before the first step, on every rank."""
        if state.global_step >= state.max_steps:
            logger.info(
                "this run is finished: its checkpoint is of step %d, and it ends at step %d. The model is exported without "
                "further training. To train on, raise --max_steps or --num_train_epochs.", state.global_step, state.max_steps,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a log entry at the last step. The Trainer calls this after each step, on every rank."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """A sampler that groups samples of similar length, with the longest first and a new order in each epoch.

    The order depends only on the seed and the epoch. transformers' sampler draws from the global generator of each rank, so
    that ranks could draw different orders, and its order depends on how a step's batch is spread over ranks.

    Args:
        batch_size: the samples of one step on all ranks.
        lengths: the samples' lengths in tokens.
        epoch: a function that returns the epoch that begins, from 0. accelerate's `set_epoch` would not reach this sampler
            when a run on several ranks is resumed, since the loader that skips batches hides it.
    """

    def __init__(self, batch_size: int, *, lengths: Sequence[int], seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


def collator_for(model: Any, tokenizer: Any, multiple_of: int | None) -> Collator:
    """Make the collator that suits a model's attention."""
    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        multiple_of=multiple_of,
        flat=is_flash(configured_attention(model.config)),
    )
