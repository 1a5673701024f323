"""Options for access to a model's files. Imports nothing heavy: `--help` reads them."""

import os
import re
from dataclasses import dataclass, field

from zero_sft.errors import ArgumentError
from zero_sft.options.keywords import require_types

_VARIANT = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Options for access to a model's files, with the names and meanings of `from_pretrained`.

    Raises:
        ArgumentError: a value has another type, or `variant` can't be part of a file name.
    """

    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model and tokenizer code that comes with the checkpoint."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for downloads from the hub; the hub's cache by default."}
    )
    revision: str | None = field(default=None, metadata={"help": "A branch, tag or commit of the hub's repository."})
    token: str | bool | None = field(
        default=None,
        repr=False,  # the token must not appear in logs
        metadata={
            "help": "The hub's access token for the model, in a file of arguments only; by default, and for datasets, HF_TOKEN "
            "or `hf auth login`."
        },
    )
    local_files_only: bool = field(default=False, metadata={"help": "Never ask the hub; use what was downloaded before."})
    subfolder: str | None = field(default="", metadata={"help": "The model's folder inside the repository or local folder."})
    variant: str | None = field(
        default=None, metadata={"help": "Variant of the weight files: fp16 takes model.fp16.safetensors."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.cache_dir, os.PathLike):
            object.__setattr__(self, "cache_dir", os.fspath(self.cache_dir))
        require_types(self, HubOptions)
        if self.variant is not None and not _VARIANT.fullmatch(self.variant):
            raise ArgumentError(
                f"variant {self.variant!r} can't be part of a file name; expected one like fp16.", code="hub.bad_variant"
            )

    def to_match(self) -> dict[str, object]:
        """Return the options that must be equal on all ranks. Folders and access to the hub may differ between nodes."""
        return {name: getattr(self, name) for name in ("trust_remote_code", "revision", "variant")}
