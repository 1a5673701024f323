"""Read the marks of a turn, or of a sample, that say whether and with which weight it is trained on. Pure."""

from collections.abc import Mapping
from typing import Any

from zero_sft.data.samples.key_meanings import as_flag, is_empty
from zero_sft.errors import DataError
from zero_sft.printable import excerpt

MARKS = ("train", "loss", "weight", "loss_scale", "mask")
"""The keys of a turn that say whether it is trained on."""

RANGES = "train_detail"
"""The key of a turn, axolotl's, that says which parts of its text are trained on."""

WEIGHT = "weight"
"""The key of a sample that holds its weight."""

_OFFSETS = ("begin_offset", "end_offset")


def weight_of_turn(turn: Mapping[str, Any], place: str, *, is_answer: bool) -> float:
    """Return the weight of a turn in the loss, 0 to 1; raise `DataError` if marks ask to train on what is not an answer."""
    weights = {key: _weight(key, turn[key], place) for key in MARKS if key in turn and not is_empty(turn[key])}
    if not is_answer:
        for key in ("train", "loss", "loss_scale"):
            if weights.get(key):
                raise DataError(
                    f'{place}: "{key}": {excerpt(repr(turn[key]))} asks to train on this turn, but only answers are '
                    "trained on. Remove the key.",
                    code="data.only_answers_are_trained_on",
                )
        return 1.0
    if (
        len({weight > 0 for weight in weights.values()}) > 1
        or len({weight for weight in weights.values() if 0 < weight < 1}) > 1
    ):
        marks = " and ".join(f'"{key}": {excerpt(repr(turn[key]))}' for key in weights)
        raise DataError(f"{place}: {marks} contradict each other. Keep one of them.", code="data.contradicting_keys")
    return min(weights.values(), default=1.0)


def weight_of_sample(sample: Mapping[str, Any], where: str) -> float:
    """Return the weight of a sample in the loss, 0 to 1; raises `DataError`."""
    return 1.0 if is_empty(sample.get(WEIGHT)) else _weight(WEIGHT, sample[WEIGHT], where)


def trained_ranges(turn: Mapping[str, Any], text: str, place: str, *, is_answer: bool) -> tuple[tuple[int, int], ...] | None:
    """Return the half-open ranges of a text that `train_detail` marks as trained, in order; None without such marks.

    In the data, offsets are of characters, and the last one is included. What no range covers is not trained on.

    Raises:
        DataError: not a list of ranges in order, a range beyond the text, or a trained range in another turn than an answer.
    """
    value = turn.get(RANGES)
    if is_empty(value):
        return None
    ranges, position = list[tuple[int, int]](), 0
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        start, last = (item.get(key) for key in _OFFSETS) if isinstance(item, Mapping) else (None, None)
        flag = as_flag(item.get("train")) if isinstance(item, Mapping) else None
        if not isinstance(start, int) or not isinstance(last, int) or flag is None:
            raise DataError(
                f'{place}, `{RANGES}` {number}: expected {{"begin_offset": 0, "end_offset": 4, "train": true}}; got '
                f"{excerpt(item)}.",
                code="data.bad_train_detail",
            )
        if not position <= start <= last < len(text):
            raise DataError(
                f"{place}, `{RANGES}` {number}: characters {start} to {last} overlap the range before, or are not in the text "
                f"of {len(text)} characters. Offsets count from 0, and the last one is included.",
                code="data.bad_train_detail",
            )
        position = last + 1
        if flag:
            ranges.append((start, position))
    if ranges and not is_answer:
        raise DataError(
            f"{place}: `{RANGES}` asks to train on parts of this turn, but only answers are trained on. Remove the key.",
            code="data.only_answers_are_trained_on",
        )
    return tuple(ranges) if is_answer else None


def _weight(key: str, value: Any, place: str) -> float:
    """Return the weight that one mark gives, 0 to 1; raises `DataError`."""
    flag = as_flag(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if flag is not None and not (key == "mask" and is_number):  # a number is ambiguous there: 1 may mean "train" or "leave out"
        return float(flag != (key == "mask"))
    number = _number(value) if key in ("weight", "loss_scale") else None
    if number is None or not 0 <= number <= 1:
        expected = "a number from 0 to 1" if key in ("weight", "loss_scale") else "true or false"
        raise DataError(
            f'{place}: "{key}": {excerpt(repr(value))}; expected {expected}. "train": false leaves an answer out of the loss.',
            code="data.bad_value_of_key",
        )
    return number


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None
