import dataclasses

import pytest

from tests.saving.test_run_record import LINEAR
from zero_sft.saving.resume_step import log_other_steps, step_of_same_sample


def record(rows, samples_a_step, steps_an_epoch=0):
    return dataclasses.replace(LINEAR, rows=rows, samples_a_step=samples_a_step, steps_an_epoch=steps_an_epoch)


@pytest.mark.parametrize(("step", "then", "now", "expected"), [
    (16, record(100, 8, 13), record(100, 16, 7), 8),  # the worked example
    (16, record(100, 8), record(100, 16), 8),  # of an earlier release, which did not record the steps of an epoch
    (13, record(100, 8, 13), record(100, 16, 7), 7),  # the border of an epoch
    (26, record(100, 8, 13), record(100, 3, 34), 68),
    (12, record(100, 8, 12), record(100, 16, 6), 6),  # --dataloader_drop_last: 96 samples an epoch
    (5, record(100, 16, 7), record(100, 8, 13), 10),
    (5, record(100, 16, 7), record(100, 16, 7), 5),
    (5, record(100, 0), record(100, 16, 7), 5),  # unknown
    (0, record(100, 16, 7), record(100, 8, 13), 0),
])  # fmt: skip
def test_the_step_of_the_same_sample(step, then, now, expected):
    assert step_of_same_sample(step, then, now) == expected


def test_what_is_logged(caplog):
    with caplog.at_level("INFO"):
        log_other_steps(3, record(100, 8, 13), record(100, 16, 7))
        log_other_steps(2, record(100, 8, 13), record(100, 16, 7))
        log_other_steps(2, record(100, 8, 13), record(100, 8, 13))
    one, other = caplog.messages
    assert "goes on after step 1" in one
    assert "8 samples are trained on again" in one
    assert "again" not in other
