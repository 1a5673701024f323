"""`Linear4bit`: a linear module whose sharded weight holds 4-bit codes and scales.

Its forward and backward dequantise the whole weight, which exists only meanwhile. Neither keeps the gathered bytes: autograd
saves the module, and DeepSpeed gathers the module's parameters again for backward. bitsandbytes' own module keeps them until
backward, which under ZeRO-3 is a copy of the model on every rank.
"""

from typing import Any

import torch
from torch import nn

from zero_sft.four_bit.layout import FourBitLayout
from zero_sft.zero import shards


class Linear4bit(nn.Linear):
    """A linear module with a frozen weight in 4 bits.

    Attributes:
        layout: the bytes of the weight.
        quant_type: "nf4" or "fp4".
    """

    layout: FourBitLayout
    quant_type: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply by the dequantised weight, in the input's dtype."""
        return _LinearFunction.apply(input, self.bias, self)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Compute the weight, (out_features, in_features); its parameter is gathered."""
        from zero_sft.four_bit import kernels

        return kernels.dequantize(self.weight.detach(), self.layout, self.quant_type, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}"


class _LinearFunction(torch.autograd.Function):
    """`functional.linear`, with the gradients of input and bias. DeepSpeed has gathered the module's parameters each time."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, module: Linear4bit) -> torch.Tensor:
        ctx.module = module
        return nn.functional.linear(input, module.dequantized(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        needs_input, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad.matmul(ctx.module.dequantized(grad.dtype)) if needs_input else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
        return grad_input, grad_bias, None


def make_4bit(module: Any, *, dtype: torch.dtype, quant_type: str, double: bool) -> None:
    """Turn a linear module on the meta device into a `Linear4bit`, in place. Its weight is not trained.

    Args:
        dtype: the engine's dtype, which the parameter of bytes gets.
    """
    layout = FourBitLayout(shape=tuple(module.weight.shape), double=double)
    stored = torch.empty(layout.numel(dtype.itemsize), dtype=dtype, device="meta")
    module.weight = nn.Parameter(stored, requires_grad=False)
    shards.represent(module.weight, layout.weight_numel)
    module.__class__ = Linear4bit
    module.layout, module.quant_type = layout, quant_type
