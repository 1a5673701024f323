"""DeepSpeed configs of stage 3 as widely copied: the keys and values of the projects' published files."""

from typing import Any

_FP16 = {
    "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
    "min_loss_scale": 1,
}  # fmt: skip
_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
_WARMUP_LR = {
    "type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
}  # fmt: skip
_WARMUP_DECAY_LR = {
    "type": "WarmupDecayLR",
    "params": {**_WARMUP_LR["params"], "total_num_steps": "auto"},
}
_SIZES = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}  # fmt: skip
_AUTO_BUCKETS = {
    "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
}  # fmt: skip
_LIVE = {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}
_CPU = {"device": "cpu", "pin_memory": True}
_STAGE_2_KEYS = {
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "reduce_scatter": True,
    "round_robin_gradients": True,
}

DS_CONFIGS: dict[str, dict[str, Any]] = {
    "transformers' documentation, offloaded": {
        "fp16": _FP16, "optimizer": _ADAMW, "scheduler": _WARMUP_LR,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": _CPU, "offload_param": _CPU, "overlap_comm": True, "contiguous_gradients": True,
            "sub_group_size": 1e9, **_AUTO_BUCKETS, **_LIVE, "stage3_gather_16bit_weights_on_model_save": True,
        },
        **_SIZES, "steps_per_print": 2000, "wall_clock_breakdown": False,
    },
    "FastChat": {
        "fp16": _FP16,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}, "overlap_comm": True,
            "contiguous_gradients": True, **_AUTO_BUCKETS, "stage3_max_live_parameters": 5e8,
            "stage3_max_reuse_distance": 5e8, "stage3_gather_16bit_weights_on_model_save": True,
        },
        **_SIZES, "steps_per_print": 1e9,
    },
    "LLaMA-Factory ds_z3_config": {
        **_SIZES, "zero_allow_untested_optimizer": True, "fp16": _FP16, "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9, **_AUTO_BUCKETS, **_LIVE,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
    "axolotl zero3_bf16": {
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 0, **_AUTO_BUCKETS,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": True}, "fp16": {**_FP16, "auto_cast": False, "initial_scale_power": 32, "enabled": False},
        **_SIZES, "wall_clock_breakdown": False,
    },
    "a decaying scheduler and stage-2 keys": {
        "bf16": {"enabled": "auto"}, "optimizer": {**_ADAMW, "params": {**_ADAMW["params"], "torch_adam": True}},
        "scheduler": _WARMUP_DECAY_LR,
        "zero_optimization": {"stage": 3, **_STAGE_2_KEYS, "contiguous_gradients": True, **_AUTO_BUCKETS},
        **_SIZES,
    },
    "the smallest": {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"},
}  # fmt: skip
