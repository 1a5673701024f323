"""Plot the loss curve of a run from the trainer's log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_sft.console.plots import new_figure, save_figure


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draw training and evaluation loss over steps into a PNG; return False if no loss was logged.

    Args:
        history: the trainer's `state.log_history`: dicts with "step" and "loss" or "eval_loss".
        title: the title above the plot.
    """
    curves = {
        label: [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
        for label, key in (("training", "loss"), ("held out", "eval_loss"))
    }
    if not any(curves.values()):
        return False
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 4)
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=label, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss per trained token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
    return True
