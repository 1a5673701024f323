"""`save_pretrained` where the ranks share no folder: rank 0 writes what the ranks would have written together."""

import os

import pytest

from testing.runner import run_ranks
from tests import models
from tests.errors import raises


def save(folder, tmp, block_bytes):
    from unittest import mock

    from zero_sft import load_model, save_pretrained
    from zero_sft.saving import gathered_parts

    model = load_model(str(folder), ds_config=models.zero3(False))
    save_pretrained(model, tmp / "together")
    (own := tmp / f"node{os.environ['RANK']}").mkdir()
    os.chdir(own)
    with mock.patch.object(gathered_parts.gathered_parts, "__defaults__", (block_bytes,)):
        save_pretrained(model, "alone")


@pytest.mark.parametrize(("kind", "ranks", "block_bytes"), [("llama", 2, 2**28), ("mixtral", 3, 1000), ("gpt2", 2, 64)])
def test_rank_0_writes_the_whole_model(tmp_path, kind, ranks, block_bytes):
    """In one block a tensor, or in many; tied weights and experts as everywhere."""
    folder = models.save_tiny(kind, tmp_path / "model")
    run_ranks(ranks, save, {"folder": folder, "tmp": tmp_path, "block_bytes": block_bytes}, 200)
    together, alone = tmp_path / "together", tmp_path / "node0" / "alone"
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    for path in together.iterdir():
        assert path.read_bytes() == (alone / path.name).read_bytes(), path.name
    assert list((tmp_path / "node1").iterdir()) == []


def save_on_a_full_disk(folder, tmp):
    from unittest import mock

    from zero_sft import load_model, save_pretrained
    from zero_sft.saving import weight_files

    def write_copy(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    model = load_model(str(folder), ds_config=models.zero3(False))
    (own := tmp / f"node{os.environ['RANK']}").mkdir()
    os.chdir(own)
    with mock.patch.object(weight_files, "write_copy", write_copy), raises("export.unwritable", "No space left"):
        save_pretrained(model, "alone")


def test_an_error_of_rank_0_ends_all_ranks(tmp_path):
    folder = models.save_tiny("llama", tmp_path / "model")
    run_ranks(2, save_on_a_full_disk, {"folder": folder, "tmp": tmp_path}, 100)
    assert [list((tmp_path / f"node{rank}").iterdir()) for rank in range(2)] == [[], []]
