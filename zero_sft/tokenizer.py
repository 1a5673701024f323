"""The tokenizer: set up once on rank 0, sent as bytes, the same on every rank.

Only rank 0 opens tokenizer files, on disk or at the hub. What it has set up (padding side, length, pad token) it saves,
packs and broadcasts; every rank, itself included, rebuilds the tokenizer from those bytes in a private folder, which is
gone afterwards. A fingerprint (vocabulary, special tokens, chat template, encodings) proves them all the same. The packet
is a JSON index and the files' bytes, no pickle; code is in it only where `trust_remote_code` lets it travel.

Ids are to be those the model was trained with. For a folder that has a SentencePiece model but no `tokenizer.json`, as
Vicuna's has, transformers 5 converts it with merges in order of id instead of score, and for some model types without
the leading space; both are put right here. Left out: adding tokens, which would need new embedding rows.
"""

import dataclasses
import hashlib
import importlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zero_sft import distributed
from zero_sft.distributed import World
from zero_sft.errors import ArgumentError, TokenizerError, ZeroSftError
from zero_sft.hub import TOKENIZER, HubOptions, resolve_folder_alone

logger = logging.getLogger(__name__)

PROBES = (
    "Hello, world!", "  two  spaces\tand a tab\n\nlines \n", "Grüße aus Straßburg, naïve é", "日本語の文。中文 한국어",
    "العربية हिन्दी ไทย עברית", "👩‍👩‍👧‍👦 🏳️‍🌈 🤯", "def f(x):\n    return x ** 2  # square\n", "0123456789 3.14", "",
)  # fmt: skip
"""Texts whose encodings must be the same on every rank; to these come the special tokens."""

_PAD, _SPARE = (re.compile(rf"(?i)(?<![a-z])({words})") for words in ("pad", "reserved|unused|dummy"))
_MEDIA = re.compile(r"(?i)image|img|video|vision|audio|speech")


