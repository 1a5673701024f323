"""The estimate as a picture: what each rank reads, in how many requests, and the memory of a device by what it is for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft.console.plots import new_figure, save_figure
from zero_sft.estimate.simulate import RankLoad


def draw(title: str, loads: Sequence[RankLoad], device: Mapping[str, int], device_bytes: int, path: Path) -> None:
    """Draw one model in one world into a picture; its format follows the path's suffix.

    Raises:
        ArgumentError: a path that can't be written, or no matplotlib.
    """
    figure = new_figure(11, 4.6)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    _over_ranks(above, [load.nbytes / 1e9 for load in loads], "GB", "read by each rank")
    _over_ranks(below, [load.requests for load in loads], "requests", "in how many requests")
    below.set_xlabel("rank")
    _memory(figure.add_subplot(grid[:, 1]), device, device_bytes)
    save_figure(figure, path)


def _over_ranks(axes: Any, values: Sequence[float], unit: str, title: str) -> None:
    """One number of each rank, on axes that begin at 0, so that equal ranks look equal."""
    from matplotlib.ticker import MaxNLocator

    edges = [rank - 0.5 for rank in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, color="tab:blue", alpha=0.6)
    axes.set(ylabel=unit, title=title, xlim=(edges[0], edges[-1]), ylim=(0, 1.15 * max(*values, 1e-9)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.title.set_fontsize("medium")


def _memory(axes: Any, device: Mapping[str, int], device_bytes: int) -> None:
    """What a device holds, one on top of the other, next to the line of what it has; names stand at the right, outside."""
    bottom, bars = 0.0, []
    for name, nbytes in device.items():
        label = f"{name}: {nbytes / 2**30:,.1f}"
        bars.append(axes.bar([0], [nbytes / 2**30], bottom=[bottom], label=label, width=0.6))
        bottom += nbytes / 2**30
    limit = device_bytes / 2**30
    line = axes.axhline(limit, color="black", linestyle="--", label=f"memory of the device: {limit:,.0f}")
    axes.set(ylabel="GiB", title=f"one device at its worst: {bottom:,.1f} GiB", xlim=(-0.5, 0.5), xticks=[])
    axes.set_ylim(0, 1.1 * max(bottom, limit))
    axes.title.set_fontsize("medium")
    handles = [line, *reversed(bars)]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
