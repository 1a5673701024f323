"""A reader sees the earlier model or the new one, whenever the writer is killed; what else the folder holds stays."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.errors import raises
from tests.saving import models_on_disk as models
from tests.saving.killed import killed_before_each_step
from tests.slow import slow, slow_except
from zero_sft.saving import swap_folders
from zero_sft.saving.folder import Placing, StagingFolder, explain_not_placed, make_staging
from zero_sft.saving.placing import ADAPTER_SETTINGS, SETTINGS, put_in_place, require_replaceable

OLD, NEW = 1, 2


def staged(
    target: Path, files: int = 1, settings: int | None = None, placing: Placing | None = None, number=NEW
) -> StagingFolder:
    """A finished staging folder of the new model."""
    staging = make_staging(target)
    if placing is Placing.FILE_BY_FILE and staging.preferred is not placing:
        inside = target / staging.folder.name
        staging.folder.rename(inside)
        staging = StagingFolder(folder=inside, target=staging.target, preferred=placing)
    models.write(staging.folder, number, files, settings=settings)
    return staging


FORMER = slow_except([(3, "safetensors")], [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (2, "bin")])


@pytest.mark.parametrize(("files", "kind"), FORMER)
@pytest.mark.parametrize("fresh", [slow(1), 3])
def test_killed_at_any_step_of_a_swap(tmp_path, files, kind, fresh):
    out, rest = tmp_path / "out", {}

    def prepare():
        models.cleared(tmp_path)
        models.write(out, OLD, files, kind)
        rest.update(models.write_others(out))
        staging = staged(out, fresh)
        assert staging.preferred is Placing.SWAP
        return lambda: put_in_place(staging)

    seen = []
    for _ in killed_before_each_step(prepare):
        weights, settings = models.read(out)
        assert weights == settings
        assert models.others(out) == rest
        seen += weights
    assert set(seen) == {OLD, NEW}
    assert len(seen) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("files", "kind"), FORMER)
@pytest.mark.parametrize(("fresh", "settings"), slow_except([(3, NEW)], [(1, OLD), (1, NEW), (3, OLD), (3, NEW)]))
def test_killed_at_any_step_in_place(tmp_path, files, kind, fresh, settings):
    """Weights are never mixed; where the settings change with them, there are none for a moment instead."""
    out, rest = tmp_path / "out", {}

    def prepare():
        models.cleared(tmp_path)
        models.write(out, OLD, files, kind)
        rest.update(models.write_others(out))
        staging = staged(out, fresh, settings, Placing.FILE_BY_FILE)
        return lambda: put_in_place(staging)

    seen, without = [], 0
    for _ in killed_before_each_step(prepare):
        assert models.others(out) == rest
        try:
            weights, found = models.read(out)
        except FileNotFoundError:
            without += 1
            continue
        assert len(weights) == 1
        assert found == ({OLD} if settings == OLD else weights)
        seen += weights
    assert set(seen) == {OLD, NEW}
    assert bool(without) == (settings == NEW)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    names = {path.name for path in out.glob("*model*")}
    assert len(names) == (2 if fresh == 1 else 5)  # and the user's model-backup.bin


@pytest.mark.parametrize("placing", [Placing.SWAP, Placing.FILE_BY_FILE])
def test_readers_meanwhile(tmp_path, placing):
    """A reader in a loop over 200 exports: weights that it opens by path are of one model; so is all that it reads of a folder
    that it holds open, where folders are swapped."""
    swaps = placing is Placing.SWAP
    out = models.write(tmp_path / "out", 0)
    models.write_others(out)
    stop = tmp_path / "stop"
    child = os.fork()
    if child == 0:
        os._exit(_read_until(stop, out, swaps))
    for number in range(1, 201):
        put_in_place(staged(out, 3 if number % 2 else 1, number if swaps else 0, placing, number))
    stop.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _read_until(stop: Path, out: Path, holds_the_folder: bool) -> int:
    """0 if no read mixed two models, 1 if weights did, 2 if weights and settings did, 3 if there were too few reads."""
    reads = 0
    while not stop.exists():
        handle = os.open(out, os.O_RDONLY) if holds_the_folder else None
        try:
            weights, settings = models.read(out if handle is None else Path(f"/proc/self/fd/{handle}"))
        except (FileNotFoundError, ValueError):
            continue
        finally:
            if handle is not None:
                os.close(handle)
        reads += 1
        if len(weights) > 1:
            return 1
        if holds_the_folder and not settings <= weights:
            return 2
        time.sleep(0.0001)
    return 0 if reads > 100 else 3


def test_a_folder_held_open_is_one_model(tmp_path):
    """A reader that opens the folder first sees weights and settings of one model, whatever happens to the name."""
    out = models.write(tmp_path / "out", OLD, 3)
    handle = os.open(out, os.O_RDONLY)
    before = Path(f"/proc/self/fd/{handle}")
    with mock.patch("zero_sft.saving.placing.shutil.rmtree"):
        put_in_place(staged(out))
    assert models.read(before) == ({OLD}, {OLD})
    assert models.read(out) == ({NEW}, {NEW})
    os.close(handle)


@pytest.mark.parametrize("placing", [Placing.SWAP, Placing.FILE_BY_FILE])
def test_files_of_two_models_never_share_a_name(tmp_path, placing):
    """A reader that has an index finds that model's files or none, however many exports are between."""
    out = models.write(tmp_path / "out", OLD, 3)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for files in (3, 1, 3):
        put_in_place(staged(out, files, placing=placing))
        assert models.read(out) == ({NEW}, {NEW})
        assert not [name for name in index.values() if (out / name).exists()]


