"""A run's checkpoint, written by ranks and read by any number of them, next to DeepSpeed's own view of the optimizer."""

import random
import shutil

import pytest
import torch

from testing.runner import run_ranks
from tests import models

TORCH_ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
CPU_ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}}
SGD = {"type": "SGD", "params": {"lr": 1e-3}}
MOMENTUM = {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}
LION = {"type": "Lion", "params": {"lr": 1e-4}}


def make_engine(folder, ds):
    import deepspeed

    from zero_sft import load_model

    model = load_model(str(folder), ds_config=ds)
    return deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters())[0]


def take_steps(engine, count, first=0):
    """Train on batches of 24 samples, which the ranks divide; return the mean loss of each step."""
    import torch.distributed as dist

    losses = []
    for step in range(first, first + count):
        total = torch.zeros(1)
        for sample in range(dist.get_rank(), 24, dist.get_world_size()):
            ids = (torch.arange(12).view(1, 12) * (sample + 3) + step * 5) % 60 + 3
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        dist.all_reduce(total)
        losses.append(float(total) / 24)
    return losses


def config(kind, nvme, world_size, bf16):
    sections = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 24 // world_size}
    zero = {"sub_group_size": random.Random(world_size).choice([3_000, 50_000, 10**9])}
    optimizer = {"sgd": SGD, "momentum": MOMENTUM, "lion": LION, "cpu_adam": CPU_ADAM, "nvme": CPU_ADAM}.get(kind, TORCH_ADAM)
    if kind in ("cpu", "cpu_adam", "lion"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if kind == "nvme":
        zero |= {"offload_optimizer": {"device": "nvme", "nvme_path": str(nvme), "buffer_count": 5}, "sub_group_size": 10**9}
        sections["aio"] = {"block_size": 4096, "queue_depth": 8, "intra_op_parallelism": 1}
    if kind == "hpz":
        zero["zero_hpz_partition_size"] = world_size
    return models.zero3(
        bf16, optimizer=optimizer, zero_force_ds_cpu_optimizer=False, zero_allow_untested_optimizer=True,
        zero_optimization=zero, **sections,
    )  # fmt: skip


def full_state(engine):
    """Weights, and DeepSpeed's own view of the optimizer's state of each parameter, in full."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    result = {}
    keys = [key for key, value in next(iter(engine.optimizer.optimizer.state.values()), {}).items() if torch.is_tensor(value)]
    keys = [key for key in keys if key != "step"]
    for name, param in engine.module.named_parameters():
        result[f"weight {name}"] = models.gather_full(param).clone()
        if param.requires_grad:
            result[f"master {name}"] = safe_get_full_fp32_param(param).clone()
            for key in keys:
                result[f"{key} {name}"] = safe_get_full_optimizer_state(param, key).clone()
    return result


def save(folder, kind, bf16, tmp):

    from zero_sft.cluster.world import World
    from zero_sft.saving import export_layout
    from zero_sft.saving.checkpoint_saver import CheckpointSaver
    from zero_sft.saving.checkpoint_writer import Progress
    from zero_sft.saving.forms import form_of
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    engine = make_engine(folder, config(kind, tmp / "nvme", world.world_size, bf16))
    take_steps(engine, 2)
    tensors = export_layout.weights_to_save(engine.module)
    layout = export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 60_000, world)
    saved = []
    saver = CheckpointSaver(
        world, save_async=False, on_error="raise", on_saved=lambda target, report: saved.append((target, report.step))
    )
    progress = Progress(step=2, samples=48, loss=1.0, dtype="bfloat16")
    saver.save(engine, tensors, tmp / "checkpoint-2", layout, lambda: form_of(engine.module).settings_files(None), progress)
    assert saved == [(tmp / "checkpoint-2", 2)]
    state, losses = full_state(engine), take_steps(engine, 3, first=2)
    end = full_state(engine)
    if world.is_main:
        torch.save({"state": state, "losses": losses, "end": end}, tmp / "expected.pt")
    engine.destroy()


def restore(kind, bf16, tmp, exact):
    import torch.distributed as dist

    from zero_sft.checkpoint.manifest import find_damage, read_manifest
    from zero_sft.cluster.world import World
    from zero_sft.saving.checkpoint_reader import restore_optimizer
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    folder = tmp / "checkpoint-2"
    manifest = read_manifest(folder)
    assert find_damage(folder, manifest, verify=True) is None
    engine = make_engine(folder, config(kind, tmp / "nvme2", world.world_size, bf16))
    read = restore_optimizer(engine, folder, manifest, world)
    expected = torch.load(tmp / "expected.pt", weights_only=True)
    state = full_state(engine)
    assert state.keys() == expected["state"].keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected["state"][name]), name
    # Each byte is read by one rank.
    total = [None] * world.world_size
    dist.all_gather_object(total, read)
    kept = [name for name in state if not name.startswith(("weight", "master") if not bf16 else "weight")]
    assert sum(total) == sum(state[name].nbytes for name in kept)
    losses = take_steps(engine, 3, first=2)
    if exact:
        assert losses == expected["losses"]
        for name, tensor in full_state(engine).items():
            assert torch.equal(tensor, expected["end"][name]), name
    else:
        assert losses == pytest.approx(expected["losses"], rel=1e-2 if bf16 else 1e-5)
    engine.destroy()


CASES = [
    ("adam", False, 2, (2, 1, 3), "adam"),
    ("adam", True, 4, (1, 8), "adam"),
    ("cpu", True, 2, (2,), "adam"),
    ("adam", True, 2, (1,), "cpu"),
    ("cpu_adam", True, 2, (2,), "cpu_adam"),
    ("momentum", False, 2, (2, 1), "momentum"),
    ("sgd", True, 2, (2,), "sgd"),
    ("lion", True, 2, (2,), "lion"),
    ("hpz", True, 2, (2,), "adam"),
    ("nvme", True, 2, (2,), "nvme"),
    ("nvme", True, 2, (1,), "cpu_adam"),
]
"""The optimizer and its place, bf16, the ranks that save, the numbers of ranks that read, and what these train with."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bf16", "saved", "resumed", "then"), CASES)
def test_read_on_any_number_of_ranks(tmp_path, kind, bf16, saved, resumed, then):
    if kind == "nvme":
        models.require_async_io()
    folder = models.save_tiny("llama", tmp_path / "llama", dtype=torch.bfloat16 if bf16 else torch.float32)
    run_ranks(saved, save, {"folder": folder, "kind": kind, "bf16": bf16, "tmp": tmp_path}, 200)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    shutil.rmtree(tmp_path / "nvme", ignore_errors=True)
    for size in resumed:
        exact = size == saved and kind == then
        run_ranks(size, restore, {"kind": then, "bf16": bf16, "tmp": tmp_path, "exact": exact}, 200)


