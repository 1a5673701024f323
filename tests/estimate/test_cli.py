"""The command, in process."""

import json

import pytest

from zero_sft.commands.estimate import main

SMALL = [
    "--model_name_or_path", "Llama-3.1-8B", "--per_device_train_batch_size", "1", "--model_max_length", "128", "--world_size",
]  # fmt: skip


def test_text_json_markdown_and_picture(tmp_path, capsys):
    picture, table = tmp_path / "p.png", tmp_path / "t.md"
    assert main([*SMALL, "64", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "8.0 B parameters, 291 tensors" in out
    assert "on 64 GPUs, 8 a node" in out
    assert "\n  fits" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*SMALL, "8", "300", "--gpu_memory_gib", "8", "--markdown", str(table), "--json"]) == 0
    few, many = json.loads(capsys.readouterr().out)
    assert len(few["ranks"]) == 8
    assert len(many["ranks"]) == 300
    assert sum(each["nbytes"] for each in many["ranks"]) == 2 * many["parameters"]
    assert not few["fits"]
    assert few["remedies"]
    assert "| Llama-3.1-8B (8 B) | 300 |" in table.read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model", "nothing/here", "--world_size", "8"], "Models that ship as configs"),
        ([*SMALL, "8", "--ds_config", "zero9"], "no DeepSpeed config 'zero9'"),
        ([*SMALL, "8", "--storage", "tape"], "unknown storage 'tape'"),
        ([*SMALL, "8", "--dtype", "float17"], "got 'float17'"),
        ([*SMALL, "8", "16", "--plot", "x.png"], "one model in one world"),
        ([*SMALL, "8", "--markdown", "/nowhere/x.md"], "can't be written"),
    ],
)
def test_wrong_input_is_one_clear_error(monkeypatch, capsys, wrong, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(wrong) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err


def test_a_world_of_no_ranks(capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, "0"])
    assert "no whole number from 1 on" in capsys.readouterr().err