def test_a_new_folder_appears_at_once(tmp_path):
    out = tmp_path / "far" / "away" / "out"
    put_in_place(staged(out, 3))
    assert models.read(out) == ({NEW}, {NEW})
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_others_write_during_a_swap_is_kept(tmp_path):
    """A file that appears, and one that is replaced, after the staging folder got its links."""
    out = models.write(tmp_path / "out", OLD)
    models.write_others(out)
    staging = staged(out)

    def late(one, other):
        (out / "logs" / "late.txt").write_text("late")
        (out / "fresh.txt").write_text("fresh")
        (out / "replaced").write_text("changed")
        (out / "replaced").replace(out / "notes.txt")
        swap_folders.swap(one, other)

    with mock.patch("zero_sft.saving.placing.swap", late):
        put_in_place(staging)
    assert models.read(out) == ({NEW}, {NEW})
    found = models.others(out)
    assert (found["logs/late.txt"], found["fresh.txt"], found["notes.txt"]) == ("late", "fresh", "changed")
    assert (out / "checkpoint-5" / "latest").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", ["no swap", "no links"])
def test_where_a_folder_cannot_be_swapped_files_are_replaced(tmp_path, how):
    out = models.write(tmp_path / "out", OLD, 3)
    rest = models.write_others(out)
    refuse = mock.Mock(side_effect=OSError(1, "Operation not permitted"))
    if how == "no swap":
        with mock.patch.object(swap_folders, "swap", refuse):
            staging = staged(out, 3)
            assert (staging.preferred, staging.folder.parent) == (Placing.FILE_BY_FILE, out)
            put_in_place(staging)
    else:
        staging = staged(out, 3)
        with mock.patch("os.link", refuse):
            put_in_place(staging)
    assert models.read(out) == ({NEW}, {NEW})
    assert models.others(out) == rest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    put_in_place(staged(out, 1))
    assert not list(out.glob("model-0*")), "weight files under names that a later export does not know"


