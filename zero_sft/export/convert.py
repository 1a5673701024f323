"""Write the weights of one checkpoint, or the mean of several, as a model folder.

The model is built from its config without weights, so that the files have the names, shapes and dtypes of the run's own
export. One tensor is in memory at a time (with a mean: two). Nothing here communicates.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES
from zero_sft.checkpoint.folder_kind import ADAPTER_CONFIG, BASE_CONFIG
from zero_sft.checkpoint.manifest import find_damage, has_manifest, read_manifest
from zero_sft.cluster.world import World
from zero_sft.config import load_config
from zero_sft.console import progress
from zero_sft.errors import ArgumentError, CheckpointError, ConfigError, ExportError
from zero_sft.export.deepspeed_weights import UniversalWeights, ZeroWeights, find_states
from zero_sft.export.saved_weights import MeanWeights, SavedWeights
from zero_sft.export.sharded_weights import FolderWeights, RankWeights, ShardedWeights
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import ModelSource, fetch_files, fetch_weights, locate_model
from zero_sft.loading.request import ModelSpec
from zero_sft.loading.skeleton import build_on_meta
from zero_sft.plan.partition import full_range
from zero_sft.printable import first_of
from zero_sft.saving import weight_files
from zero_sft.saving.export_layout import ExportLayout, adapter_layout, model_layout, published_layout
from zero_sft.saving.folder import explain_not_placed, explain_write_errors, make_staging
from zero_sft.saving.placing import put_in_place, require_replaceable
from zero_sft.saving.readable import missing_names
from zero_sft.saving.settings import settings_in
from zero_sft.saving.weight_files import WeightPart
from zero_sft.transformers_internals import internal, names_not_saved, set_weight_conversions

logger = logging.getLogger("zero_sft.export")

_SETTINGS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "additional_chat_templates/*")
"""Files of config and tokenizer, for a download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """The checkpoints to export, and the form of the model.

    Attributes:
        checkpoints: the folders of the checkpoints, or of adapters; of several, the mean.
        model: a folder or hub id with config and tokenizer; None: those in the last checkpoint. Of an adapter, the base model;
            None: that which its config names.
        merge_adapter: write the base model with the adapter merged, not the adapter alone.
        dtype: of the weights; None: that in which the run trained.
        verify: whether to compare the checkpoints' files with their manifests first.
    """

    checkpoints: Sequence[Path]
    out: Path
    model: str | None
    hub: HubOptions
    merge_adapter: bool = False
    dtype: torch.dtype | None = None
    max_file_bytes: int = MAX_FILE_BYTES
    verify: bool = True


def export(request: ExportRequest) -> None:
    """Write the model to a hidden folder, which takes the place of `request.out` at the end.

    Raises:
        CheckpointError: a checkpoint can't be read, is damaged, or is of another model.
        ConfigError: there is no config, or none from which a model can be built.
        ExportError: the folder can't be written.
    """
    is_adapter = (request.checkpoints[-1] / ADAPTER_CONFIG).is_file()
    if request.merge_adapter and not is_adapter:
        raise CheckpointError(
            f"{request.checkpoints[-1]} is not an adapter: it has no {ADAPTER_CONFIG}. Leave --merge_adapter out.",
            code="export.not_an_adapter",
        )
    if is_adapter:
        _export_adapter(request)
        return
    trained_dtype = _dtype_of(request.checkpoints[-1])
    dtype = request.dtype or trained_dtype
    use_masters = dtype != trained_dtype or len(request.checkpoints) > 1
    _verify(request, use_masters=use_masters)
    settings = _settings_folder(request)
    config = load_config(settings, request.hub)
    spec = ModelSpec(folder=settings, config=config, dtype=dtype, trust_remote_code=request.hub.trust_remote_code)
    model, state = build_on_meta(spec)
    members = [_open(folder, model, state, use_masters=use_masters) for folder in request.checkpoints]
    weights = members[0] if len(members) == 1 else MeanWeights(members)
    state = _state_to_write(model, state, weights, request.checkpoints[-1])
    layout = _layout(model, state, weights, request.max_file_bytes)
    _write(request.out, layout, weights, state, _settings_files(settings, dtype))


