"""Generation settings that transformers would not save cost no run, and what is exported stops where its answers end."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests import models, small_job
from tests.data import tiny
from tests.errors import raises
from tests.slow import slow
from zero_sft.generation_config import (
    TurnEnds,
    inconsistent_settings,
    read_generation_config,
    stop_at,
    turn_ends,
    write_generation_config,
)

INCONSISTENT = {  # transformers reads these, but saves none once anything else has changed
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 0.1},
    "eta_cutoff": {"eta_cutoff": 0.1},
    "length_penalty": {"length_penalty": 0.5},
    "early_stopping": {"early_stopping": True},
    "several": {"temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0},
    "output_scores": {"output_scores": True},
    "a cache that is not used": {"use_cache": False, "cache_implementation": "static"},
}
REFUSED = {  # transformers does not read these at all
    "num_return_sequences": {"num_return_sequences": 3},
    "early_stopping": {"early_stopping": "maybe"},
    "cache_implementation": {"cache_implementation": "nonsense"},
    "max_new_tokens": {"max_new_tokens": 0},
    "watermarking_config": {"watermarking_config": {"nonsense": 1}},
    "compile_config": {"compile_config": {"mode": "x"}},
    "eos_token_id": {"eos_token_id": "2"},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def folder_with(folder, **settings):
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps({**TOKENS, **settings}))
    return folder


@pytest.mark.parametrize("case", INCONSISTENT)
def test_what_transformers_calls_inconsistent_is_kept_as_it_is(tmp_path, case):
    settings = INCONSISTENT[case]
    generation, left_out = read_generation_config(folder_with(tmp_path / "base", **settings))
    assert left_out == ()
    generation.pad_token_id = 3
    assert set(inconsistent_settings(generation)) & settings.keys()
    with pytest.raises(ValueError, match="invalid"):  # or this test shows nothing
        generation.save_pretrained(tmp_path)
    write_generation_config(generation, tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in settings} == settings
    assert (again.eos_token_id, again.pad_token_id) == (2, 3)


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_can_not_read_is_left_out_and_named(tmp_path, case):
    generation, left_out = read_generation_config(folder_with(tmp_path / "base", **REFUSED[case], repetition_penalty=1.5))
    (sentence,) = left_out
    assert case in sentence
    assert "left out" in sentence
    assert generation.repetition_penalty == 1.5
    write_generation_config(generation, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).repetition_penalty == 1.5


def test_several_refused_settings_are_all_named(tmp_path):
    settings = {"num_beams": 4, "max_new_tokens": 0, "early_stopping": "maybe", "num_return_sequences": 3}
    generation, left_out = read_generation_config(folder_with(tmp_path / "base", **settings))
    assert [sentence.split(" refuses ")[1].split(" = ")[0] for sentence in left_out] == ["max_new_tokens", "early_stopping"]
    assert (generation.num_beams, generation.num_return_sequences) == (4, 3)


def test_a_folder_without_the_file_has_its_settings_in_its_config(tmp_path):
    models.save_tiny("llama", tmp_path / "model", eos_token_id=[2, 5])
    (tmp_path / "model" / "generation_config.json").unlink()
    generation, _ = read_generation_config(tmp_path / "model")
    assert generation.eos_token_id == AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id


@pytest.mark.parametrize(("content", "code"), [("{", "not_json"), ("[1]", "not_an_object")])
def test_a_broken_file_is_an_error(tmp_path, content, code):
    folder = folder_with(tmp_path / "base")
    (folder / "generation_config.json").write_text(content)
    with raises(f"generation_config.{code}", "generation_config.json"):
        read_generation_config(folder)


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, 4), (1, [1, 4]), (4, 4), ([1, 3], [1, 3, 4]), ([4], 4), ([1, 4, 1], [1, 4])]
)
def test_the_end_of_a_turn_joins_the_ends_that_were_there(eos, expected):
    generation = GenerationConfig(eos_token_id=eos)
    stop_at(generation, TurnEnds(token_ids=(4,)))
    assert generation.eos_token_id == expected


def test_of_two_ends_one_that_stops_already_is_enough():
    generation = GenerationConfig(eos_token_id=[1, 2])
    assert stop_at(generation, TurnEnds(token_ids=(3, 2))) == ()
    assert stop_at(generation, TurnEnds(token_ids=(3, 4))) == (3, 4)


def test_the_tokens_that_end_an_answer():
    tokenizer = tiny.byte_tokenizer()
    end, letter = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("#")
    assert turn_ends(tokenizer, ["<|im_end|>"]).token_ids == (end,)
    assert turn_ends(tokenizer, ["\n<|im_end|></s>"]).token_ids == (end,), "the first special token"
    assert turn_ends(tokenizer, ["#"]).token_ids == (letter,)
    assert turn_ends(tokenizer, ["###"]) == TurnEnds(texts=("###",)), "several tokens of which none is special"


JINJA = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<|eot|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": "<|im_end|>", "jinja": "<|eot|>", "model": "<|im_end|>", "vicuna": "</s>"}


def base_model(folder, template, **generation):
    """A base model whose generation config knows nothing of the template, and one answer to learn by heart."""
    small_job.make(folder, 1)
    tokenizer = tiny.byte_tokenizer(tiny.CHATML if template == "model" else None)
    tokenizer.save_pretrained(folder / "model")
    talk = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me, the cat."}]
    (folder / "data.json").write_text(json.dumps([{"conversations": talk}] * 16))
    (folder / "prompts.json").write_text('["Who?"]')
    (folder / "template.jinja").write_text(JINJA)
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1, **generation}))
    return folder


@pytest.mark.world_size(2, timeout_s=300)
@pytest.mark.parametrize("template", [slow(name) for name in ("chatml", "jinja", "model", "vicuna")])
def test_a_learnt_answer_ends_in_the_job_and_in_plain_transformers(tmp_path, template):
    """The job of a base model whose settings transformers would not save: it is exported, and the answer is said once."""
    from zero_sft.cluster.world import World

    main = World.detect().is_main
    if main:
        base_model(tmp_path, template, temperature=0.6, top_p=0.9)
    torch.distributed.barrier()
    small_job.train(
        tmp_path, "out", max_steps=80, learning_rate=0.01, lr_scheduler_type="cosine", per_device_train_batch_size=4,
        sample_prompts=tmp_path / "prompts.json",
        chat_template=tmp_path / "template.jinja" if template == "jinja" else template, packing=False,
    )  # fmt: skip
    if not main:
        return
    (answer,) = json.loads((tmp_path / "out" / "logs" / "answers.json").read_text())
    assert answer["after"] == "Me, the cat."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"]) == (0.6, 0.9)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[template])
    assert settings["eos_token_id"] == ([1] if end == 1 else [1, end])  # the Trainer makes a list of one
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "out")], capture_output=True, text=True, timeout=100, check=False
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ["Me, the cat.", end], done.stderr


PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
asked = [{"role": "user", "content": "Who?"}]
prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
said = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
print(json.dumps([tokenizer.decode(said[:-1]).strip(), said[-1]]))
"""
"""What the exported model answers, without this package, and the token that ends it."""


