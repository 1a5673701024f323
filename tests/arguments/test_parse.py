"""Tests of `zero_sft.arguments`: parsing, translation of other names, refusals, and the trainer's arguments."""

import dataclasses
import json
import logging
import shlex

import pytest

from tests.errors import raises
from zero_sft.adapters.options import LoraOptions
from zero_sft.arguments import build_training_arguments, help_text, parse, wants_help
from zero_sft.arguments.build import adapt_to_device
from zero_sft.arguments.names import REFUSALS, REFUSED_OPTIMIZERS, TRANSLATIONS
from zero_sft.arguments.specifications import specifications
from zero_sft.errors import ArgumentError
from zero_sft.packaged_file import packaged_file

# The command in the README of FastChat 0.2.36, except the two fsdp arguments and the paths.
FASTCHAT = """
    --model_name_or_path meta-llama/Llama-2-7b-hf --data_path data/dummy_conversation.json --bf16 True
    --output_dir output_vicuna --num_train_epochs 3 --per_device_train_batch_size 2 --per_device_eval_batch_size 2
    --gradient_accumulation_steps 16 --evaluation_strategy "no" --save_strategy "steps" --save_steps 1200
    --save_total_limit 10 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True
"""
FSDP = "--fsdp 'full_shard auto_wrap' --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer"


def refused(*argv: str) -> str:
    """Return the message with which `argv` is refused."""
    with pytest.raises(ArgumentError) as caught:
        parse(argv)
    return str(caught.value)


def test_defaults_are_fastchats():
    parsed = parse([])
    assert parsed.model.model_name_or_path == "facebook/opt-125m"
    assert parsed.model.trust_remote_code is False
    assert parsed.model.padding_side == "right"
    assert (parsed.model.dtype, parsed.model.loader, parsed.model.cache_dir) == ("auto", "sharded", None)
    assert parsed.data.training_path == str(packaged_file("examples", "conversations.json"))
    assert parsed.data.eval_data_path is None
    assert parsed.data.lazy_preprocess is False
    assert parsed.training == {
        "output_dir": "output", "model_max_length": 512, "optim": "adamw_torch", "deepspeed": "zero3",
        "resume_from_checkpoint": None, "trust_remote_code": False, "overwrite_output_dir": False,
    }  # fmt: skip
    assert parsed.notes == ()


def test_fastchats_published_command_is_understood():
    parsed = parse(shlex.split(FASTCHAT))
    assert parsed.model.model_name_or_path == "meta-llama/Llama-2-7b-hf"
    assert parsed.data.lazy_preprocess is True
    expected = {
        "bf16": True, "tf32": True, "num_train_epochs": 3.0, "gradient_accumulation_steps": 16, "eval_strategy": "no",
        "save_steps": 1200, "learning_rate": 2e-5, "weight_decay": 0.0, "warmup_steps": 0.03, "lr_scheduler_type": "cosine",
        "model_max_length": 2048, "activation_checkpointing": True,
    }  # fmt: skip
    assert {name: parsed.training[name] for name in expected} == expected
    assert parsed.notes == (
        "--evaluation_strategy is --eval_strategy today: taken as --eval_strategy no",
        "--warmup_ratio is --warmup_steps today: taken as --warmup_steps 0.03",
        "--gradient_checkpointing is --activation_checkpointing today: taken as --activation_checkpointing True",
    )


def test_fastchats_lora_command():
    command = (
        "--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --fp16 True --q_lora False --flash_attn False --deepspeed ds.json "
        "--evaluation_strategy no --tf32 True --lora_target_modules q_proj v_proj --lora_bias none"
    )
    parsed = parse(command.split())
    assert parsed.training["deepspeed"] == "ds.json"
    assert parsed.model.attn_implementation is None
    assert parsed.lora == LoraOptions(
        lora_r=8, lora_alpha=16, lora_dropout=0.05, lora_target_modules=["q_proj", "v_proj"], lora_bias="none"
    )
    assert not parse([]).lora.enabled
    assert parse(["--lora_r", "8", "--q_lora", "True"]).model.load_in_4bit


