"""SteerLM: the attribute line, each stage against a loop that shares no code, and 2.0's loss against its formula."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL
from plain import PlainModel, PlainTrainer, encode
from safetensors.torch import load_file

import generate
import hf
import losses
import score
import train_rm
import train_sft
import train_steerlm
from data import attributes
from data.formats import ATTRIBUTES, answers_of
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import scoring
from weights.folder import load_model, save_model

NEMO = "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"
LINE = "{prompt}<|attr|>{attributes}"


def rows_of(path: Path, n: int = 10**9) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()][:n]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def predictor(toy: Path, tmp_path_factory) -> Path:
    """An attribute model with large random weights, so that it tells answers apart without training."""
    folder = tmp_path_factory.mktemp("predictor")
    flags = hf.New(
        width=32, layers=2, heads=4, kv_heads=2, std=0.7, tokenizer=str(toy / "world" / "tokenizer")
    )
    save_model(hf.new_model(flags), folder / "new", flags.tokenizer)
    names = ("toxicity", "helpfulness", "correctness", "coherence", "complexity", "verbosity")
    model = load_model(folder / "new", torch.float32, scores=names)
    torch.nn.init.normal_(
        model.score_head.weight, std=0.5, generator=torch.Generator().manual_seed(0)
    )
    save_model(model, folder / "final", folder / "new")
    return folder / "final"


@pytest.fixture(scope="module")
def steered(toy: Path, tmp_path_factory) -> Path:
    """A model trained on attribute lines for a few steps; signal handlers are put back."""
    out = tmp_path_factory.mktemp("steered")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    data = str(toy / "world" / "attributes.jsonl")
    words = ["--model", str(toy / "model"), "--data", data, "--lr", "1e-2", "--batch-size", "6"]
    train_steerlm.main(["--out", str(out), "--attribute-template", LINE, *words])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out / "final"


# ---- the line --------------------------------------------------------------------------------------------------------


def test_the_line_is_nemo_aligners():
    """All nine attributes at their best are NeMo-Aligner's line, in its place; any subset keeps the order."""
    assert attributes.line(attributes.best(ATTRIBUTES)) == NEMO
    asked = attributes.condition(
        "User: hi\nAssistant:\n", attributes.best(ATTRIBUTES), attributes.TEMPLATE
    )
    assert asked == f"User: hi\nAssistant:\n<extra_id_2>{NEMO}\n"
    assert (
        attributes.line({"verbosity": 1.0, "quality": math.nan, "helpfulness": 3.0})
        == "helpfulness:3,verbosity:1"
    )
    assert attributes.read_line(" verbosity:1, helpfulness:4 ") == {
        "verbosity": 1,
        "helpfulness": 4,
    }
    assert attributes.condition("p", {}, LINE) == "p"
    talk = [
        {"role": "user", "content": "a {attributes}"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert attributes.condition(talk, {"quality": 2.0}, LINE) == [
        *talk[:2],
        {"role": "user", "content": "c<|attr|>quality:2"},
    ]
    assert (
        attributes.condition("{prompt} {attributes}", {"quality": 2}, LINE)
        == "{prompt} {attributes}<|attr|>quality:2"
    )
    assert [attributes.whole(x) for x in (-3, 0.49, 0.5, 2.5, 3.2, 9)] == [0, 0, 1, 3, 3, 4]
    for text, reason in (("kindness:4", "'kindness' is not known: use quality, toxicity"), ("quality", "NAME:VALUE"),
                         ("quality:5", "from 0 to 4"), ("quality:x", "from 0 to 4")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            attributes.read_line(text)
    with pytest.raises(ValueError, match="must hold .attributes. once"):
        attributes.check_template("{prompt}")
    assert attributes.check_template("{prompt}\\n{attributes}") == "{prompt}\n{attributes}"


def test_generate_takes_attributes(toy: Path, steered: Path, tmp_path: Path):
    """--attributes conditions as training did; unknown names are refused with those that the model knows."""
    prompts = write(tmp_path / "prompts.jsonl", rows_of(toy / "world" / "prompts_test.jsonl", 5))
    words = [
        "--model",
        str(steered),
        "--data",
        str(prompts),
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
        "--out",
    ]
    generate.main([*words, str(tmp_path / "a.jsonl"), "--attributes", "verbosity:1,helpfulness:4"])
    by_hand = [
        {"prompt": row["prompt"] + "<|attr|>helpfulness:4,verbosity:1"} for row in rows_of(prompts)
    ]
    words[3] = str(write(tmp_path / "by_hand.jsonl", by_hand))
    generate.main([*words, str(tmp_path / "b.jsonl")])
    ours, wanted = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
    assert [row["response"] for row in ours] == [row["response"] for row in wanted]
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in rows_of(prompts)]
    with pytest.raises(
        ValueError, match="'humor' is not known: use toxicity, helpfulness, correctness"
    ):
        generate.main([*words, str(tmp_path / "c.jsonl"), "--attributes", "humor:1"])
    words[1] = str(toy / "model")
    with pytest.raises(ValueError, match="was not trained with any"):
        generate.main([*words, str(tmp_path / "c.jsonl"), "--attributes", "verbosity:1"])


# ---- the stages ------------------------------------------------------------------------------------------------------


def test_the_predictor_is_a_regression_reward_model(toy: Path, tmp_path: Path, train):
    """--stage attributes takes the very steps of train_rm.py --loss regression."""
    flags = {"model": toy / "model", "data": toy / "world" / "attributes.jsonl", "lr": 1e-2, "batch_size": 7,
             "eval_data": toy / "world" / "attributes_test.jsonl"}  # fmt: skip
    mine = train(train_steerlm, tmp_path / "a", stage="attributes", **flags)
    wanted = train(train_rm, tmp_path / "b", loss="regression", **flags)
    for row, other in zip(mine, wanted, strict=True):
        assert row == {key: other[key] for key in row}


def test_annotation_is_the_score_rounded(toy: Path, predictor: Path, tmp_path: Path, train):
    """annotate writes what score.py says, clamped to 0-4 and rounded, for rows of every kind."""
    data = rows_of(toy / "world" / "sft.jsonl", 20)
    pair = {
        "prompt": data[0]["prompt"],
        "chosen": data[0]["response"],
        "rejected": data[1]["response"],
    }
    talk = [
        {"role": "user", "content": data[0]["prompt"]},
        {"role": "assistant", "content": data[0]["response"]},
    ]
    file = write(tmp_path / "rows.jsonl", [*data, pair, {"messages": talk}])
    train_steerlm.main(
        [
            "--stage",
            "annotate",
            "--model",
            str(predictor),
            "--data",
            str(file),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    made = rows_of(tmp_path / "out" / "annotated.jsonl")
    score.main(
        ["--model", str(predictor), "--data", str(file), "--out", str(tmp_path / "scored.jsonl")]
    )
    for row, scored in zip(made[:20], rows_of(tmp_path / "scored.jsonl")):
        raw = scored["scores"]
        assert row["attributes"] == {k: min(4, max(0, math.floor(v + 0.5))) for k, v in raw.items()}
        assert (row["prompt"], row["response"]) == (scored["prompt"], scored["response"])
    assert (
        made[20]["responses"] == [pair["chosen"], pair["rejected"]]
        and made[20]["attributes"][0] == made[0]["attributes"]
    )
    assert (
        made[21]["response"] == talk[1]["content"]
        and made[21]["attributes"] == made[0]["attributes"]
    )
    assert len({json.dumps(row["attributes"]) for row in made}) > 3  # it says different things


def test_five_steps_of_sft_equal_a_plain_loop_in_float64(toy: Path, tmp_path: Path, train):
    """Attribute-conditioned SFT: losses and weights of a plain loop over prompts with the line written by hand."""
    flags = hf.New(
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        std=0.3,
        dtype="fp64",
        tokenizer=str(toy / "world" / "tokenizer"),
    )
    save_model(hf.new_model(flags), tmp_path / "model", flags.tokenizer)
    data = rows_of(toy / "world" / "attributes.jsonl", 20)
    for i, row in enumerate(data):
        row["attributes"] = {
            k: v for j, (k, v) in enumerate(row["attributes"].items()) if (i + j) % 3
        }
    order = "toxicity helpfulness correctness coherence complexity verbosity".split()
    lines = [
        ",".join(f"{k}:{row['attributes'][k]}" for k in order if k in row["attributes"])
        for row in data
    ]
    by_hand = [
        {**row, "prompt": f"{row['prompt']}<|attr|>{line}"} for row, line in zip(data, lines)
    ]
    trees = encode(toy / "world" / "tokenizer" / "tokenizer.model", by_hand, ["response"])
    plain = PlainModel(tmp_path / "model", torch.float64)
    trainer, wanted = PlainTrainer(plain, total=5, lr=1e-2), []
    for step in range(5):
        mine = trees[step * 4 : step * 4 + 4]
        total = -sum(plain.logps(prompt, r[0]).sum() for prompt, r in mine) / sum(
            len(r[0]) for _, r in mine
        )
        wanted.append(trainer.step(total))
    for run, budget in enumerate((8192, 130)):
        got = train(
            train_steerlm, tmp_path / f"out{run}", model=tmp_path / "model", data=write(tmp_path / "rows.jsonl", data),
            lr=1e-2, batch_size=4, warmup=0.25, weight_decay=0.1, shuffle=False, max_tokens=budget, dtype="fp64",
            template="plain", attribute_template=LINE,
        )  # fmt: skip
        for row, (loss, norm) in zip(got, wanted, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=1e-10) and row[
                "grad_norm"
            ] == pytest.approx(norm, rel=1e-10)
        mine = load_file(tmp_path / f"out{run}" / "final" / "model.safetensors")
        assert (
            max((mine[name] - w.detach()).abs().max() for name, w in plain.weights.items()) < 1e-10
        )
    assert attributes.load(tmp_path / "out0" / "final") == (LINE, tuple(order))


def test_real_rows_equal_a_plain_loop(real_model: Path, tmp_path: Path, train):
    """Five fp32 steps on real answers with quality and verbosity, within 1e-5; the line as NeMo-Aligner places it."""
    data = [
        row
        for row in rows_of(REAL / "alpaca_eval" / "attributes.jsonl", 300)
        if len(str(row)) < 1200
    ][:10]
    by_hand = [
        {
            **row,
            "prompt": f"{row['prompt']}<extra_id_2>quality:{row['quality']},verbosity:{row['verbosity']}\n",
        }
        for row in data
    ]
    trees = encode(real_model / "tokenizer.model", by_hand, ["response"])
    plain = PlainModel(real_model, torch.float32)
    trainer, wanted = PlainTrainer(plain, total=5, lr=1e-4), []
    for step in range(5):
        mine = trees[step * 2 : step * 2 + 2]
        total = -sum(plain.logps(prompt, r[0]).sum() for prompt, r in mine) / sum(
            len(r[0]) for _, r in mine
        )
        wanted.append(trainer.step(total))
    got = train(
        train_steerlm, tmp_path / "out", model=real_model, data=write(tmp_path / "rows.jsonl", data), lr=1e-4,
        batch_size=2, warmup=0.25, weight_decay=0.1, shuffle=False,
    )  # fmt: skip
    for row, (loss, norm) in zip(got, wanted, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-5) and row["grad_norm"] == pytest.approx(
            norm, rel=1e-4
        )


def test_dropout_leaves_values_out(toy: Path, tmp_path: Path, train):
    """--attribute-dropout writes lines of random subsets, the same ones for the same seed; 0 keeps everything."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "attributes.jsonl",
        "max_steps": 1,
        "attribute_template": LINE,
    }
    kept = []
    for run, share in enumerate((0.0, 0.5, 0.5)):
        train(train_steerlm, tmp_path / str(run), attribute_dropout=share, **flags)
        made = rows_of(tmp_path / str(run) / "conditioned_train.jsonl")
        kept.append([row["prompt"].partition("<|attr|>")[2].count(":") for row in made])
    assert (
        set(kept[0]) == {6} and kept[1] == kept[2] and 2 < np.mean(kept[1]) < 4 and min(kept[1]) < 2
    )


def test_bootstrap_learns_from_its_own_answers(
    toy: Path, steered: Path, predictor: Path, tmp_path: Path, train
):
    """Samples at the asked attributes, re-annotates, trains on that, and a resumed run takes the same samples."""
    flags = {"stage": "bootstrap", "model": steered, "predictor": predictor, "data": toy / "world" / "sft.jsonl",
             "answers": 2,
             "max_new_tokens": 40, "ask": "helpfulness:4,toxicity:0", "batch_size": 8, "lr": 1e-3}  # fmt: skip
    whole = train(train_steerlm, tmp_path / "out", **flags, save_every=2, keep=9)
    samples = rows_of(tmp_path / "out" / "bootstrap.jsonl")
    for row in samples:
        if "responses" in row:
            assert len(row["responses"]) == len(row["attributes"]) == 2
        else:
            row["responses"], row["attributes"] = [row["response"]], [row["attributes"]]
    labels = {json.dumps(one) for row in samples for one in row["attributes"]}
    assert len(labels) > 1 and all(
        set(json.loads(one)) == set(attributes.load(steered)[1]) for one in labels
    )
    made = rows_of(tmp_path / "out" / "conditioned_train.jsonl")
    assert len(made) == sum(len(row["responses"]) for row in samples)
    assert (
        made[0]["prompt"]
        == f"{samples[0]['prompt']}<|attr|>{attributes.line(samples[0]['attributes'][0])}"
    )
    (tmp_path / "out" / "metrics.jsonl").rename(tmp_path / "old.jsonl")
    again = train(train_steerlm, tmp_path / "out", **flags, resume=tmp_path / "out" / "step_2")
    assert again == whole[2:] and len(whole) > 2
    with pytest.raises(
        ValueError, match="--stage bootstrap needs a --model of --stage sft and a --predictor"
    ):
        train(
            train_steerlm,
            tmp_path / "no",
            stage="bootstrap",
            model=toy / "model",
            data=toy / "world" / "sft.jsonl",
        )


# ---- SteerLM 2.0 -----------------------------------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def test_steerlm2_and_its_gradient_are_the_formula():
    """Sum over a prompt's answers of w log(w / b); the slope by log π is -(w - b), groups of any size and order."""
    rng = np.random.default_rng(0)
    group = rng.permutation([0] * 4 + [1] * 2 + [2] + [3] * 5)
    pi, q, wanted = rng.normal(-30, 4, (3, 12))
    logps = torch.tensor(pi, requires_grad=True)
    terms = losses.steerlm2(logps, torch.tensor(q), torch.tensor(wanted), torch.tensor(group))
    (slope,) = torch.autograd.grad(terms.sum(), logps)
    for g in range(4):
        mine = np.flatnonzero(group == g)
        w, b = softmax(list(wanted[mine])), softmax(list(pi[mine] - q[mine]))
        assert terms[mine].sum().item() == pytest.approx(
            sum(x * math.log(x / y) for x, y in zip(w, b)), abs=1e-12
        )
        assert slope[mine].tolist() == pytest.approx([-(x - y) for x, y in zip(w, b)], abs=1e-12)
    huge = losses.steerlm2(
        *(torch.tensor([-3e4, -100.0, 3e3]) for _ in range(3)), torch.zeros(3, dtype=torch.int64)
    )
    assert huge.isfinite().all()


def test_steerlm2_equals_a_plain_loop_in_float64(toy: Path, predictor: Path, tmp_path: Path, train):
    """Three steps over groups of answers: weights from predictor and prior by hand, the same for every budget and with
    prompts shared or not (to the fp32 that weights are kept in)."""
    flags = hf.New(
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        std=0.3,
        dtype="fp64",
        tokenizer=str(toy / "world" / "tokenizer"),
    )
    for name, seed in (("model", 0), ("prior", 1)):
        save_model(
            hf.new_model(hf.New(**{**vars(flags), "seed": seed})), tmp_path / name, flags.tokenizer
        )
    source = rows_of(toy / "world" / "attributes.jsonl", 30)
    asked = {"helpfulness": 4, "verbosity": 1}
    data = [
        {
            "prompt": source[i]["prompt"],
            "responses": [r["response"] for r in source[3 * i : 3 * i + 2 + i % 2]],
            "attributes": asked,
        }
        for i in range(9)
    ]
    tokenizer = toy / "world" / "tokenizer" / "tokenizer.model"

    def trees(prompt_of) -> list:
        rows = [
            {"prompt": prompt_of(row), **{f"r{k}": r for k, r in enumerate(row["responses"])}}
            for row in data
        ]
        return [encode(tokenizer, [row], [k for k in row if k != "prompt"])[0] for row in rows]

    plain, prior = (
        PlainModel(tmp_path / "model", torch.float64),
        PlainModel(tmp_path / "prior", torch.float64),
    )
    model, names = scoring.load_scorer(str(predictor), torch.float64, "cpu")
    template = Template("plain", load_tokenizer(predictor))
    conditioned = trees(lambda row: row["prompt"] + "<|attr|>helpfulness:4,verbosity:1")
    scores = scoring.score(model, template, [answers_of(row) for row in data])
    fit = [
        [-sum((s[names.index(k)] - v) ** 2 for k, v in asked.items()) / (2 * 0.7**2) for s in one]
        for one in scores
    ]
    trainer, wanted = PlainTrainer(plain, total=3, lr=1e-2), []
    with torch.no_grad():
        q = [[plain.logps(p, r).sum().item() for r in rs] for p, rs in conditioned]
        free = [
            [prior.logps(p, r).sum().item() for r in rs]
            for p, rs in trees(lambda row: row["prompt"])
        ]
    for step in range(3):
        total = 0.0
        for i in range(3 * step, 3 * step + 3):
            w = softmax([a + b - c for a, b, c in zip(fit[i], free[i], q[i])])
            ratio = torch.stack(
                [
                    plain.logps(conditioned[i][0], r).sum() - c
                    for r, c in zip(conditioned[i][1], q[i])
                ]
            )
            log_b = ratio.log_softmax(0)
            total = total + sum(x * (math.log(x) - b) for x, b in zip(w, log_b)) / 3
        wanted.append(trainer.step(total))
    for run, (budget, share) in enumerate([(8192, True), (200, True), (8192, False)]):
        got = train(
            train_steerlm, tmp_path / f"out{run}", model=tmp_path / "model", data=write(tmp_path / "rows.jsonl", data),
            loss="steerlm2", predictor=predictor, prior=tmp_path / "prior", spread=0.7, lr=1e-2, batch_size=3,
            warmup=0.25, weight_decay=0.1, shuffle=False, max_tokens=budget, share_prompts=share, dtype="fp64",
            template="plain", attribute_template=LINE,
        )  # fmt: skip
        for row, (loss, norm) in zip(got, wanted, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=2e-5) and row[
                "grad_norm"
            ] == pytest.approx(norm, rel=2e-5)


def test_steerlm2_bootstraps_and_refuses_what_it_cannot(
    toy: Path, steered: Path, predictor: Path, tmp_path: Path, train
):
    """--stage bootstrap --loss steerlm2 runs; single answers, and no predictor, are refused with the reason."""
    flags = {
        "loss": "steerlm2",
        "model": steered,
        "predictor": predictor,
        "prior": toy / "model",
        "batch_size": 4,
    }
    rows = train(train_steerlm, tmp_path / "a", stage="bootstrap", data=toy / "world" / "sft.jsonl", answers=4,
                 max_steps=3, max_new_tokens=40, **flags)  # fmt: skip
    assert len(rows) == 3 and all(row["loss"] > 0 for row in rows)
    with pytest.raises(ValueError, match="every row has one alone; raise --answers"):
        train(train_steerlm, tmp_path / "b", data=toy / "world" / "attributes.jsonl", **flags)
    with pytest.raises(ValueError, match="needs --predictor DIR"):
        train(
            train_steerlm,
            tmp_path / "c",
            data=toy / "world" / "attributes.jsonl",
            **{**flags, "predictor": ""},
        )
    with pytest.raises(ValueError, match="no row of --data has an attribute: --stage annotate"):
        train(train_steerlm, tmp_path / "d", model=toy / "model", data=toy / "world" / "sft.jsonl")
    with pytest.raises(ValueError, match="a language model is needed"):
        train(train_sft, tmp_path / "e", model=predictor, data=toy / "world" / "sft.jsonl")
