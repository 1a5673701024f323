"""Tests that packed and unpacked training give the same loss in every step, with each attention implementation."""

import json

import pytest

from testing.runner import run_ranks
from tests import small_job
from tests.data import tiny

STEPS = 4
SAMPLES = 24


@pytest.fixture
def folder(tmp_path):
    """A job whose conversations fill one batch."""
    return small_job.make(tmp_path, SAMPLES)


def rows_when_packed(folder) -> int:
    from zero_sft.data.packing import pack

    return len(pack(tiny.prepare(folder / "data.json", tiny.byte_tokenizer(tiny.CHATML), model_max_length=256).samples, 256))


def train(folder, out, arguments):
    """One rank's part of a run."""
    common = {"data_cache_dir": folder / "cache", "model_max_length": 256, "max_steps": STEPS}
    small_job.train(folder, out, **{**common, **arguments})


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_unpacked_give_one_curve(folder, attention):
    """Each step is one epoch with all samples, so both runs have the same batches."""
    rows, curves = rows_when_packed(folder), []
    assert rows < SAMPLES // 2
    for packing, batch in (("True", rows), ("False", SAMPLES)):
        run_ranks(1, train, {"folder": folder, "out": packing, "arguments": {
            "packing": packing, "per_device_train_batch_size": batch, "attn_implementation": attention}})  # fmt: skip
        seen = [entry["num_tokens"] for entry in small_job.history(folder, packing) if "num_tokens" in entry]
        if packing == "True":
            assert STEPS * rows * 200 < seen[-1] <= STEPS * rows * 256, "tokens of all rows"
        curves.append(small_job.losses(folder, packing))
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def fail(folder):
    """Run the job as one rank, and expect an error on every rank. Every rank; communicates."""
    from zero_sft.cluster import failure_report as failure

    said = []
    failure.report_failure = lambda error: said.append(error.code) or 0
    train(folder, "out", {"lazy_preprocess": "True", "per_device_train_batch_size": 1, "model_max_length": 128})
    assert said == ["data.nothing_trained_on"]


@pytest.mark.slow
def test_a_step_in_which_nothing_is_trained_on_ends_the_run(folder):
    """Lazily tokenised samples may be cut off before their answers: here all but one, which is in one of five steps."""
    cut = [{"from": "human", "value": "x" * 400}, {"from": "gpt", "value": "y"}]
    whole = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    (folder / "data.json").write_text(json.dumps([{"conversations": talk} for talk in [*[cut] * 9, whole]]))
    run_ranks(2, fail, {"folder": folder})
