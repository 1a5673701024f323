"""Read a dataset on the Hugging Face hub as a source of objects; `datasets` downloads, caches and reads it."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.data.sources.splits import ChosenSplit
from zero_sft.errors import DataError
from zero_sft.printable import printable

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """One split of a dataset in one configuration; None stands for the default or only configuration, or newest revision.

    For a gated dataset, set HF_TOKEN or run `hf auth login`.
    """

    id: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name for messages."""
        named = f"{self.id}@{self.revision}" if self.revision else self.id
        return ":".join(filter(None, (named, self.config, self.split)))

    def objects(self, *, start: int = 0, streaming: bool = False) -> Iterator[tuple[Any, str]]:
        """Yield each row from number `start` on with its place for messages, "org/name:split, sample 3".

        With `streaming`, the dataset is not downloaded as a whole. Raises `DataError` as `_load` does.
        """
        rows = _load(self, streaming=True).skip(start) if streaming else _loaded(self).skip(start) if start else _loaded(self)
        number, rows = start, iter(rows)
        while True:
            with _explained(self):
                row = next(rows, None)
            if row is None:
                return
            number += 1
            yield row, f"{self.name}, sample {number}"

    def state_of_local_files(self) -> None:
        """Return None: a commit does not change."""

    def fingerprint(self) -> list[Any]:
        """Return JSON-able names, which tell a run that is resumed whether the data is the same."""
        return [self.name]

    def chosen(self) -> ChosenSplit[Path]:
        """Return an empty choice: no files are ignored, and the name includes the split."""
        return ChosenSplit()

    def state(self) -> None:
        """Return None: a commit does not change."""

    def require_outside(self, root: Path, *, option: str, code: str) -> None:
        """Do nothing: the dataset is not read from one of the user's folders."""

    def identity(self) -> list[Any]:
        """Return JSON-able values that identify the commit and the rows; raises as `objects` does."""
        dataset = _loaded(self)
        folders = {Path(cache_file["filename"]).parent.name for cache_file in dataset.cache_files}  # named by the commit
        return [self.id, self.split, dataset.info.config_name, sorted(folders)]


@functools.cache
def _loaded(source: HubDataset) -> "datasets.Dataset":
    """Load the dataset once, and keep it until the process ends, so that `identity` and `objects` see the same commit.

    Nobody clears it. The rows are memory-mapped from the cache of `datasets`.
    """
    return _load(source, streaming=False)


def _load(source: HubDataset, *, streaming: bool) -> Any:
    """Load a dataset, or with `streaming` open it; raise `DataError` if that is not possible."""
    import datasets

    with _explained(source):
        return datasets.load_dataset(
            source.id, source.config, split=source.split, revision=source.revision, streaming=streaming
        )


@contextlib.contextmanager
def _explained(source: HubDataset) -> Iterator[None]:
    """Turn the errors of `datasets` within the block into a `DataError`."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = next(iter(printable(str(error)).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{source.id} is not a file or folder, and split {source.split!r} of a hub dataset of that name can't be loaded: "
            f"{reason}\nCheck --data_path and --eval_data_path; expected a path, org/name:split or "
            "org/name:configuration:split. A gated dataset needs HF_TOKEN (--token is for the model only). Without internet "
            "access, download the dataset elsewhere and name its folder.",
            code="data.hub_dataset_unavailable",
        ) from error
