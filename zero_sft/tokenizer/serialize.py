"""Serialize a tokenizer as bytes: a JSON index, followed by the tokenizer's saved files. No pickle.

Every rank rebuilds the tokenizer from these files in a temporary folder. The bytes contain code only if `trust_remote_code`
allowed it.
"""

import importlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from zero_sft.errors import TokenizerError
from zero_sft.tokenizer.fingerprint import fingerprint
from zero_sft.transformers_internals import set_tokenizer_backend

_BASE_CONFIG = "_zero_sft_base_config"
"""Attribute of a tokenizer that holds the settings of its model's `tokenizer_config.json` that an export restores.

A run sets another length. transformers renames the tokenizer's class and drops `legacy`, on which the ids of a Llama tokenizer
after a special token depend.
"""

_BASE_KEYS = ("tokenizer_class", "model_max_length", "add_bos_token", "add_eos_token", "legacy")


def keep_base_config(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Keep the settings that an export needs; `config` is the content of a `tokenizer_config.json`."""
    setattr(tokenizer, _BASE_CONFIG, {name: config[name] for name in _BASE_KEYS if name in config})


def base_config(tokenizer: Any) -> Mapping[str, Any]:
    """Return the kept settings; empty for a tokenizer that this package has not set up."""
    return getattr(tokenizer, _BASE_CONFIG, {})


def serialize(tokenizer: PreTrainedTokenizerBase, label: str) -> bytes:
    """Return the saved tokenizer as bytes: 8 bytes of length, a JSON index of that length, the files one after another."""
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as top:
        tokenizer.save_pretrained(top, save_jinja_files=False)
        files = {path.name: path.read_bytes() for path in sorted(Path(top).iterdir())}
    cls = type(tokenizer)
    index = {"label": re.sub(r"\W", "_", label) or "model", "class": [cls.__module__, cls.__qualname__]}
    index["base_config"] = base_config(tokenizer)
    index["files"] = [[name, len(data)] for name, data in files.items()]
    head = json.dumps(index).encode()
    return b"".join([len(head).to_bytes(8, "big"), head, *files.values()])


def unpack(serialized: bytes) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """Return the index and the files of a serialized tokenizer.

    Raises:
        TokenizerError: a length does not fit, or a file name leads out of its folder.
    """
    start = 8 + int.from_bytes(serialized[:8], "big")
    index = json.loads(serialized[8:start])
    files = {}
    for name, size in index["files"]:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise TokenizerError(
                f"the serialized tokenizer names a file {name!r}; expected a plain file name.", code="tokenizer.bad_bytes"
            )
        files[name] = serialized[start : start + size]
        start += size
    if start != len(serialized):
        raise TokenizerError(
            f"the serialized tokenizer has {len(serialized)} bytes; its index expects {start}.", code="tokenizer.bad_bytes"
        )
    return index, files


def deserialize(serialized: bytes, name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Rebuild a serialized tokenizer, in its original class. Any rank; does not communicate."""
    index, files = unpack(serialized)
    module, class_name = index["class"]
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as top:
        folder = Path(top) / index["label"]
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        if module.startswith("transformers_modules."):
            options = {"config": PreTrainedConfig(), "trust_remote_code": trust_remote_code, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        else:
            tokenizer = getattr(importlib.import_module(module), class_name).from_pretrained(folder, local_files_only=True)
    if tokenizer.is_fast and "tokenizer.json" in files:
        # Classes that build their own backend drop settings that they don't know; restore rank 0's backend.
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        backend.encode_special_tokens = tokenizer.split_special_tokens
        set_tokenizer_backend(tokenizer, backend)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = name
    keep_base_config(tokenizer, index["base_config"])
    for key in ("is_local", "local_files_only"):  # options of this load, which must not be exported with the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def require_faithful(original: PreTrainedTokenizerBase, rebuilt: PreTrainedTokenizerBase) -> None:
    """Raise `TokenizerError` if the rebuilt tokenizer differs from the original."""
    before, after = fingerprint(original), fingerprint(rebuilt)
    lost = [key for key in before if before[key] != after.get(key)]
    if lost:
        raise TokenizerError(
            f"{type(original).__name__} does not survive save_pretrained and from_pretrained: {lost[0]} was "
            f"{before[lost[0]]!r:.200} and became {after.get(lost[0])!r:.200}. Save it as tokenizer.json first.",
            code="tokenizer.not_faithful",
        )
