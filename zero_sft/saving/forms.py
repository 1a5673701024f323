"""The form in which a model is saved: as a model, as an adapter alone, or as a model with its adapter merged.

A form says which tensors are saved, in which files, and what stands next to them. Exports and checkpoints ask it, so that
neither knows of adapters.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zero_sft.cluster.world import World
from zero_sft.errors import ExportError
from zero_sft.loading import skeleton
from zero_sft.saving.export_layout import ExportLayout, adapter_layout, choose_layout, weights_to_save
from zero_sft.saving.readable import is_adapted, require_loads_back
from zero_sft.saving.settings import write_adapter_settings, write_settings


class SavedForm(ABC):
    """The part of a model that is saved, and its files."""

    @abstractmethod
    def tensors(self) -> dict[str, Any]:
        """Return the tensors to save, by name. Any rank; does not communicate."""

    @abstractmethod
    def choose_layout(self, state: Mapping[str, torch.Tensor], max_file_bytes: int, world: World) -> ExportLayout:
        """Return the files for these tensors, which are on meta. Every rank; communicates."""

    @abstractmethod
    def require_loads_back(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise `ExportError` unless a reader gets the same model from these tensors. Rank 0."""

    @abstractmethod
    def write_settings(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the files next to the weights. Rank 0."""

    def settings_files(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
        """Return the contents of the files that `write_settings` writes, by path in the folder. Rank 0."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.write_settings(folder, tokenizer)
            return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class WholeModel(SavedForm):
    """A model folder of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def tensors(self) -> dict[str, Any]:
        return weights_to_save(self._model)

    def choose_layout(self, state: Mapping[str, torch.Tensor], max_file_bytes: int, world: World) -> ExportLayout:
        return choose_layout(self._model, state, max_file_bytes, world)

    def require_loads_back(self, state: Mapping[str, torch.Tensor]) -> None:
        require_loads_back(self._model, state)

    def write_settings(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        write_settings(folder, self._model, tokenizer)


class AdapterAlone(SavedForm):
    """An adapter in PEFT's format."""

    def __init__(self, adapted: Any) -> None:
        self._adapted = adapted

    def tensors(self) -> dict[str, Any]:
        from zero_sft.adapters.peft_internals import saved_tensors

        return saved_tensors(self._adapted)

    def choose_layout(self, state: Mapping[str, torch.Tensor], max_file_bytes: int, world: World) -> ExportLayout:
        return adapter_layout(state)

    def require_loads_back(self, state: Mapping[str, torch.Tensor]) -> None:
        if not state:
            raise ExportError("the model's adapter has no weights to save.", code="adapter.no_weights")

    def write_settings(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        from zero_sft.adapters.peft_internals import config_to_save

        write_adapter_settings(folder, config_to_save(self._adapted), self._adapted.config, tokenizer)


class MergedModel(SavedForm):
    """A model folder of transformers, of a model whose adapter was merged in place."""

    def __init__(self, adapted: Any) -> None:
        self._adapted = adapted
        self._base: PreTrainedModel = adapted.get_base_model()
        # Without the modules that PEFT has put around those of the model.
        self._rebuilt = skeleton.build_untied_on_meta(type(self._base), self._base.config)

    def tensors(self) -> dict[str, Any]:
        from zero_sft.adapters.merge import merged_tensors

        return weights_to_save(self._rebuilt, merged_tensors(self._adapted))

    def choose_layout(self, state: Mapping[str, torch.Tensor], max_file_bytes: int, world: World) -> ExportLayout:
        return choose_layout(self._rebuilt, state, max_file_bytes, world)

    def require_loads_back(self, state: Mapping[str, torch.Tensor]) -> None:
        require_loads_back(self._rebuilt, state)

    def write_settings(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        write_settings(folder, self._base, tokenizer)


def form_of(model: nn.Module) -> SavedForm:
    """Return the form in which a model is saved by default: an adapted one as its adapter alone."""
    return AdapterAlone(model) if is_adapted(model) else WholeModel(model)  # type: ignore[arg-type]
