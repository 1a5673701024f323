"""Check before the weights are read that the output folder has room for the checkpoints and the export."""

import logging
from pathlib import Path

from zero_sft.arguments.ds_conflicts import steps_in_epoch
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.job.inputs import Inputs
from zero_sft.saving.room import SaveSizes, checkpoint_bytes, checkpoints_at_once, export_sizes, folder_bytes, require_room
from zero_sft.saving.trainer_checkpoint import checkpoints_in

logger = logging.getLogger("zero_sft.train")


def require_room_for_run(inputs: Inputs, world: World) -> None:
    """Check the room for the export and for the checkpoints that the arguments ask for. Every rank; communicates.

    Raises:
        ExportError: the file system of `--output_dir` has too little room.
    """
    with collective_stage(world, "checking the room in the output folder"):
        if not world.is_main:
            return
        try:
            sizes = _save_sizes(inputs, world)
        except Exception as error:  # noqa: BLE001 - a model that can't be built: the load reports it in detail
            logger.debug("the size of the export can't be computed: %r", error)
            return
        output = Path(inputs.arguments.output_dir)
        freed = sum(map(folder_bytes, checkpoints_in(output))) if inputs.overwrites_run else 0
        require_room(output, sizes, freed)


def _save_sizes(inputs: Inputs, world: World) -> SaveSizes:
    arguments, record = inputs.arguments, inputs.record
    export_bytes, numel = export_sizes(inputs.spec)
    epochs = record.max_steps / steps_in_epoch(record.rows, arguments, world.world_size)
    first_step = inputs.checkpoint.global_step if inputs.checkpoint else 0
    return SaveSizes(
        export_bytes=export_bytes,
        checkpoint_bytes=export_bytes if arguments.save_only_model else checkpoint_bytes(numel, record.optimizer),
        checkpoints=checkpoints_at_once(
            arguments.save_strategy.value, record.max_steps, arguments.save_steps, epochs, arguments.save_total_limit,
            first_step,
        ),
    )  # fmt: skip
