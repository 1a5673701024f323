"""What an export says about its model, so that it can be fine-tuned again; and what can't be saved."""

import json

import pytest
from transformers import GenerationConfig

from tests import architectures, models
from tests.data import tiny
from tests.errors import raises
from zero_sft.config import load_config
from zero_sft.hub.options import HubOptions
from zero_sft.rope import with_context
from zero_sft.saving.settings import _write, rehearse_settings


def exported(config, folder):
    """The config as an export of it reads."""
    folder.mkdir()
    _write(folder, config, None, None)
    return load_config(folder, HubOptions())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "olmo2", "gpt_neox", "qwen3_moe"])
def test_an_export_that_is_fine_tuned_again_is_not_scaled_twice(tmp_path, model_type):
    base = architectures.tiny_config(model_type)
    window = base.max_position_embeddings
    once = exported(with_context(base, model_max_length=2 * window), tmp_path / "once")
    again = exported(with_context(once, model_max_length=2 * window), tmp_path / "again")
    assert again.rope_parameters == once.rope_parameters
    more, direct = (with_context(config, model_max_length=4 * window) for config in (again, base))
    assert {**more.rope_parameters, "type": None} == {**direct.rope_parameters, "type": None}
    for folder in ("once", "again"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["max_position_embeddings"] == window


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_what_can_not_be_saved_is_named(what):
    config, tokenizer = models.tiny_config("llama"), tiny.byte_tokenizer()
    if what == "config":
        config.custom = {1, 2}
    else:
        tokenizer.init_kwargs["custom"] = object()
    with raises("export.settings_unsavable", what, "JSON serializable"):
        rehearse_settings(config, GenerationConfig(), tokenizer)
