"""Several sets to evaluate on, each with a name and a loss."""

import json
from pathlib import Path

import pytest

from tests import small_job
from tests.errors import raises
from zero_sft.arguments.dry_run import require_metric_of_sets
from zero_sft.data.sources.data_path import all_sources, parse_evaluation

GIVEN = {
    "max_steps": 2, "packing": False, "optim": "sgd", "learning_rate": 0.0, "per_device_train_batch_size": 2, "eval_steps": 1,
    "eval_strategy": "steps", "per_device_eval_batch_size": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = small_job.make(tmp_path_factory.mktemp("sets"), 12)
    samples = json.loads((folder / "data.json").read_text())
    (folder / "short.json").write_text(json.dumps(samples[:5]))
    (folder / "long.json").write_text(json.dumps(samples[5:]))
    return folder


def evaluated(folder: Path, out: str, data: str, **arguments) -> dict[str, float]:
    small_job.run(folder, out, 2, GIVEN | {"eval_data_path": data} | arguments)
    losses = {}
    for entry in small_job.history(folder, out):
        losses |= {name: value for name, value in entry.items() if name.startswith("eval") and name.endswith("_loss")}
    return losses


def test_a_loss_each_and_one_of_all(folder):
    """The loss of all sets is that of their samples as one set."""
    short, long = folder / "short.json", folder / "long.json"
    best = {"save_strategy": "best", "metric_for_best_model": "long_loss"}
    named = evaluated(folder, "named", f"short={short},long={long}", **best)
    assert named.keys() == {"eval_short_loss", "eval_long_loss", "eval_loss"}
    assert named["eval_loss"] == pytest.approx(evaluated(folder, "one", f"{short},{long}")["eval_loss"], rel=1e-6)
    for name, path in (("short", short), ("long", long)):
        alone = evaluated(folder, f"{name}-alone", str(path))
        assert alone == {"eval_loss": pytest.approx(named[f"eval_{name}_loss"], rel=1e-6)}
    lines = (folder / "named" / "logs" / "train.log").read_text()
    assert "eval short loss" in lines
    assert (folder / "named" / "checkpoint-1").is_dir(), "the best by the loss of a set"


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "c=d.json"):
        (tmp_path / name).write_text("[]")
    sets = parse_evaluation("x=a.json, y=b.json,x=b.json")
    assert {name: [source.text for source in sources] for name, sources in sets.items()} == {
        "x": ["a.json", "b.json"],
        "y": ["b.json"],
    }
    assert list(parse_evaluation("a.json,b.json")) == list(parse_evaluation("c=d.json")) == [""]
    assert [source.text for source in all_sources("x=a.json,y=b.json")] == ["a.json", "b.json"]
    with raises("data.names_missing", "1 of 2"):
        parse_evaluation("x=a.json,b.json")


def test_the_metric_of_a_set():
    for metric in (None, "loss", "eval_loss", "tide_loss", "eval_tide_loss", "tide_runtime"):
        require_metric_of_sets(metric, ["tide"])
    for metric in ("chat_loss", "eval_chat_loss"):
        with raises("arguments.unknown_metric", metric, "tide_loss"):
            require_metric_of_sets(metric, ["tide"])
    with raises("arguments.unknown_metric", "expected loss."):
        require_metric_of_sets("tide_loss", [""])
