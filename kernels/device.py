"""Which path an operation takes: its fused Triton kernel or its plain-torch twin in the same file.

    PLUMB_KERNELS=off python train_dpo.py ...      the plain twins on a GPU too: is it a kernel's fault?
    TRITON_INTERPRET=1 PLUMB_KERNELS=on pytest     the kernels on CPU tensors, in Triton's interpreter: slow and exact

Otherwise tensors on a CUDA device take the kernels, all others the twins. Where no kernel can run, Triton is not even
imported (there is no wheel for macOS, and the imports cost a second): kernel files take `triton`, `tl` and decorators
from here, which are stand-ins then.
"""

import os
import re
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

SWITCH = os.environ.get("PLUMB_KERNELS", "auto")  # auto, on or off
if SWITCH not in ("auto", "on", "off"):
    raise ValueError(f"PLUMB_KERNELS={SWITCH} is none of auto, on, off")

triton = SimpleNamespace(jit=lambda kernel: kernel)
tl = SimpleNamespace(constexpr=None)
LOADED = False
if SWITCH == "on" or (SWITCH == "auto" and torch.cuda.is_available()):
    os.environ.setdefault(
        "TRITON_DEFAULT_FP_FUSION", "1"
    )  # multiply-adds stay fused; Triton 3.9 wants it said
    try:
        import triton  # noqa: F401
        import triton.language as tl  # noqa: F401

        LOADED = True
    except ImportError:
        if SWITCH == "on":
            raise


class _Nothing:
    """Stands in for an operator that can never be called."""

    def register_fake(self, fake: Callable) -> Callable:
        return fake

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        pass


def operator(name: str, schema: str) -> Callable:
    """Decorator: makes a function torch.ops.plumb.<name>, which torch.compile takes as it is, and which does not alias
    or change its inputs unless the schema says so."""
    if not LOADED:
        return lambda function: _Nothing()
    changed = re.findall(r"Tensor\(\w!\)\??(?:\[\])? (\w+)", schema)
    return torch.library.custom_op(f"plumb::{name}", mutates_args=changed, schema=schema)


def untraced(function: Callable) -> Callable:
    """Decorator: torch.compile calls the function and does not look inside."""
    return torch.compiler.disable(function) if LOADED else function


def fused(x: Tensor) -> bool:
    """Whether kernels compute on this tensor. float64 is for tests: its exactness is the twins' business."""
    if not LOADED or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return x.is_cuda or (
        SWITCH == "on" and x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    )


def architecture(device: torch.device) -> int:
    """Compute capability as one number (80, 86, 90, 100, ...); the interpreter passes for a 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, over which programs are balanced."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 132
    )
