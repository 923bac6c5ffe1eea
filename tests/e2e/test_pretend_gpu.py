"""Every training script on a pretend GPU: CUDA's rules, and how often the host waits a step."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pretend
import pytest
import torch
from launch import RankFailed, launch

import reporting
import train_distill
import train_dpo
import train_kto
import train_nash
import train_online_dpo
import train_ppo
import train_reinforce
import train_rm
import train_sft
import train_steerlm
import training

TOKENS = 6  # of a sample, at most
SAMPLING = ["--max-new-tokens", str(TOKENS)]
REWARD = ["--reward", "length:3", *SAMPLING]
OFFLOAD = ["--offload", "optimizer", "--grad-dtype", "bf16", "--async-save"]
# script -> module, its training rows, its evaluation rows, flags of its own
SCRIPTS = {
    "sft": (train_sft, "sft", "sft", ["--samples", "2"]),
    "sft offloaded": (train_sft, "sft", "sft", OFFLOAD),
    "dpo": (train_dpo, "preferences", "preferences_test", ["--samples", "2"]),
    "kto": (train_kto, "labels", "labels", []),
    "rm": (train_rm, "preferences", "preferences_test", []),
    "distill": (train_distill, "sft", "sft", ["--teacher", "MODEL", "--on-policy", "1", *SAMPLING]),
    "ppo": (train_ppo, "sft", "prompts_test", [*REWARD, "--ppo-epochs", "1"]),
    "reinforce": (train_reinforce, "sft", "prompts_test", [*REWARD, "--kl", "0.1"]),
    "online_dpo": (train_online_dpo, "sft", "prompts_test", REWARD),
    "nash": (train_nash, "sft", "prompts_test", REWARD),
    "steerlm": (train_steerlm, "groups", "groups", ["--loss", "steerlm2", "--answers", "0"]),
}
STEP = {"optimizer.py:step": 1, "reporting.py:means": 1}  # norm of the gradient, metrics
ROLLOUT = {"sampling/sampler.py:generate": TOKENS}  # one a token
# script -> the waits of a step, by place, besides the meter's two: the host runs ahead otherwise.
BUDGET = {
    "sft": STEP,
    "sft offloaded": {**STEP, "master.py:update": 2},  # the gradient of each of its two buckets
    "dpo": STEP,
    "kto": {**STEP, "train_kto.py:main": 1},  # the reference point, for the log
    "rm": STEP,
    "distill": {**STEP, **ROLLOUT},
    # Policy, critic; log-probs of the policy and of the reference, values.
    "ppo": {
        **STEP,
        **ROLLOUT,
        "optimizer.py:step": 2,
        "sampling/updates.py:logps_at": 2,
        "train_ppo.py:token_values": 1,
    },
    "reinforce": {**STEP, **ROLLOUT, "sampling/updates.py:logps_at": 2},
    "online_dpo": {**STEP, **ROLLOUT},
    "nash": {**STEP, "sampling/sampler.py:generate": 2 * TOKENS},  # of the policy and the mixture
    "steerlm": STEP,
}


def waits_of_steps(main: Callable[[list[str]], None], words: list[str]) -> list[Counter[str]]:
    """Run a script's main in this process, on the pretend GPU; return the waits of its steps."""
    steps: list[Counter[str]] = []
    remaining, report = training.remaining, training.report_step

    def each_step(loop: training.Loop) -> Iterator[int]:
        for step in remaining(loop):
            pretend.PHASE[0] = "step"
            pretend.WAITS.clear()
            yield step

    def report_step(*args) -> None:
        pretend.PHASE[0] = ""
        steps.append(Counter())
        for (phase, place, _), n in pretend.WAITS.items():
            steps[-1][place] += n if phase else 0
        report(*args)

    training.remaining, training.report_step = each_step, report_step
    try:
        main(words)
    finally:
        training.remaining, training.report_step = remaining, report
    return [+counts for counts in steps]


def words_for(name: str, toy: Path, out: Path, steps: int) -> list[str]:
    """Return the flags of a short run of a script."""
    _, rows, heldout, own = SCRIPTS[name]
    world = out.parent if name == "steerlm" else toy / "world"
    files = {"model": toy / "model", "data": world / f"{rows}.jsonl", "out": out}
    words = [word for key, value in files.items() for word in (f"--{key}", str(value))]
    few = out.parent / "heldout.jsonl"
    few.write_text("".join((world / f"{heldout}.jsonl").read_text().splitlines(True)[:8]))
    words += ["--eval-data", str(few), "--eval-every", "2"]
    words += f"--batch-size 8 --max-tokens 600 --save-every 2 --max-steps {steps}".split()
    if name == "steerlm":
        words += ["--predictor", str(out.parent / "predictor/final"), "--prior", "MODEL"]
    return [str(toy / "model") if word == "MODEL" else word for word in words + own]


def train(name: str, toy: Path, out: Path) -> list[Counter[str]]:
    """Take two steps, stop, resume for the third; return the waits of each."""
    pretend.install()
    training.SAMPLE_TOKENS = TOKENS
    main = SCRIPTS[name][0].main
    if name == "steerlm":
        prepare_steerlm(toy, out.parent)
    steps = waits_of_steps(main, words_for(name, toy, out, 2))
    return steps + waits_of_steps(main, [*words_for(name, toy, out, 3), "--resume", "auto"])


