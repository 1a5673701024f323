"""The log of a training: lines that a person reads, from a real job, and the count of tokens over a resume."""

import contextlib
import io
import itertools
import json
import re

import pytest
from safetensors.torch import load_file

from tests import small_job
from zero_sft.console.progress import format_bytes, format_duration

LINE = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)  epoch \d+\.\d\d  loss (?P<loss>\d+\.\d{3})  lr (?P<lr>\d\.\de[-+]\d\d)  grad \S+"
    r"  (?P<rate>[\d,]+) tok/s/rank(  (?P<trained>\d+)% trained)?(  (?P<left>\d+:\d\d) left)?"
)
EVALUATION = re.compile(
    r"step (?P<step>\d+)/\d+  epoch \d+\.\d\d  eval loss (?P<loss>\d+\.\d{3})  (?P<samples>\d+) samples in \S+ s"
)


def run(folder, out, **arguments):
    """A run's stdout and stderr on this rank."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        small_job.train(folder, out, **arguments)
    return said.getvalue(), wrong.getvalue()


@pytest.mark.slow
@pytest.mark.world_size(2, timeout_s=300)
def test_the_log_of_a_job_and_its_tokens_over_a_resume(tmp_path):
    """The reference for the resumed run's count is the run that was not interrupted."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        small_job.make(tmp_path, 24)
    dist.barrier()
    options = {
        "per_device_train_batch_size": 2, "packing": False, "max_steps": 6, "logging_steps": 2, "save_strategy": "steps",
        "save_steps": 3, "eval_data_path": tmp_path / "data.json", "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    said, wrong = run(tmp_path, "whole", **options)
    again, _ = run(tmp_path, "resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3", **options)
    if dist.get_rank() == 1:
        assert not said
        assert "step" not in wrong
        return
    history = small_job.history(tmp_path, "whole")
    steps = {int(found["step"]): found for found in LINE.finditer(said)}
    assert list(steps) == [2, 4, 6]
    for entry in history:
        if "loss" in entry:
            assert steps[entry["step"]]["loss"] == f"{entry['loss']:.3f}"
            assert steps[entry["step"]]["lr"] == f"{entry['learning_rate']:.1e}" == "1.0e-03"
    assert [bool(found["left"]) for found in steps.values()] == [True, True, False]
    evaluations = {int(found["step"]): found for found in EVALUATION.finditer(said)}
    expected = {entry["step"]: f"{entry['eval_loss']:.3f}" for entry in history if "eval_loss" in entry}
    assert {step: found["loss"] for step, found in evaluations.items()} == expected
    assert {found["samples"] for found in evaluations.values()} == {"24"}
    assert "training: 6 steps, 4 samples per step (2 ranks x 2 on each)" in said
    assert "training: steps 4 to 6, 4 samples per step" in again
    assert re.search(r"trained 6 steps in \d+:\d\d, mean loss", said)
    for noise in ("{'", "Writing model shards", "\r", "\x1b"):
        assert noise not in said + wrong
    tokens = {
        out: {entry["step"]: entry["num_tokens"] for entry in small_job.history(tmp_path, out) if "loss" in entry}
        for out in ("whole", "resumed")
    }
    assert tokens["resumed"] == tokens["whole"]
    # The epoch's tokens, as the preparation has counted them, and the share of each log that was trained on.
    data = re.search(r"([\d,]+) tokens, ([\d,]+) of them trained on", said)
    computed, trained = (int(number.replace(",", "")) for number in data.groups())
    shares = [entry["trained_share"] for entry in history if "loss" in entry]
    new = [after - before for before, after in itertools.pairwise([0, *tokens["whole"].values()])]
    assert sum(new) == computed
    assert sum(share * number for share, number in zip(shares, new, strict=True)) == pytest.approx(trained)
    assert steps[2]["trained"] == f"{100 * shares[0]:.0f}"
    # transformers' estimate, with the elements that the parameters have in the file; padding counts as well.
    weights = load_file(tmp_path / "model" / "model.safetensors")
    numel = sum(tensor.numel() for name, tensor in weights.items() if "embed_tokens" not in name)
    flops = {out: small_job.history(tmp_path, out)[-1]["total_flos"] for out in ("whole", "resumed")}
    assert flops["resumed"] == flops["whole"]
    assert flops["whole"] % (6 * numel) == 0
    assert flops["whole"] >= 6 * numel * tokens["whole"][6]


@pytest.mark.slow
@pytest.mark.world_size(1, timeout_s=200)
def test_a_checkpoint_without_the_count_goes_on_from_the_last_that_was_logged(tmp_path):
    small_job.make(tmp_path, 8)
    options = {"per_device_train_batch_size": 2, "packing": False, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
               "checkpoint_format": "deepspeed"}  # fmt: skip
    run(tmp_path, "whole", **options)
    file = tmp_path / "whole" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"].pop("TokenCount")["attributes"]["tokens"] == state["log_history"][-1]["num_tokens"]
    file.write_text(json.dumps(state))
    run(tmp_path, "resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2", **options)
    whole, resumed = (
        [entry["num_tokens"] for entry in small_job.history(tmp_path, out) if "loss" in entry] for out in ("whole", "resumed")
    )
    assert whole == resumed


def test_lines():
    from zero_sft.job.steps import evaluation_line, finished_line, other_line, training_metrics

    logs = {"loss": 2.9411, "learning_rate": 1.8e-5, "grad_norm": 1.3239, "epoch": 0.5217, "entropy": 1.0, "num_tokens": 9.0}
    assert training_metrics(logs) == "loss 2.941  lr 1.8e-05  grad 1.32"
    assert training_metrics({"loss": float("nan"), "aux_loss": 0.0123}) == "loss nan  aux loss 0.012"
    sets = {"eval_a_loss": 2.31, "eval_a_runtime": 3.1, "eval_a_samples_per_second": 3.226, "epoch": 1.0}
    assert evaluation_line(sets, 12, 23) == "step 12/23  epoch 1.00  eval a loss 2.310  10 samples in 3.1 s"
    assert finished_line({"train_runtime": 161.0, "train_loss": 2.5}, 23) == "trained 23 steps in 2:41, mean loss 2.500"
    assert finished_line({"train_runtime": 0.1, "train_loss": 0.0}, 0) == "trained 0 steps in 0:00"
    assert other_line({"mine": 0.5, "epoch": 1.0}, 2, 3) == "step 2/3  epoch 1.00  mine 0.5"
    assert not other_line({"epoch": 1.0, "total_flos": 1.0}, 2, 3)


def test_time_left_and_throughput():
    """Time left counts what lies between steps; tokens a second don't count evaluations and saves."""
    from zero_sft.job.steps import Pace, Throughput

    pace = Pace()
    pace.step(5, 100.0)
    assert pace.seconds_left(11) is None
    pace.step(6, 102.0)
    pace.step(7, 104.0)
    assert pace.seconds_left(11) == 8.0
    assert pace.seconds_left(7) is None
    speed = Throughput(1000, 10.0)
    speed.add(12.0)
    assert speed.tokens_per_second(1600) == 300.0
    speed.resume(50.0)  # after an evaluation
    speed.add(51.0)
    assert speed.tokens_per_second(1700) == 100.0
    assert speed.tokens_per_second(1700) is None


def test_words_for_durations_and_sizes():
    assert [format_duration(each) for each in (0.4, 5, 161, 3723, 90000)] == ["0:00", "0:05", "2:41", "1:02:03", "1 d 1:00:00"]
    assert [format_bytes(each) for each in (0, 1000, 1536, 13 * 2**30)] == ["0 B", "1000 B", "1.5 KiB", "13.0 GiB"]


def test_the_line_of_a_large_run_fits_100_columns(monkeypatch):
    """A 70B model on H100s: rate, share of the peak, and once the memory."""
    from types import SimpleNamespace

    from zero_sft.job import steps
    from zero_sft.job.timeline import Timeline

    said = []
    monkeypatch.setattr(steps, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(steps, "peak_memory", lambda: 65_700_000_000)
    monkeypatch.setattr(steps, "_log_line", lambda args, state, line: said.append(line))
    log = steps.StepLog(lambda: 60_000, "packed rows", Timeline(), lambda: 6 * 69_500_000_000)
    state = SimpleNamespace(global_step=980, max_steps=9800, is_world_process_zero=True)
    log._pace.step(1, 0.0)
    log._pace.step(980, 2_000.0)
    for _ in range(2):
        log._throughput = steps.Throughput(0, 0.0)
        log._throughput.add(1.0)
        log.on_log(SimpleNamespace(world_size=64), state, None, {
            "loss": 1.2345, "learning_rate": 1.8e-5, "grad_norm": 1.3239, "epoch": 0.5,
            "trained_share": 0.714,
        })  # fmt: skip
    first, second = said
    metrics = "step 980/9800  epoch 0.50  loss 1.234  lr 1.8e-05  grad 1.32  938 tok/s/GPU  40% MFU"
    assert first == f"{metrics}  61.2 GiB  71% trained  5:00:18 left"
    assert second == f"{metrics}  5:00:18 left", "neither the memory nor the trained share has changed"
    assert len(second) <= 100


@pytest.mark.parametrize(("name", "tera"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L40", 181), ("AMD Instinct MI300X", 1307), ("NVIDIA GeForce RTX 3060", None), ("", None),
])  # fmt: skip
def test_peaks(name, tera):
    from zero_sft.job.device_use import peak_flops

    assert peak_flops(name) == (tera and tera * 1e12)
