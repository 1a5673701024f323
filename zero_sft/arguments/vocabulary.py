"""The number of tokens of a run: more than its model was made for, if tokens are added."""

import copy
import logging
from typing import Any

from zero_sft.arguments.groups import ModelArguments
from zero_sft.errors import ArgumentError
from zero_sft.rope import text_config
from zero_sft.tokenizer.added_tokens import AddedTokens

logger = logging.getLogger(__name__)


def added_tokens(options: ModelArguments) -> AddedTokens:
    """Return the tokens that a run adds."""
    return AddedTokens(ordinary=tuple(options.add_tokens or ()), special=tuple(options.add_special_tokens or ()))


def required_rows(options: ModelArguments, tokenizer: Any, config: Any, *, has_adapters: bool) -> int | None:
    """Return the number of rows that the embedding needs; None if the run leaves it as it is. Pure, apart from the log.

    Raises:
        ArgumentError: it needs more, and the run trains adapters.
    """
    rows = getattr(text_config(config), "vocab_size", None)
    needed = 1 + max(tokenizer.get_vocab().values(), default=0)
    if rows is None or needed <= rows or not (options.resize_vocab or added_tokens(options).all):
        return None
    if has_adapters:
        raise ArgumentError(
            f"the tokenizer has {needed:,} tokens, and the model's embedding {rows:,} rows. An adapter would not hold the new "
            "rows. Add the tokens to the model first, in a run without --lora_r, or leave these options out.",
            code="arguments.tokens_with_adapters",
        )
    logger.info("the embedding gets %d rows in place of %d, for the tokenizer's tokens", needed, rows)
    return needed


def with_rows(config: Any, rows: int | None) -> Any:
    """Return a model's config with another number of embedding rows; None changes nothing. Pure."""
    if rows is None:
        return config
    config = copy.deepcopy(config)
    text_config(config).vocab_size = rows
    return config
