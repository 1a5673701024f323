"""Parse `--data_path` into sources: `a.json,b.jsonl`, or with weights `a.json:0.7,org/name:train_sft:0.3`.

The split of a folder is named like the split of a dataset on the hub: `folder:split`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zero_sft.data.sources.hub_dataset import HubDataset
from zero_sft.data.sources.local_files import LocalFiles, is_named_as_data
from zero_sft.data.sources.remote_files import RemoteFiles
from zero_sft.errors import DataError
from zero_sft.remote import LIBRARIES, is_web, redacted, scheme_of, without_secrets

DataSource = LocalFiles | RemoteFiles | HubDataset

_MIN_WEIGHT_RATIO = 1e-6
_HUB_PAGE = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/datasets/(?P<id>[\w.-]+/[\w.-]+)(/?|[/?#](?!resolve/).*)")
_HUB_DATASET = re.compile(r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w.%~-]+))?(:(?P<split>\w[\w.-]*))?/?")
_REMOTE = re.compile(r"(?P<url>.+?)(:(?P<split>[A-Za-z_][\w.-]*))?")
_NAMED = re.compile(r"\w+=.+")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>\w[\w.-]*)(?=:))?(:(?P<split>\w[\w.-]*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source and its weight in the mixture (None: every sample once); `text` is what the user wrote, for messages."""

    data: DataSource
    weight: float | None = None
    text: str = field(default="", compare=False)


def parse_sources(text: str) -> tuple[Source, ...]:
    """Parse the value of `--data_path`. An existing path is a single source, whatever characters it contains.

    Every rank calls it once per option; does not communicate. It looks paths up, so nodes that see different files may get
    different sources.

    Raises:
        DataError: an empty part, a URL of an unknown kind, a weight that is not a positive number, or weights for only some of
            the sources.
    """
    if not text.strip():
        raise DataError(
            "--data_path or --eval_data_path is empty (an unset variable?). Name a file, a folder or a dataset.",
            code="data.no_path",
        )
    if _exists(text):
        return (Source(data=_data(text), text=text),)
    shown = shown_sources(text)
    sources = tuple(_parse_source(part.strip(), shown) for part in _parts(text))
    weights = [source.weight for source in sources if source.weight is not None]
    if 0 < len(weights) < len(sources):
        raise DataError(
            f"{shown}: {len(weights)} of {len(sources)} sources have a weight. Give all a weight (a number after a colon), or "
            "none.",
            code="data.weights_missing",
        )
    if weights and min(weights) < _MIN_WEIGHT_RATIO * max(weights):
        raise DataError(
            f"{shown}: the weights {max(weights):g} and {min(weights):g} are too far apart. Leave out the source with the "
            "smaller one.",
            code="data.weights_too_far_apart",
        )
    return sources


def parse_evaluation(text: str) -> dict[str, tuple[Source, ...]]:
    """Parse the value of `--eval_data_path`: sources as in `parse_sources`, or sets by name, `tide=a.jsonl,chat=b.json`.

    Every rank calls it once; does not communicate. The name of a set that was given no name is "". The sources of one name are
    one set.

    Raises:
        DataError: as `parse_sources`, or names for only some of the sources.
    """
    parts = [part.strip() for part in _parts(text)]
    named = [part for part in parts if _NAMED.fullmatch(part) and not _exists(part)]
    if _exists(text) or not named:
        return {"": parse_sources(text)}
    if len(named) < len(parts):
        raise DataError(
            f"--eval_data_path {shown_sources(text)}: {len(named)} of {len(parts)} sources have a name. Give all a name, such "
            "as chat=a.json,tide=b.json, or none.",
            code="data.names_missing",
        )
    sets: dict[str, tuple[Source, ...]] = {}
    for part in named:
        name, _, path = part.partition("=")
        sets[name] = (*sets.get(name, ()), *parse_sources(path))
    return sets


def all_sources(text: str) -> tuple[Source, ...]:
    """Return all sources in the value of `--data_path` or `--eval_data_path`; raises as `parse_evaluation`."""
    return tuple(source for sources in parse_evaluation(text).values() for source in sources)


def require_sources(sources: Sequence[Source], *, to_evaluate: bool = False) -> None:
    """Check that every source exists, before time is spent on any of them. Any rank; does not communicate.

    Args:
        to_evaluate: for a folder with several splits, the user must name one; the default, `train`, is not held-out data.

    Raises:
        DataError: a path that does not exist, or an unnamed split.
    """
    for source in sources:
        source.data.state()
        held_out = source.data.chosen().held_out if to_evaluate else None
        if held_out:
            raise DataError(
                f"--eval_data_path {source.data.name} has several splits; expected the name of one. For example: "
                f"--eval_data_path {source.data.name}:{held_out}.",
                code="data.eval_split_unnamed",
            )


