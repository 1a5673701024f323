"""Samples tokenised while the model is trained: the batches of the prepared data, resumed exactly, on any number of ranks."""

import itertools
import json
import os
import random
import shutil

import pytest

from testing.runner import run_ranks
from tests import small_job
from tests.remote import standin

CALM = {
    "optim": "sgd", "max_grad_norm": 0.0, "model_max_length": 100, "per_device_train_batch_size": 2, "max_steps": 6,
    "deepspeed": json.dumps({
        "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_job.make(tmp_path_factory.mktemp("streaming"), samples=60)
    rng = random.Random(2)
    talks = [
        {"prompt": f"{n}!", "completion": "b" * rng.randrange(1, 90), "weight": rng.choice([1, 1, 0.5])} for n in range(25)
    ]
    (folder / "other.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


def losses(folder, out, ranks, **arguments):
    small_job.run(folder, out, ranks, {**CALM, **arguments})
    return small_job.losses(folder, out)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, {}),
        pytest.param(1, {"packing": False}, marks=pytest.mark.slow),
        pytest.param(4, {"packing": False, "gradient_accumulation_steps": 2, "max_steps": 3}, marks=pytest.mark.slow),
        pytest.param(2, {"data_path": "{folder}/data.json:0.6,{folder}/other.jsonl:0.4"}, marks=pytest.mark.slow),
        pytest.param(2, {"data_path": "{folder}/data.json,{folder}/other.jsonl", "packing": False}, marks=pytest.mark.slow),
    ],
)
def test_batches_are_those_of_prepared_data(folder, ranks, arguments):
    name = f"{ranks}-{len(str(arguments))}"
    arguments = {name: str(value).format(folder=folder) for name, value in arguments.items()}
    arguments["train_sampling_strategy"] = "sequential"
    prepared = losses(folder, f"prepared-{name}", ranks, **arguments)
    streamed = losses(folder, f"streamed-{name}", ranks, **arguments, streaming=True)
    assert len(streamed) == int(arguments.get("max_steps", 6))
    assert streamed == pytest.approx(prepared, rel=1e-6)


def test_a_run_is_resumed_at_the_same_row_in_a_later_pass(folder):
    stream = {"streaming": True, "packing": False, "max_steps": 24, "save_strategy": "steps", "save_steps": 18}  # 96 rows
    whole = losses(folder, "whole", 2, **stream)
    (folder / "resumed").mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-18", folder / "resumed" / "checkpoint-18")
    resumed = losses(folder, "resumed", 2, **stream, resume_from_checkpoint="auto")
    assert resumed == pytest.approx(whole, rel=1e-6)
    assert len(set(whole)) == 24


@pytest.mark.slow
def test_other_ranks_go_on_at_the_same_row(folder):
    stream = {"streaming": True, "packing": False, "save_strategy": "steps", "save_steps": 4}
    losses(folder, "elastic", 4, **stream, max_steps=7)
    whole = tokens(folder, "elastic")
    shutil.rmtree(folder / "elastic" / "logs")
    small_job.run(
        folder, "elastic", 2,
        {**CALM, **stream, "max_steps": 14, "resume_from_checkpoint": folder / "elastic" / "checkpoint-4"},
    )  # fmt: skip
    resumed = tokens(folder, "elastic")
    assert [sum(pair) for pair in zip(resumed[-6::2], resumed[-5::2], strict=True)] == whole[4:]


def tokens(folder, out):
    """The tokens of each step, which depend on its rows alone."""
    totals = [0, *(int(entry["num_tokens"]) for entry in small_job.history(folder, out) if "loss" in entry)]
    return [after - before for before, after in itertools.pairwise(totals)]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_data_comes_from_an_s3_server(folder, streaming, monkeypatch):
    arguments = {**CALM, "train_sampling_strategy": "sequential", "packing": False, "streaming": streaming}
    local = losses(folder, f"local-{streaming}", 2, **arguments)
    store = standin.Store({"bucket/talks/data.json": (folder / "data.json").read_bytes()}, key="the-key")
    with standin.serve_s3(store, monkeypatch):
        given = {**arguments, "data_path": "s3://bucket/talks"}
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        kwargs = {"folder": folder, "out": f"far-{streaming}", "arguments": given, "environment": environment}
        run_ranks(2, _train, kwargs, 400)
        assert store.sent["bucket/talks/data.json"] > 0
    assert small_job.losses(folder, f"far-{streaming}") == local


def _train(folder, out, arguments, environment):
    os.environ.update(environment)
    small_job.train(folder, out, **arguments)
