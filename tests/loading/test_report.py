"""Tests of the text of a load report: every number has its unit and its rank."""

import dataclasses

import pytest

from zero_sft.loading.report import LoadReport

GIB, MIB = 2**30, 2**20


def report(rank=0, **changes):
    """Return the report of two ranks, of which the second reads twice as long."""
    fast = {
        "seconds": 2.5, "bytes_read": 4 * GIB, "requests": 1200, "bytes_communicated": 1536,
        "peak_host_bytes": 100 * MIB, "peak_device_bytes": 0, "stage skeleton": 0.5, "stage read": 2.0,
    }  # fmt: skip
    slow = {**fast, "seconds": 4.5, "stage read": 4.0, "peak_host_bytes": 300 * MIB}
    stages = {"skeleton": 0.5, "read": 2.0}
    values = {"parameters": 4_294_967_296, "dtype": "bfloat16", "world_size": 2, "stages": stages, **changes}
    return LoadReport(loader="sharded", model="/models/x", rank=rank, ranks=[fast, slow], **values)


def cells(text):
    """Return the rows of the table: title → cells."""
    rows = [line.strip().split("  ") for line in text.splitlines()[1:]]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_each_number_has_its_unit_and_its_ranks():
    text = report().summary()
    first, *_ = text.splitlines()
    assert first == ("loaded /models/x in 4.50 s: 4,295.0 M parameters in bfloat16, sharded over 2 ranks (sharded loader)")
    rows = cells(text)
    assert rows["one rank: least"] == ["most", "all ranks"]
    assert rows["time"] == ["2.50 s", "4.50 s"], "the sum of times means nothing"
    assert rows["build the model without weights"] == ["0.50 s", "0.50 s"]
    assert rows["read the weights"] == ["2.00 s", "4.00 s"]
    assert rows["read from the checkpoint"] == ["4.0 GiB", "4.0 GiB", "8.0 GiB"]
    assert rows["in how many reads"] == ["1,200", "1,200", "2,400"]
    assert rows["speed"] == ["1.0 GiB/s", "2.0 GiB/s", "2.0 GiB/s"]
    assert rows["messages between ranks, none with weights"] == ["1.5 KiB", "1.5 KiB", "3.0 KiB"]
    assert rows["host memory, highest above the start"] == ["100.0 MiB", "300.0 MiB"]
    assert not any("device" in title for title in rows), "nothing was on a device"
    assert max(map(len, text.splitlines())) < 110


def test_one_rank_has_one_column():
    alone = report(world_size=1)
    alone = dataclasses.replace(alone, ranks=alone.ranks[:1])
    rows = cells(alone.summary())
    assert "this rank" in alone.summary()
    assert rows["read from the checkpoint"] == ["4.0 GiB"]
    assert "all ranks" not in alone.summary()


def test_the_summary_is_printed_once(capsys):
    for rank in range(2):
        report(rank=rank).print_summary()
    assert capsys.readouterr().out == report().summary() + "\n"


def test_what_stands_out_is_said():
    text = report(missing_keys=["a", "b", "c", "d"], verified=7, untraceable_keys=[("e", 5)]).summary()
    assert "missing, initialised as the model defines: 4 (a, b, c and 1 more)" in text
    assert "read back: 7 tensors" in text
    assert dataclasses.asdict(report())["rank"] == 0


def test_former_names_of_fields_work_with_a_warning():
    with pytest.warns(FutureWarning, match="missing_keys"):
        assert report(missing_keys=["a"]).missing == ["a"]
    with pytest.raises(AttributeError):
        report().nothing  # noqa: B018
