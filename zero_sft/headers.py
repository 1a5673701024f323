"""The headers of a checkpoint, each file's read once in the cluster where there are many files and many ranks.

A header is small, but opening a file on a network file system is not cheap: 163 files on 256 ranks would be opened 41,728
times. So the files are dealt out to the ranks, and the headers exchanged, some 100 bytes a tensor.
"""

from zero_sft import distributed
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import CheckpointIndex, assemble, locate
from zero_sft.distributed import World, agreed
from zero_sft.request import Request
from zero_sft.storage import torch_zip

FEW_FILES = 8
"""Up to that many files every rank reads all headers itself, which costs less than an exchange."""


def read_index(request: Request, world: World) -> CheckpointIndex:
    """The index of the checkpoint, the same on every rank. Every rank; communicates.

    Raises:
        ZeroSftError: the same on every rank; also where ranks see different files.
    """
    with agreed(world, "looking for the checkpoint's files"):
        files = locate(request.folder, torch_zip.read_header, request.variant)
    distributed.agree_on(world, "checkpoint's files", files.sizes())
    dealt_out = world.world_size > 1 and len(files.paths) > FEW_FILES
    mine = range(world.rank, len(files.paths), world.world_size) if dealt_out else range(len(files.paths))
    with agreed(world, "reading the checkpoint's headers"):
        headers = {number: files.read(files.paths[number]) for number in mine}
    if dealt_out:
        rows = [[number, [each.to_row() for each in header.values()]] for number, header in headers.items()]
        for number, tensors in (each for theirs in distributed.exchange(world, rows) for each in theirs):
            path = str(files.paths[number])
            headers[number] = {tensor.name: tensor for tensor in (StoredTensor.from_row(path, row) for row in tensors)}
    with agreed(world, "putting the checkpoint's index together"):
        return assemble(files, [headers[number] for number in range(len(files.paths))])
