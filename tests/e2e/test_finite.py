"""No NaN survives: not in a checkpoint, not in final/ or best/, not in the place of a good one.

Seen to fail: without not_finite in checkpoint.py, without the check in weights/folder.py, with
`best is None` alone in is_best.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train_dpo
import train_sft
import training
from layers import is_finite
from optimizer import AdamW
from weights.folder import load_model, save_model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_element_is_seen_wherever_it_stands(value: float, dtype: torch.dtype):
    """As torch.isfinite(x).all(), in every place of a buffer; empty ones are finite."""
    x = torch.randn(4099).to(dtype)
    assert is_finite(x) and is_finite(x[:0]) and is_finite(torch.full((3,), 1e38))
    for place in (0, 1, 2047, 4098):
        broken = x.clone()
        broken[place] = value
        assert not is_finite(broken)


def breaks_after(step: int, monkeypatch, value: float = math.nan) -> None:
    """Let the update of a step write a value into the weights, though its gradient was finite."""
    update, calls = AdamW.step, iter(range(1, 99))

    def patched(self: AdamW, *values):
        result = update(self, *values)
        if next(calls) == step:
            self.buckets[-1].master.value.data[-1] = value
        return result

    monkeypatch.setattr(AdamW, "step", patched)


@pytest.mark.parametrize(
    ("value", "later"), [(math.nan, False), (math.inf, False), (math.nan, True)]
)
def test_weights_that_are_not_finite_push_no_checkpoint_out(
    value: float, later: bool, toy: Path, tmp_path: Path, train, monkeypatch
):
    """The run ends with an error that names the last good checkpoint, which --keep 1 keeps."""
    breaks_after(4, monkeypatch, value)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"is not finite after step 4.*step_2 is good"):
        train(
            train_sft,
            out,
            model=toy / "model",
            data=toy / "world" / "sft.jsonl",
            batch_size=8,
            save_every=2,
            keep=1,
            async_save=later,
        )
    assert checkpoint.newest(out).name == "step_2" and not (out / "final").exists()
    state = load_file(out / "step_2" / "state-00001-of-00001.safetensors")
    assert all(is_finite(x.double()) for x in state.values())


def test_the_last_step_cannot_make_a_broken_final(toy: Path, tmp_path: Path, train, monkeypatch):
    """No later step would notice: final/ is refused, and an earlier final/ stays."""
    flags = {"model": toy / "model", "data": toy / "world" / "preferences.jsonl", "batch_size": 8}
    out = tmp_path / "out"
    train(train_dpo, out, **flags, max_steps=2, save_every=2)
    before = (out / "final" / "model.safetensors").read_bytes()
    breaks_after(1, monkeypatch)
    with pytest.raises(ValueError, match="final was not written: a weight is not finite: "):
        train(train_dpo, out, **flags, max_steps=3, resume="auto")
    assert (out / "final" / "model.safetensors").read_bytes() == before
    assert not list(out.glob(".*"))


def test_no_adapter_of_nan_is_written(toy: Path, tmp_path: Path, train, monkeypatch):
    """The same holds for OUT/adapter."""
    breaks_after(2, monkeypatch)
    with pytest.raises(ValueError, match="adapter was not written: .* is not finite"):
        train(
            train_sft,
            tmp_path / "out",
            model=toy / "model",
            data=toy / "world" / "sft.jsonl",
            batch_size=8,
            max_steps=2,
            lora=2,
            merge=False,
        )
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_model_that_starts_with_nan_never_becomes_final(toy: Path, tmp_path: Path, train):
    """Few steps end before the limit of skipped ones: still an error, and no promise of a good
    checkpoint.
    """
    model = load_model(toy / "model", torch.float32)
    with torch.no_grad():
        model.head.weight[3, 3] = 1e38  # finite, and its logits are not
        model.head.weight[3, 4] = 1e38
    save_model(model, tmp_path / "broken", toy / "model")
    flags = {"model": tmp_path / "broken", "data": toy / "world" / "sft.jsonl", "batch_size": 4}
    with pytest.raises(ValueError, match="there is no checkpoint to go back to"):
        train(train_sft, tmp_path / "out", **flags, dtype="bf16", lr=1e38, clip=0)


def test_a_loss_that_is_not_finite_is_never_the_best():
    """Neither as the first evaluation nor later; the best so far stays."""
    loop = SimpleNamespace(state=checkpoint.State())
    assert not training.is_best(loop, math.nan) and loop.state.best is None
    assert training.is_best(loop, 2.0) and not training.is_best(loop, math.nan)
    assert not training.is_best(loop, -math.inf) and loop.state.best == 2.0
