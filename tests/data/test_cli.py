"""`python -m zero_sft.data`: what it counts, shows and draws."""

import json

import pytest

from tests.data.tiny import CHATML, byte_tokenizer
from zero_sft.data.cli import histogram, main


@pytest.fixture
def model(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    talks = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x" * n}] for n in (1, 5, 400)]
    path.write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return path


def test_it_counts_shows_and_draws(model, data, tmp_path, capsys):
    picture = tmp_path / "lengths.png"
    command = ["--model_name_or_path", str(model), "--data_path", str(data), "--model_max_length", "100", "--show", "2"]
    assert main([*command, "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "3 of 3 samples, 6 turns (format sharegpt, template model)",
        "1 sample longer than --model_max_length, the longest ",
        "most 100",
        "sample 2,",
        "<|im_start|>assistant\n⟦x<|im_end|>⟧",
        "⟦xxxxx<|im_end|>⟧",
        "█",
    ):
        assert part in shown, shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_a_mixture_costs_counts_rows_as_often_as_they_are_in_it(model, data, tmp_path, capsys):
    """Packed never costs more than padded, nor less than the rows' own tokens."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": "y" * n}) for n in range(1, 40)))
    command = ["--model_name_or_path", str(model), "--data_path", f"{data}:0.7,{other}:0.3", "--model_max_length", "120"]
    assert main(command) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "tokens computed for each" in line)
    packed, padded = (
        float(word.strip(";:")) for word in line.split() if word.strip(";:").replace(".", "").isdigit() and "." in word
    )
    assert 1 <= packed < padded
    assert main([*command, "--packing", "False"]) == 0
    assert f": {padded:.2f}" in capsys.readouterr().out


def test_errors_are_one_line(model, data, tmp_path, capsys):
    command = ["--model_name_or_path", str(model), "--data_path"]
    assert main([*command, str(tmp_path / "none.json")]) == 2
    assert main([*command, str(data), "--model_max_length", "0"]) == 2
    assert main([*command, str(data), "--plot", "/nowhere/x.png"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert [line.startswith("error: ") for line in errors] == [True] * 3, errors


def test_histogram():
    assert histogram([1, 2, 24])[0] == (1, 2, 2)
    assert histogram([1, 2, 24])[-1] == (23, 24, 1)
    assert histogram([7, 7]) == [(7, 7, 2)]
    assert histogram([60, 65])[0] == (60, 60, 1)
    assert sum(count for _, _, count in histogram(list(range(1, 1000)))) == 999
    assert len(histogram(list(range(1, 1000)))) <= 12
