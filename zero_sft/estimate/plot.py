"""Draw an estimate: bytes and requests that each rank reads, and the memory of a device by purpose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft.console.plots import new_figure, save_figure
from zero_sft.estimate.simulate import RankLoad


def draw(title: str, loads: Sequence[RankLoad], device: Mapping[str, int], device_bytes: int, path: Path) -> None:
    """Draw the estimate of one model and one world size; the suffix of the path sets the format.

    Raises:
        ArgumentError: the path can't be written, or matplotlib is not installed.
    """
    figure = new_figure(11, 4.6)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    upper = figure.add_subplot(grid[0, 0])
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    _over_ranks(upper, [load.nbytes / 1e9 for load in loads], "GB", "read by each rank")
    _over_ranks(lower, [load.requests for load in loads], "requests", "requests of each rank")
    lower.set_xlabel("rank")
    _memory(figure.add_subplot(grid[:, 1]), device, device_bytes)
    save_figure(figure, path)


def _over_ranks(axes: Any, values: Sequence[float], unit: str, title: str) -> None:
    """Draw one number per rank on axes that begin at 0, so that equal ranks look equal."""
    from matplotlib.ticker import MaxNLocator

    edges = [rank - 0.5 for rank in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, color="tab:blue", alpha=0.6)
    axes.set(ylabel=unit, title=title, xlim=(edges[0], edges[-1]), ylim=(0, 1.15 * max(*values, 1e-9)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.title.set_fontsize("medium")


def _memory(axes: Any, device: Mapping[str, int], device_bytes: int) -> None:
    """Draw the memory of a device as a stacked bar below a line for its limit, with the legend on the right, outside."""
    bottom, bars = 0.0, []
    for name, nbytes in device.items():
        label = f"{name}: {nbytes / 2**30:,.1f}"
        bars.append(axes.bar([0], [nbytes / 2**30], bottom=[bottom], label=label, width=0.6))
        bottom += nbytes / 2**30
    limit = device_bytes / 2**30
    line = axes.axhline(limit, color="black", linestyle="--", label=f"memory of the device: {limit:,.0f}")
    axes.set(ylabel="GiB", title=f"one device at its peak: {bottom:,.1f} GiB", xlim=(-0.5, 0.5), xticks=[])
    axes.set_ylim(0, 1.1 * max(bottom, limit))
    axes.title.set_fontsize("medium")
    handles = [line, *reversed(bars)]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
