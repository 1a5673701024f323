"""Read the headers of a checkpoint of many files, each once in the whole cluster.

A header is small, but opening a file on a network file system is slow: 256 ranks would open 163 files 41,728 times. So each
rank reads some of the files, and the ranks exchange the headers, about 100 bytes per tensor. With few files the exchange would
cost more than it saves: then every rank reads all headers.
"""

from collections.abc import Mapping, Sequence

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import CheckpointFiles
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World

FEW_FILES = 8
"""If the checkpoint has at most this many files, every rank reads all headers."""


def read_headers_together(files: CheckpointFiles, world: World) -> Sequence[Mapping[str, StoredTensor]]:
    """Read the headers of all files, in the order of `files.identities`. Every rank, with the same file names; communicates.

    Raises:
        ZeroSftError: the same on every rank.
    """
    title, paths = "reading the checkpoint's headers", list(files.identities)
    if world.world_size == 1 or len(paths) <= FEW_FILES:
        with collective_stage(world, title):
            headers = [files.read_header(path) for path in paths]
        return headers
    with collective_stage(world, title) as exchange:
        exchange.local = [
            [tensor.to_row() for tensor in files.read_header(path).values()] for path in paths[world.rank :: world.world_size]
        ]
    merged: list[Mapping[str, StoredTensor]] = []
    for number, path in enumerate(paths):
        rows = exchange.gathered[number % world.world_size][number // world.world_size]
        merged.append({tensor.name: tensor for tensor in (StoredTensor.from_row(path, row) for row in rows)})
    return merged
