"""Prepare data once in the cluster, and map it on every rank.

1. Rank 0 prepares the data with worker processes, stores it in the cache folder, and broadcasts the cache keys.
2. The first rank of each node looks up the keys. If the cache folder is shared, it finds the data; otherwise it prepares the
   same data for its node.
3. The other ranks map the data.

Waiting ranks use the control group, so the training group's timeout does not apply.
"""

import json

from transformers import PreTrainedTokenizerBase

from zero_sft.cluster.control_group import LONG_WAIT, broadcast_bytes
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
    """Run `prepare_sources` once for all ranks. Every rank; communicates.

    Raises:
        DataError: an error of `prepare_sources`, raised on every rank; or a path with different data on different nodes.
    """
    prepared = None
    with collective_stage(world, STAGE, LONG_WAIT):
        if world.is_main:
            prepared = prepare_sources(spec, tokenizer, template)
    encoded_keys = None if prepared is None else json.dumps(prepared.keys).encode()
    keys = json.loads(broadcast_bytes(world, encoded_keys))

    def open_or_prepare() -> PreparedDataset:
        opened = prepared or open_sources(spec, tokenizer, template, keys, verify=world.leads_node)
        if opened is not None:
            return opened
        made = prepare_sources(spec, tokenizer, template)  # this node's cache does not have the data
        if made.keys != keys:
            raise DataError(
                f"{spec.name} contains different data on the node of rank {world.rank} than on the node of rank 0. Put the "
                "data on a file system that all nodes share, or copy it to every node.",
                code="data.differs_between_nodes",
            )
        return made

    return run_stage(world, STAGE, open_or_prepare, main_first=True, timeout=LONG_WAIT)
