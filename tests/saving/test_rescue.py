"""A model that can't be written where it belongs is written somewhere else, and the error says where."""

from pathlib import Path

import pytest

from tests.errors import raises
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError, NotPlacedError
from zero_sft.saving.export import export_or_rescue


class Writer:
    """An export that fails for the first folders that it is asked to write."""

    def __init__(self, failures: int, kind: type[ExportError] = ExportError) -> None:
        self.failures, self.kind, self.folders = failures, kind, []

    def __call__(self, folder: Path) -> None:
        self.folders.append(folder)
        if len(self.folders) <= self.failures:
            raise self.kind(f"{folder} can't be written: No space left on device.", code="export.unwritable")
        folder.mkdir()


def test_a_folder_that_can_be_written(tmp_path):
    writer = Writer(0)
    export_or_rescue(writer, tmp_path / "out", World())
    assert writer.folders == [tmp_path / "out"]


def test_the_working_directory_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = Writer(1)
    with raises("export.unwritable", "No space left on device", "out-rescued-") as caught:
        export_or_rescue(writer, Path("/nowhere/out"), World())
    assert writer.folders[1].is_dir()
    assert str(writer.folders[1]) in str(caught.value)
    assert writer.folders[1].parent == tmp_path


def test_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises("export.unwritable", "/nowhere/out") as caught:
        export_or_rescue(Writer(2), Path("/nowhere/out"), World())
    assert str(tmp_path) not in str(caught.value), "the model is nowhere"


def test_a_complete_staging_folder_is_not_written_twice(tmp_path):
    writer = Writer(1, NotPlacedError)
    with pytest.raises(NotPlacedError):
        export_or_rescue(writer, tmp_path / "out", World())
    assert len(writer.folders) == 1