def _layout(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], weights: SavedWeights, max_file_bytes: int
) -> ExportLayout:
    # Without rules, transformers orders the tensors otherwise than in the run's own export.
    has_rules = bool(internal("get_model_conversion_mapping")(model, add_legacy=False))
    if weights.rules is not None or not has_rules:
        set_weight_conversions(model, weights.rules or ())
    layout, reason = published_layout(model, state, max_file_bytes)
    if layout is None:
        logger.warning("the model is written under its own names, not those of its published checkpoint (%s)", reason)
        layout = model_layout(state, max_file_bytes)
    return layout


def _export_adapter(request: ExportRequest) -> None:
    """Write an adapter, or its base model with the adapter merged."""
    from zero_sft.adapters.attach import adapted_on_meta, read_lora_config
    from zero_sft.export.adapter_weights import AdapterWeights, MergedWeights, stored_dtype

    last = request.checkpoints[-1]
    dtype, use_masters = request.dtype, request.dtype is not None or len(request.checkpoints) > 1
    _verify(request, use_masters=use_masters)
    lora = read_lora_config(last)
    source = _base_model(request, lora)
    _require_other_folder(request.out, source)
    settings = fetch_files(source, World.alone(), _SETTINGS)
    spec = ModelSpec(
        folder=settings,
        config=load_config(settings, source.options),
        dtype=dtype or stored_dtype(last),
        trust_remote_code=source.options.trust_remote_code,
    )
    model, _ = build_on_meta(spec)
    adapted = adapted_on_meta(model, lora, merge=request.merge_adapter)
    members = [AdapterWeights(folder, adapted, use_masters=use_masters) for folder in request.checkpoints]
    adapter = members[0] if len(members) == 1 else MeanWeights(members)
    own_files = settings_in(last)  # the tokenizer's, with the run's chat template
    if not request.merge_adapter:
        state = {name: torch.empty(shape, dtype=spec.dtype, device="meta") for name, shape in adapter.shapes.items()}
        names = [name for name in (ADAPTER_CONFIG, BASE_CONFIG) if (last / name).is_file()]
        files = own_files | {name: (last / name).read_bytes() for name in names}
        _write(request.out, adapter_layout(state), adapter, state, files)
        return
    folder = fetch_weights(source, World.alone())
    plain, state = build_on_meta(spec)
    base = FolderWeights(folder, plain, state, spec.dtype)
    merged = MergedWeights(base, adapted, adapter, spec.dtype)
    state = _state_to_write(plain, state, merged, folder)
    files = _settings_files(settings, spec.dtype, last / BASE_CONFIG) | own_files
    _write(request.out, _layout(plain, state, merged, request.max_file_bytes), merged, state, files)


def _require_other_folder(out: Path, source: ModelSource) -> None:
    """Raise `ArgumentError` if the merged model would replace the adapter's base model."""
    if source.folder is not None and out.resolve() == source.folder.resolve():
        raise ArgumentError(
            f"{out} is the folder of the adapter's base model, whose weights would be replaced. Name another folder.",
            code="export.into_the_models_folder",
        )


def _base_model(request: ExportRequest, lora: Any) -> ModelSource:
    """Locate the base model of an adapter.

    Raises:
        CheckpointError: it is neither named nor found.
    """
    name = request.model or lora.base_model_name_or_path
    if not name:
        raise CheckpointError(
            f"{request.checkpoints[-1] / ADAPTER_CONFIG} does not name the base model: name it with --model_name_or_path.",
            code="export.no_base_model",
        )
    revision = request.hub.revision or (lora.revision if request.model is None else None)
    return locate_model(name, dataclasses.replace(request.hub, revision=revision), World.alone())


def _write(
    out: Path, layout: ExportLayout, weights: SavedWeights, state: Mapping[str, torch.Tensor], settings: Mapping[str, bytes]
) -> None:
    with explain_write_errors(out):
        staging = make_staging(out)
    try:
        with explain_write_errors(out):
            free = shutil.disk_usage(staging.folder).free
            if free < layout.nbytes:
                raise ExportError(
                    f"{out} needs {layout.nbytes:,} bytes, and {free:,} are free there. Name a folder on another disk.",
                    code="export.no_room",
                )
            weight_files.write_headers(staging.folder, layout.files)
            for name, content in {**settings, **weight_files.index_file(layout.files)}.items():
                (staging.folder / name).parent.mkdir(exist_ok=True)
                (staging.folder / name).write_bytes(content)
            require_replaceable(staging.target, {path.name for path in staging.folder.iterdir()})
            with progress.task("writing the model", layout.nbytes, progress.BYTES) as task:
                parts = (
                    WeightPart(name=name, flat_range=full_range(tensor.numel()), values=weights.read(name).to(tensor.dtype))
                    for name, tensor in state.items()
                )
                weight_files.write_parts(staging.folder, layout.files, layout.source_maps, parts, advance=task.advance)
    except BaseException:
        shutil.rmtree(staging.folder, ignore_errors=True)
        raise
    with explain_not_placed(staging):
        put_in_place(staging)


