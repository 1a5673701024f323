"""Tests of `zero_sft.job.trainer`: samples that accelerate repeats at the end of an epoch are not trained on again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.errors import raises
from zero_sft.cluster import failure_report as failure
from zero_sft.cluster.world import World
from zero_sft.data.collator import Collator
from zero_sft.data.tokenize import IGNORE_INDEX
from zero_sft.errors import DataError
from zero_sft.job.sequence_parallel import DataRank
from zero_sft.job.trainer import JobTrainer, mask_repeated_samples

ROWS = [{"input_ids": [number] * number, "labels": [number] * number, "seq_lengths": [number]} for number in range(1, 9)]


def trained(flat, indices, rank, *, rows, is_last=True):
    """Return the rows that a rank's batch trains on, of a dataset of `rows` on 2 ranks, and the number of trained tokens."""
    batch = Collator(pad_token_id=0, flat=flat)([ROWS[index] for index in indices])
    batch = mask_repeated_samples(batch, rows, size=2, rank=rank, ranks=2, is_last=is_last)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    return torch.unique(labels, return_counts=True)[0].tolist(), len(labels)


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_are_only_repeated(flat):
    """7 rows on 2 ranks with batches of 2: the last step has rows 5 and 6, then 7 and a repeated 1."""
    assert trained(flat, [4, 5], 0, rows=7) == ([5, 6], 11)
    assert trained(flat, [6, 0], 1, rows=7) == ([7], 7)
    assert trained(flat, [0, 1], 1, rows=6) == ([], 0)
    assert trained(flat, [6, 0], 1, rows=8) == ([1, 7], 8)
    assert trained(flat, [6, 0], 1, rows=7, is_last=False) == ([1, 7], 8)


@pytest.mark.parametrize(("end", "drop_last", "labels"), [(True, False, [0]), (False, False, [0, 1]), (True, True, [0, 1])])
def test_only_the_last_batches_of_an_epoch_are_filled_up(end, drop_last, labels):
    trainer: Any = SimpleNamespace(
        _place=DataRank.of(rank=1, world_size=2, parts=1),
        accelerator=SimpleNamespace(gradient_state=SimpleNamespace(end_of_dataloader=end)),
    )
    batch = JobTrainer._mask_in_last_batch(trainer, {"labels": torch.arange(2)}, 7, 2, drop_last)
    assert batch["labels"][batch["labels"] != IGNORE_INDEX].tolist() == labels


@pytest.mark.parametrize(
    "said",
    ["a.json, sample 6: no", "Caught DataError in worker 0.\nTraceback\nzero_sft.errors.DataError: a.json, sample 6: no"],
)
def test_what_one_rank_alone_can_not_read_it_says_itself(said, capsys):
    trainer: Any = SimpleNamespace(
        train_dataset=range(4), args=SimpleNamespace(train_batch_size=1, world_size=2, dataloader_drop_last=False)
    )

    def batches():
        raise DataError(said)  # without its code, as torch rebuilds it from a worker's text
        yield

    with raises("data.unusable_sample") as caught:
        next(JobTrainer._local_batches(trainer, batches()))
    failure.begin_job(World(rank=1, world_size=2))
    assert failure.report_failure(caught.value) == 1
    assert capsys.readouterr().err == "\nerror: a.json, sample 6: no (rank 1 alone) [data.unusable_sample]\n"
    failure.begin_job(World(rank=1, world_size=2))
    assert failure.report_failure(DataError("all have it")) == 1
    assert not capsys.readouterr().err
