"""Triton's interpreter, in which the laws of the kernels run on a CPU, and how they compare.

The interpreter must be chosen before a kernel's module is imported, and all other tests need the
plain twins. So the laws run in a process of their own, which a test in test_kernels.py starts.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
law = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_kernels.py starts")
EXACT, HALF = 1e-6, 1e-2  # relative to the largest value: float32, and the 2-byte types
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: EXACT,
    torch.bfloat16: HALF,
    torch.float16: HALF,
}


def relative_error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference over the largest value (over 1 where that is less)."""
    assert ours.shape == wanted.shape and torch.isfinite(ours).all()
    return ((ours.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def gradients(out, inputs, slopes) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, inputs, slopes))


def mend_interpreter() -> None:
    """Make the interpreter treat bfloat16 as a GPU does, and take loop bounds of one element.

    Unmended, its dots multiply bfloat16's raw bits and its casts to bfloat16 truncate; and in
    Triton 3.6 numpy 2.4 rejects an array of one element as a loop bound.
    """
    import triton.language as tl
    import triton.runtime.interpreter as I

    builder, patch = I.InterpreterBuilder, I._patch_lang_tensor
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return I.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *how):
        assert min(*a.data.shape, *b.data.shape) >= 16, "a GPU rejects dots below 16"
        return dot(self, widened(a), widened(b), d, *how)

    def cast_impl(self, source, to):
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            bits = source.data.view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return I.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return cast(self, source, to)

    def patch_tensor(tensor, scope):
        def index(self) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", index)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    I._patch_lang_tensor = patch_tensor


if INTERPRETED:
    mend_interpreter()
