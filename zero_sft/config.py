"""Read a model's config, prepare it for training, and require that all ranks have the same. `rope.py` extends the context."""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zero_sft.checkpoint.folder_kind import adapter_warning, describe_broken_link, describe_folder, describe_placeholder
from zero_sft.cluster.stages import collective_stage, dotted, require_identical, run_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ConfigError
from zero_sft.hub.options import HubOptions
from zero_sft.hub.source import CONFIG, ModelSource, agree_on_source, fetch_files, local_folder, require_name
from zero_sft.options.keywords import read_keywords, takes_options
from zero_sft.rope import text_config, with_context
from zero_sft.storage.default_device import cpu_by_default
from zero_sft.transformers_internals import NAME_KEY
from zero_sft.zero.process_group import connect

logger = logging.getLogger(__name__)


@takes_options(HubOptions)
@cpu_by_default()
def prepare_config(
    model_name_or_path: str, *, model_max_length: int | None = None, rope_parameters: dict | None = None, **options: Any
) -> PreTrainedConfig:
    """Return a model's config, ready for training, the same on every rank. Every rank; communicates.

    Args:
        model_name_or_path: a local folder or a hub id.
        model_max_length: the longest sequence, in tokens. Beyond the model's context its RoPE is scaled linearly.
        rope_parameters: the scaling to use instead, in transformers' terms (`rope_type`, `factor`, ...). They are merged into
            the model's parameters, so that `rope_theta` stays, and win over `model_max_length`.
        trust_remote_code, cache_dir, revision, token, local_files_only, subfolder, variant: as in `from_pretrained`.

    Raises:
        ConfigError: a config or an argument is unusable, or the model's positions can't reach `model_max_length`.
        CheckpointError: the folder does not exist, or the hub can't provide the model.
        DistributedError: the ranks have different configs; the message names the keys and the ranks.
    """
    world = connect(World.detect())
    with collective_stage(world, f"looking for {model_name_or_path}") as exchange:
        (hub,) = read_keywords(options, HubOptions, function=prepare_config)
        name = require_name(model_name_or_path)
        folder = local_folder(name, hub)
        exchange.local = folder is not None
        exchange.must_match = ("arguments of prepare_config", hub.to_match())
    source = agree_on_source(name, hub, folder, exchange.gathered, world)
    return prepare_config_from(source, world, model_max_length=model_max_length, rope_parameters=rope_parameters)


def prepare_config_from(
    source: ModelSource, world: World, *, model_max_length: int | None = None, rope_parameters: dict | None = None
) -> PreTrainedConfig:
    """Prepare the config of a located model, as `prepare_config` does. Every rank; communicates."""
    name, options = source.name, source.options
    folder = fetch_files(source, world, CONFIG)

    def read() -> tuple[PreTrainedConfig, PreTrainedConfig]:
        loaded = load_config(folder, options)
        loaded.name_or_path = name
        ready = with_context(loaded, model_max_length=model_max_length, rope_parameters=rope_parameters)
        return loaded, _with_usable_padding(ready)

    stage = f"reading the config of {name}"
    loaded, config = run_stage(world, stage, read, main_first=options.trust_remote_code)
    require_identical(world, "model config", config_settings(config))
    if world.is_main and adapter_warning(folder):
        logger.warning(adapter_warning(folder))
    texts = (text_config(loaded), text_config(config))
    loaded_padding, padding = (getattr(text, "pad_token_id", None) for text in texts)
    if loaded_padding != padding and world.is_main:
        logger.warning(
            "%s: config.json has pad_token_id %s, and the model has %s embeddings; it is left out", name, loaded_padding,
            text_config(config).vocab_size,
        )  # fmt: skip
    before, after = (getattr(text, "rope_parameters", None) for text in texts)
    if before != after and world.is_main:
        logger.warning("RoPE of %s from %s to %s, for model_max_length %s", name, before, after, model_max_length)
    return config


def _with_usable_padding(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove a padding token that has no embedding, since the model's constructor would fail on it.

    Raises:
        ConfigError: the config states no usable number of embeddings.
    """
    rows = getattr(text_config(config), "vocab_size", None)
    if rows is None:
        return config
    if type(rows) is not int or rows < 1:
        raise ConfigError(
            f"{config.name_or_path}: vocab_size in config.json is {rows!r}, expected a whole number, at least 1. Compare it "
            "with the original.",
            code="config.bad_vocab_size",
        )
    for part in (config, text_config(config)):
        padding = getattr(part, "pad_token_id", None)
        if padding is not None and not -rows <= padding < rows:
            part.pad_token_id = None
    return config


def load_config(folder: Path, options: HubOptions) -> PreTrainedConfig:
    """Read transformers' config object from `folder/config.json`. Any rank; does not communicate.

    Raises:
        ConfigError: the file is missing or unusable.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    model_type, auto_map = raw.get("model_type"), raw.get("auto_map")
    code = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known and not (code and options.trust_remote_code):
        remedy = (
            f"It comes with its own code ({code}): read it, and if you trust it, give --trust_remote_code True."
            if code
            else "If it is spelled right, a newer release may know it: pip install -U transformers"
        )
        raise ConfigError(
            f"{path}: transformers {transformers.__version__} does not know the model type {model_type!r}. {remedy}",
            code="config.unknown_model_type",
        )
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(
            f"{path}: quantization_config is {quantization!r}, expected an object. Compare it with the original.",
            code="config.bad_quantization_config",
        )
    try:
        return AutoConfig.from_pretrained(
            folder,
            trust_remote_code=options.trust_remote_code,
            cache_dir=options.cache_dir,
            token=options.token,
            local_files_only=options.local_files_only,
        )
    except Exception as error:  # each model type raises other exceptions for bad values
        raise ConfigError(
            f"{path} is not a usable {model_type} config: {error}. Compare it with the original.", code="config.unusable"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if link := describe_broken_link(path):
        raise ConfigError(link, code="config.missing")
    if not path.is_file():
        kind = describe_folder(path.parent) if path.parent.is_dir() else ""
        remedy = f"\n{kind}" if kind else " Name the folder that holds it next to the weights."
        raise ConfigError(f"no config.json in {path.parent}.{remedy}", code="config.missing")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        if describe_placeholder(path):
            raise ConfigError(describe_placeholder(path), code="config.placeholder_file") from error
        raise ConfigError(
            f"{path} can't be read as JSON: {error}. Download or copy the file again.", code="config.not_json"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected a JSON object, got {raw!r:.80}. Download or copy the file again.", code="config.not_an_object"
        )
    return raw


def config_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's settings by dotted name, without its path, which may differ between nodes. Any rank."""
    settings = dotted(config.to_dict()).items()
    return {key: value for key, value in settings if key.rpartition(".")[2] != NAME_KEY} | {"class": type(config).__name__}
