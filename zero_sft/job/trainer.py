"""TRL's `SFTTrainer`, with the batches of this project; its checkpoints are in `job/checkpoints.py`.

Importing this module imports TRL.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from zero_sft.data.collator import Collator
from zero_sft.data.tokenize import IGNORE_INDEX
from zero_sft.errors import DataError
from zero_sft.job.checkpoints import SavingTrainer
from zero_sft.job.trainer_internals import computed_tokens, set_computed_tokens, set_logged_tokens
from zero_sft.transformers_internals import configured_attention

logger = logging.getLogger("zero_sft.train")

LENGTHS = "length"
"""The column with the samples' lengths, in tokens."""


class Trainer(SavingTrainer):
    """An `SFTTrainer` that writes no model card, takes no step without trained tokens, and evaluates each token once.

    Args:
        published: what checkpoints and the export say about the model.
    """

    _evaluated: dict[str, Any]  # of the evaluation under way: its samples, and of those so far this rank's loss and tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # they print dicts; `job/steps.py` logs lines
        self.remove_callback(ProgressCallback)
        self.add_callback(TokenCount())

    @property
    def tokens(self) -> int:
        """Tokens that all ranks have computed in the whole run, as TRL counts them: a resumed run's go on."""
        return max(computed_tokens(self), self._token_count().tokens)

    def _token_count(self) -> "TokenCount":
        """The callback that keeps the count; the Trainer may have replaced it by one from a checkpoint."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, TokenCount))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be taken for the exported model's."""

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of one step, and the number of their trained tokens on all ranks. Every rank; communicates.

        Raises:
            DataError: nothing is trained on in any of them, on any rank.
        """
        batches, trained = super().get_batch_samples(self._local_batches(epoch_iterator), *args, **kwargs)
        # Tokenised beforehand, each sample has a trained token; and the number is on the device, so that asking for it waits.
        if batches and trained is not None and _is_lazy(self.train_dataset) and int(trained) == 0:
            raise DataError(
                f"nothing is trained on in the batches of step {self.state.global_step + 1}: all samples were cut off before "
                "their first answer. Raise --model_max_length, or leave --lazy_preprocess out, which drops such samples.",
                code="data.nothing_trained_on",
            )
        return batches, trained

    def _local_batches(self, batches: Iterator) -> Iterator:
        """The batches of this rank, with nothing that is only repeated; what can't be tokenised is this rank's own error."""
        rows, size = len(self.train_dataset), self.args.train_batch_size  # type: ignore[arg-type]
        try:
            for batch in batches:
                yield self._mask_padding_samples(batch, rows, size, self.args.dataloader_drop_last)
        except DataError as error:
            said = str(error).rpartition("DataError: ")[2].strip()  # a worker process's comes with its traceback
            alone = DataError(said, code=error.code or "data.unusable_sample")
            alone.rank_local = self.args.world_size > 1
            raise alone from None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and all rows' tokens of packed batches counted, where it counts one row's. Every rank; communicates."""
        rows = len(inputs["labels"]) if model.training and "attention_mask" not in inputs else 1
        before = self.tokens
        set_computed_tokens(self, before)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if rows > 1:
            set_computed_tokens(self, before + rows * (computed_tokens(self) - before))
            set_logged_tokens(self, computed_tokens(self))
        self._token_count().tokens = computed_tokens(self)
        return loss

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's, with the mean loss of all trained tokens. Every rank; communicates.

        The Trainer's own is the mean of the batches' means, which depends on how samples are spread over batches and ranks;
        so does the routers' auxiliary loss, which is left out.
        """
        self._evaluated = {"rows": len(dataloader.dataset), "loss": 0.0, "tokens": 0}
        routed, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            result = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.aux_loss_enabled = routed
        own = torch.tensor([self._evaluated["loss"], self._evaluated["tokens"]], dtype=torch.float64, device=self.args.device)
        loss, tokens = self.accelerator.reduce(own, reduction="sum").tolist()  # type: ignore[union-attr]
        if result.metrics and f"{metric_key_prefix}_loss" in result.metrics:
            result.metrics[f"{metric_key_prefix}_loss"] = loss / tokens if tokens else math.nan
        return result

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the last samples whatever `--dataloader_drop_last` says, which is about steps."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = dropped

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, for samples that were not only repeated, with their loss added up. Every rank; communicates."""
        inputs = self._mask_padding_samples(inputs, self._evaluated["rows"], self.args.eval_batch_size, drop_last=False)
        tokens = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if tokens:
            self._evaluated["loss"] += float(result[0]) * tokens
            self._evaluated["tokens"] += tokens
        return result

    def _mask_padding_samples(self, batch: dict[str, Any], samples: int, size: int, drop_last: bool) -> dict[str, Any]:
        """A batch, of `size` of a data set's samples, without labels for those that are only repeated to give every rank one.

        Of the last batches, all ranks' in a row, the first few samples are the epoch's last; accelerate's own count of them is
        wrong after a resume. Where the last are dropped, nothing is repeated.
        """
        row_lengths = batch.pop("row_lengths", None)
        ranks = self.args.world_size
        last = 0 if drop_last else samples % (ranks * size)
        rows = len(batch["labels"] if row_lengths is None else row_lengths)
        if self.accelerator.gradient_state.end_of_dataloader and last and ranks > 1 and rows == size:
            kept = max(0, last - self.args.process_index * size)
            if row_lengths is None:
                batch["labels"][kept:] = IGNORE_INDEX
            else:  # all in one row
                batch["labels"][:, int(row_lengths[:kept].sum()) :] = IGNORE_INDEX
        return batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """For samples of like length, the sampler of this module instead of the Trainer's. Any rank by itself."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy != "group_by_length" or LENGTHS not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return SeededLengthGroupedSampler(
            batch, lengths=list(dataset[LENGTHS]), seed=seed, epoch=lambda: int(self.state.epoch or 0)
        )


class TokenCount(TrainerCallback, ExportableState):
    """Keeps the number of computed tokens in the trainer's state of a checkpoint, since TRL counts from 0 in each process."""

    def __init__(self) -> None:
        self.tokens = 0

    def state(self) -> dict[str, Any]:
        """For the trainer's state; the Trainer asks for it when it saves one."""
        return {"args": {}, "attributes": {"tokens": self.tokens}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the count of the checkpoint that is resumed, if it is one; of older ones, the last that was logged."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        logged = [int(entry["num_tokens"]) for entry in state.log_history if "num_tokens" in entry]
        self.tokens = max(self.tokens, int(kept["attributes"]["tokens"]), *logged[-1:])


class LogLastStep(TrainerCallback):
    """The last step's loss goes into the log, whatever `logging_steps`.

    What the Trainer has not logged yet at the end goes into its `train_loss` as rank 0's own part, which is not the mean.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer before the first step, on every rank."""
        if state.global_step >= state.max_steps and state.is_world_process_zero:
            logger.info(
                "this run is finished: its checkpoint is of step %d, and it ends at step %d. Nothing is trained; the model is "
                "exported as it is. To train on, raise --max_steps or --num_train_epochs.", state.global_step, state.max_steps,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after each step, on every rank."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Samples of like length together, the longest first, in another order each epoch.

    The order follows from the seed and the epoch alone. That of transformers' own is drawn from each rank's global generator,
    so that ranks could draw different ones, and depends on how the batch of a step is spread over ranks.

    Args:
        batch_size: samples of one step, on all ranks.
        lengths: of the samples, in tokens.
        epoch: which one begins, from 0 on. It is asked, not told: accelerate's `set_epoch` does not reach a sampler behind
            the batches that a resumed run skips on several ranks.
    """

    def __init__(self, batch_size: int, *, lengths: Sequence[int], seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


def _is_lazy(dataset: Any) -> bool:
    return "input_ids" not in dataset.column_names


def collator_for(model: Any, tokenizer: Any, multiple_of: int | None) -> Collator:
    """How batches are made for a model and its attention."""
    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        multiple_of=multiple_of,
        flat="flash" in (configured_attention(model.config) or ""),
    )