@pytest.mark.parametrize(("words", "code", "value"), [
    ("--lora_alpha 16", "arguments.no_effect", "--lora_alpha"),
    ("--use_dora True", "arguments.no_effect", "--use_dora"),
    ("--lora_r 0", "arguments.out_of_range", "--lora_r"),
    ("--lora_r 8 --lora_dropout 1", "arguments.out_of_range", "--lora_dropout"),
    ("--lora_r 8 --lora_weight_path a", "arguments.contradiction", "--lora_r"),
    ("--lora_weight_path a --use_rslora True", "arguments.contradiction", "--use_rslora"),
    ("--lora_r 8 --lora_target_parameters a --lora_dropout 0.1", "arguments.contradiction", "--lora_dropout"),
    ("--lora_r 8 --lora_target_parameters a --use_dora True", "arguments.contradiction", "--use_dora"),
    ("--lora_r 8 --checkpoint_format deepspeed", "arguments.needs_sharded_checkpoints", "--checkpoint_format"),
    ("--lora_r 8 --lora_target_modules=", "arguments.empty", "--lora_target_modules"),
    ("--use_peft True --lora_r 8", "arguments.no_meaning", "--use_peft"),
])  # fmt: skip
def test_options_of_lora_that_can_not_be_used(words, code, value):
    with raises(code, value):
        parse(words.split())


def test_dropout_of_lora():
    assert parse(["--lora_r", "8"]).lora.dropout == 0.05
    assert parse(["--lora_r", "8", "--lora_target_parameters", "mlp.experts.down_proj"]).lora.dropout == 0
    assert parse(["--lora_r", "8", "--merge_adapter", "False", "--use_dora", "False"]).lora.dropout == 0.05


def test_what_has_no_meaning_is_refused_with_what_to_use():
    with raises("arguments.no_meaning", "--fsdp ", "--fsdp_transformer_layer_cls_to_wrap", "--deepspeed (zero3"):
        parse(shlex.split(FASTCHAT + FSDP))
    assert parse(["--fsdp", ""]).training == parse([]).training


@pytest.mark.parametrize(
    "argv", [["--name_of_nothing", "5"], ["--lerning_rate", "1"], ["--lerning_rate=1"], ["--lerning-rate"]]
)
def test_unknown_names_are_refused_with_the_nearest(argv):
    with raises("arguments.unknown") as caught:
        parse(argv)
    assert ("mean --learning_rate?" in str(caught.value)) == ("lerning" in argv[0])


def test_all_problems_are_told_at_once():
    with raises("arguments.unusable", "--fsdp", "--learning_rate?", "'many'", "--bf16 True") as caught:
        parse(["--fsdp", "full_shard", "--lerning_rate", "1", "--max_steps", "many", "--bf16", "--fp16"])
    assert sorted(caught.value.codes[1:]) == [
        "arguments.contradiction", "arguments.no_meaning", "arguments.unknown", "arguments.wrong_value",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate=3e-5"], "learning_rate", 3e-5),
        (["--learning-rate", "3e-5"], "learning_rate", 3e-5),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--bf16"], "bf16", True),
        (["--no_bf16"], "bf16", False),
        (["--bf16", "false"], "bf16", False),
        (["--no_cuda"], "use_cpu", True),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--report_to", "none"], "report_to", "none"),
        (["--run_name", "--", "--seed", "3"], "run_name", "--"),
        (["--run_name=--x"], "run_name", "--x"),
        (["--run_name", "5"], "run_name", "5"),
        (["--save_total_limit", "none"], "save_total_limit", None),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs", {"num_cycles": 2}),
        (["--deepspeed", '{"zero_optimization": {"stage": 3}}'], "deepspeed", {"zero_optimization": {"stage": 3}}),
        (["--pad_to_multiple_of", "8"], "pad_to_multiple_of", 8),
        (["--max_length", "64"], "model_max_length", 64),
        (["--max_seq_length", "64", "--model_max_length", "64"], "model_max_length", 64),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "out/checkpoint-5"], "resume_from_checkpoint", "out/checkpoint-5"),
        (["--local_rank=1", "--seed", "4"], "seed", 4),
        (["--local_rank", "0", "--seed", "4"], "seed", 4),
    ],
)
def test_command_line(argv, name, value):
    training = parse(argv).training
    assert training[name] == value
    assert type(training[name]) is type(value)
    assert "local_rank" not in training


