"""A tokenizer that plain transformers reads back as another one is found before a run trains with it."""

import json

from transformers import AutoTokenizer

from tests.data import tiny
from tests.real_tokenizers import published_tokenizer
from zero_sft.saving.settings import changed_encoding


def test_one_that_reads_back(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert changed_encoding(tmp_path, tokenizer) is None


def test_one_that_transformers_changes_when_it_saves(tmp_path):
    """Llama 2's says `"legacy": true`, which transformers 5.23 reads, and does not write."""
    base = published_tokenizer("llama2")
    assert json.loads((base / "tokenizer_config.json").read_text())["legacy"] is True
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path)
    changed = changed_encoding(tmp_path, tokenizer)
    assert changed is not None
    assert "to other ids" in changed
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": True}))
    assert changed_encoding(tmp_path, tokenizer) is None


def test_one_that_can_not_be_opened(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "can't open the exported tokenizer" in (changed_encoding(tmp_path, tokenizer) or "")
