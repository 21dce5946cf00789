"""A device that computes on the CPU and counts what a GPU would be asked: kernels, and waits for it.

Tensors on it are wrappers around CPU tensors, so results are the CPU's. A kernel is an operator that computes something,
not one that only makes a view. The host waits for the device when it reads a value (`item`, `tolist`, a copy to the host) and
when it writes one with a blocking copy, as `torch.tensor(..., device=...)` does on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "counting"

_COPY = torch.ops.aten._to_copy.default
_COPY_INTO = torch.ops.aten.copy_.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_NO_KERNEL = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
)


@dataclass
class Counts:
    """What was asked of the device.

    Attributes:
        kernels: operators that compute something.
        waits: how often the host waits for the device, by what for.
    """

    kernels: int = 0
    waits: dict[str, int] = field(default_factory=dict)

    @property
    def syncs(self) -> int:
        return sum(self.waits.values())

    def wait(self, for_what: str) -> None:
        self.waits[for_what] = self.waits.get(for_what, 0) + 1


class OnDevice(torch.Tensor):
    """A tensor on the counting device; `data_` is its content."""

    counts: ClassVar[Counts] = Counts()
    data_: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=torch.device(NAME, 0),
        )
        made.data_ = data
        return made

    def tolist(self) -> Any:
        self.counts.wait("read")
        return self.data_.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return _run(function, arguments, named or {})


class _Everywhere(TorchDispatchMode):
    """Also sends operators without such tensors to the device, where they name it."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        leaves = tree_leaves((arguments, named))
        if any(isinstance(one, OnDevice) for one in leaves) or _is_ours(named.get("device")):
            return _run(function, arguments, named)
        return function(*arguments, **named)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(function: Any, arguments: Any, named: dict[str, Any]) -> Any:
    plain, others = tree_map(
        lambda one: one.data_ if isinstance(one, OnDevice) else one, (arguments, named)
    )
    stays = True
    if named.get("device") is not None:
        stays = _is_ours(named["device"])
        others["device"] = torch.device("cpu")
    _count(function, arguments, named, stays)
    made = function(*plain, **others)
    if not stays or function is _ITEM:
        return made
    if made is plain[0] and isinstance(arguments[0], torch.Tensor):  # in place
        return arguments[0]
    return tree_map(lambda one: OnDevice(one) if isinstance(one, torch.Tensor) else one, made)


def _count(function: Any, arguments: Any, named: dict[str, Any], stays: bool) -> None:
    counts = OnDevice.counts
    crosses = False
    if function is _COPY:
        crosses = not stays or not isinstance(arguments[0], OnDevice)
    elif function is _COPY_INTO:
        crosses = isinstance(arguments[0], OnDevice) != isinstance(arguments[1], OnDevice)
    if function is _ITEM:
        counts.wait("read")
    elif crosses:
        blocking = not (
            named.get("non_blocking") or (function is _COPY_INTO and arguments[2:] == (True,))
        )
        if blocking:
            counts.wait("copy to the device" if stays else "read")
    elif not function.is_view and function.overloadpacket.__name__ not in _NO_KERNEL:
        counts.kernels += 1


# torch.tensor(..., device=...) goes past Python's dispatch, straight to the backend


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _count(_COPY_INTO, (target, source, non_blocking), {}, isinstance(target, OnDevice))
    data = [one.data_ if isinstance(one, OnDevice) else one for one in (source, target)]
    data[1].copy_(data[0])
    return target


class _Backend(backend_registration._DummyBackendModule):
    """What gradient checkpointing asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_library: Any = None


def _register() -> None:
    """Register the device with torch, once in a process."""
    global _library
    if _library is not None:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")


@contextmanager
def counting() -> Iterator[Counts]:
    """Count inside the block, where modules and tensors can be moved to the device `NAME`. Counting is not
    per thread, but for the backward's."""
    _register()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    OnDevice.counts = Counts()
    try:
        with _Everywhere():
            yield OnDevice.counts
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
