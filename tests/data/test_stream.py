"""Rows made block by block are those of the prepared data, and a stream goes on at any block."""

import itertools
import json
import random

import pytest

from tests.data.tiny import CHATML, byte_tokenizer
from tests.errors import raises
from zero_sft.data import packing
from zero_sft.data.mixture import DatasetSpec, prepare_sources
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.sources.data_path import parse_sources
from zero_sft.data.stream import Stream, StreamState
from zero_sft.data.streamed import StreamedRows
from zero_sft.data.templates.choose import choose_template

TOKENIZER = byte_tokenizer(CHATML)
TEMPLATE = choose_template(None, TOKENIZER)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files, of three and two batches of objects; a block has 400 samples."""
    monkeypatch.setattr(packing, "_BATCH_SAMPLES", 400)
    rng = random.Random(1)
    for name, count, longest in (("a", 1300, 60), ("b", 777, 90)):
        answers = ["x" * rng.randrange(longest) for _ in range(count)]
        talks = [
            {"messages": [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": answer}]}
            for n, answer in enumerate(answers)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return tmp_path


def spec_of(folder, data, **options):
    text = data.replace("a.jsonl", f"{folder}/a.jsonl").replace("b.jsonl", f"{folder}/b.jsonl")
    options = {"model_max_length": 200, "root": folder / "cache", "seed": 5, **options}
    return DatasetSpec(sources=parse_sources(text), **options)


def stream(spec, **options):
    return Stream(spec, spec.pipeline(TOKENIZER, TEMPLATE), **{"shuffle": False, **options})


def blocks_of_pass(spec, number=0, **options):
    return [block for block in until_pass(stream(spec, **options), number + 1) if block.start.pass_number == number]


def until_pass(blocks, number):
    return itertools.takewhile(lambda block: block.start.pass_number < number, iter(blocks))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("data", ["a.jsonl", "a.jsonl,b.jsonl", "a.jsonl:0.7,b.jsonl:0.3"])
def test_rows_are_those_of_prepared_data_and_go_on_at_any_block(files, data, pack):
    spec = spec_of(files, data, pack=pack)
    prepared = prepare_sources(spec, TOKENIZER, TEMPLATE)
    blocks = blocks_of_pass(spec)
    rows = [row for block in blocks for row in block.rows.to_pylist()]
    assert rows == [{name: row[name] for name in rows[0]} for row in prepared.rows]
    assert len(blocks) > 3
    for block in blocks:
        state = StreamState.from_json(json.loads(json.dumps(block.start.to_json())))
        again = next(iter(stream(spec, state=state)))
        assert (again.start, again.rows, again.reports) == (block.start, block.rows, again.reports)
    if ":" not in data:
        assert [report.kept for report in blocks[-1].reports] == [report.kept for report in prepared.reports]


def test_a_pass_is_shuffled_within_blocks_and_in_another_order_each_time(files):
    spec = spec_of(files, "a.jsonl")
    plain, first, again = (blocks_of_pass(spec, shuffle=shuffle) for shuffle in (False, True, True))
    second = blocks_of_pass(spec, 1, shuffle=True)
    for number, block in enumerate(plain):
        ordered, shuffled, later = ([str(row) for row in each[number].rows.to_pylist()] for each in (plain, first, second))
        assert sorted(ordered) == sorted(shuffled) == sorted(later)
        assert ordered != shuffled != later != ordered
        assert first[number].rows == again[number].rows
        assert block.start.row == first[number].start.row
    assert second[0].start.row == first[-1].stop


def test_processes_make_the_same_rows(files):
    text = (files / "a.jsonl").read_text()
    (files / "a.jsonl").write_text(text * 4)  # enough for processes
    spec = spec_of(files, "a.jsonl")
    alone, many = (blocks_of_pass(spec, processes=processes) for processes in (1, 2))
    assert [block.rows for block in alone] == [block.rows for block in many]


@pytest.mark.parametrize("kind", ["list.json", "rows.parquet", "table.csv", "text.jsonl.gz"])
def test_every_kind_of_file_is_taken_up_in_the_middle(tmp_path, kind):
    import gzip

    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": f"{n}", "completion": f"answer {n}"} for n in range(1234)]
    path = tmp_path / kind
    if kind.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    elif kind.endswith("csv"):
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif kind.endswith("gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        path.write_text(json.dumps(rows, indent=1))
    ((source),) = parse_sources(str(path))
    whole = list(source.data.objects())
    assert [sample for sample, _ in whole] == rows
    for start in (0, 1, 100, 777, 1234, 2000):
        assert list(source.data.objects(start=start)) == whole[start:]


@pytest.mark.parametrize("data", ["a.jsonl", "a.jsonl,b.jsonl"])
def test_a_pass_is_reported_where_it_ends_with_a_whole_block(files, monkeypatch, data):
    for name in ("a", "b"):
        lines = [json.dumps({"prompt": f"{n}", "completion": "x" * (n % 4)}) for n in range(400)]
        (files / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(packing, "_BATCH_SAMPLES", 100)
    blocks = blocks_of_pass(spec_of(files, data))
    sources = data.count(",") + 1
    assert [block.rows.num_rows for block in blocks] == [100] * 3 * sources
    assert [len(block.reports) for block in blocks] == [*[0] * (3 * sources - 1), sources]
    assert [(report.samples, report.kept) for report in blocks[-1].reports] == [(400, 300)] * sources


def test_a_source_that_is_repeated_is_counted_once(files):
    (files / "b.jsonl").write_text("\n".join((files / "b.jsonl").read_text().splitlines()[:40]))
    spec = spec_of(files, "a.jsonl:0.5,b.jsonl:0.5")
    prepared = prepare_sources(spec, TOKENIZER, TEMPLATE)
    reports = blocks_of_pass(spec)[-1].reports
    assert [(report.samples, report.kept, report.dropped) for report in reports] == [
        (report.samples, report.kept, report.dropped) for report in prepared.reports
    ]


def test_a_file_that_is_written_to_ends_the_stream(files):
    blocks = iter(stream(spec_of(files, "a.jsonl")))
    next(blocks)
    with (files / "a.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b"}))
    with raises("data.changed_while_read", "a.jsonl"):
        list(itertools.islice(blocks, 10))


def test_contents_of_the_same_size_are_told_apart(files):
    (source,) = parse_sources(f"{files}/a.jsonl")
    before = source.data.fingerprint()
    lines = (files / "a.jsonl").read_text().splitlines()
    (files / "a.jsonl").write_text("\n".join([*lines[30:], *lines[:30]]) + "\n")
    after = source.data.fingerprint()
    assert after != before
    assert after[0][:2] == before[0][:2]


def test_a_source_without_anything_to_train_on_ends_the_stream(files):
    (files / "a.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 3)
    for data in ("a.jsonl", "b.jsonl,a.jsonl", "a.jsonl:0.5,b.jsonl:0.5"):
        with raises("data.nothing_left", "a.jsonl"):
            blocks_of_pass(spec_of(files, data))


def test_bad_samples_end_the_stream_where_they_are_or_are_skipped(files):
    lines = (files / "a.jsonl").read_text().splitlines()
    (files / "a.jsonl").write_text("\n".join([*lines[:900], '{"messages": 3}', *lines[900:]]))
    made = []
    with raises("data.turns_not_a_list", "a.jsonl, line 901"):
        made += iter(stream(spec_of(files, "a.jsonl")))
    assert len(made) == 1
    spec = spec_of(files, "a.jsonl", parser=SampleParser(on_bad_sample="skip"))
    assert blocks_of_pass(spec)[-1].reports[0].bad == 1


class TestStreamedRows:
    """The rows of a stream as a dataset."""

    def opened(self, files, **options):
        spec = spec_of(files, "a.jsonl")
        options = {"length": 5000, "rows_a_step": 8, **options}
        return StreamedRows(lambda state: iter(stream(spec, state=state)), **options)

    def test_rows_are_those_of_the_stream(self, files):
        rows = self.opened(files)
        spec = spec_of(files, "a.jsonl")
        passes = [row for number in (0, 1) for block in blocks_of_pass(spec, number) for row in block.rows.to_pylist()]
        wanted = [*range(3, 40, 7), 1000, 1300, 2400]
        assert rows.__getitems__(wanted) == [passes[index] for index in wanted]
        assert rows[2] == passes[2]
        assert (len(rows), rows.column_names) == (5000, ["input_ids", "labels"])
        rows.close()

    def test_known_states_are_used(self, files):
        first = self.opened(files)
        expected = first[1200]
        states = first.states_at(1200)
        assert [state.row for state in states] == [800, 1200]
        first.close()
        opened = []
        spec = spec_of(files, "a.jsonl")
        rows = StreamedRows(
            lambda state: opened.append(state) or iter(stream(spec, state=state)), length=5000, rows_a_step=8, states=states
        )
        assert rows[1200] == expected
        assert opened == [states[1]]
        rows.close()

    def test_rows_of_a_step_have_weights_together(self, files):
        """Also where only the next block has some, so that all ranks agree."""
        lines = (files / "a.jsonl").read_text().splitlines()
        weighted = {"prompt": "a", "completion": "bbb", "weight": 0.5}
        (files / "a.jsonl").write_text("\n".join([*lines[:700], *[json.dumps(weighted)] * 400]))
        spec = spec_of(files, "a.jsonl")
        first = next(block.start.row for block in blocks_of_pass(spec) if "weights" in block.rows.column_names)
        rows = self.opened(files, rows_a_step=7)
        step = first // 7
        assert first % 7
        assert ["weights" in rows[index] for index in (7 * step - 1, 7 * step, 7 * step + 6)] == [False, True, True]
        assert rows[7 * step]["weights"] == [1.0] * len(rows[7 * step]["input_ids"])
        rows.close()

    def test_passes_are_reported_when_their_rows_are_taken(self, files):
        ended = []
        rows = self.opened(files, on_pass=lambda number, reports: ended.append((number, len(reports))))
        length = blocks_of_pass(spec_of(files, "a.jsonl"))[-1].stop
        rows.__getitems__([0, length - 1])
        assert ended == []
        rows.__getitems__([length])
        assert ended == [(0, 1)]
        rows.close()

    def test_an_error_is_raised_each_time(self, files):
        (files / "a.jsonl").write_text("broken")
        rows = self.opened(files)
        for _ in range(2):
            with raises("data.not_json"):
                rows[0]
        rows.close()
