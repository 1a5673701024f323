"""Arguments that the Trainer would refuse once the model is loaded: refused when its arguments are built."""

import pytest

from tests.errors import raises
from zero_sft.arguments import build_training_arguments, parse
from zero_sft.errors import ArgumentError

DS = {"zero_optimization": {"stage": 3}}

REFUSED = [
    (("--optim", "adamw_bnb_8bit"), ("--optim adamw_bnb_8bit", "bitsandbytes")),
    (("--optim", "lion_32bit"), ("--optim lion_32bit", "bitsandbytes")),
    (("--optim", "schedule_free_adamw"), ("--optim schedule_free_adamw", "schedulefree")),
    (("--optim", "grokadamw"), ("--optim grokadamw", "grokadamw")),
    (("--optim", "stable_adamw"), ("--optim stable_adamw", "optimi")),
    (("--optim", "sgd", "--optim_args", "momentum=fast"), ("--optim sgd", "fast")),
    (("--learning_rate", "-1e-5"), ("--optim adamw_torch", "Invalid learning rate")),
    (("--adam_beta1", "1.5"), ("--optim adamw_torch", "beta")),
    (("--lr_scheduler_type", "cosine_with_min_lr"), ("--lr_scheduler_type cosine_with_min_lr", "min_lr")),
    (("--lr_scheduler_type", "warmup_stable_decay"), ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps")),
    (("--lr_scheduler_kwargs", '{"nosuch": 1}'), ("--lr_scheduler_kwargs", "nosuch")),
    (("--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"a": 1}'), ("does nothing", "constant")),
    (("--report_to", "nosuch"), ("--report_to nosuch", "tensorboard")),
    (("--use_liger_kernel",), ("pip install liger-kernel",)),
    (("--weight_decay", "-0.1"), ("--weight_decay", "-0.1")),
    (("--optim", "sgd", "--optim_args", "momentum"), ("--optim sgd",)),
    (("--dataloader_num_workers", "-1"), ("--dataloader_", "num_workers")),
    (("--dataloader_persistent_workers",), ("--dataloader_", "persistent_workers")),
    (("--dataloader_num_workers", "1", "--dataloader_multiprocessing_context", "nosuch"), ("--dataloader_", "nosuch")),
    (("--seed", "-1"), ("--seed", "-1")),
    (("--label_smoothing_factor", "1.5"), ("--label_smoothing_factor", "1.5")),
    (("--max_grad_norm", "-1"), ("--max_grad_norm", "-1")),
    (("--pad_to_multiple_of", "0"), ("--pad_to_multiple_of", "0")),
    (
        ("--metric_for_best_model", "bleu", "--save_strategy", "best", "--eval_strategy", "steps", "--eval_data_path", "x"),
        ("--metric_for_best_model bleu", "loss"),
    ),
    (("--activation_checkpointing_kwargs", '{"use_reentrent": false}'), ("use_reentrent", "use_reentrant")),
    (("--activation_checkpointing_kwargs", '{"use_reentrant": "no"}'), ("use_reentrant = 'no'", "true or false")),
    (("--neftune_noise_alpha", "-1"), ("--neftune_noise_alpha", "-1")),
]


@pytest.mark.world_size(1)
def test_each_is_refused_and_named():
    from importlib.util import find_spec

    for argv, parts in REFUSED:
        if any(
            find_spec(part) for part in ("bitsandbytes", "schedulefree", "grokadamw", "optimi", "liger_kernel") if part in parts
        ):
            continue  # it is installed here
        try:
            build_training_arguments(parse(argv).training, DS)
        except ArgumentError as error:
            message = str(error)
        else:
            pytest.fail(f"{argv} was taken")
        for part in parts:
            assert part in message, (argv, message)


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
    with raises("arguments.unusable") as caught:
        build_training_arguments(parse(["--report_to", "nosuch", "--optim", "grokadamw", "--seed", "-1"]).training, DS)
    assert all(part in str(caught.value) for part in ("--report_to nosuch", "--optim grokadamw", "--seed"))
    arguments = build_training_arguments(
        parse(["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']).training, DS
    )
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-6}
