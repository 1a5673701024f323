"""A tokenizer as bytes: its saved files behind a JSON index, no pickle.

Every rank rebuilds it from them in a private folder, which is gone afterwards. Code is in a packet only where
`trust_remote_code` lets it travel.
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
from zero_sft.tokenizer.base_config import base_config, keep_base_config
from zero_sft.tokenizer.fingerprint import fingerprint
from zero_sft.transformers_internals import set_tokenizer_backend


def serialize(tokenizer: PreTrainedTokenizerBase, label: str) -> bytes:
    """The saved tokenizer as bytes: 8 bytes of length, a JSON index of that length, the files one after another."""
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as top:
        tokenizer.save_pretrained(top, save_jinja_files=False)
        files = {path.name: path.read_bytes() for path in sorted(Path(top).iterdir())}
    kind = type(tokenizer)
    index = {"label": re.sub(r"\W", "_", label) or "model", "class": [kind.__module__, kind.__qualname__]}
    index["base_config"] = base_config(tokenizer)
    index["files"] = [[name, len(data)] for name, data in files.items()]
    head = json.dumps(index).encode()
    return b"".join([len(head).to_bytes(8, "big"), head, *files.values()])


def unpack(packet: bytes) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """The index and the files of a packet.

    Raises:
        TokenizerError: a length that does not fit, or a name that leads out of the folder it is to be written to.
    """
    start = 8 + int.from_bytes(packet[:8], "big")
    index = json.loads(packet[8:start])
    files = {}
    for name, size in index["files"]:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise TokenizerError(
                f"the tokenizer packet names a file {name!r}; expected a plain file name.", code="tokenizer.bad_packet"
            )
        files[name] = packet[start : start + size]
        start += size
    if start != len(packet):
        raise TokenizerError(
            f"the tokenizer packet has {len(packet)} bytes; its index expects {start}.", code="tokenizer.bad_packet"
        )
    return index, files


def deserialize(packet: bytes, name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that was packed, in the class it had. Any rank, by itself."""
    index, files = unpack(packet)
    module, kind = index["class"]
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as top:
        folder = Path(top) / index["label"]
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        if module.startswith("transformers_modules."):
            given = {"config": PreTrainedConfig(), "trust_remote_code": trust_remote_code, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(folder, **given)
        else:
            tokenizer = getattr(importlib.import_module(module), kind).from_pretrained(folder, local_files_only=True)
    if tokenizer.is_fast and "tokenizer.json" in files:
        # Classes that build their own backend drop what they don't know of; this one is what rank 0 had.
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        backend.encode_special_tokens = tokenizer.split_special_tokens
        set_tokenizer_backend(tokenizer, backend)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = name
    keep_base_config(tokenizer, index["base_config"])
    for key in ("is_local", "local_files_only"):  # of this loading, not of the tokenizer: not to be exported with it
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def check_faithful(original: PreTrainedTokenizerBase | None, rebuilt: PreTrainedTokenizerBase) -> None:
    """Rank 0: what is sent is what was loaded; and its files stay where `save_pretrained` of slow classes finds them."""
    if original is None:
        return
    before, after = fingerprint(original), fingerprint(rebuilt)
    lost = [key for key in before if before[key] != after.get(key)]
    if lost:
        raise TokenizerError(
            f"{type(original).__name__} does not survive save_pretrained and from_pretrained: {lost[0]} was "
            f"{before[lost[0]]!r:.200} and became {after.get(lost[0])!r:.200}. Save it as tokenizer.json first.",
            code="tokenizer.not_faithful",
        )
    if getattr(original, "vocab_file", None):
        rebuilt.vocab_file = original.vocab_file