@pytest.mark.slow
@pytest.mark.world_size(2, timeout_s=200)
@pytest.mark.parametrize("case", ["num_return_sequences", "cache_implementation"])
def test_a_run_goes_on_without_what_transformers_refuses(tmp_path, case):
    from zero_sft.cluster.world import World

    if World.detect().is_main:
        base_model(tmp_path, "vicuna", **REFUSED[case])
    torch.distributed.barrier()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        small_job.train(tmp_path, "out", max_steps=1, per_device_train_batch_size=4, sample_prompts=tmp_path / "prompts.json")
    assert said.getvalue().count(f"transformers refuses {case}") == (1 if World.detect().is_main else 0)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 4]  # and the tokenizer's ChatML <|im_end|>


FAULTS = {
    "broken generation config": ("generation_config.json", "{", "generation_config.json can't be read as JSON"),
    "config": ("config.json", None, "the model's config can't be saved"),
}


@pytest.mark.world_size(2, timeout_s=200)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_saved_is_found_before_the_weights_are_read(tmp_path, fault):
    from unittest import mock

    from transformers import PreTrainedConfig

    from zero_sft import train
    from zero_sft.cluster.world import World
    from zero_sft.job import load_model

    file, content, message = FAULTS[fault]
    if World.detect().is_main:
        base_model(tmp_path, "vicuna")
        if content is not None:
            (tmp_path / "model" / file).write_text(content)
    torch.distributed.barrier()

    def unsaveable(self, *args, **kwargs):
        raise TypeError("Object of type set is not JSON serializable")

    errors = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        loads = stack.enter_context(mock.patch.object(load_model, "load_model_from"))
        if content is None:
            stack.enter_context(mock.patch.object(PreTrainedConfig, "to_json_file", unsaveable))
        given = {"model_name_or_path": tmp_path / "model", "data_path": tmp_path / "data.json", "output_dir": tmp_path / "out"}
        status = train.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    assert status == 1
    assert not loads.called
    if World.detect().is_main:
        assert message in errors.getvalue()
