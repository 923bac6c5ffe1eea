"""Training: laws 1 and 3, against an independent plain-torch loop and between layouts."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_llama
from plain import PlainModel, PlainTrainer, encode, five_steps
from safetensors.torch import load_file

import hf
import losses
import train_distill
import train_dpo
import train_kto
import train_rm
import train_sft
from weights.folder import DTYPES, load_model, save_model

REAL = Path(__file__).parents[3] / "shared" / "data"


def rows_of(path: Path, n: int, longest: int = 10**9) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if len(str(row)) < longest][:n]


@pytest.mark.parametrize(("dtype", "lr", "near"), [("fp32", 1e-4, 1e-5), ("fp64", 1e-3, 1e-10)])
@pytest.mark.parametrize("file", ["gsm8k/pref_train.jsonl", "alpaca_eval/pref_chat.jsonl"])
def test_dpo_on_real_pairs_equals_a_plain_loop(
    file, dtype, lr, near, real_model: Path, tmp_path: Path, train
):
    """Every step has the losses and norms of the plain loop, prompts shared or not, any budget.

    Within 1e-5 in fp32; within 1e-10 in fp64 at ten times the rate, where AdamW would amplify
    fp32's rounding.
    """
    rows = rows_of(REAL / file, 12, longest=1500)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees = encode(real_model / "tokenizer.model", rows, ["chosen", "rejected"])
    plain = PlainModel(real_model, DTYPES[dtype])
    trainer = PlainTrainer(plain, total=4, lr=lr)
    with torch.no_grad():
        ref = [[plain.logps(prompt, r).sum() for r in responses] for prompt, responses in trees]
    wanted = []
    for step in range(4):
        total = 0.0
        for i in range(step * 3, step * 3 + 3):
            c, r = (plain.logps(trees[i][0], trees[i][1][k]).sum() - ref[i][k] for k in (0, 1))
            total = total - torch.nn.functional.logsigmoid(0.1 * (c - r)) / 3
        wanted.append(trainer.step(total))
    assert (
        len({round(loss, 3) for loss, _ in wanted}) > 2
    )  # it moves, so that equality means something
    ways = [(True, 8192), (False, 8192), (True, 700), (False, 800)]  # shared or not, budget
    for run, (share, budget) in enumerate(ways if dtype == "fp64" else ways[2:3]):
        got = train(
            train_dpo,
            tmp_path / f"out{run}",
            model=real_model,
            data=tmp_path / "pairs.jsonl",
            lr=lr,
            batch_size=3,
            warmup=0.25,
            weight_decay=0.1,
            shuffle=False,
            share_prompts=share,
            max_tokens=budget,
            dtype=dtype,
        )[1:]
        assert got[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        for row, (loss, norm) in zip(got, wanted, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=near)
            assert row["grad_norm"] == pytest.approx(norm, rel=10 * near)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_five_steps_equal_a_plain_loop_in_float64(
    script, family: str, toy: Path, tmp_path: Path, train
):
    """Law 3 in one process: loss, norm and all weights after five AdamW steps within 1e-10."""
    sizes = {} if family == "gpt_neox" else {"kv_heads": 2}
    flags = hf.New(
        family=family,
        width=32,
        layers=2,
        heads=4,
        std=0.3,
        tied=family == "qwen2",
        dtype="fp64",
        tokenizer=str(toy / "world" / "tokenizer"),
        **sizes,
    )
    save_model(hf.new_model(flags), tmp_path / "model", flags.tokenizer)
    dpo = script is train_dpo
    file = toy / "world" / ("preferences.jsonl" if dpo else "sft.jsonl")
    keys = ["chosen", "rejected"] if dpo else ["response"]
    trees = encode(toy / "world" / "tokenizer" / "tokenizer.model", rows_of(file, 20), keys)
    wanted, weights = five_steps(tmp_path / "model", trees, 4, dpo)
    for run, (share, budget) in enumerate([(True, 8192), (False, 150), (True, 130)]):
        got = train(
            script,
            tmp_path / f"out{run}",
            model=tmp_path / "model",
            data=file,
            lr=1e-2,
            batch_size=4,
            max_steps=5,
            warmup=0.25,
            weight_decay=0.1,
            shuffle=False,
            share_prompts=share,
            max_tokens=budget,
            dtype="fp64",
            template="plain",
        )
        for row, (loss, norm) in zip([row for row in got if row["step"]], wanted, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=1e-10)
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-10)
        mine = load_file(tmp_path / f"out{run}" / "final" / "model.safetensors")
        assert mine.keys() == weights.keys()
        assert max((mine[name] - weights[name]).abs().max() for name in weights) < 1e-10


@pytest.mark.parametrize("loss", losses.DPO_LOSSES)
def test_losses_do_not_depend_on_micro_batches(loss: str, toy: Path, tmp_path: Path, train):
    """Every loss gives the same three steps in float64 in one micro-batch or in many."""
    smoothing = {"robust": 0.1, "exo_pair": 0.01}.get(loss, 0.0)
    runs = [
        train(
            train_dpo,
            tmp_path / str(budget),
            model=toy / "model",
            data=toy / "world" / "preferences.jsonl",
            lr=1e-2,
            batch_size=12,
            max_steps=3,
            dtype="fp64",
            max_tokens=budget,
            loss=loss,
            label_smoothing=smoothing,
            sft_weight=0.1,
            cache=tmp_path / "cache",
        )
        for budget in (8192, 150)
    ]
    rows = [[row for row in run if "loss" in row] for run in runs]
    assert len(rows[0]) == 3 and rows[0][-1]["loss"] != rows[0][0]["loss"]
    for one, many in zip(*rows, strict=True):
        if one["step"] == 1:  # every reward is 0 but for rounding, which side of 0 is chance
            one.pop("rewards/accuracies"), many.pop("rewards/accuracies")
        assert one == pytest.approx(many, abs=1e-10)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train_sft, {}),
        (train_dpo, {"sft_weight": 0.5}),
        (train_dpo, {"loss": "ipo", "average_logps": True, "reference_free": True}),
        (train_dpo, {"sft_weight": 0.5, "ld_alpha": 0.4}),
        (train_dpo, {"sft_weight": 0.5, "mix": ["sigmoid:0.8", "bco_pair:0.2"]}),
        (train_kto, {"batch_size": 96, "loss": "kto"}),
        (train_kto, {"batch_size": 96, "loss": "kto", "sft_weight": 0.5, "shuffle": False}),
        (train_kto, {"batch_size": 96, "loss": "bco", "average_logps": True, "sft_weight": 0.5}),
        (train_rm, {"centering": 0.1}),
        (train_distill, {"sft_weight": 0.5}),
    ],
)
def test_evaluation_measures_what_is_trained(script, flags, toy: Path, tmp_path: Path, train):
    """Without updates, the loss of a step over all rows is eval/loss on the same rows."""
    save_tiny_llama(tmp_path / "model", toy / "world" / "tokenizer", std=0.1)
    other = {train_dpo: "ref", train_distill: "teacher"}.get(script)
    if other and not flags.get("reference_free"):
        flags = {**flags, other: toy / "model"}
    if script is train_sft:
        flags = {**flags, "batch_size": 60}
    data = (
        toy
        / "world"
        / ("sft.jsonl" if script in (train_sft, train_distill) else "preferences.jsonl")
    )
    rows = train(
        script,
        tmp_path / "out",
        **{
            "model": tmp_path / "model",
            "data": data,
            "eval_data": data,
            "batch_size": 60 if script is train_distill else 48,
            "max_steps": 1,
            "lr": 0.0,
            "dtype": "fp64",
            **flags,
        },
    )
    step, evaluation = rows[-2], rows[-1]
    for name in set(step) & {name.removeprefix("eval/") for name in evaluation} - {"step"}:
        assert evaluation[f"eval/{name}"] == pytest.approx(step[name], abs=1e-9), name
    assert "eval/loss" in evaluation


def test_bf16_weights_have_fp32_masters(toy: Path, tmp_path: Path, train):
    """Updates below bf16's resolution add up: in 20 small steps bf16 moves as far as fp32."""
    moved = {}
    start = load_model(toy / "model", torch.float32)
    for dtype in ("bf16", "fp32"):
        train(
            train_sft,
            tmp_path / dtype,
            model=toy / "model",
            data=toy / "world" / "sft.jsonl",
            lr=2e-5,
            batch_size=3,
            dtype=dtype,
            max_steps=20,
            schedule="constant",
            warmup=0.0,
            save_every=20,
        )
        state = load_file(tmp_path / dtype / "step_20" / "state-00001-of-00001.safetensors")
        moved[dtype] = torch.cat(
            [
                state[f"master/{name}"].double() - p.double().flatten()
                for name, p in start.to(
                    torch.bfloat16 if dtype == "bf16" else torch.float32
                ).named_parameters()
            ]
        )
        start = load_model(toy / "model", torch.float32)
    assert moved["fp32"].norm() > 0
    assert (moved["bf16"] - moved["fp32"]).norm() < 0.2 * moved["fp32"].norm()


