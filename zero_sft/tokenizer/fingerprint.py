"""Fingerprint a tokenizer by its vocabulary, special tokens, chat template and encodings of difficult texts."""

import hashlib
import json
from typing import Any

PROBES = (
    "Hello, world!", "  two  spaces\tand a tab\n\nlines \n", "Grüße aus Straßburg, naïve é", "日本語の文。中文 한국어",
    "العربية हिन्दी ไทย עברית", "👩‍👩‍👧‍👦 🏳️‍🌈 🤯", "def f(x):\n    return x ** 2  # square\n", "0123456789 3.14", "",
)  # fmt: skip
"""Texts whose encodings must be the same on every rank. `encodings` adds one with the special tokens."""


def fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Return the properties that must be the same on every rank, as JSON-serializable values."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "vocabulary": digest(tokenizer.get_vocab()),
        "special tokens": tokenizer.special_tokens_map,
        "extra special tokens": tokenizer.extra_special_tokens,
        "added tokens": digest({key: repr(token) for key, token in tokenizer.added_tokens_decoder.items()}),
        "chat template": tokenizer.chat_template,
        "padding side": tokenizer.padding_side,
        "truncation side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        "legacy": getattr(tokenizer, "legacy", None),
        "backend": digest(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None,
        **{f"encoding of {text}": ids for text, ids in encodings(tokenizer).items()},
    }


def encodings(tokenizer: Any) -> dict[str, list[int]]:
    """Return the ids of `PROBES` and of a text with the special tokens, by the first 60 characters of the text's `repr`."""
    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})[:64]
    texts = (*PROBES, "".join(f"{token}a {token}" for token in special))
    return {f"{text!r:.60}": tokenizer.encode(text) for text in texts}
