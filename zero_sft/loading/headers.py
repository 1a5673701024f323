"""Headers of a checkpoint of many files, each read once in the cluster.

A header is small, but opening a file on a network file system is not cheap: 163 files on 256 ranks would be opened 41,728
times. So the files are dealt out to the ranks, and the headers exchanged, some 100 bytes a tensor. Few files cost less than
an exchange: there every rank reads all headers itself.
"""

from collections.abc import Mapping, Sequence

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import CheckpointFiles
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World

FEW_FILES = 8
"""Up to that many files are read by every rank."""


def read_headers_together(files: CheckpointFiles, world: World) -> Sequence[Mapping[str, StoredTensor]] | None:
    """`index.read_headers`, the same on every rank, or None where every rank had better read them itself.

    Every rank, with the same names of files; communicates unless it returns None.

    Raises:
        ZeroSftError: the same on every rank.
    """
    if world.world_size == 1 or len(files.paths) <= FEW_FILES:
        return None
    with collective_stage(world, "reading the checkpoint's headers") as stage:
        mine = {number: files.read(files.paths[number]) for number in range(world.rank, len(files.paths), world.world_size)}
        stage.local = [[number, [each.to_row() for each in header.values()]] for number, header in mine.items()]
    headers = dict(mine)
    for number, rows in (each for theirs in stage.gathered for each in theirs):
        path = str(files.paths[number])
        headers[number] = {tensor.name: tensor for tensor in (StoredTensor.from_row(path, row) for row in rows)}
    return [headers[number] for number in range(len(files.paths))]
