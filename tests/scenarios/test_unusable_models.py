"""Tests of config.json values that transformers accepts and then fails on: corrected with a log line, or one error."""

import json
import logging

import pytest

from tests import models, small_job
from tests.errors import raises
from zero_sft import prepare_config


def folder_with(folder, **values):
    models.save_tiny("llama", folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.world_size(1)
def test_a_padding_token_without_an_embedding_is_left_out(tmp_path):
    """Plain transformers fails in the constructor of the embedding."""
    folder = folder_with(tmp_path / "model", pad_token_id=99_999)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("zero_sft").addHandler(handler)
    config = prepare_config(str(folder))
    assert config.pad_token_id is None
    assert any("pad_token_id 99999" in line for line in said)


@pytest.mark.world_size(1)
@pytest.mark.parametrize(("padding", "expected"), [(0, 0), (-1, -1), (None, None)])
def test_any_other_padding_token_stays(tmp_path, padding, expected):
    assert prepare_config(str(folder_with(tmp_path / "model", pad_token_id=padding))).pad_token_id == expected


@pytest.mark.world_size(1)
def test_a_vocabulary_of_no_size(tmp_path):
    with raises("config.bad_vocab_size", "-1"):
        prepare_config(str(folder_with(tmp_path / "model", vocab_size=-1)))


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"hidden_act": "nosuch"}, "nosuch"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "NoneType"),
    ],
)
def test_a_config_of_which_no_model_can_be_made(tmp_path, values, found):
    from zero_sft import load_model

    folder = folder_with(tmp_path / "model", **values)
    with raises("config.unbuildable", str(folder), "LlamaForCausalLM", found):
        load_model(str(folder), ds_config=models.zero3(bf16=False))


@pytest.mark.world_size(1)
def test_a_class_of_another_model(tmp_path):
    """The config is right, so the message does not blame it; a class that can read another model's config still may."""
    from transformers import GPT2LMHeadModel, MistralForCausalLM

    from zero_sft import load_model

    folder = models.save_tiny("llama", tmp_path / "model")
    with raises("config.unbuildable", "GPT2LMHeadModel", "GPT2Config", "LlamaConfig", "model_class", str(folder)) as caught:
        load_model(str(folder), ds_config=models.zero3(), model_class=GPT2LMHeadModel)
    assert "original" not in str(caught.value)
    model = load_model(str(folder), ds_config=models.zero3(), model_class=MistralForCausalLM)
    assert type(model) is MistralForCausalLM


@pytest.mark.world_size(1)
def test_an_auto_class_without_this_model(tmp_path):
    from transformers import LlavaConfig

    from zero_sft import load_model

    LlavaConfig(architectures=["LlavaForConditionalGeneration"]).save_pretrained(tmp_path)
    with raises("config.no_such_head", "AutoModelForCausalLM", "'llava'", "model_class", "LlavaForConditionalGeneration"):
        load_model(str(tmp_path), ds_config=models.zero3())


@pytest.mark.world_size(1)
def test_an_attention_that_the_config_names_and_the_machine_lacks(tmp_path):
    from importlib.util import find_spec

    from zero_sft import load_model

    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here")
    folder = folder_with(tmp_path / "model", _attn_implementation="flash_attention_2")
    with raises("arguments.attention_unusable", "flash_attention_2", "--attn_implementation"):
        load_model(str(folder), ds_config=models.zero3(bf16=False))
    load_model(str(folder), ds_config=models.zero3(bf16=False), attn_implementation="sdpa")


def test_prompts_that_the_model_can_not_read(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    from zero_sft.data.templates.choose import choose_template
    from zero_sft.job.generation import require_answerable

    small_job.make(tmp_path / "opt", 1, kind="opt")
    config = AutoConfig.from_pretrained(tmp_path / "opt" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "opt" / "model")
    template = choose_template(None, tokenizer)
    require_answerable(["Hi?"], tokenizer, template, config)
    with raises("data.prompt_too_long", "prompt 2", "512"):
        require_answerable(["Hi?", "a" * 600], tokenizer, template, config)
    config.vocab_size = 10
    with raises("data.token_without_embedding", "prompt 1"):
        require_answerable(["Hi?"], tokenizer, template, config)


@pytest.mark.world_size(1, timeout_s=100)
def test_an_answer_ends_where_a_table_of_positions_does(tmp_path):
    from transformers import AutoTokenizer

    from zero_sft import load_model
    from zero_sft.data.templates.choose import choose_template
    from zero_sft.job.generation import answer

    small_job.make(tmp_path, 1, kind="opt")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), ds_config=models.zero3(bf16=False))
    answers = answer(model, tokenizer, ["a" * 480], template=choose_template(None, tokenizer), max_new_tokens=256)
    assert len(answers) == 1, "beyond 512 positions the embedding fails"
