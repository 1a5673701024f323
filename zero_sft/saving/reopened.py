"""Open an exported tokenizer with plain transformers, and compare it with the tokenizer of the training.

A round trip through transformers loses settings of some tokenizers, such as `legacy` of Llama's, and then silently encodes the
same text to other ids. `settings.py` restores the settings that it knows; this check finds all others.
"""

from pathlib import Path
from typing import Any

from zero_sft.tokenizer.fingerprint import encodings


def changed_encoding(folder: Path, tokenizer: Any) -> str | None:
    """Describe the first text that the tokenizer in `folder` encodes to other ids than `tokenizer`; None if there is none.

    Left out: tokenizers with custom code, which is not run again here. Rank 0; does not communicate.
    """
    from transformers import AutoTokenizer

    if type(tokenizer).__module__.startswith("transformers_modules."):
        return None
    try:
        reopened = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception
        return f"plain transformers can't open the exported tokenizer: {str(error).strip() or type(error).__name__}."
    trained_encodings, reopened_encodings = encodings(tokenizer), encodings(reopened)
    for text, ids in trained_encodings.items():
        reopened_ids = reopened_encodings.get(text)
        if ids != reopened_ids:
            return (
                f"plain transformers encodes {text} with the exported tokenizer to other ids ({_around(reopened_ids, ids)}) "
                f"than this run trains on ({_around(ids, reopened_ids)}). Open the export with the base model's tokenizer "
                "files, or report this."
            )
    return None


def _around(ids: Any, others: Any) -> str:
    """Format the ids from just before the first difference."""
    ids, others = list(ids or ()), list(others or ())
    first = next((index for index, (id_, other) in enumerate(zip(ids, others, strict=False)) if id_ != other), 0)
    return ", ".join(map(str, ids[max(0, first - 1) : first + 3])) + ", ..."
