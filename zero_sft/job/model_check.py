"""Check the model before the data is prepared: its class, attention, precision and weight files.

Without these checks the job would fail when the model is built, after the data is prepared (an hour for a large dataset), or
even after the weights are read. Left out: the weights of a model on the hub, which the load fetches, and the class of a model
with custom code, which is unknown until that code runs.
"""

import logging
from typing import Any

from zero_sft.arguments import ParsedArguments
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.data.packing import is_flash
from zero_sft.ds_config import engine_dtype
from zero_sft.errors import ArgumentError, ConfigError
from zero_sft.hub.source import ModelSource

logger = logging.getLogger("zero_sft.train")

_FROM_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of `zero_optimization` whose "auto" the Trainer computes from the model's hidden size."""


def require_usable_model(parsed: ParsedArguments, arguments: Any, config: Any, source: ModelSource, world: World) -> None:
    """Raise an error if the model can't be trained with these arguments. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    from zero_sft.loading.dtype import requested_dtype, require_engine_dtype
    from zero_sft.loading.skeleton import attention_of, require_attention, resolve_class

    ds_config = arguments.hf_deepspeed_config.config
    with collective_stage(world, "checking the model"):
        requested = requested_dtype(parsed.model.dtype, config)
        dtype = engine_dtype(ds_config, requested)
        require_engine_dtype(parsed.model.dtype, requested, dtype)
        attention = attention_of(config, parsed.model.attn_implementation)
        if is_flash(attention) and dtype == "float32":
            raise ArgumentError(
                f"the attention implementation {attention} works only in 16 bits, but this run trains in float32. "
                "Give --bf16 True, or --attn_implementation sdpa.",
                code="arguments.attention_needs_16_bits",
            )
        if not getattr(config, "auto_map", None):
            cls, part = resolve_class(config, None, source.folder or source.name, trust_remote_code=False)
            if arguments.activation_checkpointing and not cls.supports_gradient_checkpointing:
                raise ArgumentError(
                    f"{cls.__name__} does not support --activation_checkpointing, which is on by default: "
                    "give --activation_checkpointing False.",
                    code="arguments.no_activation_checkpointing",
                )
            if attention:
                require_attention(cls, part, attention)
        _require_hidden_size(arguments.hf_deepspeed_config, config)
        if source.folder is not None and world.is_main:
            _require_weights(source.folder, source.options.variant)


def _require_weights(folder: Any, variant: str | None) -> None:
    """Read the header of every weight file, which fails on a missing, truncated or placeholder file. Rank 0."""
    from zero_sft.checkpoint.index import read_index
    from zero_sft.storage import torch_zip

    read_index(folder, torch_zip.read_header, variant)


def _require_hidden_size(hf_config: Any, config: Any) -> None:
    """Check the Trainer's condition for three "auto" values, which it applies only when the engine starts."""
    auto_keys = [key for key in _FROM_HIDDEN_SIZE if hf_config.is_auto(f"zero_optimization.{key}")]
    configs = [config, getattr(config, "text_config", None)]
    if auto_keys and not any(hasattr(part, name) for part in configs for name in ("hidden_size", "hidden_sizes")):
        raise ConfigError(
            f'zero_optimization has "auto" for {", ".join(auto_keys)}, which the Trainer computes from the model\'s '
            f"hidden_size; {type(config).__name__} has none. Set numbers: about h², 0.9 h² and 10 h for a model of width h.",
            code="ds_config.auto_needs_hidden_size",
        )
