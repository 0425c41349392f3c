"""Finds operations whose result a processor would have to wait for on a GPU, on machines without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that read a number, or whose result's size depends on one; inference mode renames some.
_WAITING: Final = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::where",
        "aten::nonzero_numpy",
        "aten::nonzero",
        "aten::masked_select",
        "aten::bincount",
        "aten::equal",
        "aten::is_nonzero",
        "aten::_unique2",
        "aten::repeat_interleave.Tensor",
    }
)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        indices = args[1] if name in {"aten::index.Tensor", "aten::index_put_"} else ()
        by_mask = any(each is not None and each.dtype is torch.bool for each in indices)
        if name in _WAITING or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """Yield the names of such operations as they occur."""
    with _Waits() as waits:
        yield waits.found
