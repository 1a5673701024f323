"""The tokenizer: set up once on rank 0, sent as bytes, the same on every rank.

Only rank 0 opens tokenizer files, on disk or at the hub (`setup`). What it has set up (padding side, length, pad token) it
saves, packs and broadcasts; every rank, itself included, rebuilds the tokenizer from those bytes (`packet`). A `fingerprint`
proves them all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zero_sft.cluster.control_group import DOWNLOAD_TIMEOUT, broadcast_bytes
from zero_sft.cluster.stages import collective_stage, require_identical, run_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import TOKENIZER, ModelSource, fetch_files, locate_model_alone
from zero_sft.options.keywords import read_keywords, takes_options
from zero_sft.tokenizer.fingerprint import fingerprint
from zero_sft.tokenizer.serialize import check_faithful, deserialize, serialize
from zero_sft.tokenizer.setup import set_up
from zero_sft.zero.process_group import connect

SerializedTokenizer = tuple[PreTrainedTokenizerBase, bytes]
"""A tokenizer that is set up, and its packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """How a tokenizer is to be set up, and whether it may bring code."""

    name: str  # the model's name, for messages
    trust_remote_code: bool
    model_max_length: int
    padding_side: str

    @classmethod
    def of(cls, source: ModelSource, model_max_length: int, padding_side: str) -> "TokenizerSpec":
        """The spec for a model that was located."""
        return cls(
            name=source.name,
            trust_remote_code=source.options.trust_remote_code,
            model_max_length=model_max_length,
            padding_side=padding_side,
        )

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

    def prepare(self, source: ModelSource) -> SerializedTokenizer:
        """Set the tokenizer up and pack it. Rank 0; does not communicate; it may be on another thread."""
        folder = fetch_files(source, World(), TOKENIZER)
        tokenizer = set_up(folder, source.options, self.model_max_length, self.padding_side)
        return tokenizer, serialize(tokenizer, folder.name)


@takes_options(HubOptions)
def load_tokenizer(
    model_name_or_path: str, *, model_max_length: int, padding_side: str = "right", **options: object
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, the same on every rank. Every rank; communicates; rank 0 alone reads files.

    `model_name_or_path` is a hub id or a folder, which rank 0 alone needs to have; `model_max_length` is in tokens;
    `padding_side` is "right" or "left"; `options` as in `prepare_config`. The pad token is the unk token, as in FastChat, or
    where there is none a token that is never content (logged). The vocabulary never grows.

    Raises:
        TokenizerError: no usable tokenizer there; CheckpointError: no such folder; ArgumentError: an argument out of
            range. Always the same one on every rank.
    """
    (hub,) = read_keywords(options, HubOptions, function=load_tokenizer)
    spec = TokenizerSpec(
        name=model_name_or_path,
        trust_remote_code=hub.trust_remote_code,
        model_max_length=model_max_length,
        padding_side=padding_side,
    )
    world = connect(World.detect())
    return broadcast_tokenizer(world, spec, lambda: spec.prepare(locate_model_alone(model_name_or_path, hub)))


def load_tokenizer_from(
    source: ModelSource, world: World, *, model_max_length: int, padding_side: str
) -> PreTrainedTokenizerBase:
    """Do what `load_tokenizer` does, with a model that was located. Every rank; communicates."""
    spec = TokenizerSpec.of(source, model_max_length, padding_side)
    return broadcast_tokenizer(world, spec, lambda: spec.prepare(source))


def broadcast_tokenizer(
    world: World, spec: TokenizerSpec, prepared: Callable[[], SerializedTokenizer]
) -> PreTrainedTokenizerBase:
    """The tokenizer that rank 0 prepares, or has prepared, on every rank. Every rank; communicates.

    Raises:
        ZeroSftError: as `load_tokenizer`'s.
    """
    original, packet = None, None
    with collective_stage(world, "setting up the tokenizer", DOWNLOAD_TIMEOUT):
        spec.check()
        if world.is_main:
            original, packet = prepared()
    packet = broadcast_bytes(world, packet)

    def rebuilt() -> PreTrainedTokenizerBase:
        tokenizer = deserialize(packet, spec.name, trust_remote_code=spec.trust_remote_code)
        check_faithful(original, tokenizer)
        return tokenizer

    main_first = spec.trust_remote_code
    tokenizer = run_stage(world, "rebuilding the tokenizer", rebuilt, main_first=main_first)
    require_identical(world, "tokenizer", fingerprint(tokenizer))
    return tokenizer
