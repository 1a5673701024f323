"""Check before the weights are read that the output folder has room for the checkpoints and the export."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from zero_sft.arguments import ParsedArguments
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.ds_config import engine_dtype
from zero_sft.job.inputs import Inputs

logger = logging.getLogger("zero_sft.train")


def require_room_for_run(parsed: ParsedArguments, arguments: Any, inputs: Inputs, world: World) -> None:
    """Check the room for the export and for the checkpoints that the arguments ask for. Every rank; communicates.

    Raises:
        ExportError: the file system of `--output_dir` has too little room.
    """
    from zero_sft.saving.former_run import checkpoints_in
    from zero_sft.saving.room import folder_bytes, require_room

    with collective_stage(world, "checking the room in the output folder"):
        if not world.is_main:
            return
        try:
            sizes = _save_sizes(parsed, arguments, inputs, world)
        except Exception as error:  # noqa: BLE001 - a model that can't be built: the load reports it in detail
            logger.debug("the size of the export can't be computed: %r", error)
            return
        output = Path(arguments.output_dir)
        freed = sum(map(folder_bytes, checkpoints_in(output))) if inputs.overwrites_run else 0
        require_room(output, sizes, freed)


def _save_sizes(parsed: ParsedArguments, arguments: Any, inputs: Inputs, world: World) -> Any:
    from zero_sft.loading.dtype import requested_dtype
    from zero_sft.loading.request import ModelSpec
    from zero_sft.saving import room

    ds = arguments.hf_deepspeed_config.config
    spec = ModelSpec(
        folder=inputs.source.folder or Path(inputs.source.name),
        config=inputs.config,
        dtype=getattr(torch, engine_dtype(ds, requested_dtype(parsed.model.dtype, inputs.config))),
        attn_implementation=parsed.model.attn_implementation,
        trust_remote_code=parsed.model.trust_remote_code,
    )
    export_bytes, numel = room.export_sizes(spec)
    optimizer = (ds.get("optimizer") or {}).get("type") or _value(arguments.optim)
    state_bytes = room.checkpoint_bytes(numel, room.optimizer_state_bytes(optimizer))
    batches = len(inputs.training_data.rows) / (arguments.per_device_train_batch_size * world.world_size)
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    epoch_steps = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * epoch_steps)
    return room.SaveSizes(
        export_bytes=export_bytes,
        checkpoint_bytes=export_bytes if arguments.save_only_model else state_bytes,
        checkpoints=room.checkpoints_at_once(
            _value(arguments.save_strategy), steps, arguments.save_steps, steps / epoch_steps,
            arguments.save_total_limit, 0 if inputs.checkpoint is None else inputs.checkpoint.global_step,
        ),
    )  # fmt: skip


def _value(option: Any) -> str:
    """Return the text of an option, which may be a member of an Enum."""
    return str(getattr(option, "value", option))
