"""`zero_sft.data.prepare_distributed`: rows are made once in the cluster, or once per node where nodes share no folder."""

import dataclasses
import json

import pytest

from tests.data.tiny import CHATML, byte_tokenizer
from tests.errors import raises
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.stages import require_identical
from zero_sft.cluster.world import World
from zero_sft.data import dataset
from zero_sft.data.dataset import PreparedDataset
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.prepare_distributed import prepare_distributed
from zero_sft.data.sources.data_path import parse_sources
from zero_sft.data.templates.choose import choose_template


@pytest.fixture
def folder(tmp_path):
    for name, letter in (("data", "x"), ("other", "y")):
        talks = [[{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": letter * n}] for n in range(1, 40)]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return tmp_path


def cluster() -> World:
    """Two nodes of two ranks."""
    world = World.detect()
    return dataclasses.replace(world, local_rank=world.rank % 2, local_world_size=2)


def prepare(spec: DatasetSpec, world: World) -> PreparedDataset:
    tokenizer = byte_tokenizer(CHATML)
    return prepare_distributed(spec, tokenizer, choose_template(None, tokenizer), world)


def prepared_by(spec: DatasetSpec, world: World) -> list[int]:
    """How often each rank has made rows itself. Every rank; communicates."""
    made = []
    original = dataset.make_batches
    dataset.make_batches = lambda *args: (made.append(1), original(*args))[1]
    try:
        rows = prepare(spec, world)
    finally:
        dataset.make_batches = original
    require_identical(world, "rows", {"rows": rows.rows[:], "reports": [each.lines() for each in rows.reports]})
    return all_gather_json(world, len(made))


@pytest.mark.world_size(4)
@pytest.mark.parametrize("pack", [False, True])
def test_once_in_the_cluster_where_the_folder_is_shared(folder, pack):
    spec = DatasetSpec(
        sources=parse_sources(f"{folder / 'data.json'},{folder / 'other.json'}"),
        model_max_length=200,
        pack=pack,
        root=folder / "c",
    )
    assert prepared_by(spec, cluster()) == [2, 0, 0, 0]
    assert prepared_by(spec, cluster()) == [0, 0, 0, 0]


@pytest.mark.world_size(4)
def test_once_a_node_where_it_is_not(folder):
    world = cluster()
    spec = DatasetSpec(
        sources=parse_sources(str(folder / "data.json")),
        model_max_length=200,
        pack=True,
        root=folder / f"node{world.rank // 2}",
    )
    assert prepared_by(spec, world) == [1, 0, 1, 0]


@pytest.mark.world_size(4)
def test_nodes_with_other_data_are_an_error_on_every_rank(folder):
    world = cluster()
    name = ("data.json", "other.json")[world.rank // 2]
    spec = DatasetSpec(sources=parse_sources(str(folder / name)), model_max_length=200, root=folder / f"node{world.rank // 2}")
    with raises("data.differs_between_nodes", "rank 2"):
        prepare(spec, world)


@pytest.mark.world_size(2)
def test_an_error_of_rank_0_is_every_ranks(folder):
    spec = DatasetSpec(sources=parse_sources(str(folder / "none.json")), model_max_length=200, root=folder / "c")
    with raises("data.no_such_file"):
        prepare(spec, World.detect())


@pytest.mark.world_size(2)
def test_a_broken_line_is_the_same_error_on_every_rank(folder):
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    spec = DatasetSpec(sources=parse_sources(str(folder / "broken.jsonl")), model_max_length=200, root=folder / "c")
    with raises("data.not_json", "line 2"):
        prepare(spec, World.detect())
