"""Load a safetensors checkpoint into shards with other libraries: one function per library.

Every rank calls the function after gloo is initialised. It returns an object that keeps the rank's share of every tensor in
private memory. If the library leaves the choice, rank r of N holds the rows `[r*n//N, (r+1)*n//N)` of a tensor with n rows.
All read through the page cache, since the comparison is with a warm cache; two libraries would bypass it by default (O_DIRECT).
Settings in the environment take precedence over those made here. Left out: libraries that need a GPU.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero_sft.cluster.world import World

_MODULES = {
    "torch_dcp": ("torch.distributed.checkpoint.hf_storage", "torch.distributed.fsdp", "transformers"),
    "safetensors_slices": ("safetensors.torch",),
    "fastsafetensors": ("fastsafetensors",),
    "runai_streamer": ("runai_model_streamer",),
    "runai_ranges": ("runai_model_streamer",),
}


def _files(folder: Path) -> list[str]:
    """Return the safetensors files, in the same order on every rank."""
    return [str(path) for path in sorted(folder.glob("*.safetensors"))]


def _rows(count: int, world: "World") -> slice:
    """Return this rank's slice of `count` rows. Worked example: rank 1 of 3 has [3, 6) of 10 rows."""
    return slice(world.rank * count // world.world_size, (world.rank + 1) * count // world.world_size)


def _threads(world: "World") -> int:
    """Return a rank's share of the cores, but at least two, so that one thread reads while the other waits for a page."""
    return max(2, len(os.sched_getaffinity(0)) // world.world_size)


def torch_dcp(folder: Path, world: "World") -> object:
    """Shard a meta model with FSDP2 (layer by layer, then the rest), and fill it with torch's distributed checkpoint.

    Each rank copies its rows from a mapping of the files; only plans are communicated. A thread reads whole files, so only one
    thread reads a single-file checkpoint. The model is ready to train: its buffers, which no checkpoint holds, are computed.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (world.world_size,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder), thread_count=_threads(world)))
    return model


def safetensors_slices(folder: Path, world: "World") -> object:
    """Read slices with `get_slice` of the safetensors library, and copy them, as they map the file. No communication."""
    from safetensors import safe_open

    shards = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it can't be iterated)
                rows = file.get_slice(name)
                shards[name] = rows[_rows(rows.get_shape()[0], world)].clone()
    return shards


def fastsafetensors(folder: Path, world: "World") -> object:
    """Read N files together, one on each of N ranks, and scatter their tensors over gloo with the library's `get_sharded`.

    Rank 0 alone reads a single-file checkpoint, into its memory. A tensor whose number of rows N does not divide can't be
    scattered: it is broadcast, and each rank keeps its rows.
    """
    os.environ.setdefault("FASTSAFETENSORS_ODIRECT", "0")
    import torch.distributed as dist
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", nogds=True, max_threads=_threads(world))
    files, size, shards = _files(folder), world.world_size, {}
    for first in range(0, len(files), size):
        loader.add_filenames({rank: files[first + rank : first + rank + 1] for rank in range(size)})
        buffer = loader.copy_files_to_device()
        for name in loader.get_keys():
            count = loader.get_shape(name)[0]
            if count % size == 0:
                shards[name] = buffer.get_sharded(name, dim=0)
            else:
                shards[name] = buffer.get_tensor(name)[_rows(count, world)].clone()
        buffer.close()
        loader.reset()
    loader.close()
    return shards


def _runai_settings(world: "World") -> None:
    """Set plain reads: as fast from the page cache as io_uring, but counted by the kernel (`rchar`), which io_uring is not."""
    os.environ.setdefault("RUNAI_STREAMER_FS_STRATEGY", "sync_buffered")
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", str(_threads(world)))


def runai_streamer(folder: Path, world: "World") -> object:
    """Stream whole tensors with Run:ai's `SafetensorsStreamer`: every rank reads all files and copies its rows.

    Left out: its distributed mode, in which each rank reads a share of the tensors and broadcasts them whole. Over gloo that
    took more than twice as long, and two buffers of up to 1 GiB per rank. Here the ranks exchange only their host names.
    """
    _runai_settings(world)
    os.environ.setdefault("RUNAI_STREAMER_MEMORY_LIMIT", "0")  # a buffer of one tensor: the least memory, at the same speed
    from runai_model_streamer import SafetensorsStreamer

    shards = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(_files(folder), device="cpu", owned=False)
        for name, tensor in streamer.get_tensors():
            shards[name] = tensor[_rows(len(tensor), world)].clone()
    return shards


def runai_ranges(folder: Path, world: "World") -> object:
    """Read the byte ranges of this rank's rows with Run:ai's `FileStreamer`, and keep its buffers. No communication.

    This is the best case for that library: this project's header reader finds the byte ranges.
    """
    _runai_settings(world)
    import torch
    from runai_model_streamer import FileChunks, FileStreamer

    from zero_sft.checkpoint.header import read_header

    requests, tensors = [], []
    for index, path in enumerate(_files(folder)):
        stored = sorted(read_header(path).values(), key=lambda tensor: tensor.offset_bytes)
        offsets, sizes = [], []
        for tensor in stored:
            rows, row_nbytes = _rows(tensor.shape[0], world), tensor.nbytes // tensor.shape[0]
            offsets.append(tensor.offset_bytes + rows.start * row_nbytes)
            sizes.append((rows.stop - rows.start) * row_nbytes)
        requests.append(FileChunks(index, path, offsets, sizes))
        tensors.append(stored)
    shards = {}
    with FileStreamer() as streamer:
        streamer.stream_files(requests)
        for file, index, content in streamer.get_chunks():  # uint8 (1, nbytes)
            tensor = tensors[file][index]
            shards[tensor.name] = content.view(torch.bfloat16).view(-1, *tensor.shape[1:])
    return shards


RIVALS: dict[str, Callable[[Path, "World"], object]] = {
    "torch_dcp": torch_dcp,
    "safetensors_slices": safetensors_slices,
    "fastsafetensors": fastsafetensors,
    "runai_streamer": runai_streamer,
    "runai_ranges": runai_ranges,
}


def available() -> dict[str, str | None]:
    """Import all libraries, and return for each name None or the import error. Called before the clock starts."""
    reasons: dict[str, str | None] = dict.fromkeys(RIVALS)
    for name, modules in _MODULES.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: a shared library for another platform
            reasons[name] = str(error)
    return reasons
