"""Run the job from arguments to export on CPU ranks; bad input gives one message, and all ranks exit with an error status."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import models
from tests.data import tiny
from tests.errors import error_codes
from tests.slow import slow

CHAT = [
    {
        "id": str(i),
        "conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"{i} is a number."}],
    }
    for i in range(16)
]


@pytest.fixture
def model(tmp_path):
    tokenizer = tiny.byte_tokenizer(tiny.CHATML)
    folder = models.save_tiny(
        "llama", tmp_path / "model", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    (tmp_path / "data.json").write_text(json.dumps(CHAT))
    (tmp_path / "prompts.json").write_text('["What is 99?"]')
    return folder


def job(folder, **changes):
    """Return the command line of a run of three steps."""
    arguments = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / "out",
        "max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.01,
    }  # fmt: skip
    arguments.update(changes)
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


@pytest.mark.world_size(2, timeout_s=200)
def test_from_arguments_to_export(model, tmp_path):
    from transformers import AutoTokenizer

    from zero_sft import train

    status = train.main(
        job(tmp_path, sample_prompts=tmp_path / "prompts.json", eval_data_path=tmp_path / "data.json", eval_on_start=True)
    )
    assert status == 0
    out = tmp_path / "out"
    assert (out / "logs" / "loss.png").stat().st_size > 1000
    history = json.loads((out / "logs" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    timeline = json.loads((out / "logs" / "timeline.json").read_text())
    assert list(timeline) == [
        "imports", "joining", "inputs", "load", "answers before", "engine start", "evaluation before", "first step"
    ]  # fmt: skip
    assert all(seconds >= 0 for seconds in timeline.values())
    report = json.loads((out / "logs" / "load_report.json").read_text())
    assert report["loader"] == "sharded"
    assert report["missing_keys"] == []
    assert len(json.loads((out / "logs" / "answers.json").read_text())) == 1
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(out)!r}); print('plain')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert "plain" in done.stdout, done.stderr
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(out).chat_template


BAD = {
    # the arguments, the code, a value in the message
    "no such folder": ({"model_name_or_path": "/nowhere/model"}, "hub.no_such_folder", "/nowhere/model"),
    "unknown argument": ({"learning_rat": 1}, "arguments.unknown", "learning_rate"),
    "not stage 3": ({"deepspeed": '{"zero_optimization": {"stage": 2}}'}, "ds_config.not_stage_3", "zero_optimization.stage"),
    "no such config": ({"deepspeed": "zero4"}, "ds_config.not_found", "zero3_offload"),
    "no data": ({"data_path": "/nowhere.json"}, "data.no_such_file", "/nowhere.json"),
    "not JSON": ({"data_path": "{tmp}/broken.json"}, "data.not_json", "broken.json"),
    "empty data": ({"data_path": "{tmp}/empty.json"}, "data.empty_file", "empty.json"),
    "unknown role": ({"data_path": "{tmp}/roles.json"}, "data.unknown_role", "roles.json"),
    "no conversations": ({"data_path": "{tmp}/fields.json"}, "data.unknown_format", "conversations"),
    "too little data": ({"per_device_train_batch_size": 32}, "data.too_few_samples", " 64:"),
    "unwritable output": ({"output_dir": "{tmp}/data.json/out"}, "export.unwritable", "data.json/out"),
    "output inside the data": ({"data_path": "{tmp}", "output_dir": "{tmp}/out"}, "data.output_inside_data", "out"),
    "fsdp": ({"fsdp": "full_shard"}, "arguments.no_meaning", "--fsdp"),
    "truncated weights": ({"model_name_or_path": "{tmp}/truncated"}, "checkpoint.truncated", "model-00001"),
    "context of a table": (
        {"model_name_or_path": "{tmp}/opt", "model_max_length": 4096}, "rope.position_table_too_short", "--model_max_length"
    ),
}  # fmt: skip


@pytest.fixture
def material(model, tmp_path):
    """Files with one fault each."""
    (tmp_path / "broken.json").write_text('[{"id": ')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "fields.json").write_text('[{"id": "1", "body": "x"}]')
    roles = [{"id": "1", "conversations": [{"from": "alien", "value": "x"}]}]
    (tmp_path / "roles.json").write_text(json.dumps(roles))
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for path in model.iterdir():
        data = path.read_bytes()
        (truncated / path.name).write_bytes(data[:-9] if path.name.startswith("model-00001") else data)
    models.save_tiny("opt", tmp_path / "opt")
    return tmp_path


@pytest.mark.world_size(2)
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_message_and_a_non_zero_status(material, fault):
    import torch.distributed as dist

    from zero_sft import train

    changes, code, value = BAD[fault]
    changes = {name: str(value).replace("{tmp}", str(material)) for name, value in changes.items()}
    before = sorted(path.name for path in material.iterdir())
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = train.main(job(material, **changes))
    assert status != 0
    if dist.get_rank() == 0:
        assert error_codes(said.getvalue()) == [code], said.getvalue()
        assert value in said.getvalue()
        assert said.getvalue().count("error:") == 1
    else:
        assert "error" not in said.getvalue()
    dist.barrier()
    after = sorted(path.name for path in material.iterdir() if path.name != "out")
    assert after == before
    assert list((material / "out").glob("*")) == []  # of a folder that does not exist as well


def launch(folder, *words, ranks=2, timeout_s=150):
    """Run the job with the real launcher; return (status, output, seconds)."""
    port = 20000 + os.getpid() % 20000
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port),
        "--module", "zero_sft.train", *words,
    ]  # fmt: skip
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, time.monotonic() - start


@pytest.mark.slow
def test_the_launcher_passes_the_failure_on(model, tmp_path):
    status, output, _ = launch(tmp_path, *job(tmp_path, data_path="/nowhere.json"))
    assert status != 0
    assert output.count("error: ") == 1
    assert error_codes(output) == ["data.no_such_file"]
    assert "/nowhere.json" in output
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer*_{20000 + os.getpid() % 20000}_*"))


@pytest.mark.slow
def test_eight_ranks_run_to_the_export(model, tmp_path):
    status, output, _ = launch(tmp_path, *job(tmp_path, per_device_train_batch_size=1), ranks=8, timeout_s=280)
    assert status == 0, output[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.world_size(2, timeout_s=500)
@pytest.mark.parametrize("name", ["zero3_offload", slow("zero3_zeropp"), slow("zero3_nvme")])
def test_each_shipped_config_starts(model, tmp_path, name):
    """The run trains one step and exports. The NVMe config gets a folder, and buffers small enough for a test."""
    from zero_sft import train
    from zero_sft.packaged_file import packaged_file

    config = name
    if name == "zero3_nvme":
        models.require_async_io()
        values = json.loads(packaged_file("ds_configs", "zero3_nvme.json").read_text())
        for section in ("offload_param", "offload_optimizer"):
            values["zero_optimization"][section]["nvme_path"] = str(tmp_path)
        values["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
        config = json.dumps(values)
    assert train.main(job(tmp_path, deepspeed=config, max_steps=1)) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
