"""Tests that every picture has a title and no overlapping parts."""

from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """The list of saved figures, which stay open for inspection."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def title_of(figure):
    return figure.get_suptitle() or figure.axes[0].get_title()


@pytest.mark.parametrize("ranks", [1, 64])
def test_the_estimates_picture_hides_nothing(saved, tmp_path, ranks):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from zero_sft.estimate.plot import draw

    loads = [SimpleNamespace(nbytes=250_000_000, requests=290) for _ in range(ranks)]
    device = {"parameters": 2**31, "activations": 100 * 2**30}
    draw(f"Llama-3.1-8B on {ranks} GPUs", loads, device, 80 * 2**30, tmp_path / "x.png")  # pyright: ignore[reportArgumentType]
    (figure,) = saved
    assert title_of(figure) == f"Llama-3.1-8B on {ranks} GPUs"
    FigureCanvasAgg(figure).draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n]), "axes on top of each other"
    legend = figure.axes[2].get_legend()
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes), "the legend covers what is drawn"
    inside = figure.bbox.padded(1)
    assert inside.x0 <= legend.get_window_extent().x0
    assert legend.get_window_extent().x1 <= inside.x1
    low, high = figure.axes[2].get_ylim()
    assert low <= 80 < high
    assert "memory of the device: 80" in [text.get_text() for text in legend.get_texts()]


def test_the_loss_curve_has_a_title(saved, tmp_path):
    from zero_sft.job.loss_plot import plot_loss

    assert not plot_loss([{"step": 1, "train_runtime": 1.0}], tmp_path / "x.png", "nothing")
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    assert plot_loss(history, tmp_path / "x.png", "Loss of SmolLM2-135M-Instruct, runs/demo")
    (figure,) = saved
    assert title_of(figure) == "Loss of SmolLM2-135M-Instruct, runs/demo"
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["training", "held out"]


def test_the_lengths_have_a_title(saved, tmp_path):
    from zero_sft.commands.data import _draw

    _draw([1, 2, 3], tmp_path / "x.png", "3 samples of a.json")
    assert title_of(saved[0]) == "3 samples of a.json"
