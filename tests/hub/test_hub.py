"""Models by hub id, from a stand-in hub: one download a file system, one commit a load, tokens kept secret."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.data import tiny
from tests.hub import standin
from tests.launching import free_port

REPO = "someone/tiny"
TOKEN = "hf_secretsecretsecret"

JOB = """
import json, logging, os, sys
import torch
from zero_sft.cluster import node_layout as layout
layout._host_identity = lambda: os.environ["NODE"]
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
from zero_sft import load_pretrained
from zero_sft.errors import ZeroSftError
from zero_sft.zero import shards
try:
    model, tokenizer = load_pretrained(sys.argv[1], ds_config={"zero_optimization": {"stage": 3}}, model_max_length=32,
                                       **json.loads(sys.argv[2]))
except ZeroSftError as error:
    print("RESULT", json.dumps({"error": error.code, "message": str(error)}))
    sys.exit(3)
total = sum(float(shards.local_shard(p).double().sum()) for p in model.parameters())
print("RESULT", json.dumps({"sum": total, "vocabulary": len(tokenizer), "missing": model.load_report.missing_keys}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, as a repository has it."""
    tokenizer = tiny.byte_tokenizer(tiny.CHATML)
    folder = models.save_tiny("llama", tmp_path_factory.mktemp("repo") / "first", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    (folder / "unwanted.pdf").write_bytes(b"x" * 1000)
    return folder


def load(hub: standin.Hub, homes: list[Path], repo: str = REPO, nodes: int = 1, **options) -> tuple[list[dict], str]:
    """`load_pretrained` on as many ranks as `homes` (their caches), over `nodes` nodes; each rank's result, and all output."""
    port, size = str(free_port()), len(homes)
    local = size // nodes
    ranks = []
    with tempfile.TemporaryDirectory() as logs:
        paths = [Path(logs, f"rank{rank}.log") for rank in range(size)]
        for rank, home in enumerate(homes):
            env = {
                **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "RANK": str(rank),
                "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local),
                "NODE": str(rank // local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-c", JOB, repo, json.dumps(options)]
            with paths[rank].open("w") as log:  # a pipe that nobody reads would stop a rank
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            for each in ranks:
                each.wait(timeout=300)
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths))
        finally:
            for each in ranks:
                each.kill()
        outputs = [path.read_text() for path in paths]
    results = []
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        assert lines, output[-3000:]
        results.append(json.loads(lines[0].removeprefix("RESULT ")))
    return results, "\n".join(outputs)


@pytest.mark.slow
def test_one_download_a_file_system(folder, tmp_path):
    """Three ranks on two nodes that share a cache: every file comes once, the weights only where they are wanted."""
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), folder)]})) as hub:
        results, _ = load(hub, [tmp_path / "shared"] * 2, nodes=2)
        fetched = len(hub.requests)
        weights = len(list(folder.glob("*.safetensors")))
        assert hub.downloads(".safetensors") == weights > 1
        assert hub.downloads("config.json") <= 3  # config, generation config, tokenizer's
        assert hub.downloads("unwanted.pdf") == 0
        assert all(each["missing"] == [] and each["vocabulary"] > 0 for each in results)
        again, _ = load(hub, [tmp_path / "shared"] * 2, nodes=2, local_files_only=True)
        assert again == results
        assert len(hub.requests) == fetched


@pytest.mark.slow
def test_nodes_with_disks_of_their_own(folder, tmp_path):
    """Each node's first rank downloads for its node; tokenizer files come to rank 0 alone."""
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), folder)]})) as hub:
        load(hub, [tmp_path / "one", tmp_path / "two"], nodes=2)
        assert hub.downloads(".safetensors") == 2 * len(list(folder.glob("*.safetensors")))
        assert hub.downloads("tokenizer.json") == 1
        assert not list((tmp_path / "two").rglob("tokenizer*"))


def test_one_commit_for_all_stages(folder, tmp_path):
    """Somebody pushes while the job starts: config, weights and tokenizer still are of one commit, on every rank."""
    newer = models.save_tiny("llama", tmp_path / "newer", vocab_size=97)
    history = [(standin.commit_hash("1"), folder), (standin.commit_hash("2"), newer)]
    with standin.serve(standin.Hub({REPO: history}, moves=True)) as hub:
        load(hub, [tmp_path / "one", tmp_path / "two"], nodes=2)
    snapshots = {path.name for home in ("one", "two") for path in (tmp_path / home).rglob("snapshots/*")}
    assert snapshots == {standin.commit_hash("1")}


@pytest.mark.slow
def test_revision_is_taken(folder, tmp_path):
    newer = models.save_tiny("llama", tmp_path / "newer", vocab_size=97)
    first, second = standin.commit_hash("1"), standin.commit_hash("2")
    with standin.serve(standin.Hub({REPO: [(first, folder), (second, newer)]})) as hub:
        load(hub, [tmp_path / "home"], revision=first)
        assert {path.name for path in (tmp_path / "home").rglob("snapshots/*")} == {first}
        results, _ = load(hub, [tmp_path / "home"], revision="nosuch")
    assert results[0]["error"] == "hub.no_such_revision"
    assert "nosuch" in results[0]["message"]
    assert "--revision" in results[0]["message"]


