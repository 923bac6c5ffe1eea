"""Choice between an operation's Triton kernel and its plain-torch twin in the same file.

    PLUMB_KERNELS=off python train_dpo.py ...      plain twins on a GPU: is a kernel at fault?
    TRITON_INTERPRET=1 PLUMB_KERNELS=on pytest     kernels on CPU tensors, in Triton's interpreter

Without the variable, tensors on a CUDA device take the kernels and all others the twins. Where no
kernel can run, Triton is not imported at all (it has no wheel for macOS, and importing it takes a
second): the kernel files take `triton`, `tl` and decorators from here, which then are stand-ins.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

SWITCH = os.environ.get("PLUMB_KERNELS", "auto")  # auto, on or off
if SWITCH not in ("auto", "on", "off"):
    raise ValueError(f"PLUMB_KERNELS={SWITCH}: set it to auto, on or off")

# A kernel names the lengths that change from batch to batch in `do_not_specialize`: Triton compiles
# anew for an integer that is 1 or stops being a multiple of 16.
triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
tl = SimpleNamespace(constexpr=None)
LOADED = False
if SWITCH == "on" or (SWITCH == "auto" and torch.cuda.is_available()):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 has to be told to fuse
    try:
        import triton  # noqa: F401
        import triton.language as tl  # noqa: F401

        LOADED = True
    except ImportError:
        if SWITCH == "on":
            raise


class _UncallableOperator:
    """Stand-in for an operator where no kernel can run; it accepts registrations only."""

    def register_fake(self, fake: Callable) -> Callable:
        return fake

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        pass


def operator(name: str, schema: str) -> Callable:
    """Return a decorator that registers a function as torch.ops.plumb.<name>.

    torch.compile calls such an operator without looking inside. It must not alias or change its
    inputs unless the schema says so.
    """
    if not LOADED:
        return lambda function: _UncallableOperator()
    changed = re.findall(r"Tensor\(\w!\)\??(?:\[\])? (\w+)", schema)
    return torch.library.custom_op(f"plumb::{name}", mutates_args=changed, schema=schema)


def untraced(function: Callable) -> Callable:
    """Decorate a function that torch.compile calls without looking inside."""
    return torch.compiler.disable(function) if LOADED else function


def fused(x: Tensor) -> bool:
    """Tell whether kernels compute on this tensor. float64 always takes the exact plain twins."""
    if not LOADED or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    interpreted = SWITCH == "on" and os.environ.get("TRITON_INTERPRET") == "1"
    return x.is_cuda or (interpreted and x.device.type == "cpu")


def architecture(device: torch.device) -> int:
    """Return the compute capability as one number: 80, 86, 90, 100; 90 in the interpreter.

    AMD's GPUs, which torch calls cuda too, have three digits: 942 is gfx942, 910 is gfx90a.
    """
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName  # gfx942:sramecc+:xnack-
        digits = name.split(":")[0].removeprefix("gfx")
        return 100 * int(digits[:-2]) + 10 * int(digits[-2]) + int(digits[-1], 16)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_amd(arch: int) -> bool:
    """Tell whether a number of `architecture` is one of AMD's."""
    return arch >= 900


def processors(device: torch.device) -> int:
    """Count the streaming multiprocessors, over which work is balanced; an H100's elsewhere."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def upload(x: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """Copy numbers of the host to a device; a GPU's host does not wait for the copy.

    From pageable memory it would wait, for all that the GPU still has to do before.
    """
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copy_to_host(buffers: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Copy a tensor into the buffer of this name in host memory, made where there is none yet.

    From a GPU the buffer is pinned, and neither host nor GPU waits: see `copies_done`.
    """
    if name not in buffers:
        buffers[name] = host_buffer(x, x.dtype)
    return buffers[name].copy_(x, non_blocking=x.is_cuda)


def host_buffer(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory of the host in the shape of a tensor, pinned if that one lies on a GPU."""
    buffer = torch.empty(like.shape, dtype=dtype)
    return buffer.pin_memory() if like.is_cuda else buffer


def copies_done(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the copies begun so far are done, in any thread."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def pick_device(name: str) -> str:
    """Return "cuda" or "cpu" for --device auto, cuda or cpu. ValueError: there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch finds no GPU: "
            "install a CUDA build of torch or use --device cpu"
        )
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Stop glibc from returning large buffers to the system.

    The page faults of getting them again took a fifth of a CPU step.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
