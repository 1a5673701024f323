"""The methods of training that are tried in each set-up: what is trained, and what the model is compared with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tests import models
from zero_sft.adapters.attach import add_adapters, lora_config
from zero_sft.adapters.options import LoraOptions
from zero_sft.job.trained_part import freeze_others

SEED = 11
ADAPTERS = LoraOptions(lora_r=4, lora_dropout=0.0, lora_target_modules=["all-linear"])


class Method(ABC):
    """A method of training."""

    load_options: Mapping[str, Any] = MappingProxyType({})
    """Options of the sharded load."""

    def reference_folder(self, folder: Path, dtype: torch.dtype) -> Path:
        """Return the checkpoint with the values of the reference. In the parent, before any rank."""
        return folder

    @abstractmethod
    def sharded(self, model: Any) -> Any:
        """Make a loaded model ready. Every rank."""

    @abstractmethod
    def plain(self, model: Any) -> Any:
        """Do the same with a model that is not sharded."""


class Full(Method):
    """All parameters."""

    def sharded(self, model: Any) -> Any:
        return model

    plain = sharded


class OneLayer(Method):
    """The second layer, `--unfreeze`."""

    def sharded(self, model: Any) -> Any:
        freeze_others(model, r"layers\.1\.")
        return model

    plain = sharded


class Lora(Method):
    """Adapters on all linear modules, `--lora_r`."""

    def sharded(self, model: Any) -> Any:
        return add_adapters(model, lora_config(ADAPTERS), seed=SEED)

    def plain(self, model: Any) -> Any:
        from peft import get_peft_model

        with torch.random.fork_rng():
            torch.default_generator.manual_seed(SEED)
            return get_peft_model(model, lora_config(ADAPTERS), autocast_adapter_dtype=False)


class QLora(Lora):
    """Adapters on a model in 4 bits, `--q_lora`. The reference has the values for which the 4 bits stand."""

    load_options = MappingProxyType({"load_in_4bit": True})

    def reference_folder(self, folder: Path, dtype: torch.dtype) -> Path:
        from bitsandbytes import functional

        to = folder.with_name(f"{folder.name}-dequantised-{str(dtype).rpartition('.')[2]}")
        if not to.exists():
            model = models.plain(folder, dtype)
            for name, module in model.named_modules():
                if type(module) is torch.nn.Linear and name != "lm_head":
                    codes, state = functional.quantize_4bit(module.weight.detach(), quant_type="nf4", compress_statistics=True)
                    module.weight.data.copy_(functional.dequantize_4bit(codes, state))
            model.save_pretrained(to)
        return to


METHODS: dict[str, Method] = {"all parameters": Full(), "one layer": OneLayer(), "LoRA": Lora(), "QLoRA": QLora()}
"""All methods by name."""