def _verify(request: ExportRequest, *, use_masters: bool) -> None:
    """Compare the files of all checkpoints with their manifests, if that is wanted."""
    if request.verify:
        for folder in request.checkpoints:
            _require_intact(folder, with_masters=use_masters)


def _require_intact(folder: Path, *, with_masters: bool) -> None:
    """Compare the files that will be read with the checkpoint's manifest, if it has one."""
    if has_manifest(folder):
        manifest = read_manifest(folder)
        with_ranks_files = with_masters or manifest.hosts
        files = {name: file for name, file in manifest.files.items() if with_ranks_files or not name.startswith("optimizer-")}
        with progress.task(f"verifying {folder.name}"):
            damage = find_damage(folder, dataclasses.replace(manifest, files=files), verify=True)
        if damage:
            raise CheckpointError(f"{folder} is damaged: {damage}. Name another checkpoint.", code="export.file_damaged")


def _settings_folder(request: ExportRequest) -> Path:
    """Return a local folder with config and tokenizer."""
    if request.model is not None:
        return fetch_files(locate_model(request.model, request.hub, World.alone()), World.alone(), _SETTINGS)
    checkpoint = request.checkpoints[-1]
    for folder in (checkpoint, checkpoint.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"{checkpoint} has no config.json. Name the model with which the run began, for its config and its tokenizer: "
        "--model_name_or_path.",
        code="config.missing",
    )


def _dtype_of(folder: Path) -> torch.dtype:
    """Return the dtype in which the run trained."""
    return getattr(torch, read_manifest(folder).dtype) if has_manifest(folder) else _open_deepspeed(folder).dtype


def _open(folder: Path, model: PreTrainedModel, state: Mapping[str, torch.Tensor], *, use_masters: bool) -> SavedWeights:
    """Open a checkpoint in any of the formats.

    Raises:
        CheckpointError: it is in none of them, or can't be read.
    """
    if has_manifest(folder) and read_manifest(folder).hosts:
        return RankWeights(folder, use_masters=use_masters)
    if has_manifest(folder):
        return ShardedWeights(folder, model, state, use_masters=use_masters)
    return _open_deepspeed(folder)


def _open_deepspeed(folder: Path) -> ZeroWeights | UniversalWeights:
    states = find_states(folder)
    if states is None:
        raise CheckpointError(
            f"{folder} has neither manifest.json nor states of DeepSpeed. Name the folder of a checkpoint: checkpoint-N of "
            "this project's runs or of the Hugging Face Trainer, global_stepN of DeepSpeed, or a universal checkpoint.",
            code="export.no_checkpoint",
        )
    return UniversalWeights(states) if (states / "zero").is_dir() else ZeroWeights(states)


def _state_to_write(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], weights: SavedWeights, folder: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors of the model that the checkpoint has, on meta.

    Raises:
        CheckpointError: it lacks others that a reader can't do without, or has them in another shape, or has more.
    """
    missing = missing_names(model, state, weights.shapes)
    unexpected = [name for name in weights.shapes if name not in state]
    reshaped = [name for name, shape in weights.shapes.items() if name in state and tuple(state[name].shape) != shape]
    problems = [
        f"{what} {first_of(sorted(names))}"
        for what, names in (("it lacks", missing), ("the model lacks", unexpected), ("another shape has", reshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{folder} is not of a {type(model).__name__} with this config: {'; '.join(problems)}. Name the model with which "
            "the run began: --model_name_or_path.",
            code="export.other_model",
        )
    return {name: tensor for name, tensor in state.items() if name in weights.shapes and name not in names_not_saved(model)}


def _settings_files(folder: Path, dtype: torch.dtype, config_as_trained: Path | None = None) -> dict[str, bytes]:
    """Return config and tokenizer, with the dtype of the weights in the config.

    Args:
        config_as_trained: stands for the config in the folder, if it exists.
    """
    files = settings_in(folder)
    is_there = config_as_trained is not None and config_as_trained.is_file()
    config = json.loads(config_as_trained.read_bytes() if config_as_trained is not None and is_there else files["config.json"])
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = name
    config.setdefault("dtype", name)
    return files | {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
