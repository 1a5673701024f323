"""Let a job that is started again go on from its newest checkpoint, whatever it was told in its first start.

The first start may have been told to overwrite the folder of an earlier run, or to resume from another folder. So a later start
resumes from the output folder if what is there is of this job, which `run.json` says; else it does as it was told.
"""

import dataclasses
import logging
from pathlib import Path

from zero_sft.arguments import ParsedArguments
from zero_sft.checkpoint.folder_kind import checkpoints_in
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.starts import is_later_start, job_name
from zero_sft.cluster.world import World
from zero_sft.job.run_folder import read_starts
from zero_sft.saving.earlier_run import LOGS
from zero_sft.saving.resume import AUTO

logger = logging.getLogger("zero_sft.train")


def resumed_if_started_again(parsed: ParsedArguments, world: World) -> ParsedArguments:
    """Return the arguments with which this start goes on. Every rank; communicates in a later start."""
    if not is_later_start():
        return parsed
    with collective_stage(world, "looking for an earlier start of this job") as exchange:
        if world.is_main:
            exchange.local = has_checkpoints_of(job_name(), Path(parsed.training["output_dir"]).expanduser())
    if not exchange.gathered[0]:
        return parsed
    logger.info("this job was started before: it goes on from its newest checkpoint")
    return dataclasses.replace(
        parsed, training={**parsed.training, "resume_from_checkpoint": AUTO, "overwrite_output_dir": False}
    )


def has_checkpoints_of(job: str, output: Path) -> bool:
    """Return whether the checkpoints in an output folder are of a start of this job."""
    starts = read_starts(output / LOGS)
    return bool(job and starts and starts[-1].get("job") == job and checkpoints_in(output))
