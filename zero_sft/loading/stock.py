"""Load with transformers' own loader under ZeRO-3: the fallback, and the reference for comparison.

`zero.Init` broadcasts every new parameter, rank 0 reads the whole checkpoint, and every module is gathered, overwritten and
partitioned again: the traffic is about three times the model. Unexpected and mismatched names are not reported.
"""

import time
from typing import Any

from transformers import PreTrainedModel

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.loading import skeleton
from zero_sft.loading.report import KeyReport, LoadStats
from zero_sft.loading.request import LoadRequest
from zero_sft.transformers_internals import keep_zero3_enabled, zero3_under
from zero_sft.zero import gather_hooks as gather
from zero_sft.zero import shards


def load_stock(request: LoadRequest, world: World) -> tuple[PreTrainedModel, KeyReport, LoadStats]:
    """Load through `from_pretrained` under `zero.Init`. Every rank; communicates all the weights.

    Raises:
        ZeroSftError: a rank failed before the load began. An error of transformers or DeepSpeed during the load is not wrapped.
    """
    spec = request.model
    with collective_stage(world, "preparing the model's class"):
        cls, config = skeleton.resolve_class(spec.config, spec.model_class, spec.folder, spec.trust_remote_code)
        optional: dict[str, Any] = {}
        if spec.attn_implementation is not None:
            skeleton.require_attention(cls, config, spec.attn_implementation)
            optional["attn_implementation"] = spec.attn_implementation
        if (repaired := skeleton.repaired_generation_config(spec, world)) is not None:
            optional["generation_config"] = repaired  # otherwise transformers refuses the whole model
    start = time.perf_counter()
    with progress.task("loading as transformers does"), zero3_under(request.ds_config):
        loaded: Any = cls.from_pretrained(
            str(spec.folder),
            config=config,
            dtype=spec.dtype,
            local_files_only=True,
            variant=request.variant,
            output_loading_info=True,
            **optional,
        )
    model, info = loaded
    seconds = time.perf_counter() - start
    keep_zero3_enabled(model, request.ds_config)
    gather.install_gather_hooks(model)
    keys = KeyReport(parameters=shards.parameter_numel(model), missing_keys=sorted(info["missing_keys"]))
    return model, keys, LoadStats(seconds=seconds)
