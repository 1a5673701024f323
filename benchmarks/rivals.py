"""Other libraries that bring a safetensors checkpoint into shards, each one function for a benchmark's rank to call.

Every one runs on every rank, after gloo is up, and returns what keeps this rank's share of every tensor alive, in private
memory. Where a library lets its caller choose, rank r of N holds rows `[r*n//N, (r+1)*n//N)` of a tensor with n rows.
All read through the page cache: two of them would read the disk again by default (O_DIRECT), and a warm cache is what the
others are measured with. Settings in the environment win over those made here. Left out: anything that needs a GPU.
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
    """The safetensors files, in the same order on every rank."""
    return [str(path) for path in sorted(folder.glob("*.safetensors"))]


def _rows(count: int, world: "World") -> slice:
    """This rank's rows of `count`: of 10, rank 1 of 3 has [3, 6)."""
    return slice(world.rank * count // world.world_size, (world.rank + 1) * count // world.world_size)


def _threads(world: "World") -> int:
    """A rank's share of the cores, and two at least, so that one reads while the other waits for a page."""
    return max(2, len(os.sched_getaffinity(0)) // world.world_size)


def torch_dcp(folder: Path, world: "World") -> object:
    """A meta model, sharded by FSDP2 (a layer at a time, then the rest) and filled by torch's distributed checkpoint.

    Each rank copies its rows from a mapping of the files; only plans are communicated. Threads share whole files, so that
    one file is read by one thread. The model could train: its buffers, which no checkpoint holds, are made anew.
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
    """`get_slice` of the safetensors library. It gives views of a mapping of the file, hence the copy. No communication."""
    from safetensors import safe_open

    held = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it can't be iterated)
                rows = file.get_slice(name)
                held[name] = rows[_rows(rows.get_shape()[0], world)].clone()
    return held


def fastsafetensors(folder: Path, world: "World") -> object:
    """N files at a time, each read whole by one rank, which scatters its tensors over gloo: the library's `get_sharded`.

    So one file is read by rank 0 alone, into its memory. A tensor whose rows N does not divide can't be scattered: it is
    broadcast, and cut.
    """
    os.environ.setdefault("FASTSAFETENSORS_ODIRECT", "0")
    import torch.distributed as dist
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", nogds=True, max_threads=_threads(world))
    files, size, held = _files(folder), world.world_size, {}
    for first in range(0, len(files), size):
        loader.add_filenames({rank: files[first + rank : first + rank + 1] for rank in range(size)})
        buffer = loader.copy_files_to_device()
        for name in loader.get_keys():
            count = loader.get_shape(name)[0]
            if count % size == 0:
                held[name] = buffer.get_sharded(name, dim=0)
            else:
                held[name] = buffer.get_tensor(name)[_rows(count, world)].clone()
        buffer.close()
        loader.reset()
    loader.close()
    return held


def _runai_settings(world: "World") -> None:
    """Plain reads: as fast from the page cache as io_uring's, and counted by the kernel (`rchar`), which those are not."""
    os.environ.setdefault("RUNAI_STREAMER_FS_STRATEGY", "sync_buffered")
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", str(_threads(world)))


def runai_streamer(folder: Path, world: "World") -> object:
    """Run:ai's `SafetensorsStreamer`. It streams whole tensors: every rank reads all files, and copies its rows.

    Left out: its distributed mode, in which a rank reads a share of the tensors and broadcasts them whole. Over gloo that
    took more than twice as long, and two buffers of up to 1 GiB a rank. Here the ranks only exchange their host names.
    """
    _runai_settings(world)
    os.environ.setdefault("RUNAI_STREAMER_MEMORY_LIMIT", "0")  # a buffer of one tensor: the least memory, and no slower
    from runai_model_streamer import SafetensorsStreamer

    held = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(_files(folder), device="cpu", owned=False)
        for name, tensor in streamer.get_tensors():
            held[name] = tensor[_rows(len(tensor), world)].clone()
    return held


def runai_ranges(folder: Path, world: "World") -> object:
    """Run:ai's `FileStreamer`, on the byte ranges of this rank's rows, which stay in its buffers. No communication.

    What that library can do at best. Which bytes to ask for is found by this project's reader of headers.
    """
    _runai_settings(world)
    import torch
    from runai_model_streamer import FileChunks, FileStreamer

    from zero_sft.checkpoint.header import read_header

    requests, tensors = [], []
    for index, path in enumerate(_files(folder)):
        stored = sorted(read_header(path).values(), key=lambda each: each.offset_bytes)
        offsets, sizes = [], []
        for each in stored:
            rows, row_nbytes = _rows(each.shape[0], world), each.nbytes // each.shape[0]
            offsets.append(each.offset_bytes + rows.start * row_nbytes)
            sizes.append((rows.stop - rows.start) * row_nbytes)
        requests.append(FileChunks(index, path, offsets, sizes))
        tensors.append(stored)
    held = {}
    with FileStreamer() as streamer:
        streamer.stream_files(requests)
        for file, index, content in streamer.get_chunks():  # uint8 (1, nbytes)
            each = tensors[file][index]
            held[each.name] = content.view(torch.bfloat16).view(-1, *each.shape[1:])
    return held


RIVALS: dict[str, Callable[[Path, "World"], object]] = {
    "torch_dcp": torch_dcp,
    "safetensors_slices": safetensors_slices,
    "fastsafetensors": fastsafetensors,
    "runai_streamer": runai_streamer,
    "runai_ranges": runai_ranges,
}


def available() -> dict[str, str | None]:
    """Each rival's name: None, or why its library can't be imported. Called before the clock starts, imports cost nothing."""
    reasons: dict[str, str | None] = dict.fromkeys(RIVALS)
    for name, modules in _MODULES.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: a shared library for another platform
            reasons[name] = str(error)
    return reasons
