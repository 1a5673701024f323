"""A dataset of the Hugging Face hub as a source of objects; `datasets` downloads, caches and reads it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.errors import DataError
from zero_sft.printable import printable

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """One split of a dataset, in one configuration; None: its default one, or the only one.

    A gated dataset takes the token of HF_TOKEN or `hf auth login`.
    """

    id: str
    split: str = "train"
    config: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return ":".join(filter(None, (self.id, self.config, self.split)))

    def objects(self) -> Iterator[tuple[Any, str]]:
        """Each row with its place.

        Raises:
            DataError: no such dataset or split, or the hub can't provide it.
        """
        for number, row in enumerate(_loaded(self), start=1):
            yield row, f"{self.name}, sample {number}"

    def left_out(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def note(self) -> str:
        """Nothing: the name says the split."""
        return ""

    def held_out(self) -> None:
        """None: the name says the split."""

    def state(self) -> None:
        """None: a commit does not change."""

    def require_outside(self, root: Path, *, option: str, code: str) -> None:
        """Nothing: it is not read from a folder of the user's."""

    def identity(self) -> list[Any]:
        """Which rows of which commit, JSON-able; errors as `objects`'."""
        dataset = _loaded(self)
        folders = {Path(each["filename"]).parent.name for each in dataset.cache_files}  # named by the commit
        return [self.id, self.split, dataset.info.config_name, sorted(folders)]


@functools.cache
def _loaded(of: HubDataset) -> "datasets.Dataset":
    """The dataset, which `identity` and `objects` share.

    Loaded by whichever comes first and kept until the process ends, so that both see one commit; nobody clears it. The rows are
    mapped from the cache of `datasets`, and hold no memory.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(of.id, of.config, split=of.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = next(iter(printable(str(error)).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{of.id} is no file or folder, and split {of.split!r} of such a dataset of the hub can't be had: {reason}\n"
            "Check --data_path and --eval_data_path: a path, org/name:split or org/name:configuration:split. A gated one needs "
            "HF_TOKEN (--token is the model's); where there is no internet, download it elsewhere and name its folder.",
            code="data.hub_dataset_unavailable",
        ) from error
