"""`zero_sft.data.cache`: what was prepared once is found again, by all that it depends on and by nothing else."""

import json
import os
import socket
from pathlib import Path

import pytest

from tests.data.tiny import CHATML, byte_tokenizer, make_pipeline
from tests.errors import raises
from zero_sft.data import cache, dataset, mixture
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.sources.data_path import parse_sources, require_outputs_outside
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.templates.choose import choose_template


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    talks = [[{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "x" * n}] for n in range(1, 40)]
    path.write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return path


def spec(data, **changes):
    root = changes.pop("root", None) or data.parent / "cache"
    return DatasetSpec(sources=parse_sources(str(data)), root=root, **{"model_max_length": 400, **changes})


def prepare_sources(wanted, tokenizer, chat_template=None):
    return mixture.prepare_sources(wanted, tokenizer, choose_template(chat_template, tokenizer))


def open_sources(wanted, tokenizer, *rest, **options):
    return mixture.open_sources(wanted, tokenizer, choose_template(None, tokenizer), *rest, **options)


def entries(data):
    return sorted(each.name for each in (data.parent / "cache").iterdir())


def test_it_is_found_again_with_the_same_rows_and_report(data, monkeypatch):
    tokenizer = byte_tokenizer(CHATML)
    made = prepare_sources(spec(data), tokenizer)
    monkeypatch.setattr(dataset, "make_batches", lambda *_: pytest.fail("prepared again"))
    tokenizer("x", padding="max_length", max_length=5, truncation=True)  # how it pads and cuts is not how it encodes
    found = prepare_sources(spec(data), tokenizer)
    assert found.rows[:] == made.rows[:]
    assert found.reports == made.reports
    batch = make_pipeline(tokenizer, model_max_length=400).make_rows(list(LocalFiles(path=data).objects()))
    assert batch.rows.drop_columns(["weights"]).to_pydict() == made.rows[:]  # all weigh 1


def test_a_moved_file_is_the_same_data(data):
    prepare_sources(spec(data), byte_tokenizer())
    moved = data.with_name("moved.json")
    data.rename(moved)
    assert prepare_sources(spec(moved), byte_tokenizer()).reports[0].file == str(moved)
    assert len(entries(moved)) == 1


@pytest.mark.parametrize(
    ("change", "chat_template"),
    [
        ({"model_max_length": 390}, None),
        ({}, "vicuna"),
        ({"lazy": True}, None),
        ({"parser": SampleParser(train_on="last")}, None),
        ({"overlong": "drop"}, None),
        ({"pack": True}, None),
    ],
)
def test_what_it_depends_on(data, change, chat_template):
    tokenizer = byte_tokenizer(CHATML)
    prepare_sources(spec(data), tokenizer)
    prepare_sources(spec(data, **change), tokenizer, chat_template)
    assert len(entries(data)) == 2


def test_other_bytes_and_another_tokenizer_are_other_data(data):
    prepare_sources(spec(data), byte_tokenizer(CHATML))
    prepare_sources(spec(data), byte_tokenizer(CHATML + " "))
    prepare_sources(spec(data), byte_tokenizer(CHATML, eos_token="<|eot|>"))
    stamp = data.stat()
    data.write_text(data.read_text().replace("xx", "xy"))
    os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    prepare_sources(spec(data), byte_tokenizer(CHATML))
    assert len(entries(data)) == 4


def test_what_the_tokenizer_and_its_template_depend_on(data):
    """Also what stands in no vocabulary: how special tokens in a text are taken, and those that a template reads."""
    template = "{{ pad_token }}" + CHATML
    whole, split = byte_tokenizer(template), byte_tokenizer(template)
    split.split_special_tokens = True
    for each in (whole, split, byte_tokenizer(template, pad_token="<|eot|>")):
        prepare_sources(spec(data), each)
    assert len(entries(data)) == 3