def fail(folder, tmp, step):
    """One rank's part of a checkpoint that rank 0 can't prepare, or rank 1 can't write."""
    from tests.errors import raises
    from zero_sft.cluster.world import World
    from zero_sft.saving import checkpoint_writer, export_layout
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    engine = make_engine(folder, config("sgd", None, world.world_size, True))
    tensors = export_layout.weights_to_save(engine.module)
    layout = export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 60_000, world)

    def no_space(*_):
        raise OSError(28, "No space left on device", "file")

    progress = checkpoint_writer.Progress(step=2, samples=48, loss=None, dtype="bfloat16")
    content = checkpoint_writer.describe_checkpoint(engine, tensors, tmp / "checkpoint-2", layout, dict, progress, world)
    if step == "prepare":
        checkpoint_writer.weight_files.write_headers = no_space
    with raises("export.unwritable", "No space left"):
        hidden = checkpoint_writer.begin_checkpoint(content, world)
        checkpoint_writer.agree_on_manifest(hidden, content, no_space if world.rank else dict, world)


@pytest.mark.parametrize("step", ["prepare", "write"])
def test_nothing_is_left_of_one_that_fails(tmp_path, step):
    folder, out = models.save_tiny("llama", tmp_path / "llama"), tmp_path / "out"
    out.mkdir()
    run_ranks(2, fail, {"folder": folder, "tmp": out, "step": step}, 200)
    assert list(out.iterdir()) == []
