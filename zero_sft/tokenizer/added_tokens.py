"""Tokens that a run adds to the tokenizer's vocabulary. They get ids behind all others."""

import logging
from dataclasses import dataclass
from typing import Any

from zero_sft.errors import TokenizerError
from zero_sft.printable import first_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokens:
    """Tokens to add: ordinary ones, which a decoded text shows, and special ones, which `skip_special_tokens` leaves out."""

    ordinary: tuple[str, ...] = ()
    special: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.ordinary, *self.special)

    def add_to(self, tokenizer: Any) -> None:
        """Add the tokens that the tokenizer lacks.

        Raises:
            TokenizerError: the same token twice, one of white space alone, or one that the tokenizer splits nevertheless.
        """
        if not self.all:
            return
        twice = {token for token in self.all if self.all.count(token) > 1}
        if bad := [*sorted(twice), *(token for token in self.all if not token.strip())]:
            raise TokenizerError(
                f"--add_tokens and --add_special_tokens: {first_of(map(repr, bad))} given twice, or without a character. Give "
                "each token once.",
                code="tokenizer.bad_added_tokens",
            )
        known = [token for token in self.all if token in tokenizer.get_vocab()]
        tokenizer.add_tokens(list(self.ordinary))
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)}, replace_extra_special_tokens=False)
        ids = tokenizer.get_vocab()
        split = [token for token in self.all if tokenizer.encode(token, add_special_tokens=False) != [ids.get(token)]]
        if split:
            raise TokenizerError(
                f"the tokenizer splits {first_of(map(repr, split))} although it was added. Write it without white space at its "
                "ends.",
                code="tokenizer.bad_added_tokens",
            )
        if known:
            logger.info("the tokenizer has %s already", first_of(map(repr, known)))