def prepare_steerlm(toy: Path, folder: Path) -> None:
    """Write groups of responses with attributes, and train a predictor of attributes."""
    rows = [json.loads(line) for line in (toy / "world/attributes.jsonl").open()]
    asked = {"helpfulness": 4, "verbosity": 1}
    groups = [
        {"prompt": a["prompt"], "responses": [a["response"], b["response"]], "attributes": asked}
        for a, b in zip(rows[::2], rows[1::2])
    ]
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    words = ["--model", str(toy / "model"), "--data", str(toy / "world/attributes.jsonl")]
    words += ["--loss", "regression", "--max-steps", "1", "--batch-size", "8"]
    train_rm.main([*words, "--out", str(folder / "predictor")])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_the_rules_and_its_budget_of_waits(name: str, toy: Path, tmp_path: Path):
    """Three steps in bf16 with evaluation, saving, resuming and sampling; waits as in BUDGET."""
    steps = launch(1, train, name, toy, tmp_path / "out")[0]
    assert len(steps) == 3
    for waits in steps[1:]:  # the first one also moves what is kept for later steps
        assert waits == BUDGET[name]
    assert (tmp_path / "out/final/model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert [row["step"] for row in rows if "grad_norm" in row or "policy/grad_norm" in row] == [
        1,
        2,
        3,
    ]


# ---- the rules, each broken once -----------------------------------------------------------------


def seeded(fault: str, toy: Path, out: Path) -> list[Counter[str]]:
    """Run two steps of SFT with a fault in it; return the waits."""
    pretend.install()
    add = reporting.add
    if fault == "item":
        train_sft.add = lambda totals, values: (values["loss"].sum().item(), add(totals, values))
    if fault == "numpy":
        train_sft.add = lambda totals, values: values["loss"].detach().numpy()
    if fault == "device":
        train_sft.add = lambda totals, values: values["loss"] + torch.ones(len(values["loss"]))
    if fault == "unpinned":
        torch.Tensor.pin_memory = lambda self: self
    if fault == "mask":
        train_sft.add = lambda totals, values: (
            values["loss"][values["loss"] > 0],
            add(totals, values),
        )
    if fault == "index":
        train_sft.add = lambda totals, values: (
            values["loss"][torch.tensor([0])],
            add(totals, values),
        )
    words = ["--model", str(toy / "model"), "--data", str(toy / "world/sft.jsonl")]
    words += f"--batch-size 8 --max-tokens 600 --max-steps 2 --out {out}".split()
    return waits_of_steps(train_sft.main, words)


@pytest.mark.parametrize("fault", ["item", "unpinned", "mask", "index"])
def test_one_wait_more_is_over_the_budget(fault: str, toy: Path, tmp_path: Path):
    """A stray item, a copy of unpinned memory, an index by a mask or from the host."""
    assert launch(1, seeded, fault, toy, tmp_path / "out")[0][1] != BUDGET["sft"]


@pytest.mark.parametrize(("fault", "said"), [("numpy", "to numpy"), ("device", "same device")])
def test_what_a_gpu_refuses_raises(fault: str, said: str, toy: Path, tmp_path: Path):
    """numpy() of a tensor on the device, and an operation on two devices."""
    with pytest.raises(RankFailed, match=said):
        launch(1, seeded, fault, toy, tmp_path / "out")


def rules() -> dict[str, int]:
    """Do what waits on a GPU, and what must raise; return the waits by what waited."""
    pretend.install()
    x = torch.zeros(3, device="cuda")
    assert x.is_cuda and x.device.type == "cuda"
    for forbidden in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3) + x,
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: x.numpy(),
        lambda: np.asarray(x),
        lambda: x.pin_memory(),
        lambda: x.to("cpu", non_blocking=True),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")],
    ):
        with pytest.raises((RuntimeError, TypeError)):
            forbidden()
    assert not pretend.WAITS
    # None of these waits: work on the device, and copies from pinned memory.
    weight = torch.ones(3, device="cuda", requires_grad=True)
    (weight * (x + 2.0)).sum().backward()
    assert weight.grad.is_cuda
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    x.copy_(torch.ones(3).pin_memory(), non_blocking=True)
    x[torch.zeros(1, dtype=torch.int64, device="cuda")] = 5.0
    assert not pretend.WAITS
    # All of these do.
    values = [x.sum().item(), float(x[0]), *x.tolist(), *x.cpu().tolist()]
    assert values == [7.0, 5.0, 5.0, 1.0, 1.0, 5.0, 1.0, 1.0]
    assert bool((x > 0).all())
    x[[0, 1]], x[x > 0], x.nonzero(), x.copy_(torch.ones(3))
    torch.ones(3).to("cuda", non_blocking=True)
    torch.tensor([1.0], device="cuda")
    waits: Counter[str] = Counter()
    for (_, _, what), n in pretend.WAITS.items():
        waits[what] += n
    return dict(waits)


def test_the_pretend_gpu_counts_what_waits():
    """Each kind of wait once, and work that does not wait never."""
    assert launch(1, rules)[0] == {
        "item": 3,
        "tolist": 1,
        "copy to the host": 1,
        "index on the host": 1,
        "index by a mask": 1,
        "aten::nonzero": 1,
        "copy to the device": 2,
        "copy of unpinned memory": 1,
    }
