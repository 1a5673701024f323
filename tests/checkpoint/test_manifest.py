"""Manifests: what makes a checkpoint incomplete is found, and named."""

import json
import os
import zlib

import pytest

from tests.errors import raises
from zero_sft.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, find_damage, read_manifest


@pytest.fixture
def folder(tmp_path):
    contents = {"a.safetensors": b"abc" * 1000, "config.json": b"{}", "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = {name: FileRecord(nbytes=len(data), crc32=f"{zlib.crc32(data):08x}") for name, data in contents.items()}
    manifest = Manifest(
        step=7, world_size=2, samples=56, loss=1.5, dtype="float32", written="2026-01-01T00:00:00+00:00", files=files
    )
    (tmp_path / MANIFEST_FILE).write_text(manifest.to_json())
    return tmp_path


def test_read_back(folder):
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.samples, manifest.loss, manifest.nbytes) == (7, 2, 56, 1.5, 3002)
    assert find_damage(folder, manifest) is find_damage(folder, manifest, verify=True) is None


def test_damage(folder):
    manifest = read_manifest(folder)
    (folder / "a.safetensors").write_bytes(b"abd" + b"abc" * 999)
    assert find_damage(folder, manifest) is None
    assert "a.safetensors has the CRC-32" in (find_damage(folder, manifest, verify=True) or "")
    (folder / "a.safetensors").write_bytes(b"abc")
    assert find_damage(folder, manifest) == "a.safetensors has 3 bytes, and the manifest says 3,000"
    (folder / "a.safetensors").unlink()
    assert find_damage(folder, manifest) == "a.safetensors is missing"


def change(folder, **values):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"version": 2}, "manifest.other_version"),
        ({"format": "DCP"}, "manifest.unreadable"),
        ({"files": []}, "manifest.unreadable"),
        ({"files": {"../x": {"nbytes": 1, "crc32": ""}}}, "manifest.unreadable"),
        ({"files": {"/etc/passwd": {"nbytes": 1, "crc32": ""}}}, "manifest.unreadable"),
        ({"files": {"x": {"nbytes": "1", "crc32": ""}}}, "manifest.unreadable"),
        ({"step": "7"}, "manifest.unreadable"),
        ({"world_size": -1}, "manifest.unreadable"),
        ({"world_size": 0}, "manifest.unreadable"),
        ({"step": 10**30}, "manifest.unreadable"),
        ({"loss": "abc"}, "manifest.unreadable"),
        ({"loss": 10**400}, "manifest.unreadable"),
        ({"dtype": "load"}, "manifest.unreadable"),
        ({"dtype": None}, "manifest.unreadable"),
        ({"dtype": [1]}, "manifest.unreadable"),
        ({"written": "0001-01-01T00:00:00+14:00"}, "manifest.unreadable"),
        ({"hosts": [1]}, "manifest.unreadable"),
        ({"files": {"x\0": {"nbytes": 1, "crc32": ""}}}, "manifest.unreadable"),
        ({"files": {"x\ud800": {"nbytes": 1, "crc32": ""}}}, "manifest.unreadable"),
    ],
)
def test_unusable(folder, values, code):
    change(folder, **values)
    with raises(code):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000], ids=range(6))
def test_not_a_manifest(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content)
    with raises("manifest.unreadable"):
        read_manifest(folder)


def test_a_pipe_in_its_place(folder):
    (folder / MANIFEST_FILE).unlink()
    os.mkfifo(folder / MANIFEST_FILE)
    with raises("manifest.unreadable"):
        read_manifest(folder)


def test_none(tmp_path):
    with raises("manifest.missing"):
        read_manifest(tmp_path)
