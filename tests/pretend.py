"""A pretend GPU: tensors on "cuda" whose numbers lie in host memory, under CUDA's rules.

    pretend.install()                 from here on torch finds a GPU
    train_dpo.main([...])             real numbers, on "cuda:0"
    pretend.WAITS                     where the host has waited for the device, and how often

As on a GPU, an operation on tensors of two devices raises, a tensor on the device has no numpy()
and no address to read, and whatever needs a number on the host waits for the device. A copy to the
device waits too, unless it is asynchronous and from pinned memory. Time, streams and memory are not
pretended, and kernels run only in Triton's interpreter.

It lasts as long as the process: install it in a fork (launch.py) or in a process of its own. A
tensor says that it is on the device, but torch's C++ believes that it is on the CPU, so a CPU build
of torch will do and nothing has to be compiled. Backward passes run in the thread that calls them.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

# (phase, place in the source, what waits) -> number; a test sets PHASE where a step begins.
WAITS: Counter[tuple[str, str, str]] = Counter()
PHASE = [""]

# Operations whose result has a shape that only the device knows.
UNKNOWN_SHAPE = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
INDEXING = {
    "aten::index.Tensor",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}


def waits(what: str) -> None:
    """Count a wait of the host at the line of the project that asked for it."""
    WAITS[PHASE[0], _place(), what] += 1


def _place() -> str:
    """Return file:function of the innermost frame of the project that is no test."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.parent.name not in ("tests", "e2e", "unit", "ranks"):
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class OnDevice(Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "OnDevice":
        assert not isinstance(held, OnDevice)
        self = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CPU,
            requires_grad=requires_grad,
        )
        self.held = held
        return self

    def __init__(self, held: Tensor, requires_grad: bool = False):
        pass

    def __repr__(self, **options) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in PROPERTIES and isinstance(first, OnDevice):
            return PROPERTIES[func]
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(
                f"can't convert cuda:0 device type tensor to numpy, at {_place()}: use .cpu() first"
            )
        if func is Tensor.data_ptr:
            return first.held.data_ptr()
        if func is Tensor.tolist:
            waits("tolist")
            return first.detach().held.tolist()
        if func == Tensor.data.__set__:
            new = args[1]
            with torch._C.DisableTorchFunctionSubclass():
                func(first, new)
            first.held = new.held
            return None
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (first, _checked_index(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


PROPERTIES: dict[Any, Any] = {
    Tensor.device.__get__: GPU,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.get_device: 0,
    Tensor.is_pinned: False,
}


def _checked_index(index: Any) -> Any:
    """Return an index with lists as tensors of the host, which an operation then has to copy."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
    return parts if isinstance(index, tuple) else parts[0]


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _wrapped(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation that has tensors on the device among its inputs."""
    name = func.name()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_host = [x for x in tensors if not isinstance(x, OnDevice)]
    if name == "aten::copy_":
        _check_copy(args[0], args[1], asynchronous=len(args) > 2 and bool(args[2]))
    elif name in INDEXING:
        if not isinstance(args[0], OnDevice):
            raise RuntimeError(f"indices should be on the CPU, at {_place()}")
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if any(not isinstance(x, OnDevice) for x in indices):
            waits("index on the host")
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            waits("index by a mask")
        if any(x.dim() for x in on_host if not any(x is index for index in indices)):
            raise RuntimeError(f"{name} of cuda:0 and cpu, at {_place()}")
    elif any(x.dim() for x in on_host):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name} at "
            f"{_place()}"
        )
    if name in ("aten::_local_scalar_dense", "aten::equal"):
        waits("item")
    if name in UNKNOWN_SHAPE and kwargs.get("output_size") is None:
        waits(name)
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    if name == "aten::mm.dtype":  # a product in bf16, kept in fp32: only GPUs have it
        a, b, dtype = held_args
        return OnDevice(a.to(dtype) @ b.to(dtype))
    out = func(*held_args, **held_kwargs)
    if not name.startswith("aten::"):
        return tree_map(_wrapped, out)
    # A copy to the host returns a tensor of the host: its first argument.
    if name == "aten::copy_" and not isinstance(args[0], OnDevice):
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, out))


def _check_copy(to: Tensor, source: Tensor, asynchronous: bool) -> None:
    """Count the wait of a copy between host and device, if it is one that waits."""
    if isinstance(to, OnDevice) == isinstance(source, OnDevice):
        return
    if isinstance(to, OnDevice):
        _check_upload(source, asynchronous)
    elif asynchronous:
        raise RuntimeError(f"an asynchronous copy to the host is read before it ends: {_place()}")
    else:
        waits("copy to the host")


