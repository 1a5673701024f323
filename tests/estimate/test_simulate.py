"""What is played is what a load does."""

import pytest
import torch.distributed as dist

from tests import models
from tests.errors import raises
from zero_sft.estimate.model import find_model
from zero_sft.estimate.simulate import RankLoad, load_seconds, simulate_load
from zero_sft.estimate.storage_profiles import STORAGES, StorageProfile, parse_storage
from zero_sft.hub.options import HubOptions


@pytest.fixture(params=["llama", "mixtral"])
def folder(request, tmp_path):
    return models.save_tiny(request.param, tmp_path / request.param)


@pytest.mark.world_size(1, 2, 3, 8, slow=(2, 8))
def test_the_bytes_and_requests_of_a_real_load(folder):
    from zero_sft import load_model

    report = load_model(str(folder), ds_config=models.zero3()).load_report
    played = simulate_load(find_model(str(folder), HubOptions()), dist.get_world_size())[dist.get_rank()]
    assert (played.nbytes, played.requests) == (report.bytes_read, report.requests)


def test_all_ranks_of_a_large_world_together_read_every_byte_once():
    of = find_model("Llama-3.1-8B", HubOptions())
    assert sum(each.nbytes for each in simulate_load(of, 300)) == 2 * of.numel


def load(nbytes, requests):
    return RankLoad(nbytes=nbytes, requests=requests, largest_bytes=nbytes, median_bytes=nbytes)


def test_seconds_are_of_what_is_slowest():
    at = StorageProfile(node_gb_s=4.0, cluster_gb_s=10.0, request_ms=1.0)
    assert load_seconds([load(2 * 10**9, 10)] * 8, 8, at) == 4.0  # one node's bandwidth
    assert load_seconds([load(2 * 10**9, 10)] * 32, 8, at) == 6.4  # the whole storage's
    assert load_seconds([load(2 * 10**9, 40_000)] * 8, 8, at) == 10.0  # requests, 4 at a time


def test_storages_by_name_and_by_figures():
    assert parse_storage("nvme") == STORAGES["nvme"]
    assert parse_storage("lustre, node_gb_s=10").node_gb_s == 10
    assert parse_storage("node_gb_s=3,request_ms=2") == StorageProfile(node_gb_s=3.0, request_ms=2.0)
    with raises("estimate.unknown_storage", "floppy"):
        parse_storage("floppy")
    for bad in ("speed=3", "node_gb_s=fast", "node_gb_s=0", "request_ms=-1"):
        with raises("estimate.bad_storage_figure", bad):
            parse_storage(f"nvme,{bad}")
