"""Data prepared once in the cluster, and mapped by every rank.

Rank 0 prepares, with processes of its own, into a folder that other nodes see or not; it says under which keys. Then the first
rank of each node looks: where the folder is shared it finds all there, else it prepares the same for its node. Then the others
map it. Nobody waits on the training group's clock.
"""

import json

from transformers import PreTrainedTokenizerBase

from zero_sft.cluster.control_group import DOWNLOAD_TIMEOUT, broadcast_bytes
from zero_sft.cluster.stages import collective_stage, run_stage
from zero_sft.cluster.world import World
from zero_sft.data.dataset import PreparedDataset
from zero_sft.data.mixture import DatasetSpec, open_sources, prepare_sources
from zero_sft.data.templates.choose import Template
from zero_sft.errors import DataError

STAGE = "preparing the data"


def prepare_distributed(
    spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template, world: World
) -> PreparedDataset:
    """`prepare_sources`, once for all ranks. Every rank; communicates.

    Raises:
        DataError: what `prepare_sources` raises, on every rank; or nodes that have other data under the same path.
    """
    own = None
    with collective_stage(world, STAGE, DOWNLOAD_TIMEOUT):
        if world.is_main:
            own = prepare_sources(spec, tokenizer, template)
    told = None if own is None else json.dumps(own.keys).encode()
    keys = json.loads(broadcast_bytes(world, told))

    def act() -> PreparedDataset:
        opened = own or open_sources(spec, tokenizer, template, keys, verify=world.leads_node)
        return opened or _alone(spec, tokenizer, template, keys, world)

    return run_stage(world, STAGE, act, main_first=True, timeout=DOWNLOAD_TIMEOUT)


def _alone(
    spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, template: Template, keys: list[str], world: World
) -> PreparedDataset:
    """What is not to be found on this node, prepared here."""
    prepared = prepare_sources(spec, tokenizer, template)
    if prepared.keys != keys:
        raise DataError(
            f"{spec.name} holds other data on rank {world.rank}'s node than on rank 0's. Put the data on a file system that "
            "all nodes share, or copy it to every node.",
            code="data.differs_between_nodes",
        )
    return prepared
