"""Open a tokenizer's files on rank 0, and make it ready for training.

The ids must be those with which the model was trained. If a folder has a SentencePiece model but no `tokenizer.json`, as
Vicuna's does, transformers 5 converts the model with merges in order of id instead of score, and for some model types without
the leading space. Both are corrected here. `added_tokens` adds tokens.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zero_sft.checkpoint.folder_kind import first_placeholder
from zero_sft.errors import TokenizerError, ZeroSftError, is_failure
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import TOKENIZER
from zero_sft.printable import excerpt
from zero_sft.tokenizer.fingerprint import PROBES, encodings
from zero_sft.tokenizer.serialize import keep_base_config
from zero_sft.transformers_internals import set_tokenizer_backend

logger = logging.getLogger(__name__)

UNK = "the unk token"
_PAD, _SPARE = (re.compile(rf"(?i)(?<![a-z])({words})") for words in ("pad", "reserved|unused|dummy"))
_MOST_UNUSED_IDS = 2**20
"""The most ids without a token; a file with more is damaged."""
_MEDIA = re.compile(r"(?i)image|img|video|vision|audio|speech")


@contextlib.contextmanager
def explain_damage(folder: Path) -> Iterator[None]:
    """Raise `TokenizerError` in place of any error of the libraries in the body, which works with the tokenizer in `folder`."""
    try:
        yield
    except ZeroSftError:
        raise
    except BaseException as error:  # the tokenizers library raises plain Exception, and panics
        if not is_failure(error):
            raise
        placeholder = first_placeholder([path for pattern in TOKENIZER for path in sorted(folder.glob(pattern))])
        if placeholder:
            raise TokenizerError(placeholder, code="tokenizer.placeholder_file") from error
        raise TokenizerError(
            f"can't load the tokenizer in {folder}: {str(error).strip() or type(error).__name__}\nCopy its files again from "
            "the original model; if it comes with code that you trust, give --trust_remote_code True.",
            code="tokenizer.unusable",
        ) from error


def set_up(folder: Path, options: HubOptions, model_max_length: int, padding_side: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`, ready for training. Rank 0; does not communicate.

    Raises:
        TokenizerError: the tokenizer has no files, ids that are far apart, or no token to pad with.
        Exception: what the libraries raise; see `explain_damage`.
    """
    settings = dataclasses.asdict(options) | {"model_max_length": model_max_length, "padding_side": padding_side}
    del settings["revision"], settings["subfolder"], settings["variant"]  # the folder is already resolved by them
    tokenizer = _open(folder, settings)
    _require_dense_ids(tokenizer, folder)
    encodings(tokenizer)  # a damaged file may open and then fail on a text
    config = _read_json(folder / "config.json")
    pad, reason = choose_pad_token(tokenizer, (config.get("text_config") or config).get("vocab_size"))
    if pad != tokenizer.pad_token and (tokenizer.pad_token, reason) != (None, UNK):
        instead = "" if tokenizer.pad_token is None else f" instead of {tokenizer.pad_token}"
        logger.info("the tokenizer pads with %s (%s)%s; padding is never trained on", pad, reason, instead)
    tokenizer.pad_token = pad
    keep_base_config(tokenizer, _read_json(folder / "tokenizer_config.json"))
    return tokenizer


