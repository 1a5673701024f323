"""The step at which a run goes on from a checkpoint: that of the same sample, also with another number of samples per step."""

import logging

from zero_sft.saving.run_record import RunRecord

logger = logging.getLogger(__name__)

ENDLESS = 2**62
"""The steps of an epoch of data that is streamed."""


def step_of_same_sample(step: int, then: RunRecord, now: RunRecord) -> int:
    """Return the number of steps of this run before the sample that came after `step` steps of the earlier run. Pure.

    If no step of this run begins with that sample, it is the step that contains it, so that no sample is left out.
    Worked example: an epoch of 100 samples, 8 per step then and 16 now: 13 and 7 steps per epoch. Step 16 is the third of the
    second epoch, after 24 of its samples: 7 + 24 // 16 = 8.
    """
    if not then.samples_a_step or then.samples_a_step == now.samples_a_step:
        return step
    epochs, steps = divmod(step, _steps_an_epoch(then))
    return epochs * _steps_an_epoch(now) + steps * then.samples_a_step // now.samples_a_step


def log_other_steps(step: int, then: RunRecord, now: RunRecord) -> None:
    """Log at which step a run goes on whose steps have another number of samples. Rank 0."""
    goes_on = step_of_same_sample(step, then, now)
    if not then.samples_a_step or then.samples_a_step == now.samples_a_step:
        return
    steps = step % _steps_an_epoch(then)
    repeated = steps * then.samples_a_step % now.samples_a_step
    logger.info(
        "a step had %d samples, and has %d now: the run goes on after step %d, at the same sample as after step %d of the "
        "checkpoint%s",
        then.samples_a_step, now.samples_a_step, goes_on, step,
        f"; {repeated} samples are trained on again, since no step begins there" if repeated else "",
    )  # fmt: skip


def _steps_an_epoch(record: RunRecord) -> int:
    return record.steps_an_epoch or max(1, -(-record.rows // record.samples_a_step))