@pytest.mark.parametrize("placing", [Placing.SWAP, Placing.FILE_BY_FILE])
def test_settings_are_on_disk_before_they_are_placed(tmp_path, placing):
    """Weights are synced by the ranks that write them."""
    out = models.write(tmp_path / "out", OLD)
    staging, synced = staged(out, placing=placing), []

    def fsync(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    with mock.patch("os.fsync", fsync):
        put_in_place(staging)
    before = synced[: synced.index(staging.folder) + 1]
    assert {path.name for path in before} == {"config.json", "tokenizer.json", "tokenizer_config.json", staging.folder.name}
    assert synced[-1] == (tmp_path if placing is Placing.SWAP else out)


def test_rights_of_the_folder_stay(tmp_path):
    out = models.write(tmp_path / "out", OLD)
    out.chmod(0o2770)
    put_in_place(staged(out))
    assert out.stat().st_mode & 0o7777 == 0o2770


def test_the_working_directory_is_not_swapped(tmp_path, monkeypatch):
    out = models.write(tmp_path / "out", OLD)
    monkeypatch.chdir(out)
    put_in_place(staged(Path()))
    assert models.read(Path()) == ({NEW}, {NEW})


def test_a_former_tokenizer_goes_with_its_model(tmp_path):
    out = models.write(tmp_path / "out", OLD)
    for name in ("chat_template.jinja", "merges.txt", "generation_config.json"):
        (out / name).write_text("1")
    put_in_place(staged(out))
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_a_failed_last_step_keeps_the_staging_folder_and_names_it(tmp_path):
    """Some file is refused in the middle: all is as it was, and the finished model is where the error says."""
    out = models.write(tmp_path / "out", OLD, 3)
    rest = models.write_others(out)
    staging = staged(out, 3, placing=Placing.FILE_BY_FILE)
    rename, refused = Path.rename, []

    def refuse(self, destination):
        if self.name == "tokenizer.json" and destination == out / "tokenizer.json":
            refused.append(self)
            raise OSError(30, "Read-only file system", str(self))
        return rename(self, destination)

    with (
        mock.patch.object(Path, "rename", refuse),
        raises("export.not_placed", "Read-only") as caught,
        explain_not_placed(staging),
    ):
        put_in_place(staging)
    assert refused
    assert str(staging.folder) in str(caught.value)
    assert models.read(out) == ({OLD}, {OLD})
    assert models.read(staging.folder) == ({NEW}, {NEW})
    assert models.others(out) == rest


def test_an_adapter_in_the_folder_is_refused(tmp_path):
    out = models.write(tmp_path / "out", OLD)
    (out / "adapter_config.json").write_text("{}")
    with raises("export.target_holds_adapter"):
        require_replaceable(out, SETTINGS)
    require_replaceable(out, ADAPTER_SETTINGS)


def unshared(*words: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program in a mount namespace of its own, where it may mount; skip the test where that is not allowed."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("this user may not make a mount namespace")
    command = ["unshare", "--mount", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.parametrize("kind", ["tmpfs", slow("bind mount"), slow("link"), "mount point inside"])
def test_a_target_on_another_file_system(tmp_path, kind):
    done = unshared(sys.executable, "-m", "tests.saving.mounted", kind, tmp_path / "top")
    assert "placed" in done.stdout, done.stderr


def folder_with_a_file(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "keep").write_text("mine")
    return path / "keep"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "model-00009-of-00009.safetensors"]
)
@pytest.mark.parametrize("placing", [Placing.SWAP, Placing.FILE_BY_FILE])
def test_a_folder_is_never_replaced_by_a_file(tmp_path, name, placing):
    out = tmp_path / "out"
    kept = folder_with_a_file(out / name)
    staging = staged(out, placing=placing)
    with raises("export.folder_in_place_of_file", str(out), name):
        require_replaceable(out, set(os.listdir(staging.folder)))
    with raises("export.folder_in_place_of_file", name):
        require_replaceable(out, SETTINGS)  # what a job knows at its start
    with raises("export.not_placed", str(out / name)), explain_not_placed(staging):
        put_in_place(staging)  # the folder was made during the export
    assert kept.read_text() == "mine"
    assert models.read(staging.folder) == ({NEW}, {NEW}), "the new model is kept"


def test_other_folders_stay_and_a_tokenizers_templates_are_replaced(tmp_path):
    out = tmp_path / "out"
    kept = folder_with_a_file(out / "checkpoint-5")
    templates = folder_with_a_file(out / "additional_chat_templates")
    staging = staged(out)
    require_replaceable(out, set(os.listdir(staging.folder)))
    put_in_place(staging)
    assert kept.read_text() == "mine"
    assert not templates.exists()


def test_a_new_target_has_nothing_to_replace(tmp_path):
    require_replaceable(tmp_path / "new", SETTINGS)
