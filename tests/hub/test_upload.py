"""A run and an export that upload their model, to a stand-in for the hub."""

import os
import subprocess
import sys

import pytest

from tests import small_job
from tests.errors import error_codes
from tests.hub.standin import serve
from tests.hub.upload_standin import UploadHub, Uploads

TOKEN = "hf_secretsecretsecret"


def run(hub, home, module, *words, token=TOKEN):
    env = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_and_an_export(tmp_path):
    folder, out = small_job.make(tmp_path, 8), tmp_path / "out"
    arguments = {
        "model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": out, "max_steps": 2,
        "per_device_train_batch_size": 2, "packing": False, "logging_steps": 1, "push_to_hub": True,
        "hub_model_id": "me/trained", "hub_private_repo": True, "data_cache_dir": tmp_path / "cache",
    }  # fmt: skip
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    with serve(UploadHub(token=TOKEN), Uploads) as hub:
        refused = run(hub, tmp_path / "home", "zero_sft.train", *words, token="hf_wrong")
        assert refused.returncode != 0
        assert error_codes(refused.stderr) == ["hub.upload_refused"]
        assert "loading the model" not in refused.stdout, "it is refused before the weights are read"
        trained = run(hub, tmp_path / "home", "zero_sft.train", *words)
        assert trained.returncode == 0, trained.stderr
        exported = run(
            hub,
            tmp_path / "home",
            "zero_sft.export",
            out,
            tmp_path / "again",
            "--push_to_hub",
            "again",
            "--save_dtype",
            "float32",
        )
        assert exported.returncode == 0, exported.stderr
    assert hub.private == {"me/trained": True, "me/again": False}
    files = hub.repos["me/trained"]
    model = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert files == model
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "loss.png"} <= files.keys()
    assert not [name for name in files if "checkpoint" in name or "logs" in name]
    card = files["README.md"].decode()
    for text in (
        "library_name: transformers",
        "# trained",
        "data.json",
        "8 rows",
        "2 of 2 samples",
        "adamw",
        "1 rank",
        "loss.png",
    ):
        assert text in card, card
    assert str(tmp_path) not in card, "no path of the machine"
    assert "# again" in hub.repos["me/again"]["README.md"].decode()
    assert TOKEN not in trained.stdout + trained.stderr + exported.stdout + exported.stderr
    assert TOKEN.encode() not in b"".join([*files.values(), *hub.repos["me/again"].values()])


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [
    (["--hub_model_id", "me/model"], "arguments.no_effect"),
    (["--push_to_hub", "True", "--hub_model_id", "a/b/c"], "hub.bad_repository_name"),
    (["--push_to_hub", "True", "--hub_model_id", "me/model"], "hub.unavailable"),
])  # fmt: skip
def test_what_is_refused_at_the_start(tmp_path, words, code):
    small_job.make(tmp_path, 8)
    given = [
        "--model_name_or_path",
        tmp_path / "model",
        "--data_path",
        tmp_path / "data.json",
        "--output_dir",
        tmp_path / "out",
    ]
    ended = run(UploadHub(token=TOKEN, url="http://127.0.0.1:9"), tmp_path / "home", "zero_sft.train", *given, *words)
    assert ended.returncode != 0
    assert error_codes(ended.stderr) == [code], ended.stderr
    assert "loading the model" not in ended.stdout
