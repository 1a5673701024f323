"""The header of a `pytorch_model.bin`: the byte range of each tensor in the zip file that `torch.save` writes.

torch reads the pickle with `weights_only` and fake tensors, so no data is touched and no code of the file runs. Under
`FakeTensorMode`, `torch.load` (since torch 2.7) records the offset of every storage in the file. Tensors may be views with any
strides and may share a storage. Left out: the format of torch before 1.6, which is not a zip file.
Its twin is `checkpoint/header.py`; this one needs torch, which `checkpoint/` must not import.
"""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zero_sft.checkpoint.file_identity import explain_read_errors
from zero_sft.checkpoint.folder_kind import describe_placeholder
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.errors import CheckpointError
from zero_sft.storage.dtypes import STORED_DTYPES


def read_bin_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Find the tensors of one file without reading their data.

    Raises:
        CheckpointError: the file is not a zip file, is damaged, needs code to be unpickled, or is not a mapping of names to
            tensors.
    """
    path = str(path)
    size_bytes = _size_of_zip(path)
    try:
        with FakeTensorMode():
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors, which are never unpickled here: {reason[:300]}\n"
            "Download it again, or use the model's safetensors files.",
            code="checkpoint.unsafe_or_damaged",
        ) from error
    kind = type(content).__name__
    values: dict[Any, Any] = cast("dict[Any, Any]", content) if isinstance(content, dict) else {None: content}
    if not all(isinstance(name, str) for name in values):
        raise CheckpointError(
            f"{path} holds a {kind}, expected a mapping from names to tensors.", code="checkpoint.not_a_mapping"
        )
    tensors = {name: _stored(path, name, value, size_bytes) for name, value in values.items() if torch.is_tensor(value)}
    nested = [name for name, value in values.items() if _holds_tensors(value)]
    if nested and not tensors:
        raise CheckpointError(
            f"{path} holds no tensors, but a mapping of tensors under {nested[0]!r}. Save only that mapping, once, in Python:\n"
            f"  import torch; torch.save(torch.load({path!r}, weights_only=True)[{nested[0]!r}], {path!r})",
            code="checkpoint.nested_mapping",
        )
    return tensors


def _holds_tensors(value: Any) -> bool:
    """True if `value` is a mapping with a tensor in it."""
    return isinstance(value, dict) and any(map(torch.is_tensor, cast("dict[Any, Any]", value).values()))


def _size_of_zip(path: str) -> int:
    with explain_read_errors(path):
        size_bytes = Path(path).stat().st_size
        is_zip = bool(size_bytes) and _is_zip(path)
    if is_zip and _is_compressed(path):
        raise CheckpointError(
            f"{path} is compressed, so its tensors can't be read in place. Save it uncompressed, once, in Python:\n"
            f"  import torch; torch.save(torch.load({path!r}, weights_only=True), {path!r})",
            code="checkpoint.compressed",
        )
    if not is_zip and describe_placeholder(Path(path)):
        raise CheckpointError(describe_placeholder(Path(path)), code="checkpoint.placeholder_file")
    if not is_zip:
        raise CheckpointError(
            f"{path} is not a zip file: it is truncated, or was saved by a torch before 1.6. If it is complete, convert it "
            "once, in Python:\n"
            f"  import torch; torch.save(torch.load({path!r}, weights_only=True), {path!r})",
            code="checkpoint.not_a_zip",
        )
    return size_bytes


def _is_zip(path: str) -> bool:
    with contextlib.suppress(zipfile.BadZipFile):  # Python before 3.13 raises it for some damaged files
        return zipfile.is_zipfile(path)
    return False


def _is_compressed(path: str) -> bool:
    # torch.load reports a bad one.
    with contextlib.suppress(zipfile.BadZipFile, ValueError, NotImplementedError, OSError), zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    return False


def _stored(path: str, name: str, tensor: torch.Tensor, size_bytes: int) -> StoredTensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{path}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}; expected a dense tensor of a supported dtype.",
            code="checkpoint.not_a_plain_tensor",
        )
    if tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(
            f"{path}: {name!r} is a negated or conjugated view, which the file's bytes don't show. Save it resolved, once, "
            "in Python:\n  import torch; torch.save({name: tensor.resolve_neg().resolve_conj() for name, tensor "
            f"in torch.load({path!r}, weights_only=True).items()}}, {path!r})",
            code="checkpoint.not_a_plain_tensor",
        )
    itemsize, shape, strides = tensor.element_size(), tuple(tensor.shape), tuple(tensor.stride())
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    span_numel = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if tensor.numel() else 0
    if start is None or start + (tensor.storage_offset() + span_numel) * itemsize > size_bytes:
        raise CheckpointError(
            f"{path}: the bytes of {name!r} are not in the file. Download it again.", code="checkpoint.truncated"
        )
    return StoredTensor(
        name=name,
        file=path,
        dtype=STORED_DTYPES[tensor.dtype],
        shape=shape,
        offset_bytes=start + tensor.storage_offset() * itemsize,
        nbytes=span_numel * itemsize,
        strides=None if tensor.is_contiguous() else strides,
    )
