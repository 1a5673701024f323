"""The page about runs: from the logs of runs that have ended, that go on, and that somebody has damaged."""

import html.parser
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from tests.errors import error_codes, raises
from zero_sft.commands.report import main
from zero_sft.report.charts import duration, line_chart, number, tick_label, ticks
from zero_sft.report.page import page
from zero_sft.report.runs import read_run


def run(folder, *, steps=4, **arguments):
    """The logs of a run with two starts: the first was killed after step 3, and had saved step 2."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    lines = [{"time": 100.0, "event": "start", "step": 0}]
    for step in (1, 2, 3):
        lines.append(
            {"time": 100.0 + 10 * step, "step": step, "loss": 3.0 - step / 10, "learning_rate": 1e-3, "num_tokens": 50 * step}
        )
    lines.insert(3, {"time": 121.0, "event": "checkpoint", "step": 2, "seconds": 1.0})
    lines.append({"time": 130.0, "event": "answers", "step": 3, "answers": [{"prompt": "<b>2 + 2?</b>", "answer": "about 4"}]})
    lines.append({"time": 200.0, "event": "start", "step": 2})
    for step in range(3, steps + 1):
        lines.append(
            {"time": 200.0 + 5 * step, "step": step, "loss": 2.0 - step / 10, "learning_rate": 5e-4, "num_tokens": 50 * step}
        )
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"time": 300.0, "step"')
    starts = [
        {
            "began": "2026-01-01T00:00:00+00:00",
            "from_step": at,
            "host": "node7",
            "ranks": 8,
            "arguments": {"seed": 1, **arguments},
        }
        for at in (0, 2)
    ]
    starts[-1]["seconds"] = {"steps": 80.0, "start": 20.0}
    (logs / "run.json").write_text(json.dumps({"starts": starts}))
    (logs / "load_report.json").write_text(json.dumps({"seconds": 1.5, "ranks": [{"stage read": 1.0, "stage plan": 0.5}] * 2}))
    answers = [{"prompt": "<b>2 + 2?</b>", "before": "5", "after": "4"}]
    (logs / "answers.json").write_text(json.dumps(answers))
    return folder


def test_what_is_read(tmp_path):
    """Step 3 was trained twice: the second value counts. No rate goes over the pause between two starts."""
    found = read_run(run(tmp_path / "a"))
    assert found.series["loss"] == [(1, 2.9), (2, 2.8), (3, 1.7), (4, 1.6)]
    assert found.rate == [(2, 5.0), (3, 5.0), (4, 10.0)]
    assert [event["event"] for event in found.events] == ["start", "checkpoint", "answers", "start"]
    assert found.spans == [(100.0, 130.0), (200.0, 220.0)]


class Page(html.parser.HTMLParser):
    """The tags and texts of a page; each tag that is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page(tmp_path):
    """Two runs side by side: a line for each, the differing arguments first, hostile text as text."""
    script = "<script>alert(1)</script>"
    runs = [read_run(run(tmp_path / "a", lr=1, name=script)), read_run(run(tmp_path / "b", lr=2, name=script))]
    text = page(runs)
    shown = Page(text)
    assert "script" not in shown.tags
    assert script in shown.texts
    answers = shown.texts[shown.texts.index("Answers of a") :]
    assert answers[1:9] == ["prompt", "before", "step 3", "after", "<b>2 + 2?</b>", "5", "about 4", "4"]
    assert shown.tags.count("polyline") == 2 * 3, "loss, learning rate and tokens per second of two runs"
    arguments = shown.texts[shown.texts.index("Arguments") :]
    assert arguments.index("lr") < arguments.index("name")
    assert {"2 runs.", "Load of a", "Load of b", "start 1: 30 s"} <= {each.split(" Made")[0] for each in shown.texts}
    assert "http://" not in text.replace("http-equiv", "")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main([str(run(tmp_path / "a")), str(run(tmp_path / "b")), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    Page(out.read_text())
    assert main([str(tmp_path)]) == 2
    assert error_codes(capsys.readouterr().err) == ["arguments.no_run"]
    assert main([]) == 2
    assert main([str(tmp_path / "a"), "--out", str(tmp_path / "missing" / "page.html")]) == 2
    assert error_codes(capsys.readouterr().err)[-1] == "export.unwritable"


HOSTILE = [
    "", "{", "[]", "null", "[" * 100_000, '{"starts": 5}',
    '{"starts": [5, null, {"seconds": 7, "arguments": [], "versions": 3}]}',
    '{"ranks": [5, {"stage read": "x"}], "seconds": []}', '{"time": "x", "step": 1}', '{"time": 1, "step": 1, "loss": NaN}',
    '{"time": 1, "step": 1e400, "loss": 1}', '[{"prompt": {"a": 1}}, 5]', '{"time": 1, "step": 1, "loss": 1e308}\n' * 2,
    '{"time": 1, "step": 1, "event": []}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "load_report.json", "answers.json"])
def test_damaged_logs(tmp_path, name, text):
    folder = run(tmp_path / "a")
    (folder / "logs" / name).write_text(text)
    Page(page([read_run(folder)]))


def test_no_logs(tmp_path):
    (tmp_path / "logs").mkdir()
    with raises("arguments.no_run", str(tmp_path)):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.3, 2.1, [0, 0.5, 1, 1.5, 2, 2.5]), (0, 100, [0, 20, 40, 60, 80, 100]), (5, 5, [5, 6, 7, 8, 9, 10]), (0, 0, None),
     (-1e-9, 1e-9, None), (1e30, 3e30, None)],
)  # fmt: skip
def test_ticks(low, high, expected):
    found = ticks(low, high)
    assert expected is None or found == expected
    assert 3 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def test_numbers():
    assert [number(each) for each in (0, 0.5, 1234, 2e-5, 1e9, 12.3456)] == ["0", "0.5", "1,234", "2e-05", "1e+09", "12.35"]
    assert [duration(each) for each in (40, 720, 12600, 172800)] == ["40 s", "12 min", "3.5 h", "2 d"]


