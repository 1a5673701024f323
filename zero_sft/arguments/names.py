"""Old argument names that are translated, and argument names that are refused.

FastChat's published commands date from transformers 4. Names that transformers or TRL have changed since are translated, with a
line in the log. Old or current names that have no meaning under ZeRO-3 are refused, and the error says what to use instead. A
value of a refused name that asks for nothing (`--load_in_8bit False`) passes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.options.resolve import Refusal, Translation

TRANSLATIONS: dict[str, Translation] = {
    # transformers 4
    "evaluation_strategy": Translation(name="eval_strategy"),
    "warmup_ratio": Translation(name="warmup_steps", below=1.0),  # warmup_steps below 1 is a ratio; 1.0 would be one step
    "gradient_checkpointing": Translation(name="activation_checkpointing"),
    "gradient_checkpointing_kwargs": Translation(name="activation_checkpointing_kwargs"),
    "no_cuda": Translation(name="use_cpu"),
    "per_gpu_train_batch_size": Translation(name="per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Translation(name="per_device_eval_batch_size"),
    "group_by_length": Translation(name="train_sampling_strategy", values={True: "group_by_length", False: "random"}),
    "adafactor": Translation(name="optim", values={True: "adafactor", False: None}),
    "torch_dtype": Translation(name="dtype"),
    "use_auth_token": Translation(name="token"),
    # TRL
    "max_length": Translation(name="model_max_length"),
    "max_seq_length": Translation(name="model_max_length"),
    "chat_template_path": Translation(name="chat_template"),
    "model_revision": Translation(name="revision"),
    "use_liger": Translation(name="use_liger_kernel"),
    "use_bnb_nested_quant": Translation(name="bnb_4bit_use_double_quant"),
    # this package, before its first release
    "long": Translation(name="overlong"),
    # FastChat
    "q_lora": Translation(name="load_in_4bit"),
    "flash_attn": Translation(name="attn_implementation", values={True: "flash_attention_2", False: None}),
}

IGNORED = frozenset({"local_rank"})
"""Arguments that old launchers add; all launchers also pass the rank in the environment."""

_ZERO3 = "DeepSpeed ZeRO-3 shards the model; leave it out, and choose with --deepspeed (zero3, zero3_offload, a file)"
_8_BITS = "weights in 8 bits can't be sharded; see --load_in_4bit"
_DATA = "this job prepares the data itself; name the files with --data_path and the template with --chat_template"
_TOKENIZER = "the tokenizer is set up before training, identically on every rank; change it in the model's folder"
_METRICS = "an evaluation of this job computes only the loss; leave it out"
_PACKING = "see --packing; leave it out"
_PUSH = "the job uploads the model at its end, in one commit: see --push_to_hub, --hub_model_id and --hub_private_repo"
_TOKEN = "a command line is logged; set HF_TOKEN, or run `hf auth login`"
_DDP = "DeepSpeed reduces the gradients, not DDP; leave it out"
_COMPILE = "compiled models fail in the backward pass under ZeRO-3 (DeepSpeed 0.19, torch 2.13); leave it out"
_SHAPES = "under ZeRO-3 the optimizer sees flat shards of the weights, never whole matrices"
_REMOVED = "transformers has removed it; leave it out"
_FAST = "all tokenizers are fast since transformers 5; leave it out"


def _refuse(reason: str, names: str, passing: tuple[Any, ...] = Refusal(reason="").passing) -> dict[str, Refusal]:
    return {name: Refusal(reason=reason, passing=passing) for name in names.split()}


REFUSALS: dict[str, Refusal] = {
    **_refuse(_ZERO3, "fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params sharded_ddp parallelism_config"),
    **_refuse(_8_BITS, "load_in_8bit"),
    "use_peft": Refusal(reason="--lora_r turns LoRA on; leave it out"),
    **_refuse(_DATA, "dataset_batch_size", (None,)),
    **_refuse(_DATA, "dataset_kwargs", (None, {"skip_prepare_dataset": True})),
    "dataset_text_field": Refusal(reason="plain text is read from `text`; see --data_format text", passing=(None,)),
    "completion_only_loss": Refusal(reason="the text after a prompt is always trained on; leave it out", passing=(None, True)),
    "length_column_name": Refusal(reason="lengths come from the tokenised samples; leave it out", passing=(None, "length")),
    **_refuse(_METRICS, "include_for_metrics batch_eval_metrics eval_use_gather_object",
              (None, False, [])),
    **_refuse(_METRICS, "eval_accumulation_steps", (None,)),
    **_refuse(_METRICS, "prediction_loss_only eval_do_concat_batches", (None, False, True)),
    "assistant_only_loss": Refusal(reason="only the assistant's text is ever trained on; leave it out", passing=(True,)),
    "shuffle_dataset": Refusal(reason="samples are shuffled again in each epoch; see --train_sampling_strategy"),
    "remove_unused_columns": Refusal(reason="samples come without unused columns; leave it out"),
    "label_names": Refusal(reason="the labels are called `labels`; leave it out", passing=(None, ["labels"])),
    "truncation_mode": Refusal(reason="a conversation keeps its start; leave it out", passing=("keep_start",)),
    **_refuse(_PACKING, "padding_free"),
    "eval_packing": Refusal(reason="evaluation batches are padded to their longest sample; leave it out"),
    **_refuse(_PACKING, "packing_strategy", ("bfd",)),
    **_refuse(_TOKENIZER, "eos_token pad_token", (None,)),
    **_refuse(_FAST, "use_fast_tokenizer use_fast", (True,)),
    "model_init_kwargs": Refusal(reason="the model is loaded by this job; see --dtype, --attn_implementation", passing=(None,)),
    "use_cache": Refusal(reason="training does not use the cache of past keys; leave it out"),
    "auto_find_batch_size": Refusal(reason="it needs an unsharded model; see --per_device_train_batch_size"),
    **_refuse(_COMPILE, "torch_compile torch_compile_backend torch_compile_mode"),
    "optim_target_modules": Refusal(reason=_SHAPES + "; leave it out"),
    "debug": Refusal(reason="its checks need whole weights, which ZeRO-3 shards; leave it out"),
    **_refuse(_TOKEN, "hub_token push_to_hub_token"),
    **_refuse(_PUSH, "hub_always_push hub_revision push_to_hub_organization"),
    **_refuse(_PUSH, "hub_strategy", ("every_save", "end")),
    **_refuse(_DDP, "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend"),
    "ddp_timeout": Refusal(reason="DeepSpeed creates the process group; set DEEPSPEED_TIMEOUT (minutes)", passing=(1800,)),
    "enable_jit_checkpoint": Refusal(reason="each rank would stop alone and leave the others waiting; see --save_steps"),
    "do_train": Refusal(reason="this job always trains; leave it out, or give True", passing=(True,)),
    "do_predict": Refusal(reason="this job has nothing to predict; see --eval_data_path"),
    "logging_dir": Refusal(reason="transformers reads TENSORBOARD_LOGGING_DIR from the environment instead"),
    "save_safetensors": Refusal(reason="models are always saved as safetensors; leave it out", passing=(True,)),
    **_refuse("use --accelerator_config", "dispatch_batches"),
    **_refuse(_REMOVED, "fp16_backend half_precision_backend fp16_opt_level use_mps_device use_ipex jit_mode_eval torchdynamo "
                  "tpu_num_cores tpu_metrics_debug past_index mp_parameters ray_scope xpu_backend split_batches "
                  "include_inputs_for_metrics include_tokens_per_second use_legacy_prediction_loop"),
}  # fmt: skip

_WHOLE_MATRICES = (
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo",
)  # fmt: skip
REFUSED_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(_WHOLE_MATRICES, _SHAPES),
    "adagrad": "it fails at its first step under ZeRO-3 (DeepSpeed 0.19)",
}

REFUSED_ACCELERATOR_KEYS: dict[str, str] = {
    "split_batches": "every rank gets batches of --per_device_train_batch_size; leave it out",
    "dispatch_batches": "every rank reads its own samples; leave it out",
    "even_batches": "ranks with fewer batches would leave the others waiting forever; leave it out",
    "use_configured_state": "this job sets up DeepSpeed itself; leave it out",
}
"""Keys that must keep accelerate's default: true for `even_batches`, false for the others."""


def refused_accelerator_keys(settings: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each of accelerate's settings that can't be used."""
    for key, reason in REFUSED_ACCELERATOR_KEYS.items():
        value = settings.get(key)
        if value is not None and bool(value) != (key == "even_batches"):
            yield ArgumentError(f"--accelerator_config {key} can't be used: {reason}", code="arguments.accelerator_key")
