"""An output folder that holds an earlier run is taken only on request; other files are nobody's business."""

from pathlib import Path

import pytest

from tests.errors import raises
from zero_sft.saving.earlier_run import is_in, overwrites_earlier_run, remove_checkpoints


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [(), ("notes.txt",), ("logs/mine.txt", "checkpoint-best/x", "data.json"), (".out.0123abcd.part/x",), ("config.json",)],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_without_a_run(tmp_path, names, overwrite):
    assert not overwrites_earlier_run(make(tmp_path / "out", *names), None, overwrite)


def test_no_folder(tmp_path):
    assert not overwrites_earlier_run(tmp_path / "out", None, False)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
     "checkpoint-5/trainer_state.json", "logs/history.json"],
)  # fmt: skip
def test_an_earlier_run(tmp_path, name):
    out = make(tmp_path / "out", name)
    with raises("export.holds_another_run"):
        overwrites_earlier_run(out, None, False)
    assert overwrites_earlier_run(out, None, True)
    assert not overwrites_earlier_run(out, out / "checkpoint-5", False)
    with raises("export.holds_another_run"):
        overwrites_earlier_run(out, tmp_path / "elsewhere" / "checkpoint-5", False)


def test_resuming_is_a_remedy_where_there_is_a_checkpoint(tmp_path):
    for name, is_offered in (("model.safetensors", False), ("checkpoint-5/latest", True)):
        with raises("export.holds_another_run") as caught:
            overwrites_earlier_run(make(tmp_path / name.replace("/", "_"), name), None, False)
        assert ("--resume_from_checkpoint" in str(caught.value)) is is_offered


def test_a_checkpoint_that_is_a_link(tmp_path):
    out, moved = make(tmp_path / "out", "logs/history.json"), make(tmp_path / "disk" / "step5", "latest")
    (out / "checkpoint-5").symlink_to(moved)
    assert not overwrites_earlier_run(out, out / "checkpoint-5", False)
    remove_checkpoints(out)
    assert moved.is_dir()
    assert not (out / "checkpoint-5").exists()


def test_a_checkpoint_that_is_trained_on_from_is_not_removed(tmp_path):
    out = make(tmp_path / "out", "checkpoint-5/model.safetensors", "checkpoint-7/latest")
    with raises("export.would_remove_the_model", "checkpoint-5"):
        overwrites_earlier_run(out, None, True, str(out / "checkpoint-5"))
    assert overwrites_earlier_run(out, None, True, str(tmp_path / "model"))


def test_what_is_removed(tmp_path):
    out = make(tmp_path / "out", "checkpoint-5/latest", "checkpoint-12/latest", "checkpoint-best/x", "model.safetensors")
    remove_checkpoints(out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-best", "model.safetensors"]


def test_a_checkpoint_of_the_folder_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "elsewhere").symlink_to("out/checkpoint-2")
    for name in ("out/checkpoint-2", "link/checkpoint-2", "elsewhere", tmp_path / "out" / "checkpoint-2"):
        assert is_in(Path(name), Path("out")), name
        assert is_in(Path(name), tmp_path / "link"), name
    assert not is_in(None, Path("out"))
    assert not is_in(Path("other/checkpoint-2"), Path("out"))
