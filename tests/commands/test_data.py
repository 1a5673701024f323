"""`python -m zero_sft.data`: what it counts, shows and draws."""

import json
import re

import pytest

from tests.data.tiny import CHATML, byte_tokenizer
from tests.errors import error_codes
from zero_sft.commands.data import histogram, main
from zero_sft.data.padding_cost import PACKED, cost_lines, padded_tokens


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
    packed, alike, at_random, padded = costs(capsys)
    assert 1 <= packed < padded
    assert 1 <= alike <= at_random < padded
    assert main([*command, "--packing", "False", "--per_device_train_batch_size", "1"]) == 0
    single, *rest = costs(capsys)
    assert 1 <= single < alike
    assert rest == [single, padded]


def costs(capsys):
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("tokens computed for each that is trained on:") + 1
    assert sum("(the job)" in line for line in lines[start:]) == 1
    return [float(line.split()[0]) for line in lines[start:] if line.startswith("   ") and "." in line.split()[0]]


def test_it_says_what_the_job_will_do(model, data, capsys):
    """With less than a batch of packed rows it doesn't pack, and with less than a batch of samples it doesn't start."""
    command = ["--model_name_or_path", str(model), "--data_path", str(data), "--model_max_length", "512"]
    for batch, said in ((1, []), (3, ["they fill"]), (4, ["they fill", "too few to train on"])):
        assert main([*command, "--per_device_train_batch_size", str(batch)]) == 0
        shown = capsys.readouterr().out
        assert [part in shown for part in ("they fill", "too few to train on")] == [
            part in said for part in ("they fill", "too few to train on")
        ], shown
        assert f"{'like length' if said else 'rows of 512'} (the job)" in shown
        assert (" samples packed into " in shown, "not packed: " in shown) == (not said, bool(said)), "one statement"


def test_the_cost_of_padding():
    lengths = [3, 1, 2]
    assert padded_tokens(lengths, 2) == 8
    lines = cost_lines(lengths, trained_tokens=2, window=10, packed_rows=1, batch_size=2, chosen=PACKED)
    assert [line.split()[0] for line in lines[1:]] == ["5.00", "3.50", lines[3].split()[0], "15.00"]
    assert "(the job)" in lines[1]


def test_errors_are_one_line(model, data, tmp_path, capsys):
    command = ["--model_name_or_path", str(model), "--data_path"]
    assert main([*command, str(tmp_path / "none.json")]) == 2
    assert main([*command, str(data), "--model_max_length", "0"]) == 2
    assert main([*command, str(data), "--plot", "/nowhere/x.png"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert [line.startswith("error: ") for line in errors] == [True] * 3, errors


@pytest.mark.parametrize("given", [[], ["--data_path", "none"]])
def test_what_is_required_is_named_with_an_example(model, capsys, given):
    assert main(["--model_name_or_path", str(model), *given]) == 2
    err = capsys.readouterr().err
    assert error_codes(err) == ["arguments.required"]
    assert "--data_path data.json" in err


def test_keys_and_texts_can_not_write_to_the_terminal(model, data, capsys):
    """Neither an escape sequence, nor a line that looks like an error; half a character does not end it."""
    sample = json.loads(data.read_text())[0]
    sample["conversations"][0]["value"] = "\x1b[2J Hi"
    data.write_text(json.dumps([{**sample, "a\ud800": 1, "b\nerror: fake": 1, "c\x1b[31m": 1}]))
    command = ["--model_name_or_path", str(model), "--data_path", str(data), "--show", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "a\\ud800 (1 sample), b\\nerror: fake (1 sample), c\\x1b[31m (1 sample)" in shown
    assert "\\x1b[2J Hi" in shown
    assert "\x1b" not in shown
    data.write_text(json.dumps([{**sample, "images\nerror: fake\ud800": 1}]))
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "`images\\nerror: fake\\ud800`" in line


def test_histogram():
    assert histogram([1, 2, 24])[0] == (1, 2, 2)
    assert histogram([1, 2, 24])[-1] == (23, 24, 1)
    assert histogram([1, 2, 25])[-1] == (25, 25, 1)
    assert histogram([7, 7]) == [(7, 7, 2)]
    assert histogram([60, 65])[0] == (60, 60, 1)
    assert sum(count for _, _, count in histogram(list(range(1, 1000)))) == 999
    assert len(histogram(list(range(1, 1000)))) <= 12


def test_a_page_and_ids(model, tmp_path, capsys):
    """The page shows what is trained on, with its weight; nothing of the data becomes markup."""
    data, page = tmp_path / "data.json", tmp_path / "page.html"
    turns = [{"role": "user", "content": "Hi<script>"}, {"role": "assistant", "content": "Yo<b>"}]
    data.write_text(json.dumps([{"messages": turns}, {"messages": turns, "weight": 0.25}]))
    command = [
        "--model_name_or_path",
        str(model),
        "--data_path",
        str(data),
        "--model_max_length",
        "100",
        "--show",
        "2",
        "--ids",
    ]
    assert main([*command, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "⟦Yo<b><|im_end|>⟧" in shown
    assert "⟦0.25: Yo<b><|im_end|>⟧" in shown
    assert shown.count(" ".join(map(str, byte_tokenizer(CHATML)("Yo<b>", add_special_tokens=False).input_ids))) == 2
    text = page.read_text()
    assert "<mark>Yo&lt;b&gt;&lt;|im_end|&gt;</mark>" in text
    assert "<mark class=light title='weight 0.25'>Yo&lt;b&gt;" in text
    assert "<script" not in text
    assert "Hi&lt;script&gt;" in text
    assert text.count('<rect class="bar"') == 1
    assert text.count('<rect class="share"') == 1
    assert "1 row with weights other than 0 and 1" in text
    with_error = [*command, "--html", str(tmp_path / "nowhere" / "page.html")]
    assert main(with_error) == 2
    assert error_codes(capsys.readouterr().err) == ["export.unwritable"]


def test_dropped_samples_are_shown_with_the_reason(model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": "a", "completion": "b" * 10},
        {"prompt": "long" * 30, "completion": "never seen"},
        {"prompt": "first", "completion": ""},
        {"prompt": "second", "completion": ""},
        {"messages": 3},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    command = ["--model_name_or_path", str(model), "--data_path", str(data), "--model_max_length", "60"]
    assert main([*command, "--on_bad_sample", "skip", "--show_dropped", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"dropped, cut off before the first answer: {data}, line 2\n" in shown
    assert '"completion": "never seen"' in shown
    assert f"dropped, without an answer to train on: {data}, line 3\n" in shown
    assert '"prompt": "first"' in shown
    assert '"prompt": "second"' not in shown
    assert f"skipped, since it is bad:\n{data}, line 5: " in shown
    data.write_text(json.dumps(rows[0]))
    assert main([*command, "--show_dropped", "3"]) == 0
    assert "no sample was dropped" in capsys.readouterr().out


def test_the_page_shows_the_mixture_and_the_kinds_of_text(model, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nHm, so.\n</think>\n\nYo"}]
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"messages": turns}] * count))
    data = f"{tmp_path}/a.json:0.5,{tmp_path}/b.json:0.5"
    page = tmp_path / "page.html"
    command = ["--model_name_or_path", str(model), "--data_path", data, "--model_max_length", "100", "--html", str(page)]
    assert main(command) == 0
    text = page.read_text()
    shares = [float(share) for share in re.findall(r'aria-label="([0-9.]+)%"', text)]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert all(35 < share < 65 for share in shares)
    assert text.count("<i class=thoughts>Hm, so.</i>") == 20
    assert "<i class=thoughts>thoughts</i>" in text
