import datetime
import json
import os
from types import SimpleNamespace

import pytest

from zero_sft.checkpoint.manifest import MANIFEST_FILE
from zero_sft.saving.checkpoint_folders import leftovers, newest_first, next_date, remove, restore_former, surplus
from zero_sft.saving.checkpoint_writer import put_in_place


def checkpoint(folder, step, minute=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if minute is None:
        (path / "trainer_state.json").write_text("{}")
    else:
        written = f"2026-01-01T00:{minute:02}:00.000+00:00"
        (path / MANIFEST_FILE).write_text(json.dumps({"written": written}))
    return path


def test_age_decides_and_not_the_number(tmp_path):
    """The run has come back to step 2, and gone on from there."""
    two, four, three = checkpoint(tmp_path, 2, 1), checkpoint(tmp_path, 4, 2), checkpoint(tmp_path, 3, 5)
    os.utime(three, (0, 0))  # as after a copy
    assert newest_first(tmp_path) == [three, four, two]
    trainers = checkpoint(tmp_path, 1)
    os.utime(trainers / "trainer_state.json", (2e9, 2e9))
    assert newest_first(tmp_path) == [trainers, three, four, two]
    (four / MANIFEST_FILE).write_text("no JSON")
    os.utime(four, (0, 0))
    assert newest_first(tmp_path)[-1] == four


@pytest.mark.parametrize(
    "date", ["2999-01-01T00:00:00.000+00:00", "9999-12-31T23:59:59.999+00:00", "0001-01-01T00:00:00", None]
)
def test_the_next_checkpoint_is_the_newest(tmp_path, date):
    """Also if the clock of the host that wrote the last one is ahead."""
    now = datetime.datetime.now(datetime.UTC)
    if date is not None:
        (checkpoint(tmp_path, 7) / MANIFEST_FILE).write_text(json.dumps({"written": date}))
    following = next_date(tmp_path)
    assert datetime.datetime.fromisoformat(following) >= now.replace(microsecond=0)
    (checkpoint(tmp_path, 5) / MANIFEST_FILE).write_text(json.dumps({"written": following}))
    if date is None or not date.startswith("9999"):
        assert newest_first(tmp_path)[0].name == "checkpoint-5"


@pytest.mark.parametrize(("limit", "kept", "removed"), [
    (None, [3], []), (0, [3], []), (4, [3], []), (3, [3], [0]), (2, [3], [0, 1]), (1, [3], [0, 1, 2]),
    (1, [3, 0], [1, 2]), (2, [3, 0], [1, 2]), (3, [3, 0], [1]), (3, [3, 1], [0]), (1, [0], [1, 2, 3]),
])  # fmt: skip
def test_surplus(tmp_path, limit, kept, removed):
    folders = [checkpoint(tmp_path, 10 - i, i) for i in range(4)]
    assert surplus(folders, limit, {folders[i] for i in kept}) == [folders[i] for i in removed]


def test_a_link_is_removed_and_not_what_it_names(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = checkpoint(tmp_path / "elsewhere", 1, 0)
    (tmp_path / "checkpoint-1").symlink_to(other)
    remove(tmp_path / "checkpoint-1")
    remove(checkpoint(tmp_path, 2, 0))
    assert other.is_dir()
    assert newest_first(tmp_path) == leftovers(tmp_path) == []


def test_a_checkpoint_that_was_being_replaced(tmp_path):
    """It gets its name back; if the new one is in its place, it is removed."""
    for step in (3, 4):
        checkpoint(tmp_path, step, step).rename(tmp_path / f".checkpoint-{step}.0a1b2c3d.former")
    new = checkpoint(tmp_path, 4, 9)
    assert restore_former(tmp_path) == [tmp_path / "checkpoint-3"]
    assert newest_first(tmp_path) == [new, tmp_path / "checkpoint-3"]
    assert not list(tmp_path.glob(".*"))


def test_leftovers(tmp_path):
    (tmp_path / ".checkpoint-3.0a1b2c3d.partial").mkdir()
    checkpoint(tmp_path, 3, 0)
    assert [path.name for path in leftovers(tmp_path)] == [".checkpoint-3.0a1b2c3d.partial"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_checkpoint_is_kept(tmp_path, caplog, kind):
    """Somebody's notes have the name of the next checkpoint."""
    target = tmp_path / "checkpoint-6"
    if kind == "folder":
        target.mkdir()
    (target / "notes.txt" if kind == "folder" else target).write_text("mine")
    made = checkpoint(tmp_path, 5, 5)
    manifest = SimpleNamespace(to_json=lambda: "{}")
    put_in_place(made, target, manifest)
    assert (target / "manifest.json").is_file()
    (kept,) = tmp_path.glob("checkpoint-6-kept-*")
    assert (kept / "notes.txt" if kind == "folder" else kept).read_text() == "mine"
    assert "was no checkpoint" in caplog.text
    put_in_place(checkpoint(tmp_path, 7, 7), target, manifest)
    assert len(list(tmp_path.glob("checkpoint-6*"))) == 2, "a checkpoint is replaced"