@pytest.mark.slow
def test_gated_model_and_its_token(folder, tmp_path):
    """Without the token: one error that says what to do. With it: loaded, and the token in no output."""
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), folder)]}, token=TOKEN)) as hub:
        results, _ = load(hub, [tmp_path / "home"] * 2)
        assert {each["error"] for each in results} == {"hub.gated"}
        assert "HF_TOKEN" in results[0]["message"]
        assert results[0]["message"] == results[1]["message"]
        results, output = load(hub, [tmp_path / "home"] * 2, token=TOKEN)
        assert results[0]["missing"] == []
        assert TOKEN not in output


def bin_repository(folder, target):
    """The same repository with its weights as `pytorch_model.bin` alone."""
    shutil.copytree(folder, target)
    tensors = {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in target.glob("*.safetensors*"):
        path.unlink()
    torch.save(tensors, target / "pytorch_model.bin")
    return target


@pytest.mark.slow
def test_bin_files_where_there_is_nothing_better(folder, tmp_path):
    """Without safetensors `pytorch_model.bin` is fetched, once; beside safetensors it never is."""
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), folder)]})) as hub:
        expected, _ = load(hub, [tmp_path / "safe"] * 2)
    both = bin_repository(folder, tmp_path / "both")
    for path in folder.glob("*.safetensors*"):
        shutil.copy(path, both)
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("2"), both)]})) as hub:
        load(hub, [tmp_path / "second"] * 2)
        assert hub.downloads(".bin") == 0
    alone = bin_repository(folder, tmp_path / "alone")
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("3"), alone)]})) as hub:
        results, _ = load(hub, [tmp_path / "third"] * 2)
        assert hub.downloads(".bin") == 1
    assert results == expected


@pytest.mark.slow
def test_a_variants_files_alone_are_fetched(folder, tmp_path):
    repository = tmp_path / "variant"
    shutil.copytree(folder, repository)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(tensors, repository / "model.fp16.safetensors", metadata={"format": "pt"})
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), repository)]})) as hub:
        results, _ = load(hub, [tmp_path / "home"] * 2, variant="fp16")
        assert hub.downloads(".safetensors") == 1
    assert results[0]["missing"] == []


@pytest.mark.slow
def test_a_folder_inside_and_a_cache_of_its_own(folder, tmp_path):
    """Of a repository with the model in a folder that folder alone is fetched, into `cache_dir` and nowhere else."""
    repository = tmp_path / "outer"
    shutil.copytree(folder, repository / "inner")
    shutil.copytree(folder, repository / "other")
    with standin.serve(standin.Hub({REPO: [(standin.commit_hash("1"), repository)]})) as hub:
        results, _ = load(hub, [tmp_path / "home"] * 2, subfolder="inner", cache_dir=str(tmp_path / "cache"))
        assert hub.downloads(".safetensors") == len(list(folder.glob("*.safetensors")))
        assert not any("/other/" in path for _, path in hub.requests)
    assert results[0]["missing"] == []
    assert list((tmp_path / "cache").rglob("inner/model-*.safetensors"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.slow
def test_no_such_repository(tmp_path):
    with standin.serve(standin.Hub({})) as hub:
        results, _ = load(hub, [tmp_path / "home"] * 2, repo="nobody/nothing")
    assert {each["error"] for each in results} == {"hub.no_such_model"}
    assert "nobody/nothing" in results[0]["message"]


def estimate(model: str, hub: standin.Hub, home: Path, *options: str) -> dict:
    """The estimate of one rank of three, as JSON."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "zero_sft.estimate", "--model", model, "--world_size", "3", "--model_max_length", "32"]
    done = subprocess.run([*command, "--json", *options], env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_an_estimate_takes_headers_alone(folder, tmp_path):
    """Of one file or many, of a variant, and derived where there is only a `.bin`: what the local folder's headers give."""
    variant = tmp_path / "variant"
    shutil.copytree(folder, variant)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file({name: tensor.float() for name, tensor in tensors.items()}, variant / "model.wide.safetensors")
    repos = {"a/many": folder, "a/variant": variant, "a/bin": bin_repository(folder, tmp_path / "bin")}
    hub = standin.Hub({name: [(standin.commit_hash(name), path)] for name, path in repos.items()})
    with standin.serve(hub):
        local = estimate(str(folder), hub, tmp_path / "home")
        many = estimate("a/many", hub, tmp_path / "home")
        wide = estimate("a/variant", hub, tmp_path / "home", "--variant", "wide")
        derived = estimate("a/bin", hub, tmp_path / "home")
    assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing but configs and the index is kept"
    assert many["ranks"] == local["ranks"]
    assert (many["headers"], wide["headers"], derived["headers"]) == ("fetched", "fetched", "derived")
    nbytes = [each["nbytes"] for each in local["ranks"]]
    assert [each["nbytes"] for each in derived["ranks"]] == nbytes
    assert [each["nbytes"] for each in wide["ranks"]] == [2 * each for each in nbytes]
