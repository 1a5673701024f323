"""Reject token ids for which the model has no embedding; a tokenizer may have more tokens than its model has rows.

Such an id ends training in the middle of a step, on a GPU with an assertion that names neither the token nor the sample. So
the ids are checked while the data is prepared, if the tokenizer has tokens beyond the embedding.
"""

from collections.abc import Sequence
from typing import Any

from zero_sft.errors import DataError


def require_ids(ids: Sequence[int], rows: int | None, where: str) -> None:
    """Raise `DataError` if a sample that was tokenised elsewhere has an id for which the embedding has no row."""
    wrong = next((token_id for token_id in ids if token_id < 0 or (rows is not None and token_id >= rows)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: `input_ids` has the id {wrong}, but the model's embedding has {rows} rows. Tokenise with the model's "
            "tokenizer.",
            code="data.token_without_embedding",
        )


def id_limit(tokenizer: Any, embedding_rows: int | None) -> int | None:
    """Return `embedding_rows` if the tokenizer has a token beyond them; else None, since no id needs a check."""
    if embedding_rows is None or max(tokenizer.get_vocab().values(), default=0) < embedding_rows:
        return None
    return embedding_rows


def require_embedded(ids: Sequence[int], tokenizer: Any, id_limit: int | None, where: str) -> None:
    """Raise `DataError`, which names the token and the sample, if an id is at or above the limit; None: there is no limit."""
    if id_limit is None or max(ids, default=0) < id_limit:
        return
    missing_id = next(token_id for token_id in ids if token_id >= id_limit)
    raise DataError(
        f"{where}: the model has no embedding for the token {tokenizer.convert_ids_to_tokens(missing_id)!r}: its id is "
        f"{missing_id}, but the embedding has only {id_limit} rows (vocab_size in config.json). Remove the token from the text "
        "or the chat template, or use the tokenizer that belongs to the model.",
        code="data.token_without_embedding",
    )
