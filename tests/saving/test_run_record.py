"""A run that can't go on from a checkpoint is told so at the start; one that goes on otherwise is warned."""

import contextlib
import io
import json

import pytest

from tests import small_job
from tests.errors import error_codes, raises
from zero_sft.saving.run_record import RECORD_FILE, RunRecord, read_record, record_json, require_same_run, write_record

LINEAR = RunRecord(
    model_type="llama", sizes={"hidden_size": 64}, optimizer="adamw", schedule="linear", from_ds_config=False, rows=9,
    tokens=90, config={"hidden_act": "silu", "attention_dropout": 0.0, "rope_parameters": {"factor": 2.0}},
)  # fmt: skip


def changed(**values):
    return RunRecord(**{**{name: getattr(LINEAR, name) for name in LINEAR.__dataclass_fields__}, **values})


@pytest.mark.parametrize(
    ("now", "code", "values"),
    [
        (changed(sizes={"hidden_size": 48}), "resume.other_model", ("hidden_size 64 (here 48)",)),
        (changed(model_type="opt"), "resume.other_model", ("llama (here opt)",)),
        (changed(config={"hidden_act": "gelu"}), "resume.other_model", ("hidden_act silu (here gelu)",)),
        (changed(optimizer="sgd"), "resume.other_optimizer", ("adamw", "sgd")),
        (changed(schedule="WarmupLR", from_ds_config=True), "resume.other_schedule", ("linear", "WarmupLR")),
        (changed(schedule="reduce_lr_on_plateau"), "resume.other_schedule", ("linear", "reduce_lr_on_plateau")),
    ],
)
def test_what_can_not_be_gone_on_with(tmp_path, now, code, values):
    write_record(tmp_path, LINEAR)
    with raises(code, str(tmp_path), *values):
        require_same_run(tmp_path, now)


def test_what_can(tmp_path, caplog):
    require_same_run(tmp_path, LINEAR)  # a checkpoint of an earlier release has no record
    write_record(tmp_path, LINEAR)
    assert read_record(tmp_path) == LINEAR
    require_same_run(tmp_path, LINEAR)
    assert not caplog.records
    with caplog.at_level("WARNING"):
        require_same_run(tmp_path, changed(schedule="cosine"))
    assert "was linear, and is cosine from here on" in caplog.text
    with caplog.at_level("WARNING"):
        require_same_run(tmp_path, changed(config={"attention_dropout": 0.1, "rope_parameters": {"factor": 4.0}, "new_key": 1}))
    assert "attention_dropout was 0.0, and is 0.1 from here on" in caplog.text
    assert "rope_parameters was {'factor': 2.0}, and is {'factor': 4.0}" in caplog.text
    for text in ("{", "[]", '{"model_type": "llama"}', record_json(changed(sizes={"hidden_size": "64"})).decode()):
        (tmp_path / RECORD_FILE).write_text(text)
        assert read_record(tmp_path) is None, text


@pytest.mark.world_size(1, timeout_s=400)
@pytest.mark.slow
def test_the_job_resumes_its_own_run_alone(tmp_path):
    """Literally: each of these ended in a traceback after the weights were read."""
    from zero_sft import train as job

    small_job.make(tmp_path, 8)
    small_job.make(tmp_path / "opt", 8, kind="opt")
    common = {"per_device_train_batch_size": 2, "packing": False, "save_strategy": "steps", "save_steps": 2}
    small_job.train(tmp_path, "out", max_steps=2, **common)
    kept = json.loads((tmp_path / "out" / "checkpoint-2" / RECORD_FILE).read_text())
    assert (kept["model_type"], kept["rows"], kept["optimizer"]) == ("llama", 8, "adamw")
    schedule = {"type": "WarmupLR"}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "scheduler": schedule}))
    for change, code in (
        ({"model_name_or_path": tmp_path / "opt" / "model"}, "resume.other_model"),
        ({"optim": "sgd"}, "resume.other_optimizer"),
        ({"deepspeed": tmp_path / "ds.json"}, "resume.other_schedule"),
    ):
        given = {
            "model_name_or_path": tmp_path / "model", "data_path": tmp_path / "data.json", "output_dir": tmp_path / "out",
            "bf16": False, "max_steps": 4, "resume_from_checkpoint": True, "learning_rate": 0.001,
            **common, **change,
        }  # fmt: skip
        if "deepspeed" not in change:
            given["lr_scheduler_type"] = "constant"
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert job.main([word for name, value in given.items() for word in (f"--{name}", str(value))]) == 1
        printed = said.getvalue()
        assert error_codes(printed) == [code], printed
        assert "Traceback" not in printed
    talks = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(talks[:7]))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        small_job.train(tmp_path, "out", max_steps=4, resume_from_checkpoint=True, **common)
    assert "the training data is not the checkpoint's: 8 rows of" in said.getvalue()