def test_a_long_run_is_thinned():
    chart = line_chart({"loss": [(step, step % 7) for step in range(100_000)]}, "loss")
    assert len(chart) < 20_000


def test_watching(tmp_path):
    """Served on this machine alone; the page is made anew for each request."""
    folder = run(tmp_path / "a")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "zero_sft.report", str(folder), "--watch", "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            assert f"127.0.0.1:{port}" in server.stdout.readline()
            address = f"http://127.0.0.1:{port}/"
            assert "step 4, loss 1.6" in urllib.request.urlopen(address, timeout=10).read().decode()
            with (folder / "logs" / "metrics.jsonl").open("a") as file:
                file.write('\n{"time": 400.0, "step": 5, "loss": 1.5}\n')
            text = urllib.request.urlopen(address, timeout=10).read().decode()
            assert "step 5, loss 1.5" in text
            assert 'http-equiv="refresh"' in text
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(address + "../etc/passwd", timeout=10)
        finally:
            server.terminate()


@pytest.mark.parametrize(("low", "high", "expected"), [
    (5.5187, 5.5209, ["5.5185", "5.5190", "5.5195", "5.5200"]),
])  # fmt: skip
def test_labels_of_ticks_differ(low, high, expected):
    found = ticks(low, high)
    assert [tick_label(tick, found) for tick in found][: len(expected)] == expected


def test_a_run_keeps_its_colour():
    """The first run has no points in this chart."""
    chart = line_chart({"a": [], "b": [(1, 2.0), (2, 3.0)], "c": [(1, 1.0)]}, "loss")
    assert 'polyline class="series-1"' in chart
    assert 'i class="series-1"></i>b' in chart
    assert "series-0" not in chart


@pytest.mark.parametrize("value", [3e-5, 1e-3, 5e-324, 1e99, -2.0, 0.0])
@pytest.mark.parametrize("count", [1, 3_000, 20_000])
def test_a_constant_is_a_flat_line(value, count):
    """The mean of many equal numbers differs from them by rounding."""
    chart = line_chart({"learning rate": [(step, value) for step in range(count)]}, "learning rate")
    assert "circle" in chart


def test_pipes_and_devices_are_left_out(tmp_path):
    folder = run(tmp_path / "a")
    (folder / "logs" / "metrics.jsonl").unlink()
    os.mkfifo(folder / "logs" / "metrics.jsonl")
    (folder / "logs" / "history.json").unlink(missing_ok=True)
    (folder / "logs" / "answers.json").unlink(missing_ok=True)
    (folder / "logs" / "answers.json").symlink_to("/dev/zero")
    assert read_run(folder).answers == []


def test_half_a_surrogate_pair_and_a_long_number(tmp_path, capsys):
    folder = run(tmp_path / "a")
    (folder / "logs" / "run.json").write_text('{"starts": [{"began": "x\\ud800", "host": "y"}]}')
    (folder / "logs" / "load_report.json").write_text('{"bytes_read": 1' + "0" * 4001 + "}")
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()


def test_a_run_without_logs_among_others(tmp_path, capsys):
    folder = run(tmp_path / "a")
    assert main([str(folder), str(tmp_path / "no"), "--out", str(tmp_path / "page.html")]) == 0
    assert f"left out: {tmp_path / 'no'} has no logs" in capsys.readouterr().err
