"""Read the marks of a turn that say whether it is trained on. Pure."""

from collections.abc import Mapping
from typing import Any

from zero_sft.data.samples.key_meanings import as_flag, is_empty
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

MARKS = ("train", "loss", "weight", "loss_scale", "mask")
"""The keys of a turn that say whether it is trained on."""


def is_left_out_of_loss(turn: Mapping[str, Any], place: str, *, is_answer: bool) -> bool:
    """Whether an answer's marks leave it out of the loss; raise `DataError` if they ask to train on another turn."""
    verdicts = {key: _verdict(key, turn[key], place) for key in MARKS if key in turn and not is_empty(turn[key])}
    if not is_answer:
        for key in ("train", "loss", "loss_scale"):
            if verdicts.get(key):
                raise DataError(
                    f'{place}: "{key}": {excerpt(repr(turn[key]))} asks to train on this turn, but only answers are '
                    "trained on. Remove the key.",
                    code="data.only_answers_are_trained_on",
                )
        return False
    if len(set(verdicts.values())) > 1:
        marks = " and ".join(f'"{key}": {excerpt(repr(turn[key]))}' for key in verdicts)
        raise DataError(f"{place}: {marks} contradict each other. Keep one of them.", code="data.contradicting_keys")
    return not all(verdicts.values())


def _verdict(key: str, value: Any, place: str) -> bool:
    """Whether one of a turn's marks says that the turn is trained on."""
    flag = as_flag(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if flag is None or (key == "mask" and is_number):  # a number is ambiguous: 1 may mean "train" or "leave out"
        expected = "0 or 1" if key in ("weight", "loss_scale") else "true or false"
        raise DataError(
            f'{place}: "{key}": {excerpt(repr(value))}; expected {expected}. "train": false leaves an answer out of the loss.',
            code="data.bad_value_of_key",
        )
    return flag != (key == "mask")
