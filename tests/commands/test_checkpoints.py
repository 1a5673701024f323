import json
import shutil

import pytest
import torch

from tests.errors import error_codes
from tests.saving.test_resume import checkpoint as trainer_checkpoint
from zero_sft.checkpoint.checksum import crc32_of_file
from zero_sft.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest
from zero_sft.commands.checkpoints import main


def checkpoint(folder, step):
    """A complete checkpoint of two ranks, with files of one byte."""
    folder.mkdir(parents=True)
    for name in ("config.json", *(f"optimizer-{rank:05d}-of-00002.safetensors" for rank in (1, 2))):
        (folder / name).write_bytes(b"0")
    torch.save({"step": step}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    training = {"schedule": {}, "engine": {"counters": {}, "loss_scaler": {}, "groups": []}}
    (folder / "training_state.json").write_text(json.dumps(training))
    files = {path.name: FileRecord(nbytes=path.stat().st_size, crc32=f"{crc32_of_file(path):08x}") for path in folder.iterdir()}
    manifest = Manifest(
        step=step, world_size=2, samples=16 * step, loss=1 / step, dtype="bfloat16",
        written=f"2026-01-02T03:0{step}:00.000+00:00", files=files,
    )  # fmt: skip
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return folder


def lines(capsys, *words):
    status = main([str(word) for word in words])
    return status, [line.split(maxsplit=7) for line in capsys.readouterr().out.splitlines()]


def test_a_run(tmp_path, capsys):
    """The newest first; one lost a file, one lost a bit, one is in DeepSpeed's format, and one was being written."""
    checkpoint(tmp_path / "checkpoint-2", 2)
    missing, changed = checkpoint(tmp_path / "checkpoint-3", 3), checkpoint(tmp_path / "checkpoint-4", 4)
    (missing / "model.safetensors").unlink()
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-30] ^= 4
    (changed / "model.safetensors").write_bytes(content)
    trainer_checkpoint(tmp_path / "checkpoint-1", 2)
    (tmp_path / ".checkpoint-5.0a1b2c3d.partial").mkdir()
    status, (_, four, three, two, one, partial) = lines(capsys, tmp_path)
    assert status == 1
    assert four[:6] == ["checkpoint-4", "2026-01-02", "03:04", "2", "64", "0.250"]
    assert four[7].endswith("complete")
    assert "model.safetensors is missing" in three[7]
    assert two[7].endswith("complete")
    assert one[0] == "checkpoint-1"
    assert partial[0] == ".checkpoint-5.0a1b2c3d.partial:"
    status, rows = lines(capsys, tmp_path, "--verify")
    assert status == 1
    assert "model.safetensors has the CRC-32" in rows[1][7]
    assert "6 files verified" in rows[3][7]
    assert "7 files verified" in rows[4][7]


def test_one_and_none(tmp_path, capsys):
    folder = checkpoint(tmp_path / "run" / "checkpoint-2", 2)
    assert lines(capsys, folder)[0] == lines(capsys, tmp_path / "run", "--verify")[0] == 0
    shutil.rmtree(folder)
    for words, code in (([tmp_path / "run"], "no_checkpoint"), ([tmp_path / "no"], "no_such_folder")):
        assert main([str(word) for word in words]) == 2
        assert error_codes(capsys.readouterr().err) == [f"resume.{code}"]


def test_without_words(capsys):
    assert main([]) == 2
    assert error_codes(capsys.readouterr().err) == ["arguments.required"]


@pytest.mark.parametrize("content", ["", "{}", '{"format": "zero_sft checkpoint", "version": 9}'])
def test_a_manifest_that_can_not_be_read(tmp_path, capsys, content):
    folder = checkpoint(tmp_path / "checkpoint-2", 2)
    (folder / MANIFEST_FILE).write_text(content)
    status, rows = lines(capsys, tmp_path)
    assert status == 1
    assert "not complete" in " ".join(rows[1])