def load_tokenizer(
    model_name_or_path: str, *, model_max_length: int, padding_side: str = "right", **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, the same on every rank. Every rank; communicates; rank 0 alone reads files.

    `model_name_or_path` is a hub id or a folder, which rank 0 alone needs to have; `model_max_length` is in tokens;
    `padding_side` is "right" or "left"; `hub` as in `prepare_config`. The pad token is the unk token, as in FastChat, or
    where there is none a token that is never content (logged). The vocabulary never grows.

    Raises:
        TokenizerError: no usable tokenizer there; CheckpointError: no such folder; ArgumentError: an argument out of
            range. Always the same one on every rank.
    """
    options = HubOptions.from_kwargs(hub, load_tokenizer)
    world = World.detect()
    distributed.connect(world)
    original, packet = None, None
    with distributed.agreed(world, "setting up the tokenizer", distributed.DOWNLOAD_TIMEOUT):
        _check_arguments(model_max_length, padding_side)
        if world.is_main:
            folder = resolve_folder_alone(model_name_or_path, options, TOKENIZER)
            original = set_up(folder, options, model_max_length, padding_side)
            packet = pack(original, folder.name)
    packet = distributed.broadcast_bytes(world, packet)
    # Custom code is copied to a folder that ranks share: first by rank 0, then a rank of each node, then the others.
    turns = 3 if options.trust_remote_code else 1
    mine = min(turns - 1, 0 if world.is_main else 1 if world.local_rank == 0 else 2)
    tokenizer = PreTrainedTokenizerBase()
    for turn in range(turns):
        with distributed.agreed(world, "rebuilding the tokenizer"):
            if turn == mine:
                tokenizer = rebuild(packet, model_name_or_path, trust_remote_code=options.trust_remote_code)
                _check_faithful(original, tokenizer)
    distributed.agree_on(world, "tokenizer", fingerprint(tokenizer))
    return tokenizer


def _check_arguments(model_max_length: int, padding_side: str) -> None:
    if padding_side not in ("right", "left"):
        raise ArgumentError(f"--padding_side must be right or left; got {padding_side!r}.")
    if not isinstance(model_max_length, int) or isinstance(model_max_length, bool) or model_max_length < 1:
        raise ArgumentError(f"--model_max_length must be a whole number, at least 1; got {model_max_length!r}.")


def set_up(folder: Path, options: HubOptions, model_max_length: int, padding_side: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, ready for training; a TokenizerError for whatever is wrong. Rank 0, by itself."""
    settings = dataclasses.asdict(options) | {"model_max_length": model_max_length, "padding_side": padding_side}
    del settings["revision"], settings["subfolder"], settings["variant"]  # the folder is those already
    try:
        tokenizer = _open(folder, settings)
    except ZeroSftError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise TokenizerError(
            f"can't load the tokenizer in {folder}: {str(error).strip() or type(error).__name__}\nCopy its files again from "
            "the original model; if it comes with code of its own that you trust, give --trust_remote_code True."
        ) from error
    config = _read_json(folder / "config.json")
    pad, why = choose_pad_token(tokenizer, (config.get("text_config") or config).get("vocab_size"))
    if tokenizer.pad_token not in (None, pad):
        logger.info("pad token: %s instead of %s (%s), also in what is saved", pad, tokenizer.pad_token, why)
    tokenizer.pad_token = pad
    if why != "unk":
        logger.warning("no usable unk token in the tokenizer of %s; padding with %s (%s)", folder, pad, why)
    return tokenizer


def _open(folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    """transformers' tokenizer, with ids as SentencePiece itself gives them where that is what the folder has."""
    pieces = _sentencepiece(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    known = {"tokenizer.json", *filter(None, type(tokenizer).vocab_files_names.values())}
    lacks = not any((folder / each).is_file() for each in known) and not getattr(tokenizer, "vocab_file", None)
    if lacks and len(known) > 1 and not pieces and type(tokenizer).__module__.startswith("transformers.models."):
        # transformers makes one that knows nothing but its special tokens, without a word.
        raise TokenizerError(f"no tokenizer files in {folder}: expected one of {', '.join(sorted(known))}. Copy them there.")
    if pieces and tokenizer.is_fast:
        tokenizer = _as_sentencepiece(tokenizer, pieces, folder, settings)
    if isinstance(getattr(tokenizer, "legacy", None), bool):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # or save_pretrained forgets it
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def choose_pad_token(tokenizer: Any, rows: int | None = None) -> tuple[str, str]:
    """A token of the vocabulary, within the `rows` of the model's embedding, to pad with, and why that one.

    Padding is masked by position, so eos can serve at last without leaving the loss.
    """
    vocabulary = tokenizer.get_vocab()

    def usable(token: str | None) -> bool:
        return token in vocabulary and (rows is None or vocabulary[token] < rows)

    if usable(tokenizer.unk_token):
        return tokenizer.unk_token, "unk"
    if usable(tokenizer.pad_token) and tokenizer.pad_token != tokenizer.eos_token:
        return tokenizer.pad_token, "its own pad token"
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    special = [str(each) for _, each in sorted(tokenizer.added_tokens_decoder.items()) if each.special]
    spare = [each for each in special if usable(each) and each not in taken and each not in str(tokenizer.chat_template)]
    for pattern in (_PAD, _SPARE):
        for token in spare:
            if pattern.search(token) and not _MEDIA.search(token):
                return token, "a reserved token"
    if usable(tokenizer.eos_token):
        return tokenizer.eos_token, "the eos token, for want of a reserved one"
    raise TokenizerError(
        "the tokenizer has no unk, pad, reserved or eos token to pad with that its model has an embedding for. Name one of "
        "its tokens as pad_token in tokenizer_config.json."
    )


def _sentencepiece(folder: Path) -> Any:
    """The SentencePiece model that transformers has to convert, as a SentencePieceProcessor, or None."""
    for path in [] if (folder / "tokenizer.json").is_file() else sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            if file.read(1) != b"\n":  # the tag of the first field; tiktoken's .model files are text
                continue
        try:
            importlib.import_module("google.protobuf")
            return importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))
        except ImportError as error:
            raise TokenizerError(f"{path} can't be read ({error}): pip install sentencepiece protobuf") from error
    return None


def _as_sentencepiece(tokenizer: Any, pieces: Any, folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The converted tokenizer with what the conversion gets wrong put right; a TokenizerError where that can't be."""
    bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    if bpe and type(tokenizer) is PreTrainedTokenizerFast and pieces.encode("a", out_type=str)[0].startswith("▁"):
        tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)  # puts a space before, the generic class none
    if isinstance(tokenizer, LlamaTokenizer) and "add_bos_token" not in _read_json(folder / "tokenizer_config.json"):
        tokenizer.add_bos_token = True  # the documented default, but not the real one
    ids = {pieces.id_to_piece(each): each for each in range(pieces.vocab_size())}
    if bpe and ids.items() <= tokenizer.get_vocab().items():  # not numbered in another way
        _order_merges_by_score(tokenizer, pieces, ids)
    generic = type(tokenizer) is PreTrainedTokenizerFast
    if generic and any(tokenizer.encode(each, add_special_tokens=False) != pieces.encode(each) for each in PROBES[2:]):
        raise TokenizerError(
            f"transformers converts the SentencePiece model in {folder} to other ids than its own. Name the model's own "
            "tokenizer_class in tokenizer_config.json, or copy its tokenizer.json there."
        )
    return tokenizer


def _order_merges_by_score(tokenizer: Any, pieces: Any, ids: dict[str, int]) -> None:
    """Give a converted BPE the merges of its SentencePiece model: best score first, then lowest id.

    transformers 5 takes ids for scores. They differ in Llama's and Mistral's models, whose runs of spaces have low ids
    and the lowest score: "a  b" became [a, two spaces, b] instead of [a, space, space-b].
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ranked = sorted(
        (-pieces.get_score(whole), whole, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, whole in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    state["model"]["merges"] = [[left, right] for *_, left, right in ranked]
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))


def pack(tokenizer: PreTrainedTokenizerBase, label: str) -> bytes:
    """The saved tokenizer as bytes: 8 bytes of length, a JSON index of that length, the files one after another."""
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as top:
        tokenizer.save_pretrained(top, save_jinja_files=False)
        files = {path.name: path.read_bytes() for path in sorted(Path(top).iterdir())}
    kind = type(tokenizer)
    index = {"label": re.sub(r"\W", "_", label) or "model", "class": [kind.__module__, kind.__qualname__]}
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
            raise TokenizerError(f"the tokenizer packet names a file {name!r}; expected a plain file name.")
        files[name] = packet[start : start + size]
        start += size
    if start != len(packet):
        raise TokenizerError(f"the tokenizer packet has {len(packet)} bytes; its index expects {start}.")
    return index, files


def rebuild(packet: bytes, name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
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
        tokenizer._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        tokenizer._tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = name
    for key in ("is_local", "local_files_only"):  # of this loading, not of the tokenizer: not to be exported with it
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _check_faithful(original: PreTrainedTokenizerBase | None, rebuilt: PreTrainedTokenizerBase) -> None:
    """Rank 0: what is sent is what was loaded; and its files stay where `save_pretrained` of slow classes finds them."""
    if original is None:
        return
    before, after = fingerprint(original), fingerprint(rebuilt)
    lost = [key for key in before if before[key] != after.get(key)]
    if lost:
        raise TokenizerError(
            f"{type(original).__name__} does not survive save_pretrained and from_pretrained: {lost[0]} was "
            f"{before[lost[0]]!r:.200} and became {after.get(lost[0])!r:.200}. Save it as tokenizer.json first."
        )
    if getattr(original, "vocab_file", None):
        rebuilt.vocab_file = original.vocab_file


def fingerprint(tokenizer: Any) -> dict[str, Any]:
    """What has to be the same on every rank, as JSON-able values."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})[:64]
    probes = (*PROBES, "".join(f"{each}a {each}" for each in special))
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "vocabulary": digest(tokenizer.get_vocab()),
        "special tokens": tokenizer.special_tokens_map,
        "extra special tokens": tokenizer.extra_special_tokens,
        "added tokens": digest({key: repr(each) for key, each in tokenizer.added_tokens_decoder.items()}),
        "chat template": tokenizer.chat_template,
        "padding side": tokenizer.padding_side,
        "truncation side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        "legacy": getattr(tokenizer, "legacy", None),
        "backend": digest(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None,
        **{f"encoding of {each!r:.60}": tokenizer.encode(each) for each in probes},
    }
