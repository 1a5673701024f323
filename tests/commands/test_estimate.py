"""The command, in process."""

import json

import pytest

from tests.errors import error_codes
from zero_sft.commands.estimate import main

SMALL = [
    "--model_name_or_path", "Llama-3.1-8B", "--per_device_train_batch_size", "1", "--model_max_length", "128", "--world_size",
]  # fmt: skip


@pytest.mark.slow
def test_text_json_markdown_and_picture(tmp_path, capsys):
    picture, table = tmp_path / "p.png", tmp_path / "t.md"
    assert main([*SMALL, "64", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "8.0 B parameters, 291 tensors" in out
    assert "on 64 GPUs, 8 per node" in out
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
    ("wrong", "code", "value"),
    [
        (["--model", "nothing/here", "--world_size", "8"], "estimate.no_such_model", "nothing/here"),
        ([*SMALL, "8", "--ds_config", "zero9"], "ds_config.not_found", "'zero9'"),
        ([*SMALL, "8", "--storage", "tape"], "estimate.unknown_storage", "'tape'"),
        ([*SMALL, "8", "--dtype", "float17"], "arguments.wrong_value", "'float17'"),
        ([*SMALL, "8", "16", "--plot", "x.png"], "estimate.plot_of_several", "--plot"),
        (
            [*SMALL, "8", "--ds_config", '{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}'],
            "ds_config.refused_by_deepspeed",
            "offload_param",
        ),
        ([*SMALL, "8", "--markdown", "/nowhere/x.md"], "estimate.output_unwritable", "/nowhere/x.md"),
        ([*SMALL, "8", "--markdown", "/"], "estimate.output_unwritable", "/"),
        ([*SMALL, "8", "--plot", "/nowhere/x.png"], "estimate.output_unwritable", "/nowhere/x.png"),
    ],
)
def test_wrong_input_is_one_clear_error(monkeypatch, capsys, wrong, code, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(wrong) == 2
    err = capsys.readouterr().err
    assert "error: " in err
    assert error_codes(err) == [code]
    assert value in err


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ([*SMALL, "0"], "arguments.out_of_range"),
        ([*SMALL, "8", "131073"], "arguments.out_of_range"),
        ([*SMALL, "eight"], "arguments.wrong_value"),
        ([*SMALL, "1.5"], "arguments.wrong_value"),
        (SMALL[:2], "arguments.required"),
    ],
)
def test_a_world_of_no_ranks(capsys, wrong, code):
    assert main(wrong) == 2
    err = capsys.readouterr().err
    assert error_codes(err) == [code]
    assert "--world_size" in err


@pytest.mark.parametrize(("worlds", "lines"), [(["8", "16", "4"], 0), (["12"], 1), (["12", "8192"], 2)])
def test_what_is_unusual_is_said_before_it_is_computed(capsys, monkeypatch, worlds, lines):
    monkeypatch.setattr("zero_sft.commands.estimate._estimate", lambda models, options: [])
    assert main([*SMALL, *worlds]) == 0
    said = capsys.readouterr().err
    assert len(said.splitlines()) == lines
    assert ("--world_size 12" in said, "4 GPUs" in said, "8,192 ranks" in said) == ("12" in worlds, "12" in worlds, lines == 2)


def test_an_empty_name_is_not_the_working_directory(capsys):
    assert main(["--model_name_or_path", "", "--world_size", "8"]) == 2
    assert error_codes(capsys.readouterr().err) == ["arguments.empty"]


@pytest.mark.slow
def test_former_names_are_understood(capsys):
    assert main(["--model", *SMALL[1:], "8", "--ds_config", "zero3", "--gradient_checkpointing", "True"]) == 0
    notes = capsys.readouterr().err
    for former, name in (("model", "model_name_or_path"), ("ds_config", "deepspeed")):
        assert f"--{former} is --{name} today" in notes


def test_options_are_the_jobs(capsys):
    from zero_sft.arguments.specifications import specifications
    from zero_sft.commands.estimate import EstimateArguments, command

    own = set(EstimateArguments.__dataclass_fields__)
    for name, spec in command().specs.items():
        if name not in own and name != "model_name_or_path":
            assert spec == specifications()[name]


@pytest.mark.slow
def test_a_document_names_the_command_that_writes_it(tmp_path):
    """A flag that is off by choice is one of the options, and a default is not."""
    table = tmp_path / "t.md"
    assert main([*SMALL, "8", "--activation_checkpointing", "False", "--markdown", str(table)]) == 0
    written = next(line for line in table.read_text().splitlines() if line.startswith("    python -m"))
    assert "--activation_checkpointing False" in written
    assert "--deepspeed" not in written, "the default"
    assert main([*written.split()[3:], "--json"]) == 0


@pytest.mark.slow
def test_activations_are_in_the_table_even_if_the_optimizers_step_needs_more(tmp_path):
    """The gradients of one large group in the optimizer's step are more than the activations of a short sample."""
    table, config = tmp_path / "t.md", tmp_path / "ds.json"
    zero = {"stage": 3, "sub_group_size": 10**10}
    config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    assert main([*SMALL, "4", "--deepspeed", str(config), "--markdown", str(table)]) == 0
    text = table.read_text()
    row = [cell.strip() for cell in text[text.index("## Training") :].splitlines()[-1].split("|")]
    states, activations, other, total = (float(cell) for cell in row[3:7])
    assert activations > 0
    assert states + other == pytest.approx(total, abs=0.2), "the step is the peak, when activations are free again"