def test_names_inside_a_folder_and_unused_options_are_not_the_data(data):
    folder = data.parent / "folder"
    folder.mkdir()
    data.rename(folder / "a.json")
    root = data.parent / "cache"
    tokenizer = byte_tokenizer(CHATML)
    prepare_sources(spec(folder, root=root, pack=True), tokenizer)
    (folder / "a.json").rename(folder / "b.JSON")
    prepare_sources(spec(folder, root=root, pack=True, seed=7), tokenizer)
    prepare_sources(spec(folder / "b.JSON", root=root), tokenizer)
    assert len(entries(data)) == 2


def test_data_that_changes_while_it_is_read_is_not_kept(data, monkeypatch):
    make = dataset.make_batches

    def late(*args):
        data.write_text(data.read_text().replace("xx", "yy"))
        return make(*args)

    monkeypatch.setattr(dataset, "make_batches", late)
    with raises("data.changed_while_read"):
        prepare_sources(spec(data), byte_tokenizer(CHATML))
    assert entries(data) == []


def test_a_cache_inside_the_data_is_refused(data):
    for inside, fine in (("cache", False), (".cache", True)):
        wanted = spec(data.parent, root=data.parent / inside)
        if fine:
            assert prepare_sources(wanted, byte_tokenizer(CHATML)).reports[0].samples == 39
        else:
            with raises("data.cache_inside_data", "--data_cache_dir"):
                prepare_sources(wanted, byte_tokenizer(CHATML))


def test_an_output_folder_inside_the_data_is_refused(data):
    """Before anything is written: the next run would read what this one has written."""
    for inside in ("out", "a/../out", ".", "new/run"):
        with raises("data.output_inside_data", "--output_dir"):
            require_outputs_outside(parse_sources(f"{data},{data.parent}"), str(data.parent / inside))
    for outside in (".runs/out", "../out"):
        require_outputs_outside(parse_sources(str(data.parent)), str(data.parent / outside))
    require_outputs_outside(parse_sources(f"{data},org/name:train"), str(data.parent / "out"))


def test_what_is_left_of_a_cleared_entry_is_replaced(data):
    made = prepare_sources(spec(data), byte_tokenizer(CHATML))
    (data.parent / "cache" / made.keys[0] / cache.SUMMARY).unlink()
    assert prepare_sources(spec(data), byte_tokenizer(CHATML)).rows[:] == made.rows[:]


@pytest.mark.parametrize("summary", ["{}", "[]", '{"rows": 39, "summary": {}}', '{"rows": 38, "summary": {}}', "{"])
def test_a_damaged_summary_is_named(data, summary):
    made = prepare_sources(spec(data), byte_tokenizer(CHATML))
    (data.parent / "cache" / made.keys[0] / cache.SUMMARY).write_text(summary)
    with raises("data.cache_entry_damaged"):
        prepare_sources(spec(data), byte_tokenizer(CHATML))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_mixture_is_opened_by_its_keys(data, lazy):
    other = data.with_name("other.jsonl")
    other.write_text(json.dumps({"text": "z"}))
    mixed = spec(f"{data}:0.5,{other}:0.5", root=data.parent / "cache", lazy=lazy)
    tokenizer = byte_tokenizer()
    made = prepare_sources(mixed, tokenizer)
    found = open_sources(mixed, tokenizer, made.keys)
    assert found is not None
    assert found.rows[:] == made.rows[:]
    assert open_sources(mixed, tokenizer, [made.keys[0], "0" * 32]) is None


def test_a_failure_leaves_nothing(data):
    data.write_text(json.dumps([{"conversations": []}]))
    with raises("data.nothing_left", data.name):
        prepare_sources(spec(data), byte_tokenizer())
    assert entries(data) == []


def test_a_folder_that_can_not_be_written_to(data):
    with raises("data.cache_unwritable", "/proc/nowhere"):
        prepare_sources(spec(data, root=data.__class__("/proc/nowhere")), byte_tokenizer())