def _check_upload(source: Tensor, asynchronous: bool) -> None:
    if not (asynchronous and getattr(source, "pinned", False)):
        waits("copy of unpinned memory" if asynchronous else "copy to the device")


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnDevice(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.held


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.held.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return OnDevice(grad)


def _device_of(x: Any) -> torch.device | None:
    """Return the device that an argument names, if it is one."""
    if isinstance(x, Tensor):
        return x.device
    if isinstance(x, torch.device):
        return x
    if isinstance(x, str):
        return torch.device(x)
    return None


class _Rules(TorchFunctionMode):
    """Mode for torch's functions that make and move tensors, before they reach one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self._to(args, kwargs)
        if func is Tensor.cpu:
            return self._to((args[0], CPU), kwargs)
        if func is Tensor.cuda:
            return self._to((args[0], GPU), kwargs)
        if func is Tensor.pin_memory:
            if isinstance(args[0], OnDevice):
                raise RuntimeError("cannot pin a tensor of cuda:0: only dense CPU tensors")
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if func is Tensor.is_pinned and not isinstance(args[0], OnDevice):
            return getattr(args[0], "pinned", False)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        to_device = torch.device(kwargs.pop("device")).type == "cuda"
        if any(isinstance(x, OnDevice) for x in tree_leaves(args)):
            out = func(*args, **kwargs)  # as new_zeros(device=...)
            return out if to_device else _held(out)
        if to_device and func in (torch.tensor, torch.as_tensor, torch.asarray):
            waits("copy to the device")
        out = func(*args, device="cpu", **kwargs)
        if not to_device:
            return out
        return _wrapped(out.detach()).requires_grad_(out.requires_grad)

    def _to(self, args: tuple, kwargs: dict) -> Tensor:
        """Tensor.to(device, dtype), (dtype), (other) and their keywords."""
        x, *rest = args
        device = _device_of(kwargs.pop("device", None))
        dtype = kwargs.pop("dtype", None)
        for value in rest:
            device = _device_of(value) if device is None else device
            if isinstance(value, (torch.dtype, Tensor)):
                dtype = value if isinstance(value, torch.dtype) else value.dtype
        flags = [value for value in rest if isinstance(value, bool)]
        asynchronous = kwargs.get("non_blocking", bool(flags and flags[0]))
        if device is not None and device.type == "meta":
            return torch.empty_like(_held(x), device=device, dtype=dtype)
        if device is not None and (device.type == "cuda") != isinstance(x, OnDevice):
            if device.type == "cuda":
                _check_upload(x, asynchronous)
                x = _Upload.apply(x)
            elif asynchronous:
                raise RuntimeError(
                    f"an asynchronous copy to the host is read before it ends: {_place()}"
                )
            else:
                waits("copy to the host")
                x = _Download.apply(x)
        copy = kwargs.get("copy", False)
        if dtype is not None:
            return Tensor.to(x, dtype, copy=copy)
        return x.clone() if copy else x


def install() -> None:
    """Let torch find the pretend GPU until this process ends."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *device: waits("synchronize")
    cuda.memory_allocated = lambda *device: 0
    cuda.max_memory_allocated = lambda *device: 0
    cuda.reset_peak_memory_stats = lambda *device: None
    cuda.get_device_name = lambda *device: "pretend H100"
    cuda.get_device_capability = lambda *device: (9, 0)
    cuda.get_device_properties = lambda *device: SimpleNamespace(multi_processor_count=132)
    cuda.manual_seed_all = lambda seed: None
    rules = _Rules()
    rules.__enter__()
    autograd: Any = torch.autograd
    engine = autograd._engine_run_backward

    def backward(*args, **kwargs):  # what runs in it obeys the rules too
        with torch._C._EnableTorchFunction(), rules:
            return engine(*args, **kwargs)

    autograd._engine_run_backward = backward
    if os.environ.get("TRITON_INTERPRET") == "1":
        _let_kernels_read()


def _let_kernels_read() -> None:
    """Let Triton's interpreter read and write the numbers of tensors on the device."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def held_launch(self, *args, **kwargs):
        return launch(self, *tree_map(_held, args), **tree_map(_held, kwargs))

    GridExecutor.__call__ = held_launch
