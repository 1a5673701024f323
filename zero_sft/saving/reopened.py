"""Open a written tokenizer as plain transformers does, and compare it with the one that trains.

transformers' own round trip loses settings of some tokenizers (`legacy` of Llama's, for one), and then encodes the same text
to other ids, silently. `settings.py` writes back what it knows of; this finds what it does not know of.
"""

from pathlib import Path
from typing import Any

from zero_sft.tokenizer.fingerprint import encodings


def changed_encoding(folder: Path, tokenizer: Any) -> str | None:
    """A sentence about the first text that the tokenizer in `folder` encodes to other ids than `tokenizer`, or None.

    Left out: tokenizers with code of their own, which is not run again here. Rank 0; does not communicate.
    """
    from transformers import AutoTokenizer

    if type(tokenizer).__module__.startswith("transformers_modules."):
        return None
    try:
        reopened = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare exceptions
        return f"plain transformers can't open the exported tokenizer: {str(error).strip() or type(error).__name__}."
    own, other = encodings(tokenizer), encodings(reopened)
    for text, ids in own.items():
        found = other.get(text)
        if ids != found:
            return (
                f"plain transformers encodes {text} with the exported tokenizer to other ids ({_around(found, ids)}) than this "
                f"run trains on ({_around(ids, found)}). Open the export with the base model's tokenizer files, or report this."
            )
    return None


def _around(ids: Any, others: Any) -> str:
    """The ids from just before the first difference."""
    ids, others = list(ids or ()), list(others or ())
    first = next((place for place, (one, two) in enumerate(zip(ids, others, strict=False)) if one != two), 0)
    return ", ".join(map(str, ids[max(0, first - 1) : first + 3])) + ", ..."
