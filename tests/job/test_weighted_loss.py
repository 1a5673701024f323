"""The loss of samples and turns with weights is their weighted mean, however they are spread over ranks, batches and rows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import small_job
from tests.data.tiny import prepare
from tests.errors import raises
from tests.slow import slow
from zero_sft.data.tokenize import WEIGHTS
from zero_sft.job.weighted_loss import WeightedModel, require_weights_possible

GIVEN = {"max_steps": 3, "packing": False, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "model_max_length": 256}
SAMPLES = 8


def weighted(number: int) -> dict:
    """Two answers, with weights that differ between samples and turns; one answer is left out."""
    answers = [f"{number} " * (1 + 7 * number % 20), "Bye."]
    turns = [
        turn
        for answer in answers
        for turn in ({"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer})
    ]
    turns[1]["weight"] = [1, 0.25, 0, 0.5][number % 4]
    return {"messages": turns, **({"weight": 0.5} if number % 3 == 0 else {})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = small_job.make(tmp_path_factory.mktemp("weights"), 1)
    (folder / "data.json").write_text(json.dumps([weighted(number) for number in range(SAMPLES)]))
    return folder


def reference(folder: Path) -> float:
    """The weighted mean of the tokens' losses, computed with transformers alone from what each turn is meant to weigh."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    losses, weights = 0.0, 0.0
    for sample in json.loads((folder / "data.json").read_text()):
        text, spans = "", []
        for turn in sample["messages"]:
            text += f"<|im_start|>{turn['role']}\n"
            start = len(text)
            text += f"{turn['content']}<|im_end|>"
            if turn["role"] == "assistant":
                spans.append((start, len(text), turn.get("weight", 1) * sample.get("weight", 1)))
            text += "\n"
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        log_probs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        nll = -log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        for position, (first, last) in enumerate(encoded["offset_mapping"][1:]):
            weight = sum(weight for start, stop, weight in spans if start < last and first < stop)
            losses, weights = losses + weight * float(nll[position]), weights + weight
    return losses / weights


def run(folder: Path, ranks: int, **arguments) -> list[float]:
    out = f"{ranks}-{'-'.join(f'{name}-{Path(str(value)).stem}' for name, value in arguments.items())}"
    if not (folder / out).exists():
        small_job.run(folder, out, ranks, GIVEN | {"per_device_train_batch_size": SAMPLES // ranks} | arguments)
    return small_job.losses(folder, out)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        slow(1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SAMPLES}),
        (2, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        slow(4, {}),
        slow(1, {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "model_max_length": 512}),
        slow(2, {"sequence_parallel_size": 2, "per_device_train_batch_size": SAMPLES}),
        slow(2, {"lazy_preprocess": True}),
    ],
)
def test_any_spread(folder, ranks, arguments):
    expected = run(folder, 1)
    assert expected[0] == pytest.approx(reference(folder), rel=1e-5)
    if "packing" in arguments:  # the rows of a step are other samples than without packing
        small_job.run(folder, "packed", 2, GIVEN | arguments | {"gradient_accumulation_steps": 1})
        expected = small_job.losses(folder, "packed")
    assert run(folder, ranks, **arguments) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_equal_weights_change_nothing(folder, tmp_path):
    talks = [{**weighted(number), "weight": weight} for number, weight in enumerate([0.01] * SAMPLES)]
    for talk in talks:
        talk["messages"][1].pop("weight")
    light, plain = tmp_path / "light.json", tmp_path / "plain.json"
    light.write_text(json.dumps(talks))
    plain.write_text(json.dumps([{"messages": talk["messages"]} for talk in talks]))
    first, second = run(folder, 2, data_path=light), run(folder, 2, data_path=plain)
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.slow
def test_an_evaluation(folder):
    arguments = {"eval_data_path": folder / "data.json", "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    small_job.run(
        folder,
        "evaluated",
        2,
        GIVEN | arguments | {"per_device_eval_batch_size": 3, "max_steps": 1, "per_device_train_batch_size": 4},
    )
    (loss,) = [entry["eval_loss"] for entry in small_job.history(folder, "evaluated") if "eval_loss" in entry]
    assert loss == pytest.approx(reference(folder), rel=1e-5)


def test_the_columns(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prepared = prepare(folder / "data.json", tokenizer, model_max_length=256)
    assert set(prepared.rows[0][WEIGHTS]) == {0.0, 0.5}
    assert set(prepared.rows[1][WEIGHTS]) == {0.0, 0.25, 1.0}
    assert prepared.rows[4][WEIGHTS] is None
    assert "6 rows with weights other than 0 and 1" in prepared.lines()


def test_a_loss_that_takes_no_weights():
    require_weights_possible(["input_ids", WEIGHTS], WEIGHTS, "nll")
    require_weights_possible(["input_ids"], WEIGHTS, "dft")
    with raises("data.weights_with_other_loss", "--loss_type dft"):
        require_weights_possible(["input_ids", WEIGHTS], WEIGHTS, "dft")


def test_log_probabilities_are_weighted_as_labels():
    class Outputs:
        log_probs = torch.tensor([[-1.0, -2.0]])

    model = WeightedModel(lambda: Outputs(), torch.tensor([[9.0, 0.5, 0.0]]))
    assert model().log_probs.tolist() == [[-0.5, 0.0]]
