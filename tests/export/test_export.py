"""`python -m zero_sft.export`: checkpoints of every format, next to the export of the run that wrote them."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from testing.runner import run_ranks
from tests import models
from tests.errors import error_codes
from tests.saving.test_checkpoint_files import config, take_steps
from tests.slow import slow_except
from zero_sft.commands.export import main

KINDS = ["llama", "mixtral", "gpt2", "qwen2", "opt", "gpt_neox", "gemma"]


def save_in_all_formats(folder, out, bf16, frozen):
    """Train a little, and save: as DeepSpeed does, as a sharded checkpoint (twice), and as an export."""
    import deepspeed

    from zero_sft import load_model, save_pretrained
    from zero_sft.cluster.world import World
    from zero_sft.saving import export_layout
    from zero_sft.saving.checkpoint_saver import CheckpointSaver
    from zero_sft.saving.checkpoint_writer import Progress
    from zero_sft.saving.forms import form_of
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    ds = config("adam", None, world.world_size, bf16)
    model = load_model(str(folder), ds_config=ds)
    for name, param in model.named_parameters():
        param.requires_grad_(not (frozen and "embed" in name))
    engine = deepspeed.initialize(model=model, config=ds, model_parameters=[p for p in model.parameters() if p.requires_grad])[
        0
    ]
    saver = CheckpointSaver(world, save_async=False, on_error="raise", on_saved=lambda *_: None)
    tensors = export_layout.weights_to_save(engine.module)
    layout = export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 10**9, world)
    for step in (1, 2):
        take_steps(engine, 1, first=step)
        progress = Progress(step=step, samples=24, loss=None, dtype="bfloat16" if bf16 else "float32")
        states = {
            "trainer_state.json": json.dumps({"global_step": step}).encode(),
            "training_state.json": b'{"schedule": {}, "engine": {"counters": {}, "loss_scaler": {}, "groups": []}}',
        }
        files = form_of(engine.module).settings_files(None) | states
        saver.save(engine, tensors, out / "run" / f"checkpoint-{step}", layout, lambda files=files: files, progress)
        save_pretrained(engine, out / f"plain-{step}", max_file_bytes=10**9)
    engine.save_checkpoint(str(out / "deepspeed"), tag="global_step2")
    engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a model of a kind in all formats, once."""
    folders = {}

    def save(kind, bf16, frozen):
        key = (kind, bf16, frozen)
        if key not in folders:
            tmp = tmp_path_factory.mktemp(f"export-{kind}")
            folder = models.save_tiny(kind, tmp / "model")
            run_ranks(2, save_in_all_formats, {"folder": folder, "out": tmp, "bf16": bf16, "frozen": frozen}, 300)
            folders[key] = tmp
        return folders[key]

    return save


def equal_folders(one, other):
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def export(*words) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("kind", slow_except(KINDS, {"llama", "mixtral"}))
@pytest.mark.parametrize(("bf16", "frozen"), [(True, True), pytest.param(False, False, marks=pytest.mark.slow)])
def test_the_model_of_the_run(saved, tmp_path, kind, bf16, frozen):
    folder = saved(kind, bf16, frozen)
    export(folder / "run" / "checkpoint-2", tmp_path / "sharded")
    assert equal_folders(tmp_path / "sharded", folder / "plain-2")
    export(folder / "deepspeed", tmp_path / "zero", "--model_name_or_path", folder / "plain-2")
    one, other = load_file(tmp_path / "zero" / "model.safetensors"), load_file(folder / "plain-2" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in other)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_universal(saved, tmp_path):
    """As DeepSpeed's own tool converts it."""
    folder = saved("llama", True, True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder"]
    command += [str(folder / "deepspeed" / "global_step2"), "--output_folder", str(tmp_path / "universal")]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    export(tmp_path / "universal", tmp_path / "out", "--model_name_or_path", folder / "plain-2")
    assert equal_folders(tmp_path / "out", folder / "plain-2")


def test_master_weights_and_the_mean(saved, tmp_path):
    """fp32: DeepSpeed's own script gives the same. The mean is that of the fp32 weights."""
    folder = saved("llama", True, True)
    export(folder / "run" / "checkpoint-2", tmp_path / "two", "--save_dtype", "float32")
    export(folder / "run" / "checkpoint-1", tmp_path / "one", "--save_dtype", "float32")
    one, two = load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    script = [sys.executable, str(folder / "deepspeed" / "zero_to_fp32.py"), "--safe_serialization", str(folder / "deepspeed")]
    subprocess.run([*script, str(tmp_path / "script")], check=True, capture_output=True, timeout=200)
    theirs = load_file(tmp_path / "script" / "model.safetensors")
    trained = [name for name in two if "embed" not in name]
    assert all(torch.equal(two[name], theirs[name]) for name in trained)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float32"
    for average in ("last:2", "checkpoint-1,checkpoint-2"):
        export(folder / "run", tmp_path / average[:4], "--average", average, "--save_dtype", "float32")
        mean = load_file(tmp_path / average[:4] / "model.safetensors")
        assert all(torch.equal(mean[name], ((one[name] + two[name]) / 2)) for name in trained)
    export(folder / "run", tmp_path / "newest")
    assert equal_folders(tmp_path / "newest", folder / "plain-2")


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def other_config(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))


