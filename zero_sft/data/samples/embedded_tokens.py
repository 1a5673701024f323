"""Token ids that a model has no embedding for: a tokenizer may have more tokens than its model has rows.

They end a training in the middle of a step, on a GPU in an assertion that names neither token nor sample. So they are looked
for when the data is prepared, where the tokenizer has any.
"""

from collections.abc import Sequence
from typing import Any

from zero_sft.errors import DataError


def rows_to_check(tokenizer: Any, embedding_rows: int | None) -> int | None:
    """`embedding_rows`, if the tokenizer has a token beyond them; else None: then there is nothing to look for."""
    if embedding_rows is None or max(tokenizer.get_vocab().values(), default=0) < embedding_rows:
        return None
    return embedding_rows


def require_embedded(ids: Sequence[int], tokenizer: Any, rows: int, where: str) -> None:
    """Raise if one of a sample's ids has no row in the embedding.

    Raises:
        DataError: naming the token, the sample and the remedy.
    """
    if max(ids, default=0) < rows:
        return
    beyond = next(each for each in ids if each >= rows)
    raise DataError(
        f"{where}: the model has no embedding for the token {tokenizer.convert_ids_to_tokens(beyond)!r}: its id is {beyond}, "
        f"and the embedding has {rows} rows (vocab_size in config.json). Take it out of the text or the chat template, or give "
        "the tokenizer that belongs to the model.",
        code="data.token_without_embedding",
    )
