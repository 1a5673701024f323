"""Arguments that the Trainer would refuse once the model is loaded: refused when its arguments are built."""

import pytest

from tests.errors import raises
from zero_sft.arguments import build_training_arguments, parse

DS = {"zero_optimization": {"stage": 3}}

REFUSED = [
    # arguments, the code, what the message must name
    (("--optim", "adamw_bnb_8bit"), "unusable_value", ("--optim adamw_bnb_8bit", "bitsandbytes")),
    (("--optim", "lion_32bit"), "unusable_value", ("--optim lion_32bit", "bitsandbytes")),
    (("--optim", "schedule_free_adamw"), "unusable_value", ("--optim schedule_free_adamw", "schedulefree")),
    (("--optim", "grokadamw"), "unusable_value", ("--optim grokadamw", "grokadamw")),
    (("--optim", "stable_adamw"), "unusable_value", ("--optim stable_adamw", "optimi")),
    (("--optim", "sgd", "--optim_args", "momentum=fast"), "unusable_value", ("--optim sgd", "fast")),
    (("--learning_rate", "-1e-5"), "unusable_value", ("--optim adamw_torch", "-1e-05")),
    (("--adam_beta1", "1.5"), "unusable_value", ("--optim adamw_torch", "1.5")),
    (("--lr_scheduler_type", "cosine_with_min_lr"), "unusable_value", ("--lr_scheduler_type cosine_with_min_lr", "min_lr")),
    (
        ("--lr_scheduler_type", "warmup_stable_decay"),
        "unusable_value",
        ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
    ),
    (("--lr_scheduler_kwargs", '{"nosuch": 1}'), "unusable_value", ("--lr_scheduler_kwargs", "nosuch")),
    (
        ("--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"a": 1}'),
        "no_effect",
        ("--lr_scheduler_kwargs {'a': 1}", "--lr_scheduler_type constant"),
    ),
    (("--report_to", "nosuch"), "report_to_unusable", ("--report_to nosuch", "tensorboard")),
    (("--use_liger_kernel",), "package_missing", ("--use_liger_kernel", "pip install liger-kernel")),
    (("--weight_decay", "-0.1"), "out_of_range", ("--weight_decay", "-0.1")),
    (("--optim", "sgd", "--optim_args", "momentum"), "unusable_value", ("--optim sgd",)),
    (("--dataloader_num_workers", "-1"), "unusable_value", ("--dataloader_", "num_workers")),
    (("--dataloader_persistent_workers",), "unusable_value", ("--dataloader_", "persistent_workers")),
    (
        ("--dataloader_num_workers", "1", "--dataloader_multiprocessing_context", "nosuch"),
        "wrong_value",
        ("--dataloader_multiprocessing_context", "nosuch"),
    ),
    (("--seed", "-1"), "out_of_range", ("--seed", "-1")),
    (("--label_smoothing_factor", "1.5"), "out_of_range", ("--label_smoothing_factor", "1.5")),
    (("--max_grad_norm", "-1"), "out_of_range", ("--max_grad_norm", "-1")),
    (("--pad_to_multiple_of", "0"), "out_of_range", ("--pad_to_multiple_of", "0")),
    (
        ("--metric_for_best_model", "bleu", "--save_strategy", "best", "--eval_strategy", "steps", "--eval_data_path", "x"),
        "unknown_metric",
        ("--metric_for_best_model bleu", "loss"),
    ),
    (
        ("--activation_checkpointing_kwargs", '{"use_reentrent": false}'),
        "unknown_key",
        ("--activation_checkpointing_kwargs", "'use_reentrent'", "use_reentrant"),
    ),
    (
        ("--activation_checkpointing_kwargs", '{"use_reentrant": "no"}'),
        "wrong_value",
        ("--activation_checkpointing_kwargs", "use_reentrant", "'no'", "true", "false"),
    ),
    (("--optim_args", "foo=bar"), "no_effect", ("--optim_args foo=bar", "foo does nothing", "--optim adamw_torch")),
    (("--optim", "sgd", "--optim_args", "momentum=0.9, foo=1"), "no_effect", ("foo does nothing", "--optim sgd")),
    (("--optim", "sgd", "--optim_args", "centered=true"), "no_effect", ("centered does nothing",)),
    (("--eval_delay", "-1"), "out_of_range", ("--eval_delay", "-1")),
    (("--router_aux_loss_coef", "-1"), "out_of_range", ("--router_aux_loss_coef", "-1")),
    (("--neftune_noise_alpha", "-1"), "out_of_range", ("--neftune_noise_alpha", "-1")),
]


@pytest.mark.world_size(1)
def test_each_is_refused_and_named():
    from importlib.util import find_spec

    for argv, code, values in REFUSED:
        packages = {"bitsandbytes", "schedulefree", "grokadamw", "optimi"} & set(values)
        if "--use_liger_kernel" in argv:
            packages = {"liger_kernel"}
        if any(map(find_spec, packages)):
            continue  # it is installed here
        with raises(f"arguments.{code}", *values):
            build_training_arguments(parse(argv).training, DS)


@pytest.mark.world_size(1)
def test_optim_args_that_are_read_pass():
    for optim, given in (("sgd", "momentum=0.0,nesterov=false"), ("rmsprop", "centered=True, alpha=0.99"), ("adamw_torch", "")):
        arguments = build_training_arguments(parse(["--optim", optim, "--optim_args", given]).training, DS)
        assert arguments.optim_args == given
    section = {"type": "AdamW", "params": {"lr": "auto"}}
    with raises("arguments.no_effect", "--optim_args eps=1e-6", "`optimizer`"):
        build_training_arguments(parse(["--optim_args", "eps=1e-6"]).training, {**DS, "optimizer": section})


@pytest.mark.world_size(1)
def test_every_reporting_integration_that_is_not_installed_is_refused():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    missing = set(INTEGRATION_TO_CALLBACK) - {*get_available_reporting_integrations(), "flyte", "kubeflow"}
    assert missing
    for name in sorted(missing):
        with raises("arguments.report_to_unusable", f"--report_to {name}"):
            build_training_arguments(parse(["--report_to", name]).training, DS)


@pytest.mark.world_size(1)
def test_all_are_told_at_once_and_what_is_right_passes():
    with raises("arguments.unusable", "--report_to nosuch", "--optim grokadamw", "--seed") as caught:
        build_training_arguments(parse(["--report_to", "nosuch", "--optim", "grokadamw", "--seed", "-1"]).training, DS)
    assert [code.removeprefix("arguments.") for code in caught.value.codes[1:]] == [
        "report_to_unusable", "unusable_value", "out_of_range"
    ]  # fmt: skip
    arguments = build_training_arguments(
        parse(["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']).training, DS
    )
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-6}
