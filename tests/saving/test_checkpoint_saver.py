"""Checkpoints that are written while training goes on, next to those for which it waits."""

import threading
from pathlib import Path
from unittest import mock

import pytest

from testing.runner import run_ranks
from tests import models
from tests.errors import raises
from tests.saving.test_checkpoint_files import config, make_engine, take_steps
from zero_sft.checkpoint.manifest import find_damage, read_manifest


def save_twice(folder, tmp, failures=0, on_error="raise", local=None):
    """Save one state with and without waiting; with waiting for two more steps, and with write errors of rank 1."""
    from zero_sft.cluster.world import World
    from zero_sft.saving import checkpoint_saver, export_layout
    from zero_sft.saving.checkpoint_writer import Progress
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    engine = make_engine(folder, config("adam", None, world.world_size, True))
    take_steps(engine, 2)
    tensors = export_layout.weights_to_save(engine.module)
    given = (
        export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 20_000, world),
        lambda: {"a/b": b"text"},
    )
    progress = Progress(step=2, samples=48, loss=1.0, dtype="bfloat16")
    reports, trained, left = [], threading.Event(), [failures * (world.rank == 1)]

    def saver(save_async, local=None):
        return checkpoint_saver.CheckpointSaver(
            world,
            save_async=save_async,
            local_folder=local,
            on_error=on_error,
            on_saved=lambda _, report: reports.append(report),
        )

    def write_later(*args, real=checkpoint_saver.write_parts, **kwargs):
        assert trained.wait(100)
        if left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error", "a file")
        return real(*args, **kwargs)

    saver(False).save(engine, tensors, tmp / "waits" / "checkpoint-2", *given, progress)
    assert len(reports) == 1
    with mock.patch.object(checkpoint_saver, "write_parts", write_later):
        goes_on = saver(True if local is None else "auto", local)
        goes_on.save(engine, tensors, tmp / "goes on" / "checkpoint-2", *given, progress)
        goes_on.poll()
        take_steps(engine, 2, first=2)
        assert len(reports) == 1
        if local is not None:
            assert sum(f"{local}/" in line for line in Path("/proc/self/maps").read_text().splitlines()) >= 1, "the copy"
        trained.set()
        if failures > 1 and on_error == "raise":
            with raises("export.unwritable", "Input/output error"):
                goes_on.wait()
        else:
            goes_on.wait()
        goes_on.wait()
    assert len(reports) == (2 if failures < 2 else 1)
    assert all(0 < report.blocked_seconds <= report.seconds for report in reports)


@pytest.mark.parametrize(("failures", "on_disk"), [(0, False), (1, False), (1, True)])
def test_it_is_the_state_of_its_step(tmp_path, failures, on_disk):
    """Also if it is written only at the second attempt, two steps later, or copied to a local disk first."""
    folder, local = models.save_tiny("llama", tmp_path / "llama"), tmp_path / "local"
    local.mkdir()
    arguments = {"folder": folder, "tmp": tmp_path, "failures": failures, "local": local if on_disk else None}
    run_ranks(2, save_twice, arguments, 200)
    assert list(local.iterdir()) == []
    waits, goes_on = (read_manifest(tmp_path / name / "checkpoint-2") for name in ("waits", "goes on"))
    assert waits.files == goes_on.files
    assert len(waits.files) > 5
    assert find_damage(tmp_path / "goes on" / "checkpoint-2", goes_on, verify=True) is None
    assert (tmp_path / "goes on" / "checkpoint-2" / "a" / "b").read_bytes() == b"text"


@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_an_error_at_both_attempts(tmp_path, on_error):
    folder = models.save_tiny("llama", tmp_path / "llama")
    run_ranks(2, save_twice, {"folder": folder, "tmp": tmp_path, "failures": 2, "on_error": on_error}, 200)
    assert list((tmp_path / "goes on").iterdir()) == []


def save_with(available, save_async, tmp, folder, waits):
    from zero_sft.cluster.world import World
    from zero_sft.saving import export_layout
    from zero_sft.saving.checkpoint_saver import CheckpointSaver
    from zero_sft.saving.checkpoint_writer import Progress
    from zero_sft.storage import host_memory
    from zero_sft.zero.process_group import connect

    world = connect(World.detect())
    engine = make_engine(folder, config("adam", None, world.world_size, True))
    take_steps(engine, 1)
    tensors = export_layout.weights_to_save(engine.module)
    layout = export_layout.choose_layout(engine.module, export_layout.on_meta(tensors), 60_000, world)
    reports = []
    saver = CheckpointSaver(
        world, save_async=save_async, on_error="raise", on_saved=lambda target, report: reports.append(report)
    )
    with mock.patch.object(host_memory, "available_bytes", return_value=available if world.rank == 1 else 2**50):
        for step in (1, 2):
            progress = Progress(step=step, samples=24, loss=None, dtype="bfloat16")
            saver.save(engine, tensors, tmp / f"checkpoint-{step}", layout, dict, progress)
            assert len(reports) == (step if waits else step - 1)
    saver.wait()


@pytest.mark.parametrize(("available", "save_async", "waits"), [
    (2**30, "auto", False), (100_000, "auto", True), (100_000, True, False), (2**30, False, True),
])  # fmt: skip
def test_memory_decides(tmp_path, available, save_async, waits):
    """Rank 1's node has too little: no rank takes a copy."""
    folder = models.save_tiny("llama", tmp_path / "llama")
    given = {"available": available, "save_async": save_async, "tmp": tmp_path, "folder": folder, "waits": waits}
    run_ranks(2, save_with, given, 200)
