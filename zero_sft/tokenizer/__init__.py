"""Set up the tokenizer once on rank 0, and broadcast it as bytes, so that it is the same on every rank.

Only rank 0 opens tokenizer files, on disk or on the hub (`setup`). It sets padding side, length and pad token, then saves,
serializes and broadcasts the tokenizer. Every rank, including rank 0, rebuilds it from those bytes (`serialize`). The ranks
compare a `fingerprint` to prove that all have the same tokenizer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from zero_sft.cluster.control_group import LONG_WAIT, broadcast_bytes
from zero_sft.cluster.stages import collective_stage, require_identical, run_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ArgumentError
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import TOKENIZER, ModelSource, fetch_files, locate_model, require_name
from zero_sft.options.keywords import read_keywords, takes_options
from zero_sft.rope import require_length
from zero_sft.storage.default_device import cpu_by_default
from zero_sft.tokenizer.added_tokens import AddedTokens
from zero_sft.tokenizer.fingerprint import fingerprint
from zero_sft.tokenizer.serialize import deserialize, require_faithful, serialize
from zero_sft.tokenizer.setup import explain_damage, set_up
from zero_sft.zero.process_group import connect

SerializedTokenizer = tuple[PreTrainedTokenizerBase, bytes]
"""A tokenizer that is set up, and its serialized form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """The settings with which a tokenizer is set up. `name` is the model's, for messages."""

    name: str
    options: HubOptions
    model_max_length: int
    padding_side: str
    added: AddedTokens = field(default_factory=AddedTokens)

    @classmethod
    def of(
        cls, source: ModelSource, model_max_length: int, padding_side: str, added: AddedTokens | None = None
    ) -> "TokenizerSpec":
        """Make the spec for a located model."""
        return cls(
            name=source.name,
            options=source.options,
            model_max_length=model_max_length,
            padding_side=padding_side,
            added=added or AddedTokens(),
        )

    def require_valid(self) -> None:
        """Raise `ArgumentError` if a setting is out of range."""
        if self.padding_side not in ("right", "left"):
            raise ArgumentError(
                f"--padding_side must be right or left; got {self.padding_side!r}.", code="arguments.wrong_value"
            )
        require_length(self.model_max_length)

    def prepare(self, source: ModelSource) -> SerializedTokenizer:
        """Set the tokenizer up and serialize it. Rank 0, on any thread; does not communicate."""
        folder = fetch_files(source, World.alone(), TOKENIZER)
        with explain_damage(folder):
            tokenizer = set_up(folder, self.options, self.model_max_length, self.padding_side)
            self.added.add_to(tokenizer)
            return tokenizer, serialize(tokenizer, folder.name)


@takes_options(HubOptions)
@cpu_by_default()
def load_tokenizer(
    model_name_or_path: str, *, model_max_length: int, padding_side: str = "right", **options: object
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, the same on every rank. Every rank; communicates. Only rank 0 reads files.

    The pad token is the unk token, as in FastChat. A tokenizer without unk token pads with a token that is never content; the
    choice is logged. The vocabulary never grows.

    Args:
        model_name_or_path: a hub id, or a folder that only rank 0 needs to see.
        model_max_length: the longest sequence, in tokens.
        padding_side: "right" or "left".
        options: as in `prepare_config`.

    Raises:
        TokenizerError: the model has no usable tokenizer. The same on every rank, as the errors below.
        CheckpointError: the folder does not exist.
        ArgumentError: an argument is out of range.
    """
    world = connect(World.detect())
    with collective_stage(world, "checking the tokenizer's arguments") as exchange:
        (hub,) = read_keywords(options, HubOptions, function=load_tokenizer)
        name = require_name(model_name_or_path)
        exchange.must_match = ("arguments of load_tokenizer", {"trust_remote_code": hub.trust_remote_code})
    spec = TokenizerSpec(name=name, options=hub, model_max_length=model_max_length, padding_side=padding_side)
    return broadcast_tokenizer(world, spec, lambda: spec.prepare(locate_model(name, hub, World.alone())))


def load_tokenizer_from(
    source: ModelSource, world: World, *, model_max_length: int, padding_side: str, added: AddedTokens | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a located model, as `load_tokenizer` does, with the `added` tokens. Every rank; communicates."""
    spec = TokenizerSpec.of(source, model_max_length, padding_side, added)
    return broadcast_tokenizer(world, spec, lambda: spec.prepare(source))


def broadcast_tokenizer(
    world: World, spec: TokenizerSpec, prepared: Callable[[], SerializedTokenizer]
) -> PreTrainedTokenizerBase:
    """Broadcast the tokenizer that `prepared` returns on rank 0. Every rank; communicates.

    Raises:
        ZeroSftError: the errors of `load_tokenizer`.
    """
    original, serialized = None, None
    with collective_stage(world, "setting up the tokenizer", LONG_WAIT):
        spec.require_valid()
        if world.is_main:
            original, serialized = prepared()
    serialized = broadcast_bytes(world, serialized)
    has_code = spec.options.trust_remote_code

    def rebuild() -> PreTrainedTokenizerBase:
        tokenizer = deserialize(serialized, spec.name, trust_remote_code=has_code)
        if original is not None:
            require_faithful(original, tokenizer)
            if getattr(original, "vocab_file", None):  # `save_pretrained` of slow classes copies this file
                tokenizer.vocab_file = original.vocab_file
        return tokenizer

    tokenizer = run_stage(world, "rebuilding the tokenizer", rebuild, main_first=has_code)
    require_identical(world, "tokenizer", fingerprint(tokenizer))
    return tokenizer
