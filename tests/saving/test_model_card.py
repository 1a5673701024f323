import dataclasses

import pytest

from tests.saving.test_run_record import LINEAR
from zero_sft.saving.model_card import CARD_FILE, add_card, model_card

RECORD = dataclasses.replace(
    LINEAR, model="org/base", data=["/home/me/secret/my|data.json", "org/talks"], samples_a_step=16, learning_rate=2e-5,
    settings={"model_max_length": 4096}, rows=1000, tokens=90_000, max_steps=30,
)  # fmt: skip
HISTORY = [{"step": 0, "eval_loss": 2.0}, {"step": 10, "loss": 1.5}, {"step": 30, "loss": 0.5}, {"step": 30, "eval_loss": 1.0}]


def test_what_it_says():
    card = model_card("mine", RECORD, HISTORY, ranks=8, curve="loss.png")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines() == [
        "library_name: transformers", "pipeline_tag: text-generation", "base_model: org/base", "datasets:", "- org/talks",
        "tags:", "- sft", "- deepspeed",
    ]  # fmt: skip
    for line in (
        "# mine", "| base model | org/base |", r"| data | my\|data.json, org/talks |",
        "| samples | 1,000 rows, 90,000 tokens |", "| steps | 30 of 16 samples |", "| longest sample | 4096 tokens |",
        "| loss | 1.500 at first, 0.500 at the end |",
        "| loss on held-out samples | 2.000 at first, 1.000 at the end |", "| hardware | 8 ranks |", "![loss](loss.png)",
    ):  # fmt: skip
        assert line in body.splitlines(), body
    assert "secret" not in card


@pytest.mark.parametrize("model", ["/models/Llama-3/", "../here"])
def test_a_local_base(model):
    card = model_card("mine", dataclasses.replace(RECORD, model=model, data=[]), [], ranks=None)
    assert "base_model:" not in card
    assert "datasets:" not in card
    assert "/models" not in card
    assert "| loss" not in card


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "curve.png").write_bytes(b"png")
    add_card(tmp_path, "mine", RECORD, HISTORY, 2, tmp_path / "missing.png")
    assert "![" not in (tmp_path / CARD_FILE).read_text()
    add_card(tmp_path, "again", RECORD, HISTORY, 2, None)
    assert "# again" in (tmp_path / CARD_FILE).read_text(), "a card of an earlier run is replaced"
    (tmp_path / CARD_FILE).write_text("my own")
    add_card(tmp_path, "mine", RECORD, HISTORY, 2, tmp_path / "curve.png")
    assert (tmp_path / CARD_FILE).read_text() == "my own"
