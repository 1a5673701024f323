"""Memory that a save, a resume and an export take beyond what they are about, on a model much larger than the bound."""

import sys

import pytest

from testing.runner import run_ranks
from tests import models
from tests.saving.test_checkpoint_files import config, make_engine

MIB = 2**20
BOUND = 64 * MIB
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 32_000, "max_shard_size": "5GB"}  # fmt: skip


def take_a_step(engine):
    import torch

    ids = torch.arange(4).view(1, 4)
    for _ in range(24 // 2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def save(folder, out):
    from testing.probes import PeakMemory
    from zero_sft.cluster.world import World
    from zero_sft.saving import export_layout
    from zero_sft.saving.checkpoint_saver import CheckpointSaver
    from zero_sft.saving.checkpoint_writer import Progress
    from zero_sft.saving.forms import form_of
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    engine = make_engine(folder, config("adam", None, world.world_size, True))
    take_a_step(engine)
    tensors = export_layout.weights_to_save(engine.module)
    layout = export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 10**10, world)
    saver = CheckpointSaver(world, save_async=False, on_error="raise", on_saved=lambda *_: None)
    progress = Progress(step=1, samples=24, loss=None, dtype="bfloat16")
    with PeakMemory() as peak:
        saver.save(engine, tensors, out, layout, lambda: form_of(engine.module).settings_files(None), progress)
    assert peak.growth < BOUND, f"{peak.growth / MIB:.0f} MiB"
    engine.destroy()


def resume(folder, checkpoint):
    from testing.probes import PeakMemory
    from zero_sft.checkpoint.manifest import read_manifest
    from zero_sft.cluster.world import World
    from zero_sft.saving.checkpoint_reader import restore_optimizer
    from zero_sft.zero import shards
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    engine = make_engine(checkpoint, config("adam", None, world.world_size, True))
    moments = sum(8 * shards.local_range(param).numel for param in engine.module.parameters())
    assert moments > 2 * BOUND
    with PeakMemory() as peak:
        restore_optimizer(engine, checkpoint, read_manifest(checkpoint), world)
    assert peak.growth < moments + BOUND, f"{peak.growth / MIB:.0f} MiB of {moments / MIB:.0f}"
    engine.destroy()


EXPORT = """
import sys
from testing.probes import PeakMemory
from zero_sft.commands import export
import zero_sft.export.convert
words = sys.argv[1:]
with PeakMemory() as peak:
    assert export.main(words) == 0
print(peak.growth)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_save_resume_and_export(tmp_path):
    import subprocess

    folder = models.save_tiny("llama", tmp_path / "model", **SIZES)
    run_ranks(2, save, {"folder": folder, "out": tmp_path / "checkpoint-1"}, 300)
    run_ranks(2, resume, {"folder": folder, "checkpoint": tmp_path / "checkpoint-1"}, 300)
    run_ranks(3, resume, {"folder": folder, "checkpoint": tmp_path / "checkpoint-1"}, 300)
    largest = 32_000 * 512
    for dtype, nbytes in (("float32", 4 * largest), ("bfloat16", 6 * largest)):
        words = [tmp_path / "checkpoint-1", tmp_path / dtype, "--save_dtype", dtype]
        ended = subprocess.run(
            [sys.executable, "-c", EXPORT, *map(str, words)], capture_output=True, text=True, timeout=200, check=True
        )
        growth = int(ended.stdout.split()[-1])
        assert growth < nbytes + BOUND, f"{dtype}: {growth / MIB:.0f} MiB"