def test_a_damaged_entry_is_named(data):
    made = prepare_sources(spec(data), byte_tokenizer())
    rows = data.parent / "cache" / made.keys[0] / cache.ROWS
    del made
    rows.write_bytes(rows.read_bytes()[:100])
    with raises("data.cache_entry_damaged", str(rows.parent)):
        prepare_sources(spec(data), byte_tokenizer())


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"lazy": True}], ids=str)
@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_changed_byte_is_noticed(data, options, place):
    """Lengths are as they were; the entry would be trained on."""
    wanted = spec(data, **options)
    keys = prepare_sources(wanted, byte_tokenizer()).keys
    for name in entries(data):
        rows = data.parent / "cache" / name / cache.ROWS
        before = rows.read_bytes()
        at = int(place * len(before))
        rows.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        for open_again in (
            lambda: prepare_sources(wanted, byte_tokenizer()),
            lambda: open_sources(wanted, byte_tokenizer(), keys),
        ):
            with raises("data.cache_entry_damaged", str(rows.parent)):
                open_again()
        rows.write_bytes(before)
    assert prepare_sources(wanted, byte_tokenizer()).keys == keys


def test_a_changed_number_in_a_summary_is_noticed(data):
    made = prepare_sources(spec(data), byte_tokenizer())
    summary = data.parent / "cache" / made.keys[0] / cache.SUMMARY
    summary.write_text(summary.read_text().replace('"samples": 39', '"samples": 38'))
    with raises("data.cache_entry_damaged"):
        prepare_sources(spec(data), byte_tokenizer())


def test_an_entry_is_verified_once(data, monkeypatch):
    """By whoever opens it first on a node, and not by who has just written it."""
    checked = []
    checksum = cache._checksum
    monkeypatch.setattr(cache, "_checksum", lambda rows, summary: checked.append(rows) or checksum(rows, summary))
    wanted = spec(data, pack=True)
    keys = prepare_sources(wanted, byte_tokenizer()).keys
    assert len(checked) == 2, "while it is written"
    assert open_sources(wanted, byte_tokenizer(), keys, verify=False) is not None
    assert len(checked) == 2
    assert open_sources(wanted, byte_tokenizer(), keys, verify=True) is not None
    assert len(checked) == 4


def test_the_first_of_two_writers_wins(data):
    root = data.parent / "cache"

    def late(file):
        cache.store(root, "k", lambda rows: (rows.write_text("first"), {"by": 1}))
        return file.write_text("second"), {"by": 2}

    cache.store(root, "k", late)
    content = json.loads((root / "k" / cache.SUMMARY).read_text())
    assert (content["rows"], content["summary"]) == (5, {"by": 1})
    assert entries(data) == ["k"]


def test_what_killed_writers_left_is_removed_in_time(data):
    root = data.parent / "cache"
    here = f"{socket.gethostname()}-{Path('/proc/self/ns/pid').stat().st_ino}-"
    for name, age in (("old", 10**6), ("young", 10), (f"{here}999999999-x", 10), (f"{here}{os.getpid()}-x", 10),
                      (f"{socket.gethostname()}-1-999999999-x", 10)):  # fmt: skip
        folder = root / f".making-{name}"
        folder.mkdir(parents=True)
        os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    prepare_sources(spec(data), byte_tokenizer())
    assert [each for each in entries(data) if each.startswith(".")] == sorted(
        [".making-young", f".making-{here}{os.getpid()}-x", f".making-{socket.gethostname()}-1-999999999-x"]
    )


def test_a_path_that_names_no_file_is_found_before_the_others_are_prepared(data):
    wanted = spec(f"{data},{data.parent / 'nowhere.json'}", root=data.parent / "cache")
    with raises("data.no_such_file", "nowhere.json"):
        prepare_sources(wanted, byte_tokenizer())
    assert not (data.parent / "cache").exists()
