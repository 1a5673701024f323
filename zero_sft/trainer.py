"""TRL's `SFTTrainer`, with the batches and the checkpoints of this project.

Importing this module imports TRL.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from zero_sft.config import text_config
from zero_sft.data.collator import Collator
from zero_sft.data.labels import IGNORED
from zero_sft.distributed import agreed
from zero_sft.errors import DataError, ExportError
from zero_sft.saving.export import save_pretrained
from zero_sft.saving.folder import explained, require_writable
from zero_sft.saving.settings import write_settings
from zero_sft.world import World

logger = logging.getLogger("zero_sft.train")

LENGTHS = "length"
"""The column with the samples' lengths, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What is written instead of what trains: the tokenizer with the trained chat template, and values of the config."""

    tokenizer: Any
    config_values: Mapping[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def config_of(self, model: Any) -> Iterator[None]:
        """Give the model's config these values for a while: the trainer's loss has others set."""
        config = text_config(model.config)
        training = {name: getattr(config, name) for name in self.config_values}
        config.update(dict(self.config_values))
        try:
            yield
        finally:
            config.update(training)


class Trainer(SFTTrainer):
    """An `SFTTrainer` that writes no model card, takes no step without trained tokens, and evaluates each token once.

    Its checkpoints hold the same config and tokenizer files as the export. It writes weights without gathering them, and a
    finished run that is resumed takes no step.

    Args:
        published: what checkpoints and the export say about the model.
    """

    _evaluated: dict[str, Any]  # of the evaluation under way: its samples, and of those so far this rank's loss and tokens

    def __init__(self, *args: Any, published: Published, **kwargs: Any) -> None:
        self._published = published
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # they print dicts; `job/steps.py` logs lines
        self.remove_callback(ProgressCallback)
        self.add_callback(TokenCount())

    @property
    def tokens(self) -> int:
        """Tokens that all ranks have computed in the whole run, as TRL counts them: a resumed run's go on."""
        return max(self._total_train_tokens, self._token_count().tokens)

    def _token_count(self) -> "TokenCount":
        """The callback that keeps the count; the Trainer may have replaced it by one from a checkpoint."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, TokenCount))

    def export(self, folder: Path) -> None:
        """Write the model with its config and tokenizer to `folder`. Every rank; communicates.

        Raises:
            ExportError: the folder can't be written.
        """
        model: Any = self.model_wrapped
        with self._published.config_of(self.model):
            save_pretrained(model, folder, tokenizer=self._published.tokenizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's config and tokenizer, and its weights where nothing else holds them. Every rank; communicates.

        DeepSpeed's own states, which the Trainer saves next, hold the weights; with `--save_only_model True` there are none.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        engine: Any = self.model_wrapped
        if self.args.save_only_model or not _internal_call or engine.zero_gather_16bit_weights_on_model_save():
            self.export(folder)
            return
        world = World.detect()
        with agreed(world, f"writing {folder}"), explained(folder), self._published.config_of(self.model):
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                model: Any = self.model
                write_settings(folder, model, self._published.tokenizer)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, if the folder can be written now; else a warning, and the training goes on. Every rank."""
        folder, world = self.args.output_dir, World.detect()
        try:
            with agreed(world, f"checking {folder}"):
                if world.is_main:
                    require_writable(str(folder))
        except ExportError as error:
            if world.is_main:
                logger.warning("no checkpoint of step %d: %s", self.state.global_step, error)
            return
        super()._save_checkpoint(model, trial)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, unless the run that is resumed was finished: it would take one step more. Every rank."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be taken for the exported model's."""

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of one step, and the number of their trained tokens on all ranks. Every rank; communicates.

        Raises:
            DataError: nothing is trained on in any of them, on any rank.
        """
        batches, trained = super().get_batch_samples(self._own(epoch_iterator), *args, **kwargs)
        # Tokenised beforehand, each sample has a trained token; and the number is on the device, so that asking for it waits.
        if batches and trained is not None and _is_lazy(self.train_dataset) and int(trained) == 0:
            raise DataError(
                f"nothing is trained on in the batches of step {self.state.global_step + 1}: all samples were cut off before "
                "their first answer. Raise --model_max_length, or leave --lazy_preprocess out, which drops such samples."
            )
        return batches, trained

    def _own(self, batches: Iterator) -> Iterator:
        """The batches of this rank, with nothing that is only repeated; what can't be tokenised is this rank's own error."""
        rows, size = len(self.train_dataset), self.args.train_batch_size  # type: ignore[arg-type]
        try:
            for batch in batches:
                yield self._without_repeated(batch, rows, size, self.args.dataloader_drop_last)
        except DataError as error:
            said = str(error).rpartition("DataError: ")[2].strip()  # a worker process's comes with its traceback
            alone = DataError(said)
            alone.lone = self.args.world_size > 1
            raise alone from None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and all rows' tokens of packed batches counted, where it counts one row's. Every rank; communicates."""
        rows = len(inputs["labels"]) if model.training and "attention_mask" not in inputs else 1
        before = self._total_train_tokens = self.tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if rows > 1:
            self._total_train_tokens += (rows - 1) * (self._total_train_tokens - before)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        self._token_count().tokens = self._total_train_tokens
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
        inputs = self._without_repeated(inputs, self._evaluated["rows"], self.args.eval_batch_size, drop_last=False)
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if tokens:
            self._evaluated["loss"] += float(result[0]) * tokens
            self._evaluated["tokens"] += tokens
        return result

    def _without_repeated(self, batch: dict[str, Any], samples: int, size: int, drop_last: bool) -> dict[str, Any]:
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
                batch["labels"][kept:] = IGNORED
            else:  # all in one row
                batch["labels"][:, int(row_lengths[:kept].sum()) :] = IGNORED
        return batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """For samples of like length, the sampler of this module instead of the Trainer's. Any rank by itself."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy != "group_by_length" or LENGTHS not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return GroupedSampler(batch, lengths=list(dataset[LENGTHS]), seed=seed, epoch=lambda: int(self.state.epoch or 0))


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


class LastStepLogged(TrainerCallback):
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


class GroupedSampler(LengthGroupedSampler):
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
        flat="flash" in (model.config._attn_implementation or ""),
    )