def _open(folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Open the tokenizer with transformers; if the folder has a SentencePiece model, with SentencePiece's ids."""
    pieces = _sentencepiece(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    expected = {"tokenizer.json", *filter(None, type(tokenizer).vocab_files_names.values())}
    has_files = any((folder / name).is_file() for name in expected) or getattr(tokenizer, "vocab_file", None)
    if not has_files and len(expected) > 1 and not pieces and type(tokenizer).__module__.startswith("transformers.models."):
        # transformers silently makes a tokenizer that has only special tokens.
        raise TokenizerError(
            f"no tokenizer files in {folder}: expected one of {', '.join(sorted(expected))}. Copy them there.",
            code="tokenizer.no_files",
        )
    if pieces and tokenizer.is_fast:
        tokenizer = _as_sentencepiece(tokenizer, pieces, folder, settings)
    if isinstance(getattr(tokenizer, "legacy", None), bool):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # otherwise save_pretrained drops it
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def choose_pad_token(tokenizer: Any, rows: int | None = None) -> tuple[str, str]:
    """Choose a token of the vocabulary to pad with; return it and the reason for the choice.

    Padding is masked by position, so the last resort, eos, still counts in the loss.

    Args:
        rows: the rows of the model's embedding; the token's id must be below. None: not known.
    """
    vocabulary = tokenizer.get_vocab()

    def usable(token: str | None) -> bool:
        return token in vocabulary and (rows is None or vocabulary[token] < rows)

    if usable(tokenizer.unk_token):
        return tokenizer.unk_token, UNK
    if usable(tokenizer.pad_token) and tokenizer.pad_token != tokenizer.eos_token:
        return tokenizer.pad_token, "its own pad token"
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    spare = [token for token in special if usable(token) and token not in taken and token not in str(tokenizer.chat_template)]
    for pattern in (_PAD, _SPARE):
        for token in spare:
            if pattern.search(token) and not _MEDIA.search(token):
                return token, "a reserved token"
    if usable(tokenizer.eos_token):
        return tokenizer.eos_token, "the eos token, for want of a reserved one"
    raise TokenizerError(
        "the tokenizer has no unk, pad, reserved or eos token to pad with that its model has an embedding for. Name one of "
        "its tokens as pad_token in tokenizer_config.json.",
        code="tokenizer.nothing_to_pad_with",
    )


def _sentencepiece(folder: Path) -> Any:
    """Open the SentencePiece model that transformers has to convert, as a SentencePieceProcessor; None if there is none."""
    for path in [] if (folder / "tokenizer.json").is_file() else sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            if file.read(1) != b"\n":  # the tag of the first field; tiktoken's .model files are text
                continue
        try:
            importlib.import_module("google.protobuf")
            return importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))
        except ImportError as error:
            raise TokenizerError(
                f"{path} can't be read ({error}): pip install sentencepiece protobuf", code="tokenizer.package_missing"
            ) from error
    return None


def _require_dense_ids(tokenizer: Any, folder: Path) -> None:
    """Check that no id is far beyond the number of tokens.

    The tokenizers library lists all ids up to the largest one when it saves a tokenizer.

    Raises:
        TokenizerError: an id is.
    """
    ids = tokenizer.get_vocab()
    token = max(ids, key=ids.__getitem__, default=None)
    if token is not None and ids[token] > _MOST_UNUSED_IDS + len(ids):
        raise TokenizerError(
            f"{folder}: the token {excerpt(token)} has the id {ids[token]:,}, and there are only {len(ids):,} tokens. Copy the "
            "tokenizer's files again from the original model.",
            code="tokenizer.bad_ids",
        )


def _as_sentencepiece(tokenizer: Any, pieces: Any, folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Correct the errors of transformers' conversion; raise `TokenizerError` if the ids still differ."""
    bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    if bpe and type(tokenizer) is PreTrainedTokenizerFast and pieces.encode("a", out_type=str)[0].startswith("▁"):
        tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)  # the generic class adds no leading space
    if isinstance(tokenizer, LlamaTokenizer) and "add_bos_token" not in _read_json(folder / "tokenizer_config.json"):
        tokenizer.add_bos_token = True  # the documented default, which the class does not apply
    ids = {pieces.id_to_piece(id_): id_ for id_ in range(pieces.vocab_size())}
    if bpe and ids.items() <= tokenizer.get_vocab().items():  # the ids are SentencePiece's
        _order_merges_by_score(tokenizer, pieces, ids)
    generic = type(tokenizer) is PreTrainedTokenizerFast
    if generic and any(tokenizer.encode(text, add_special_tokens=False) != pieces.encode(text) for text in PROBES[2:]):
        raise TokenizerError(
            f"transformers converts the SentencePiece model in {folder} to other ids than SentencePiece's. Name the model's "
            "tokenizer_class in tokenizer_config.json, or copy its tokenizer.json there.",
            code="tokenizer.other_ids_than_sentencepiece",
        )
    return tokenizer


def _order_merges_by_score(tokenizer: Any, pieces: Any, ids: dict[str, int]) -> None:
    """Give a converted BPE the merges of its SentencePiece model: best score first, then lowest id.

    transformers 5 uses ids as scores. They differ in Llama's and Mistral's models, where runs of spaces have low ids and the
    lowest score: "a  b" became [a, two spaces, b] instead of [a, space, space-b].
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ranked = sorted(
        (-pieces.get_score(merged_id), merged_id, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, merged_id in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    state["model"]["merges"] = [[left, right] for *_, left, right in ranked]
    set_tokenizer_backend(tokenizer, tokenizers.Tokenizer.from_str(json.dumps(state)))
