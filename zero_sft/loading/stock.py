"""transformers' own ZeRO-3 load: the way back, and the reference to compare with.

`zero.Init` broadcasts every fresh parameter, rank 0 reads the whole checkpoint, and every module is gathered, overwritten and
partitioned again: about three times the model in traffic. Its account of unexpected and mismatched names is always empty.
"""

import logging
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft import progress
from zero_sft.distributed import agreed
from zero_sft.generation_config import read_generation_config
from zero_sft.loading import skeleton
from zero_sft.loading.report import LoadReport
from zero_sft.loading.request import Request
from zero_sft.transformers_internals import zero3_config, zero3_under
from zero_sft.world import World
from zero_sft.zero import gather, shards

logger = logging.getLogger(__name__)


def load_stock(request: Request, world: World, report: LoadReport) -> PreTrainedModel:
    """Load through `from_pretrained` under `zero.Init`. Every rank; communicates all the weights.

    Raises:
        ZeroSftError: if a rank fails where no other is in a collective; a failure elsewhere surfaces as the library's own.
    """
    with agreed(world, "preparing the model's class"):
        cls, config = skeleton.resolve_class(request.config, request.model_class, request.folder, request.trust_remote_code)
        if request.attn_implementation is not None:
            skeleton.require_attention(cls, config, request.attn_implementation)
        generation, left_out = read_generation_config(request.folder)
        for sentence in left_out if world.is_main else ():
            logger.warning(sentence)
    hf_config = zero3_config(request.ds_config)
    start = time.perf_counter()
    optional: dict[str, Any] = (
        {} if request.attn_implementation is None else {"attn_implementation": request.attn_implementation}
    )
    if left_out:
        optional["generation_config"] = generation  # or transformers refuses the whole model
    with progress.task("loading as transformers does"), zero3_under(request.ds_config):
        loaded: Any = cls.from_pretrained(
            str(request.folder),
            config=config,
            dtype=request.dtype,
            local_files_only=True,
            variant=request.variant,
            output_loading_info=True,
            **optional,
        )
    model, info = loaded
    report.seconds = time.perf_counter() - start
    report.missing = sorted(info["missing_keys"])
    report.parameters = sum(torch.Size(shards.full_shape(param)).numel() for param in model.parameters())
    model._zero_sft_hf_ds_config = hf_config
    gather.install(model)
    return model
