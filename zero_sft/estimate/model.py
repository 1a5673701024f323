"""Find the model to estimate: a model on the meta device, and the headers of its checkpoint.

Headers are read from a local folder, or fetched from the hub file by file without the data. If there is only a config or no
safetensors file, they are derived: the names and shapes that `save_pretrained` would write, in the dtypes of the config.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from zero_sft.checkpoint.file_layout import lay_out
from zero_sft.checkpoint.header import StoredTensor
from zero_sft.checkpoint.index import read_index
from zero_sft.cluster.world import World
from zero_sft.config import load_config
from zero_sft.conversion.convert import Resolution, published_format, resolve
from zero_sft.conversion.quantized import configured_block_shape, quantizer_for
from zero_sft.errors import CheckpointError, ConfigError
from zero_sft.estimate.remote_headers import fetch_headers
from zero_sft.estimate.storage_profiles import MODELS, shipped_models
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import CONFIG, fetch_files, locate_model
from zero_sft.loading import skeleton
from zero_sft.loading.dtype import requested_dtype
from zero_sft.loading.options import LoadOptions
from zero_sft.loading.request import ModelSpec
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.storage.torch_zip import read_bin_header


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatedModel:
    """A model, the sources of its tensors, and the origin of the headers ("read", "fetched" or "derived")."""

    name: str
    spec: ModelSpec
    model: PreTrainedModel
    state: Mapping[str, torch.Tensor]
    resolution: Resolution
    files: int
    tensors: int
    headers: str

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters of the model by name, on the meta device; a shared parameter appears once."""
        return skeleton.without_ties(self.model, dict(self.model.named_parameters()))

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(param.numel() for param in self.parameters.values())


def find_model(name: str, options: HubOptions, load_options: LoadOptions | None = None) -> EstimatedModel:
    """Find a model by a shipped name, the path of a folder or of a config.json, or a hub id.

    Raises:
        ConfigError: there is no such model, or its config can't be used.
        CheckpointError: the headers are damaged, or the checkpoint does not fit the model.
    """
    load_options = load_options or LoadOptions()
    folder, config, headers, stored = _find(name, options)
    spec = ModelSpec(
        folder=folder,
        config=config,
        dtype=getattr(torch, requested_dtype(load_options.dtype, config)),
        attn_implementation=load_options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    quantizer = quantizer_for(config, name)
    model, state = skeleton.build_on_meta(spec)
    if stored is None:
        headers, stored = "derived", derive_headers(model, state, configured_block_shape(quantizer))
    return EstimatedModel(
        name=name,
        spec=spec,
        model=model,
        state=state,
        resolution=resolve(model, state, stored, quantizer),
        files=len({tensor.file for tensor in stored.values()}),
        tensors=len(stored),
        headers=headers,
    )


def _find(name: str, options: HubOptions) -> tuple[Path, PreTrainedConfig, str, Mapping[str, StoredTensor] | None]:
    """Return the config's folder, the config, the origin of the headers, and the headers, if there are any."""
    path = Path(name).expanduser()
    if name in shipped_models():
        path = MODELS / f"{name}.json"
    if path.is_file():
        return path.parent, _from_file(path), "derived", None
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*"))
        config = load_config(path, options)
        return path, config, "read", read_index(path, read_bin_header, options.variant).tensors if has_weights else None
    try:
        source = locate_model(name, options, World.alone())
        folder = fetch_files(source, World.alone(), CONFIG)
    except CheckpointError as error:
        raise ConfigError(
            f"{error}\nModels that ship as configs: {', '.join(shipped_models())}.", code="estimate.no_such_model"
        ) from error
    return folder, load_config(folder, options), "fetched", fetch_headers(source)


def _from_file(path: Path) -> PreTrainedConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(raw.pop("model_type"), **raw)
    except Exception as error:  # each model type raises different exceptions
        raise ConfigError(
            f"{path} is not a usable model config: {error!r}. Name the config.json of a model.", code="config.unusable"
        ) from error


def derive_headers(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], block: tuple[int, int] | None
) -> dict[str, StoredTensor]:
    """Derive the headers of a published checkpoint of this model, except for the order of its tensors.

    With `block` (rows, columns), the checkpoint stores matrices of linear layers and experts as 8-bit floats with one scale per
    block, as DeepSeek-V3 does. Its multi-token prediction module, which training does not read, is not derived.
    """
    published = published_format(model, skeleton.without_ties(model, state))
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    for name, tensor in published.items():
        shape = tuple(tensor.shape)
        if block is not None and _is_quantized(model, state, name, tensor):
            rows.append((name, "F8_E4M3", shape))
            rows.append((f"{name}_scale_inv", "F32", (-(-shape[0] // block[0]), -(-shape[1] // block[1]))))
        else:
            rows.append((name, STORED_DTYPES[tensor.dtype], shape))
    return {tensor.name: tensor for file in lay_out(rows) for tensor in file.tensors}


def _is_quantized(model: PreTrainedModel, state: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor) -> bool:
    """Return True for matrices of linear layers and merged matrices (experts), but not for the output head."""
    if tensor.dim() != 2 or not name.endswith(".weight"):
        return False
    if name not in state:
        return True
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