def test_average_logps_and_reference_free(toy: Path, tmp_path: Path, train):
    """--reference-free drops the reference from the reward; --average-logps divides by tokens."""
    common = {
        "model": toy / "model",
        "data": toy / "world" / "preferences.jsonl",
        "max_steps": 1,
        "batch_size": 4,
        "shuffle": False,
        "dtype": "fp64",
        "beta": 0.5,
        "template": "plain",
    }
    trees = encode(
        toy / "world/tokenizer/tokenizer.model",
        rows_of(toy / "world/preferences.jsonl", 4),
        ["chosen"],
    )
    free = train(train_dpo, tmp_path / "free", **common, reference_free=True)[0]
    assert free["rewards/chosen"] == pytest.approx(0.5 * free["logps/chosen"], rel=1e-9)
    average = train(train_dpo, tmp_path / "average", **common, ref="none", average_logps=True)[0]
    plain = PlainModel(toy / "model", torch.float64)
    wanted = np.mean([0.5 * plain.logps(p, r[0]).detach().mean().item() for p, r in trees])
    assert average["rewards/chosen"] == pytest.approx(wanted, rel=1e-9)


def test_another_reference(toy: Path, tmp_path: Path, train):
    """--ref takes the log-probs of that folder: the loss starts at ln 2 only for the policy."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "preferences.jsonl",
        "max_steps": 2,
        "batch_size": 4,
        "lr": 1e-2,
    }
    first = train(train_dpo, tmp_path / "a", **flags)
    same = train(train_dpo, tmp_path / "b", **flags, ref=toy / "model")
    assert same[1]["loss"] == pytest.approx(math.log(2), abs=1e-7) and same[1:] == first[1:]
    other = train(train_dpo, tmp_path / "c", **flags, ref=tmp_path / "a" / "final")
    assert abs(other[1]["loss"] - math.log(2)) > 1e-3


def test_flags_that_must_not_change_results(toy: Path, tmp_path: Path, train):
    """Activation checkpointing, --samples and logging less often leave every number as it is."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "preferences.jsonl",
        "batch_size": 8,
        "lr": 1e-2,
        "eval_data": toy / "world" / "preferences_test.jsonl",
        "eval_every": 3,
    }
    plain = train(train_dpo, tmp_path / "a", **flags)
    assert (
        train(train_dpo, tmp_path / "b", **flags, checkpoint_activations=True, samples=2) == plain
    )
    fewer = train(train_dpo, tmp_path / "c", **flags, log_every=3)
    assert fewer == [row for row in plain if row["step"] % 3 == 0]


