"""Draw plots with matplotlib, without a display and without its global state."""

from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; width and height are in inches.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(
            f"a plot needs matplotlib ({error}): pip install 'zero_sft[train]'", code="arguments.package_missing"
        ) from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file; the suffix of the path sets the format.

    Raises:
        ArgumentError: the path can't be written.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"--plot {path} can't be written: {error}. Name a .png in an existing folder.", code="arguments.plot_unwritable"
        ) from error
