"""The tokenizer: set up once on rank 0, sent as bytes, the same on every rank.

Only rank 0 opens tokenizer files, on disk or at the hub (`setup`). What it has set up (padding side, length, pad token) it
saves, packs and broadcasts; every rank, itself included, rebuilds the tokenizer from those bytes (`packet`). A `fingerprint`
proves them all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zero_sft import distributed
from zero_sft.errors import ArgumentError
from zero_sft.hub.source import TOKENIZER, HubOptions, resolve_folder_alone
from zero_sft.tokenizer.fingerprints import fingerprint
from zero_sft.tokenizer.packet import check_faithful, pack, rebuild
from zero_sft.tokenizer.setup import set_up
from zero_sft.world import World

Prepared = tuple[PreTrainedTokenizerBase, bytes]
"""A tokenizer that is set up, and its packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which tokenizer, and how it is to be set up."""

    name: str  # a hub id, or a folder, which rank 0 alone needs to have
    options: HubOptions
    model_max_length: int
    padding_side: str

    def check(self) -> None:
        """Raise an ArgumentError for a setting out of range."""
        if self.padding_side not in ("right", "left"):
            raise ArgumentError(
                f"--padding_side must be right or left; got {self.padding_side!r}.", code="arguments.wrong_value"
            )
        length = self.model_max_length
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < 2**31:
            raise ArgumentError(
                f"--model_max_length must be a whole number, at least 1 and below 2**31; got {length!r}.",
                code="arguments.wrong_value",
            )

    def prepare(self) -> Prepared:
        """Set it up and pack it. Rank 0, by itself; it may be on another thread."""
        folder = resolve_folder_alone(self.name, self.options, TOKENIZER)
        tokenizer = set_up(folder, self.options, self.model_max_length, self.padding_side)
        return tokenizer, pack(tokenizer, folder.name)


def load_tokenizer(
    model_name_or_path: str, *, model_max_length: int, padding_side: str = "right", **hub: object
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
    world = distributed.connect(World.detect())
    wanted = Wanted(name=model_name_or_path, options=options, model_max_length=model_max_length, padding_side=padding_side)
    return share(world, wanted, wanted.prepare)


def share(world: World, wanted: Wanted, prepared: Callable[[], Prepared]) -> PreTrainedTokenizerBase:
    """The tokenizer that rank 0 prepares, or has prepared, on every rank. Every rank; communicates.

    Raises:
        ZeroSftError: as `load_tokenizer`'s.
    """
    original, packet = None, None
    with distributed.agreed(world, "setting up the tokenizer", distributed.DOWNLOAD_TIMEOUT):
        wanted.check()
        if world.is_main:
            original, packet = prepared()
    packet = distributed.broadcast_bytes(world, packet)

    def rebuilt() -> PreTrainedTokenizerBase:
        tokenizer = rebuild(packet, wanted.name, trust_remote_code=wanted.options.trust_remote_code)
        check_faithful(original, tokenizer)
        return tokenizer

    one_by_one = wanted.options.trust_remote_code
    tokenizer = distributed.by_turns(world, "rebuilding the tokenizer", rebuilt, one_by_one=one_by_one)
    distributed.agree_on(world, "tokenizer", fingerprint(tokenizer))
    return tokenizer
