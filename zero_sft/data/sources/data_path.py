"""Where samples come from: what `--data_path` names, `a.json,b.jsonl` or with weights `a.json:0.7,org/name:train_sft:0.3`.

A folder is named as a dataset of the hub is, `folder` or `folder:split`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zero_sft.data.sources.hub_dataset import HubDataset
from zero_sft.data.sources.local_files import LocalFiles, is_named_as_data
from zero_sft.errors import DataError

Data = LocalFiles | HubDataset

_LEAST_SHARE = 1e-6
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ADDRESS_OF_HUB = re.compile(r"(hf://|https?://(www\.)?(huggingface\.co|hf\.co)/)datasets/(?P<id>[\w.-]+/[\w.-]+?)([@/?#:].*)?")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>\w[\w.-]*)(?=:))?(:(?P<split>\w[\w.-]*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data, and its share of the mixture; None: all of it, once. `text`: as it was written, for messages."""

    data: Data
    weight: float | None = None
    text: str = field(default="", compare=False)


def parse_sources(text: str) -> tuple[Source, ...]:
    """The sources that `--data_path` names. An existing path is one source, whatever characters it has.

    Looks paths up, so nodes that see other files may come to other sources. Each rank calls it once for each argument.

    Raises:
        DataError: an empty part, an address such as https://..., a weight that is no number above 0, or weights for some of the
            sources only.
    """
    if not text.strip():
        raise DataError(
            "--data_path or --eval_data_path is empty: is a variable not set? Name a file, a folder or a dataset.",
            code="data.no_path",
        )
    if _exists(text):
        return (Source(data=_data(text), text=text),)
    sources = tuple(_source(part.strip(), text) for part in text.split(","))
    weighted = sum(each.weight is not None for each in sources)
    if 0 < weighted < len(sources):
        raise DataError(
            f"{text}: weights for {weighted} of {len(sources)} sources. Give each a weight (a number after a colon), or none.",
            code="data.weights_missing",
        )
    shares = [each.weight for each in sources if each.weight is not None]
    if shares and min(shares) < _LEAST_SHARE * max(shares):
        raise DataError(
            f"{text}: the weights {max(shares):g} and {min(shares):g} are too far apart. Leave the smaller one out.",
            code="data.weights_too_far_apart",
        )
    return sources


def require_sources(sources: Sequence[Source], *, to_evaluate: bool = False) -> None:
    """Raise `DataError` where a path names no file, before work is spent on the others. Any rank; does not communicate.

    Args:
        to_evaluate: a folder with several splits must say which one: `train` is not what is held out.
    """
    for source in sources:
        source.data.state()
        held_out = source.data.held_out() if to_evaluate else None
        if held_out:
            raise DataError(
                f"--eval_data_path {source.data.name} has several splits. Name the one to evaluate on: "
                f"--eval_data_path {source.data.name}:{held_out}.",
                code="data.eval_split_unnamed",
            )


def require_outputs_outside(sources: Sequence[Source], output_dir: str) -> None:
    """Raise `DataError` where what a run writes would be read as data by the next. Any rank; does not communicate."""
    for source in sources:
        source.data.require_outside(Path(output_dir), option="--output_dir", code="data.output_inside_data")


def _exists(text: str) -> bool:
    return Path(text).expanduser().exists()


def _source(part: str, text: str) -> Source:
    name, colon, weight = part.rpartition(":")
    if _ADDRESS.match(part) and not _exists(part):
        raise _address(part)
    if not part:
        raise DataError(f"{text!r} names an empty path. Write a.json,b.jsonl or a.json:0.7,b.jsonl:0.3.", code="data.no_path")
    if not colon or _exists(part):
        return Source(data=_data(part), text=part)
    try:
        share = float(weight)
    except ValueError:
        return Source(data=_data(part), text=part)
    if not name or not math.isfinite(share) or share <= 0:
        raise DataError(
            f"{part}: a weight is a number above 0, after a path; got {weight!r}. Write a.json:0.7,b.jsonl:0.3.",
            code="data.bad_weight",
        )
    return Source(data=_data(name), weight=share, text=part)


def _address(part: str) -> DataError:
    """The error of `https://...` and its like."""
    hub, is_file = _ADDRESS_OF_HUB.fullmatch(part), part.lower().startswith("file://")
    remedy = "Download it, and name the file or folder."
    if hub is not None:
        remedy = f"Write {hub['id']}, or {hub['id']}:split, or download it and name the file or folder."
    elif is_file:
        remedy = f"Write {part[len('file://') :]}."
    return DataError(
        f"{part}: an address is not read. Expected a file, a folder (folder:split), or a dataset of the hub (org/name:split). "
        f"{remedy}",
        code="data.address_not_read",
    )


def _data(name: str) -> Data:
    """A file or folder, or, where there is none of that name, the dataset of the hub that it may name."""
    path, match = Path(name).expanduser(), _HUB_ID.fullmatch(name)
    folder, _, split = name.rpartition(":")
    if folder and split and not path.exists() and Path(folder).expanduser().is_dir():
        return LocalFiles(path=Path(folder).expanduser(), split=split)
    if match is None or path.exists() or is_named_as_data(path) or path.parent.exists():
        return LocalFiles(path=path)
    return HubDataset(id=match["id"], config=match["config"], split=match["split"] or "train")