@pytest.mark.parametrize(
    ("argv", "code", "values"),
    [
        (["--max_steps", "3.5"], "wrong_value", ["--max_steps", "a whole number", "'3.5'"]),
        (["--learning_rate", "fast"], "wrong_value", ["--learning_rate", "a number", "'fast'"]),
        (["--learning_rate", "nan"], "wrong_value", ["--learning_rate", "'nan'"]),
        (["--trust_remote_code=perhaps"], "wrong_value", ["--trust_remote_code", "True or False", "'perhaps'"]),
        (["--padding_side", "rigth"], "wrong_value", ["one of right, left", "'rigth'", "mean right?"]),
        (["--lr_scheduler_type", "cosin"], "wrong_value", ["mean cosine?"]),
        (["--optim", "adam"], "wrong_value", ["--optim", "one of adamw_torch"]),
        (["--lr_scheduler_kwargs", "num_cycles=2"], "wrong_value", ["as JSON"]),
        (["--rope_parameters", "{'rope_type': 'linear'}"], "value_not_json", ["--rope_parameters"]),
        (["--seed"], "value_missing", ["--seed", "a whole number"]),
        (["--seed", "1", "2"], "stray_word", ["'2'", "--seed"]),
        (["--model_name_or_path", "my", "model"], "stray_word", ["'model'", "--model_name_or_path", "quotes"]),
        (["--model_max_length", "0"], "out_of_range", ["--model_max_length", "0"]),
        (["--max_steps", "0"], "out_of_range", ["--max_steps", "0"]),
        (["--max_length", "64", "--model_max_length", "128"], "contradiction", ["--max_length 64", "--model_max_length 128"]),
        (["--warmup_ratio", "1.0"], "out_of_range", ["--warmup_ratio", "1.0"]),
        (["--warmup_ratio", "0.1", "--warmup_steps", "100"], "contradiction", ["--warmup_ratio", "--warmup_steps"]),
        (["--eval_strategy", "steps"], "needs_evaluation_data", ["--eval_strategy steps", "--eval_data_path"]),
        (["--load_best_model_at_end"], "needs_evaluation_data", ["--eval_data_path"]),
        (["--bf16", "False", "--bf16_full_eval"], "evaluation_precision", ["--bf16_full_eval", "--bf16 True"]),
        (["--fp16_full_eval"], "evaluation_precision", ["--fp16_full_eval", "--fp16 True"]),
        (["--save_strategy", "best"], "needs_metric", ["--metric_for_best_model"]),
        (["--label_smoothing_factor", "0.1", "--eval_strategy", "steps", "--eval_data_path", "a"], "contradiction",
         ["--label_smoothing_factor", "--eval_strategy"]),
        (["--save_only_model", "--load_best_model_at_end", "--eval_data_path", "a"], "needs_whole_checkpoints",
         ["--save_only_model"]),
        (["--optim", "lomo"], "optimizer_refused", ["--optim lomo", "adamw_torch"]),
        (["--deepspeed", ""], "deepspeed_empty", ["--deepspeed"]),
        (["--accelerator_config", '{"split_batches": true}'], "accelerator_key",
         ["split_batches", "per_device_train_batch_size"]),
        (["--accelerator_config", '{"even_batches": false}'], "accelerator_key", ["even_batches"]),
        (["--padding_free", "True"], "no_meaning", ["--padding_free", "--packing"]),
        (["--eval_packing", "True"], "no_meaning", ["--eval_packing"]),
        (["--dataset_num_proc", "0"], "out_of_range", ["--dataset_num_proc"]),
        (["--save_steps", "-1"], "out_of_range", ["--save_steps", "got -1", "--save_strategy no"]),
        (["--save_steps", "0"], "out_of_range", ["--save_steps", "got 0"]),
        (["--save_steps", "2.5"], "out_of_range", ["--save_steps", "whole number", "got 2.5"]),
        (["--logging_steps", "-1"], "out_of_range", ["--logging_steps", "got -1"]),
        (["--logging_steps", "0"], "out_of_range", ["--logging_steps", "--logging_strategy no"]),
        (["--eval_steps", "-0.5"], "out_of_range", ["--eval_steps", "at least 0", "got -0.5"]),
        (["--warmup_steps", "-3"], "out_of_range", ["--warmup_steps", "at least 0", "got -3"]),
        (["--warmup_steps", "2.5"], "out_of_range", ["--warmup_steps", "got 2.5"]),
        (["--torch_empty_cache_steps", "0"], "out_of_range", ["--torch_empty_cache_steps"]),
        (["--dataloader_prefetch_factor", "-1"], "out_of_range", ["--dataloader_prefetch_factor"]),
        (["--seed", "1" * 6000], "wrong_value", ["--seed", "a whole number"]),
        (["--resume_from_checkpoint="], "empty", ["--resume_from_checkpoint"]),
        (["--data_path", ""], "empty", ["--data_path"]),
        (["--rope_parameters", '{"factor": 2, "factor": 3}'], "value_not_json", ["--rope_parameters", "'factor'"]),
        (["--assistant_only_loss", "False"], "no_meaning", ["--assistant_only_loss"]),
        (["--dataset_text_field", "body"], "no_meaning", ["--data_format text"]),
        (["--torch_compile"], "no_meaning", ["--torch_compile"]),
        (["--hub_always_push"], "no_meaning", ["--push_to_hub"]),
        (["train.toml"], "stray_word", ["'train.toml'", ".yaml"]),
        (["a.yaml", "b.yaml"], "stray_word", ["'b.yaml'"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(argv, code, values):
    with raises(f"arguments.{code}", *values):
        parse(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--save_steps", "0.1", "--logging_steps", "0.5", "--eval_steps", "0.25", "--warmup_steps", "0.03"],
        ["--save_steps", "1", "--logging_steps", "1.0", "--eval_steps", "0", "--warmup_steps", "0"],
        ["--save_steps", "0", "--save_strategy", "no", "--logging_steps", "0", "--logging_strategy", "epoch"],
    ],
)
def test_numbers_of_steps_may_be_parts_of_all_steps(argv):
    training = parse(argv).training
    assert {name: training[name[2:]] for name in argv[::2] if name.endswith("_steps")} == {
        name: float(value) for name, value in zip(argv[::2], argv[1::2], strict=True) if name.endswith("_steps")
    }


@pytest.mark.parametrize("argv", [["--packing", "False"], ["--assistant_only_loss"], ["--q_lora=False"], ["--do_train"]])
def test_what_asks_for_nothing_passes(argv):
    assert parse(argv).training == parse([]).training


def test_a_token_is_never_shown(tmp_path):
    """A token is refused on a command line, which the launcher logs, and accepted in a file."""
    file = tmp_path / "arguments.yaml"
    file.write_text("use_auth_token: hf_secret\n")
    parsed = parse([str(file)])
    assert parsed.model.token == "hf_secret"
    assert "hf_secret" not in repr(parsed) + "".join(parsed.notes)
    assert parse(["--token", "true"]).model.token is True
    for name in ("token", "use_auth_token"):
        message = refused(f"--{name}", "hf_secret", "--seed", "x")
        assert "HF_TOKEN" in message
        assert "hf_secret" not in message


def test_yaml_file_with_the_command_line_on_top(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        "model_name_or_path: some/model\nlearning_rate: 2e-5\nevaluation_strategy: no\nbf16: yes\nmax_length: 100\n"
        "report_to: [wandb]\nrope_parameters: {rope_type: linear, factor: 2}\nlazy_preprocess: true\n"
    )
    parsed = parse(["--bf16", str(path), "--model_max_length", "200", "--lazy-preprocess=false"])
    assert parsed.model.model_name_or_path == "some/model"
    assert parsed.model.rope_parameters == {"rope_type": "linear", "factor": 2}
    assert parsed.data.lazy_preprocess is False
    expected = {"learning_rate": 2e-5, "eval_strategy": "no", "bf16": True, "model_max_length": 200, "report_to": ["wandb"]}
    assert {name: parsed.training[name] for name in expected} == expected


def test_json_file(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"max_steps": 3, "deepspeed": {"zero_optimization": {"stage": 3}}, "tf32": None}))
    training = parse([str(path)]).training
    assert (training["max_steps"], training["deepspeed"]["zero_optimization"]["stage"], training["tf32"]) == (3, 3, None)


@pytest.mark.parametrize(
    ("name", "text", "code", "values"),
    [
        ("a.yaml", "max_steps: [1]", "wrong_value", ["--max_steps", "[1]"]),
        ("a.yaml", "max_steps: 3.0", "wrong_value", ["--max_steps", "3.0"]),
        ("a.yaml", "model_name_or_path: 5", "wrong_value", ["--model_name_or_path", "5"]),
        ("a.yaml", "seed:", "wrong_value", ["--seed", "None"]),
        ("a.yaml", "lerning_rate: 1", "unknown", ["--lerning_rate", "mean --learning_rate?"]),
        ("a.yaml", "seed: 1\nseed: 2", "file_bad_key", ["'seed'", "twice"]),
        ("a.yaml", "- seed", "file_not_an_object", ["list"]),
        ("a.yaml", "seed: [", "file_not_yaml", ["line 1"]),
        ("a.yaml", "seed: 1\nlearning_rate = 1e-4\nbf16: true\n", "file_not_yaml", ["(line 2, column 1)"]),
        ("a.yaml", "seed: 1\nrun_name: 'a\nbf16: true\n", "file_not_yaml", ["(line 2, column 11)"]),
        ("a.yaml", "report_to: [a,\n  b\nbf16: true\n", "file_not_yaml", ["line 3", "line 1"]),
        ("a.yaml", "seed: 1\n  bf16: true\n", "file_not_yaml", ["line 2"]),
        ("a.yaml", "rope_parameters: {factor: 2, factor: 3}", "file_not_yaml", ["equal keys", "line 1"]),
        ("a.yaml", "[" * 5000, "file_not_yaml", ["nested"]),
        ("a.yaml", "run_name: 2024-13-01", "file_not_yaml", ["date"]),
        ("a.yaml", f"seed: {'1' * 6000}", "file_not_yaml", ["number"]),
        ("a.json", "[" * 5000, "file_not_json", ["nested"]),
        ("a.json", '{"rope_parameters": {"factor": 2, "factor": 3}}', "file_bad_key", ["'factor'", "twice"]),
        ("a.json", '{"seed": 1,}', "file_not_json", ["line 1, column 12", "comma"]),
        ("a.json", '{"seed": 1, "seed": 2}', "file_bad_key", ["'seed'", "twice"]),
        ("a.json", "[1]", "file_not_an_object", ["list"]),
        ("a.json", "{", "file_not_json", ["line 1"]),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path, name, text, code, values):
    path = tmp_path / name
    path.write_text(text)
    with raises(f"arguments.{code}", str(path), *values):
        parse([str(path)])


def test_a_value_that_is_wrong_does_not_count_as_absent(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("eval_data_path: 5\neval_strategy: steps\n")
    with raises("arguments.wrong_value", "--eval_data_path") as caught:
        parse([str(path)])
    assert caught.value.codes == ("arguments.wrong_value",)


def test_missing_and_empty_files(tmp_path):
    with raises("arguments.file_unreadable", "no such file"):
        parse([str(tmp_path / "train.yaml")])
    (tmp_path / "train.yaml").write_text("# nothing\n")
    assert parse([str(tmp_path / "train.yaml")]).training == parse([]).training


def test_help_names_every_argument_that_can_be_used():
    text = help_text()
    assert wants_help(["--seed", "1", "--help"])
    assert not wants_help(["--seed", "1"])
    for title in ("Model:", "Data:", "Training:", "Training, inherited"):
        assert f"\n{title}" in text
    for name in specifications():
        hidden = name in REFUSALS or name in TRANSLATIONS or name == "local_rank"
        assert (f"\n  --{name} = " in text) != hidden, name
    assert "--model_name_or_path = 'facebook/opt-125m'" in text


def test_tables_name_what_exists():
    known = specifications()
    assert all(translation.name in known for translation in TRANSLATIONS.values())
    assert set(REFUSED_OPTIMIZERS) <= set(known["optim"].choices)
    for name in REFUSALS.keys() & known.keys():  # a default must never be refused
        default = known[name].default
        exempt = ("assistant_only_loss", "do_train", "dataset_text_field")
        assert default in REFUSALS[name].passing or name in exempt, (name, default)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset_text_field", "text"), ("dataset_text_field", "body"), ("completion_only_loss", "False"),
        ("completion_only_loss", "text"), ("assistant_only_loss", "False"), ("dataset_kwargs", '{"add_special_tokens": false}'),
        ("eos_token", "no"), ("pad_token", "none of these"), ("packing_strategy", "wrapped"), ("padding_free", "True"),
        ("eval_packing", "True"), ("truncation_mode", "keep_end"), ("shuffle_dataset", "True"), ("dataset_batch_size", "10"),
        ("length_column_name", "n"), ("include_for_metrics", "loss"), ("batch_eval_metrics", "True"), ("label_names", "y"),
        ("remove_unused_columns", "True"), ("eval_accumulation_steps", "2"),
    ],
)  # fmt: skip
def test_what_trl_reads_of_the_data_and_this_job_does_not_is_refused(name, value):
    """Such an argument would have no effect on the training."""
    is_bool = (name, value) == ("completion_only_loss", "text")
    with raises("arguments.not_a_bool" if is_bool else "arguments.no_meaning", f"--{name}"):
        parse([f"--{name}", value])


@pytest.mark.parametrize(
    ("name", "value", "today"),
    [("chat_template_path", "chatml", "chat_template"), ("max_length", "77", "model_max_length")],
)
def test_what_trl_calls_otherwise_is_taken(name, value, today):
    parsed = parse([f"--{name}", value])
    assert str({**dataclasses.asdict(parsed.data), **parsed.training}[today]) == value
    assert f"--{name} is --{today} today" in parsed.notes[0]


def test_every_field_of_the_trainer_is_an_argument():
    from trl import SFTConfig

    assert {field.name for field in dataclasses.fields(SFTConfig)} <= set(specifications())


def test_values_are_fitted_to_a_machine_without_a_gpu(caplog):
    with caplog.at_level(logging.INFO):
        fitted = adapt_to_device({"tf32": True, "bf16": True}, "cpu")
    assert fitted == {"bf16": True, "use_cpu": True}
    assert "--tf32 is put aside" in caplog.text
    assert adapt_to_device({"tf32": True}, "cuda") == {"tf32": True}
    for name in ("fp16", "fp16_full_eval", "activation_offloading"):
        with raises("arguments.needs_accelerator", f"--{name}"):
            adapt_to_device({name: True}, "cpu")
    with raises("arguments.cpu_on_accelerator"):
        adapt_to_device({"use_cpu": True}, "cuda")


DS_CONFIG = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


@pytest.mark.world_size(2)
def test_build(tmp_path):
    argv = [*shlex.split(FASTCHAT), "--output_dir", str(tmp_path / "out"), "--pad_to_multiple_of", "8"]
    given = json.loads(json.dumps(DS_CONFIG))
    arguments = build_training_arguments(parse(argv).training, given)
    assert given == DS_CONFIG
    assert (arguments.max_length, arguments.model_max_length, arguments.pad_to_multiple_of) == (2048, 2048, 8)
    assert (arguments.bf16, arguments.use_cpu, arguments.world_size) == (True, True, 2)
    assert (arguments.activation_checkpointing, arguments.gradient_checkpointing) == (True, True)
    assert (arguments.remove_unused_columns, arguments.dataset_kwargs) == (False, {"skip_prepare_dataset": True})
    assert (arguments.save_strategy, arguments.save_steps, arguments.eval_strategy) == ("steps", 1200, "no")
    assert arguments.deepspeed_plugin.zero_stage == 3
    assert arguments.hf_deepspeed_config.config["train_batch_size"] == 2 * 16 * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.world_size(1)
def test_build_says_what_the_trainer_refuses():
    for argv, part in (
        (["--dataloader_prefetch_factor", "2"], "dataloader_num_workers"),
        (
            ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_data_path", "x", "--eval_steps", "2",
             "--save_steps", "3"],
            "load_best_model_at_end",
        ),
    ):  # fmt: skip
        with raises("arguments.trainer_refuses", part):
            build_training_arguments(parse(argv).training, DS_CONFIG)


