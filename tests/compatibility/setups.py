"""The set-ups of ZeRO-3, the methods of training and the callers that are tried with each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
"""DeepSpeed's own Adam, since it refuses to offload another's state."""

CPU, PINNED = {"device": "cpu"}, {"device": "cpu", "pin_memory": True}
NVME_PARAM = {"device": "nvme", "buffer_count": 24, "buffer_size": 100_000, "max_in_cpu": 0}
NVME_OPTIMIZER = {"device": "nvme", "buffer_count": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A set-up: sections of a DeepSpeed config, and what is around them.

    Attributes:
        zero: keys of `zero_optimization`.
        config: keys of the config.
        ranks: the number of ranks.
        dtype: the engine's.
        batches: batches of a step, for gradient accumulation.
        refused: the code of the error with which the job refuses it at its start; "" if it runs.
        gpu_only: why it can't be tried on CPU ranks; "" if it can.
        needs_nvme: whether it needs DeepSpeed's operator for NVMe.
    """

    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 2
    dtype: str = "fp32"
    batches: int = 1
    refused: str = ""
    gpu_only: str = ""
    needs_nvme: bool = False

    @property
    def muon(self) -> bool:
        """Whether the optimizer is Muon."""
        return self.config.get("optimizer", ADAMW)["type"] == "Muon"

    @property
    def autocast(self) -> bool:
        """Whether the engine computes in another dtype than the parameters'."""
        return bool(self.config.get("torch_autocast"))

    def ds_config(self, nvme_path: str) -> dict[str, Any]:
        """Return the DeepSpeed config, with a folder for what is on NVMe."""
        zero = {name: dict(value) if isinstance(value, Mapping) else value for name, value in self.zero.items()}
        for section in ("offload_param", "offload_optimizer"):
            if zero.get(section, {}).get("device") == "nvme":
                zero[section]["nvme_path"] = nvme_path
        return {
            "bf16": {"enabled": self.dtype == "bf16"},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.batches,
            "optimizer": ADAMW,
            **self.config,
            "zero_optimization": {"stage": 3, **zero},
        }


