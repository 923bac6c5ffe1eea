"""--offload optimizer: the same bits with AdamW in host memory. --grad-dtype bf16: its rounding.

Faults that these tests are for: an update before its gradient has arrived; a gradient that is
cleared before it was copied; a clip left out or taken twice; weights that are sent before they are
back; a checkpoint without what lies in host memory.
"""

from pathlib import Path

import pretend
import pytest
import torch
from conftest import dataset_of
from forked import kill_all
from launch import launch

import checkpoint
import parallel
from checkpoint import State
from data.trees import make_batch
from footprint import Layout, sent
from model import GPT, GPTConfig
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline

SMALL = GPTConfig(
    family="llama", vocab=53, width=16, layers=2, heads=2, kv_heads=2, head_size=8, ffn=37
)
TREES = [([1, 5, 9], [[7, 8, 2], [11, 2]]), ([1, 30, 31], [[40, 41, 42, 2], [50, 2]])]
HALF = {"half_grads": True}
OFFLOAD = {"offload": True}


@pytest.fixture(autouse=True)
def nobody_stays():
    """Kill ranks that a failed test has left behind."""
    yield
    kill_all()


def make_model(dtype: torch.dtype, device: str, **sizes: int) -> GPT:
    """Return a random model, on a device like a script's."""
    model = GPT(SMALL, init_mesh(**sizes))
    model.init_weights(0)
    model = model.to(dtype)
    for module in model.modules() if device == "cuda" else ():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach().to(device)))
    return model


def train(
    out: Path,
    how: dict,
    dtype: torch.dtype,
    zero: int,
    sizes: dict,
    device: str,
    steps: int = 3,
    clip: float = 0.5,
) -> list[bytes]:
    """Take some steps, clipped; return the bytes of the weights. A checkpoint is in OUT."""
    if device == "cuda":
        pretend.install()
    model = make_model(dtype, device, **sizes)
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.1, zero, **how)
    if (out / "step_2").exists():
        checkpoint.load(out / "step_2", optimizer)
    data, mesh = dataset_of(TREES), model.mesh
    mine = [mesh.dp_rank] if mesh.dp == 2 else [0, 1]
    for _ in range(steps):
        batches = [make_batch(data, [i]) for i in mine]
        for batch, hidden in pipeline(model, batches, optimizer):
            (-model.logps(hidden, batch).sum()).backward()
        norm, _ = optimizer.step(1e-2, clip)
        assert norm > 1  # so that the clip counts
    model.wait()
    if mesh.dp == 2 and zero == 1:
        planned = sent(SMALL, Layout(dp=2), mesh.rank, [[9]], [[7]], dtype, half_grads=how == HALF)
        assert parallel.SENT["dp"] == steps * planned["dp"]
    checkpoint.save(out, State(step=steps), optimizer, 0)
    with model.whole():
        return [
            p.detach().cpu().clone().view(torch.uint8).numpy().tobytes() for p in model.parameters()
        ]


@pytest.mark.parametrize(
    ("world", "dtype", "zero", "sizes", "device"),
    [
        (1, torch.bfloat16, 1, {}, "cpu"),
        (1, torch.float64, 1, {}, "cpu"),
        (2, torch.bfloat16, 2, {}, "cpu"),
        (2, torch.float32, 3, {}, "cpu"),
        (2, torch.bfloat16, 1, {"tp": 2}, "cpu"),
        (1, torch.bfloat16, 1, {}, "cuda"),
    ],
)
def test_offloading_changes_no_bit(world, dtype, zero, sizes, device, tmp_path: Path):
    """Weights and checkpoints have the same bytes; a run goes on from the other's checkpoint."""
    rest = (dtype, zero, sizes, device)
    plain = launch(world, train, tmp_path / "plain", {}, *rest)
    assert launch(world, train, tmp_path / "offload", OFFLOAD, *rest) == plain
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "step_3").iterdir()}
        for name in ("plain", "offload")
    ]
    assert files[0] == files[1]
    for name, first, then in (("there", {}, OFFLOAD), ("back", OFFLOAD, {})):
        launch(world, train, tmp_path / name, first, *rest, 2)
        assert launch(world, train, tmp_path / name, then, *rest, 1) == plain


def rounded(out: Path, clip: float) -> list[bytes]:
    """Train as `train` does in bf16, with gradients that are rounded by hand."""
    model = make_model(torch.bfloat16, "cpu")
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.1)
    for _ in range(3):
        total = [torch.zeros_like(b.grad) for b in optimizer.buckets]
        for i in (0, 1):
            batch = make_batch(dataset_of(TREES), [i])
            for each, hidden in pipeline(model, [batch], optimizer):
                (-model.logps(hidden, each).sum()).backward()
            for b, so_far in zip(optimizer.buckets, total):
                so_far.copy_((so_far + b.grad.bfloat16().float()).bfloat16())
                b.grad.zero_()
        for b, gradient in zip(optimizer.buckets, total):
            b.grad.copy_(gradient)
        optimizer.step(1e-2, clip)
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in model.parameters()]


@pytest.mark.parametrize(
    ("clip", "runs"), [(0.5, [(1, HALF), (1, HALF | OFFLOAD)]), (0.0, [(2, HALF)])]
)
def test_half_gradients_are_sums_in_bf16(clip: float, runs: list, tmp_path: Path):
    """Over micro-batches, over ranks and offloaded: the bits of sums that are rounded by hand.

    Two ranks do not clip: they sum the squares of the norm in another order, so its last bit may
    differ.
    """
    (wanted,) = launch(1, rounded, tmp_path, clip)
    rest = (torch.bfloat16, 1, {}, "cpu", 3, clip)
    (exact,) = launch(1, train, tmp_path / "fp32", {}, *rest)
    assert exact != wanted
    for world, how in runs:
        for weights in launch(world, train, tmp_path / f"{world}{len(how)}", how, *rest):
            assert weights == wanted


def test_half_gradients_of_exact_weights_are_refused():
    """bf16 sums of fp32 gradients would lose what the weights were kept in fp32 for."""
    with pytest.raises(ValueError, match="--grad-dtype bf16 is for weights in bf16"):
        AdamW(GPT(SMALL, init_mesh()), (0.9, 0.95), 1e-8, 0.1, **HALF)