FAULTS = {
    "damaged": ("run/checkpoint-2", lambda at: damage(at / "model.safetensors"), "export.file_damaged", "model.safetensors"),
    "missing rank": (
        "deepspeed", lambda at: (at / "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(),
        "export.file_missing", "rank 0",
    ),
    "missing model states": (
        "deepspeed", lambda at: (at / "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt").unlink(),
        "export.file_missing", "rank 0",
    ),
    "code": (
        "deepspeed", lambda at: torch.save({"a": Evil()}, at / "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt"),
        "checkpoint.unknown_class", "print",
    ),
    "no zip": (
        "deepspeed", lambda at: (at / "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt").write_bytes(pickle.dumps(1)),
        "checkpoint.unreadable_pickle", "rank_1",
    ),
    "other model": ("run/checkpoint-2", lambda at: other_config(at / "config.json"), "export.other_model", "layers.2"),
    "no checkpoint": ("plain-2", lambda at: None, "export.no_checkpoint", "manifest.json"),
    "no folder": ("run", shutil.rmtree, "export.no_checkpoint", "copy"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_exported(saved, tmp_path, capsys, fault):
    """One error that names the file, and nothing written."""
    at, change, code, value = FAULTS[fault]
    source = saved("llama", True, True)
    shutil.copytree(source / at, tmp_path / "copy")
    change(tmp_path / "copy")
    words = [tmp_path / "copy", tmp_path / "out", "--model_name_or_path", source / "plain-2"]
    if fault == "other model":
        words += ["--verify", "False", "--model_name_or_path", tmp_path / "copy"]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert error_codes(said.err) == [code]
    assert value in said.err
    assert "this ran" not in said.out
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_wrong_arguments(saved, tmp_path, capsys):
    folder = saved("llama", True, True)
    for words, code in (
        ([folder / "run" / "checkpoint-2", folder / "run" / "checkpoint-2"], "export.into_the_checkpoint"),
        ([folder / "run" / "checkpoint-2", folder / "deepspeed"], "export.into_a_checkpoint"),
        ([folder / "run" / "checkpoint-2", folder / "run" / "checkpoint-1"], "export.into_a_checkpoint"),
        ([folder / "run" / "checkpoint-2", folder / "run" / "checkpoint-1" / "inside"], "export.into_a_checkpoint"),
        ([folder / "run", tmp_path / "out", "--average", "last:" + "9" * 5000], "export.no_checkpoint"),
        ([folder / "run", tmp_path / "out", "--average", "last:3"], "export.no_checkpoint"),
        ([folder / "run", tmp_path / "out", "--average", "last:0"], "export.no_checkpoint"),
        ([folder / "run", tmp_path / "out", "--average", "checkpoint-9"], "resume.no_deepspeed_state"),
        ([folder / "deepspeed", tmp_path / "out"], "config.missing"),
        ([folder / "run"], "arguments.required"),
        ([folder / "run", tmp_path / "out", "more"], "arguments.stray_word"),
    ):
        assert main([str(word) for word in words]) == 2
        assert error_codes(capsys.readouterr().err)[-1:] == [code], words
    assert not (tmp_path / "out").exists()
