"""Fetch the headers of a checkpoint on the hub: its index file and the first bytes of each file, without the data."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import INDEX_FILE, SINGLE_FILE, of_variant, read_weight_map
from zero_sft.cluster.world import World
from zero_sft.errors import CheckpointError
from zero_sft.hub.source import ModelSource, fetch_files

_PARALLEL_REQUESTS = 8


def fetch_headers(source: ModelSource) -> dict[str, StoredTensor] | None:
    """Fetch the headers of a repository's safetensors files, or return None if it has none. One rank.

    Raises:
        CheckpointError: an index or header is damaged, or the hub can't provide it.
    """
    from huggingface_hub import parse_safetensors_file_metadata
    from huggingface_hub.errors import EntryNotFoundError

    repo, options = source.name, source.options
    index_name = of_variant(INDEX_FILE, options.variant)
    index = fetch_files(source, World.alone(), (index_name,)) / index_name
    files = sorted(set(read_weight_map(index).values())) if index.is_file() else [of_variant(SINGLE_FILE, options.variant)]
    fetch = partial(parse_safetensors_file_metadata, repo, revision=options.revision, token=options.token)
    try:
        with ThreadPoolExecutor(_PARALLEL_REQUESTS, thread_name_prefix="headers") as pool:
            headers = list(pool.map(fetch, files))
    except EntryNotFoundError as error:
        if index.is_file():
            raise CheckpointError(
                f"{repo}: {index_name} names a file that the repository does not have: {error}",
                code="estimate.weight_file_missing",
            ) from error
        return None
    except Exception as error:  # errors of the hub's client and of its transport
        raise CheckpointError(
            f"the headers of {repo} can't be fetched: {error}. Try again, or name a local folder.",
            code="estimate.headers_not_fetched",
        ) from error
    return {
        name: StoredTensor(
            name=name,
            file=file,
            dtype=info.dtype,
            shape=tuple(info.shape),
            offset_bytes=info.data_offsets[0],  # from the start of the file's data, which is enough to plan requests
            nbytes=info.data_offsets[1] - info.data_offsets[0],
        )
        for file, header in zip(files, headers, strict=True)
        for name, info in header.tensors.items()
    }
