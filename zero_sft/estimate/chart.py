"""The estimate as a picture: what each rank reads, in how many requests, and the memory of a device by what it is for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.estimate.loading import RankLoad


def draw(title: str, loads: Sequence[RankLoad], device: Mapping[str, int], device_bytes: int, path: Path) -> None:
    """Draw one model in one world into a picture; its format follows the path's suffix.

    Raises:
        ArgumentError: a path that can't be written, or no matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ArgumentError(f"--plot needs matplotlib ({error}): pip install 'zero_sft[train]'") from error
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=120, width_ratios=(3, 2))
    ranks = range(len(loads))
    left.step(ranks, [each.nbytes / 1e9 for each in loads], where="mid", color="tab:blue")
    left.set(xlabel="rank", ylabel="GB read", title=title)
    left.set_ylim(bottom=0)
    other: Any = left.twinx()
    other.step(ranks, [each.requests for each in loads], where="mid", color="tab:orange", alpha=0.7)
    other.set_ylabel("requests", color="tab:orange")
    other.set_ylim(bottom=0)
    bottom = 0.0
    for name, nbytes in device.items():
        right.bar([0], [nbytes / 2**30], bottom=[bottom], label=name, width=0.5)
        bottom += nbytes / 2**30
    right.axhline(device_bytes / 2**30, color="black", linestyle="--", label="the device's memory")
    right.set(ylabel="GiB of one device", xlim=(-0.5, 1.6), xticks=[])
    right.legend(loc="upper right", fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--plot {path} can't be written: {error}") from error
    finally:
        pyplot.close(figure)
