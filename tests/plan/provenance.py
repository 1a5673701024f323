"""Where every element of a tensor comes from, one by one: slow, and plain enough to compare with."""

import itertools

from zero_sft.plan.regions import Regions, Shape


def elements(regions: Regions) -> dict[Shape, tuple[str, int]]:
    """Every element's index and its place in its source."""
    result = {}
    for each in regions:
        for index in itertools.product(*map(range, each.sizes)):
            place = each.offset + sum(i * stride for i, stride in zip(index, each.strides, strict=True))
            result[tuple(i + low for i, low in zip(index, each.start, strict=True))] = (each.source, place)
    return result