def test_the_best_model_is_kept(toy: Path, tmp_path: Path, train):
    """OUT/best holds the weights of the evaluation with the lowest loss, not the last ones."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 10,
        "eval_every": 1,
        "lr": 1.0,
        "eval_data": toy / "world" / "sft.jsonl",
        "schedule": "constant",
        "warmup": 0.0,
        "max_steps": 5,
    }
    rows = train(train_sft, tmp_path / "out", **flags)
    losses_seen = [row["eval/loss"] for row in rows if "eval/loss" in row]
    best = losses_seen.index(min(losses_seen)) + 1
    assert best < 5  # a rate of 1 ruins the model, so that the best is not the last
    again = train(train_sft, tmp_path / "again", **{**flags, "max_steps": best})
    assert again[-1]["eval/loss"] == min(losses_seen)
    a, b = (load_file(tmp_path / p / "model.safetensors") for p in ("out/best", "again/final"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("template", ["auto", "chatml"])
def test_the_final_folder_is_ready_for_transformers(
    template: str, toy: Path, tmp_path: Path, train
):
    """OUT/final loads with its tokenizer: same ids, chat template and end of an answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from data.templates import Template
    from data.tokenizer import load_tokenizer

    flags = {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "max_steps": 1,
        "template": template,
    }
    train(train_sft, tmp_path / "out", **flags)
    final = tmp_path / "out" / "final"
    _, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = (
        AutoTokenizer.from_pretrained(final),
        Template(template, load_tokenizer(toy / "model")),
    )
    messages = [{"role": "user", "content": "Where does Ada live?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.render(messages, True)
    assert theirs(rendered, add_special_tokens=False)["input_ids"] == ours.prompt(messages)
    assert set(GenerationConfig.from_pretrained(final).eos_token_id) == ours.stop_ids


def test_resuming_with_other_flags_is_said(toy: Path, tmp_path: Path, train, capsys):
    """A flag that differs from the stopped run's is named with both values."""
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 20}
    train(train_sft, tmp_path / "out", **flags, max_minutes=1e-6)
    train(train_sft, tmp_path / "out", **flags, lr=0.5, resume="auto")
    assert "another --lr: 0.5, it was 2e-05" in capsys.readouterr().out


def test_a_damaged_reference_is_scored_again(toy: Path, tmp_path: Path, train, capsys):
    """Cut short, a flipped bit, empty, no such file: a warning, and the same losses."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "preferences.jsonl",
        "batch_size": 8,
        "max_steps": 2,
        "cache": tmp_path / "cache",
    }
    first = train(train_dpo, tmp_path / "first", **flags)
    (path,) = (tmp_path / "cache").glob("reference-*.safetensors")
    whole = path.read_bytes()
    again = train(train_dpo, tmp_path / "again", **flags)
    assert "from" in capsys.readouterr().out and again[-1]["loss"] == first[-1]["loss"]
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    for i, content in enumerate((whole[:-9], bytes(flipped), b"", b"x" * 100)):
        path.write_bytes(content)
        rows = train(train_dpo, tmp_path / f"damaged{i}", **flags)
        assert "is damaged, scoring again" in capsys.readouterr().out
        assert rows[-1]["loss"] == first[-1]["loss"]
        assert path.read_bytes() == whole


def test_tensorboard_gets_every_number(toy: Path, tmp_path: Path, train):
    """--tensorboard writes the numbers of metrics.jsonl, by their names and steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 20}
    rows = train(train_sft, tmp_path / "out", **flags, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    wanted = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in losses] == [step for step, _ in wanted] and len(losses) == 3
    assert [v for _, v in losses] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_tensorboard_names_its_package(toy: Path, tmp_path: Path, train, monkeypatch):
    """Without the package the run ends before anything is computed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl"}
    with pytest.raises(ImportError, match="--tensorboard needs: pip install tensorboard"):
        train(train_sft, tmp_path / "out", **flags, tensorboard=True)
