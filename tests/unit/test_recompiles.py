"""No kernel is compiled anew for a batch of another length.

    python tests/unit/test_recompiles.py        print how many programs each kernel needs

Triton keeps one program for each key: types of the arguments, values of the constants, and which
integers are 1 or multiples of 16. Its own binder makes the key here, for sm_90 and without a GPU;
the launch after it is left out, so what the operators return is whatever the memory held.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
BATCHES = 50
Keys = dict[tuple, dict[tuple, int]]  # (kernel, constants) -> key -> batch that first had it


def lengths() -> list[int]:
    """Return token counts of batches: odd ones, powers of two, 1, and whole multiples of 16."""
    random = np.random.default_rng(0).integers(1, 400, BATCHES - 8)
    return [*random.tolist(), 1, 2, 16, 17, 32, 128, 256, 400]


def run_all(tokens: int) -> None:
    """Run every kernel's operation on a batch of some length, forward and backward."""
    from kernels.attention import tree_attention_fused
    from kernels.grouped import grouped_mlp
    from kernels.kl import linear_kl
    from kernels.logprob import linear_logprob
    from kernels.quantized import FORMATS, quantize, quantized_linear
    from kernels.rmsnorm import add_rms_norm, rms_norm
    from kernels.rope import rope
    from kernels.swiglu import swiglu
    from layout import TreeLayout

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    layout = TreeLayout.from_spans([(tokens // 2, [tokens - tokens // 2])])
    x, head, teacher = leaf(tokens, 32), leaf(150, 32), leaf(150, 32)
    experts = [[leaf(*shape), leaf(*shape)] for shape in ((48, 32), (48, 32), (32, 48))]
    target, angle = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, 16)
    outs = [
        tree_attention_fused(leaf(tokens, 4, 32), leaf(tokens, 2, 32), leaf(tokens, 2, 32), layout),
        *linear_logprob(x, head, target, 0.7, True),
        linear_logprob(x, head, target),
        linear_kl(x, head, x.detach(), teacher.detach(), "jsd"),
        rms_norm(x, leaf(32), 1e-5),
        *add_rms_norm(x, leaf(tokens, 32), leaf(32), 1e-5),
        swiglu(leaf(tokens, 48), leaf(tokens, 48)),
        rope(leaf(tokens, 4, 32), angle, angle),
        grouped_mlp(x, (tokens // 3, tokens - tokens // 3), *experts),
        *(quantized_linear(x, quantize(head.detach(), name)) for name in FORMATS),
    ]
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])


def record() -> Keys:
    """Run all batches and return the keys that their launches had."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    from kernels import attention, grouped, kl, logprob, quantized, rmsnorm, rope, swiglu, tiles

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys: Keys = defaultdict(dict)
    binders: dict = {}
    batch = 0

    def run(self, *args, grid, warmup, **kwargs):
        if self not in binders:
            binders[self] = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binders[self](*args, **kwargs)
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        constants = {p.name: bound[p.name] for p in self.params if p.is_constexpr}
        kept = repr(sorted(constants.items())), repr(sorted(options.items()))
        keys[name, *kept].setdefault(repr(specialization), batch)

    jit.JITFunction.run = run
    for module in attention, grouped, kl, logprob, quantized, rmsnorm, rope, swiglu:
        module.fused = lambda x: True
    for module in kl, logprob:
        module.GPU_CHUNK = 64  # several chunks, the last one of odd width
    rmsnorm.processors = lambda device: 1  # several steps a program
    tiles.SPLIT = 1  # split tiles, which are merged
    tiles.processors = lambda device: 1
    for batch, tokens in enumerate(lengths()):  # noqa: B007 (read in `run`)
        run_all(tokens)
    return keys


def faults(keys: Keys) -> list[str]:
    """List the kernels with a key that the first batch of the same constants did not need."""
    wrong = []
    for (name, constants, _), seen in keys.items():
        late = [key for key, batch in seen.items() if batch > min(seen.values())]
        if late:
            wrong.append(f"{name} {constants}: {len(late)} later keys, such as {late[0]}")
    return wrong


def main() -> int:
    """Print the number of programs by kernel; return how many kernels specialise on a length."""
    keys = record()
    programs: dict[str, int] = defaultdict(int)
    for (name, *_), seen in keys.items():
        programs[name] += len(seen)
    for name, count in sorted(programs.items()):
        print(f"{name:36} {count:3} programs in {BATCHES} batches")
    wrong = faults(keys)
    print("\n".join(wrong))
    return len(wrong)


def test_a_later_key_is_a_fault():
    """A kernel may need several programs at once, not a new one for a later batch."""
    good = {("k", "M=64", ""): {"a": 0, "b": 0}, ("k", "M=16", ""): {"a": 7}}
    assert not faults(good)
    assert len(faults({**good, ("k", "M=16", ""): {"a": 7, "b": 9}})) == 1


@pytest.mark.slow
def test_no_kernel_is_compiled_for_a_length():
    """Fifty batches of 50 lengths need the programs of the first one."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PLUMB_KERNELS": "on", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter has no binder
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    kernels = {line.split()[0] for line in run.stdout.splitlines() if " programs in " in line}
    assert len(kernels) == 18, kernels


if __name__ == "__main__":
    os.environ["PLUMB_KERNELS"] = "on"
    sys.path.insert(0, str(ROOT))
    sys.exit(min(1, main()))
