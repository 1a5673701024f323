"""Real SentencePiece models, and folders with them in the manner of Vicuna's."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL = ("mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
REAL = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
"""Mistral's SentencePiece models, with 32,000 and 32,768 pieces, from the data folder of that PyPI package."""


@pytest.fixture(scope="session")
def real_models():
    """Folder of real SentencePiece models, downloaded once, checked by hash, outside site-packages."""
    cache = Path(os.environ.get("ZERO_SFT_TEST_CACHE", Path.home() / ".cache" / "zero_sft_tests"))
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
    """A model folder in the manner of Vicuna's: a SentencePiece model, no tokenizer.json."""
    write_config(folder, model_type=model_type)
    shutil.copy(model, folder / "tokenizer.model")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