@pytest.mark.parametrize("name", ["output_dir", "model_name_or_path", "sample_prompts", "cache_dir", "chat_template"])
def test_an_empty_name_is_a_variable_that_is_not_set(name):
    with raises("arguments.empty", f"--{name}"):
        parse([f"--{name}", ""])


def test_numbers_beyond_what_a_run_can_count():
    with raises("arguments.out_of_range", "--model_max_length", "2**31"):
        parse(["--model_max_length", "99999999999999999999"])


def test_a_yaml_file_reads_numbers_as_the_command_line_does(tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 010\nlearning_rate: 1e-5\nlogging_steps: 0x10\n")
    training = parse([str(tmp_path / "run.yaml")]).training
    assert (training["max_steps"], training["learning_rate"], training["logging_steps"]) == (10, 1e-5, 16)
    (tmp_path / "run.yaml").write_text("save_steps: 1:30\n")
    with raises("arguments.wrong_value", "'1:30'"):
        parse([str(tmp_path / "run.yaml")])


def test_merge_keys_are_named(tmp_path):
    (tmp_path / "run.yaml").write_text("base: &base {seed: 1}\n<<: *base\n")
    with raises("arguments.file_merge_key", "<<"):
        parse([str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("value", ["auto", "bfloat16", "float16", "float32"])
def test_each_dtype_is_taken(value):
    assert parse(["--dtype", value]).model.dtype == value
    with raises("arguments.wrong_value", "--dtype", "'half'"):
        parse(["--dtype", "half"])
