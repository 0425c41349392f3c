"""transformers' products with weights and inputs rounded to 8 bits as `blocks` does it: the rest is then comparable.

Without it rounding hides small mistakes: narrow models are off by 0.02 to 0.05 of the spread of their logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_BLOCK = 32
_LEVELS = 127.0
_ZERO, _ZERO_POINT = 128.5, 128
_ROUTERS = {"gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b"}
"""What `blocks` computes in float32."""


def _is_router(name: str) -> bool:
    return name.split(".")[-2] in _ROUTERS or "router" in name


def _rounded(x: torch.Tensor, *, halves: bool) -> torch.Tensor:
    """Round along the last dimension, with the operations of `blocks`; scales of weights are float16."""
    blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scales = largest / _LEVELS
    if halves:
        scales = scales.half().float()
        numbers = (blocks * (1 / scales.clamp(min=1e-30))).round().clamp(-_LEVELS, _LEVELS)
    else:
        shifted = blocks.double() * (_LEVELS / largest).double() + _ZERO
        numbers = shifted.float().floor() - _ZERO_POINT
    return (numbers * scales).reshape(x.shape)


class _RoundedInputs(TorchFunctionMode):
    def __init__(self, skipped: set[int], *, halves: bool) -> None:
        super().__init__()
        self._skipped, self._halves = skipped, halves

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        matmul = func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if (func is functional.linear and id(args[1]) not in self._skipped) or (matmul and args[1].dim() == 2):
            args = (_rounded(args[0], halves=False), *args[1:])
        elif func is torch.matmul and args[1].dim() == 4:  # keys and values, which pages hold in float16
            args = (args[0], args[1].half().float(), *args[2:])
        elif func in (functional.conv1d, torch.conv1d) and self._halves:  # likewise
            args = (args[0].half().float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def rounded_products(model: Any) -> Iterator[None]:
    """Round the weights of a model for good, and inputs of its products in this context."""
    model.set_experts_implementation("eager")  # which computes one product for each expert
    halves = model.config.model_type == "lfm2"  # inputs of its convolutions lie in pages
    routers = {name: each for name, each in model.named_parameters() if _is_router(name)}
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.dim() < 2 or name in routers or name.endswith(("conv.conv.weight", "conv1d.weight")):
                continue
            if each.dim() == 3 and model.config.model_type == "gpt_oss":  # inputs before outputs
                each.copy_(_rounded(each.transpose(1, 2).contiguous(), halves=True).transpose(1, 2))
            elif not name.endswith("_bias"):
                each.copy_(_rounded(each, halves=True))
    with torch.inference_mode(), _RoundedInputs({id(each) for each in routers.values()}, halves=halves):
        yield