def require_outputs_outside(sources: Sequence[Source], output_dir: str) -> None:
    """Raise `DataError` if the next run would read this run's output as data. Any rank; does not communicate."""
    for source in sources:
        source.data.require_outside(Path(output_dir), option="--output_dir", code="data.output_inside_data")


def shown_sources(text: str) -> str:
    """Return sources as the user wrote them, but without what may be secret in their URLs."""
    return ",".join(without_secrets(part) for part in _parts(text))


def _parts(text: str) -> list[str]:
    """Divide sources at commas, but not at those in the password or the query of an address of the web."""
    parts = list[str]()
    for part in text.split(","):
        if parts and _goes_on(parts[-1], part.strip()):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _goes_on(before: str, part: str) -> bool:
    """Whether a part belongs to the address before its comma, whose password or query has the comma in it."""
    name, equals, rest = before.strip().partition("=")
    url = rest if equals and scheme_of(rest) and not scheme_of(name) else before.strip()
    if not is_web(url):
        return False
    if "/" not in url.partition("://")[2]:
        return "@" in part
    value = part.rpartition("=")[2]
    is_source = scheme_of(value) is not None or _exists(part) or is_named_as_data(Path(value.partition(":")[0]))
    return "?" in url and not is_source


def _exists(text: str) -> bool:
    return Path(text).expanduser().exists()


def _parse_source(part: str, shown: str) -> Source:
    """Parse one source; `shown` are all of them, for messages."""
    name, colon, weight_text = part.rpartition(":")
    if not part:
        raise DataError(f"{shown!r} has an empty path. Write a.json,b.jsonl or a.json:0.7,b.jsonl:0.3.", code="data.no_path")
    try:
        weight = float(weight_text) if colon and not _exists(part) else None
    except ValueError:
        weight = None
    if weight is None:
        return Source(data=_data(part), text=shown_sources(part))
    if not name or not math.isfinite(weight) or weight <= 0:
        raise DataError(
            f"{shown_sources(part)}: expected a weight above 0 after a path; got {weight_text!r}. Write for example "
            "a.json:0.7,b.jsonl:0.3.",
            code="data.bad_weight",
        )
    return Source(data=_data(name), weight=weight, text=shown_sources(part))


def _at_url(url: str) -> DataSource:
    """Return the source at a URL; raise `DataError` for one that can't be read."""
    if (hub_dataset := _HUB_DATASET.fullmatch(url)) is not None:
        return HubDataset(id=hub_dataset["id"], split=hub_dataset["split"] or "train", revision=hub_dataset["revision"])
    if not url.partition("://")[2].strip("/"):
        raise DataError(
            f"{url} names no file. Write for example {url.partition(':')[0]}://bucket/a.jsonl.", code="data.no_path"
        )
    page = _HUB_PAGE.fullmatch(url)
    if page is None and scheme_of(url) in LIBRARIES:
        match = _REMOTE.fullmatch(url)
        if is_web(url) or match is None:  # the web has no folders, and so no splits
            return RemoteFiles(url=url)
        return RemoteFiles(url=match["url"], split=match["split"])
    if page is not None:
        remedy = f"It is a page about a dataset: write {page['id']}, or {page['id']}:split."
    elif scheme_of(url) == "file":
        remedy = f"Write {url[len('file://') :]}."
    else:
        remedy = f"Download it, or use one of {', '.join(f'{scheme}://' for scheme in LIBRARIES)}."
    raise DataError(
        f"{redacted(url)} can't be read. Expected a file, a folder (folder:split), a URL or a hub dataset (org/name:split). "
        f"{remedy}",
        code="data.address_not_read",
    )


def _data(name: str) -> DataSource:
    """Return the local file or folder of that name; if there is none, the hub dataset that the name may stand for."""
    if scheme_of(name) and not _exists(name):
        return _at_url(name)
    path, match = Path(name).expanduser(), _HUB_ID.fullmatch(name)
    folder, _, split = name.rpartition(":")
    if folder and split and not path.exists() and Path(folder).expanduser().is_dir():
        return LocalFiles(path=Path(folder).expanduser(), split=split)
    if match is None or path.exists() or is_named_as_data(path) or path.parent.exists():
        return LocalFiles(path=path)
    return HubDataset(id=match["id"], config=match["config"], split=match["split"] or "train")