SETUPS: dict[str, Setup] = {
    "zero3, fp32": Setup(),
    "zero3, bf16": Setup(dtype="bf16"),
    "one rank": Setup(ranks=1, dtype="bf16"),
    "three ranks, which divide no size": Setup(ranks=3, dtype="bf16"),
    "offload_optimizer: cpu": Setup(zero={"offload_optimizer": CPU}, dtype="bf16"),
    "offload_optimizer: cpu, pinned": Setup(zero={"offload_optimizer": PINNED}),
    "offload_optimizer: cpu, ratio 0.5": Setup(zero={"offload_optimizer": {**CPU, "ratio": 0.5}}, dtype="bf16"),
    "offload_optimizer: nvme": Setup(zero={"offload_optimizer": NVME_OPTIMIZER}, needs_nvme=True),
    "offload_param: cpu": Setup(zero={"offload_param": CPU}, dtype="bf16"),
    "offload_param: cpu, pinned": Setup(zero={"offload_param": PINNED}),
    "offload_param: nvme": Setup(zero={"offload_param": NVME_PARAM, "offload_optimizer": CPU}, needs_nvme=True),
    "both: cpu": Setup(zero={"offload_param": CPU, "offload_optimizer": CPU}),
    "both: cpu, pinned": Setup(zero={"offload_param": PINNED, "offload_optimizer": PINNED}, dtype="bf16"),
    "both: nvme": Setup(zero={"offload_param": NVME_PARAM, "offload_optimizer": NVME_OPTIMIZER}, dtype="bf16", needs_nvme=True),
    "offload_param: cpu, optimizer: nvme": Setup(
        zero={"offload_param": CPU, "offload_optimizer": NVME_OPTIMIZER}, needs_nvme=True
    ),
    "hpZ": Setup(zero={"zero_hpz_partition_size": 2}, ranks=4, dtype="bf16"),
    "small parameters persistent": Setup(zero={"stage3_param_persistence_threshold": 2000}),
    "no parameter persistent": Setup(zero={"stage3_param_persistence_threshold": 0}),
    "sub_group_size 1000": Setup(zero={"sub_group_size": 1000}, dtype="bf16"),
    "small buckets": Setup(zero={"reduce_bucket_size": 500, "stage3_prefetch_bucket_size": 100}),
    "nothing kept gathered": Setup(zero={"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}),
    "no overlap": Setup(zero={"overlap_comm": False, "contiguous_gradients": False}),
    "reduce_scatter off": Setup(zero={"reduce_scatter": False}),
    "gradient accumulation": Setup(batches=3, dtype="bf16"),
    "gradient clipping": Setup(config={"gradient_clipping": 0.1}, dtype="bf16"),
    "prescaled gradients": Setup(
        zero={"reduce_scatter": False}, config={"prescale_gradients": True, "gradient_predivide_factor": 2.0}
    ),
    "prescaled gradients with reduce_scatter": Setup(
        config={"prescale_gradients": True}, refused="ds_config.contradiction"
    ),
    "gradients communicated in fp32": Setup(config={"communication_data_type": "fp32"}, dtype="bf16"),
    "gradients accumulated in fp32": Setup(config={"data_types": {"grad_accum_dtype": "fp32"}}, batches=2, dtype="bf16"),
    "the config's optimizer and scheduler": Setup(
        config={
            "optimizer": {"type": "Adam", "params": {"lr": 0.02, "betas": [0.8, 0.95], "torch_adam": True}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 10}},
        }
    ),
    "optimizer: Lion": Setup(
        config={"optimizer": {"type": "Lion", "params": {"lr": 0.01}}}, gpu_only="DeepSpeed's Lion has no CPU operator"
    ),
    "optimizer: Muon": Setup(
        zero={"reduce_scatter": False}, config={"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}, dtype="bf16"
    ),
    "optimizer: Muon with reduce_scatter": Setup(
        config={"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}, refused="ds_config.contradiction"
    ),
    "memory_efficient_linear off": Setup(zero={"memory_efficient_linear": False}),
    "stage3_module_granularity_threshold": Setup(
        zero={"stage3_module_granularity_threshold": 10_000}, gpu_only="DeepSpeed's zero_grad fails for such modules on CPU"
    ),
    "leaf modules": Setup(zero={"leaf_module": {"classes": ["LlamaMLP"]}}),
    "round robin and ignored keys of stage 2": Setup(
        zero={"round_robin_gradients": True, "allgather_partitions": True, "allgather_bucket_size": 1000, "cpu_offload": False}
    ),
    "torch_autocast": Setup(config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": False}}),
    "AutoTP": Setup(config={"tensor_parallel": {"autotp_size": 2}}, refused="ds_config.unsupported_feature"),
    "AutoEP": Setup(config={"expert_parallel": {"enabled": True}}, refused="ds_config.unsupported_feature"),
    "DeepCompile": Setup(config={"compile": {"deepcompile": True}}, refused="ds_config.unsupported_feature"),
    "SuperOffload": Setup(
        zero={"offload_optimizer": {**PINNED, "super_offload": True}}, refused="ds_config.unsupported_feature"
    ),
    "ZenFlow": Setup(
        zero={"offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 1,
                                                   "update_interval": 4}},
        refused="ds_config.unsupported_feature",
    ),
    "MiCS": Setup(zero={"mics_shard_size": 2}, refused="ds_config.refused_by_deepspeed"),
    "quantized weights (ZeRO++)": Setup(zero={"zero_quantized_weights": True}, gpu_only="its operators are for CUDA"),
    "quantized gradients (ZeRO++)": Setup(zero={"zero_quantized_gradients": True}, gpu_only="its operators are for CUDA"),
    "fp16": Setup(config={"fp16": {"enabled": True}, "bf16": {"enabled": False}}, dtype="fp16"),
}  # fmt: skip
"""All set-ups by name."""
