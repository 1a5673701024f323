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


def read_headers_together(files: CheckpointFiles, world: World) -> Sequence[Mapping[str, StoredTensor]] | None:
    """Read all headers together, as `index.read_headers` returns them; None if every rank should read them alone.

    Every rank, with the same file names; communicates unless it returns None.

    Raises:
        ZeroSftError: the same on every rank.
    """
    if world.world_size == 1 or len(files.paths) <= FEW_FILES:
        return None
    with collective_stage(world, "reading the checkpoint's headers") as exchange:
        numbers = range(world.rank, len(files.paths), world.world_size)
        local_headers = {number: files.read(files.paths[number]) for number in numbers}
        exchange.local = [[number, [tensor.to_row() for tensor in header.values()]] for number, header in local_headers.items()]
    headers = dict(local_headers)
    for rank_headers in exchange.gathered:
        for number, rows in rank_headers:
            tensors = [StoredTensor.from_row(str(files.paths[number]), row) for row in rows]
            headers[number] = {tensor.name: tensor for tensor in tensors}
    return [headers[number] for number in range(len(files.paths))]
