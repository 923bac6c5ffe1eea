"""Reward models: the papers' formulas, scores of an answer alone, folders for transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, REAL, dataset_of, tiny_transformers
from plain import PlainModel, PlainTrainer, encode
from safetensors.torch import load_file

import hf
import losses
import score
import train_rm
import train_sft
from data.formats import ATTRIBUTES, attribute_row
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from weights import config_json
from weights.folder import load_model, save_model


def rows_of(path: Path, n: int) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()][:n]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- losses ----


@pytest.mark.parametrize("name", ["bradley_terry", "margin_bt", "scaled_bt"])
def test_pairwise_losses_and_gradients_are_the_formulas(name: str):
    """Values and derivatives by both scores in float64 against the formulas in plain numbers."""
    rng = np.random.default_rng(0)
    for c, r, m, lam in zip(*rng.normal(0, 2, (3, 40)), rng.choice([0.0, 0.01, 0.3], 40)):
        delta, big = c - r, abs(m)
        wanted, slope = {
            "bradley_terry": (-math.log(sigma(delta)), -sigma(-delta)),
            "margin_bt": (-math.log(sigma(delta - big)), -sigma(big - delta)),
            "scaled_bt": (-big * math.log(sigma(delta)), -big * sigma(-delta)),
        }[name]
        scores = torch.tensor([[c, r]], dtype=torch.float64, requires_grad=True)
        loss, metrics = losses.pairwise_reward(
            scores, torch.tensor([m], dtype=torch.float64), name, lam
        )
        assert loss.item() == pytest.approx(wanted + lam * (c * c + r * r), abs=1e-12)
        got = torch.autograd.grad(loss.sum(), scores)[0][0].tolist()
        assert got == pytest.approx([slope + 2 * lam * c, -slope + 2 * lam * r], abs=1e-12)
        assert (
            metrics["rewards/accuracies"].item() == (c > r)
            and not metrics["rewards/chosen"].requires_grad
        )
    signed = losses.bradley_terry(torch.tensor(1.0), torch.tensor(0.5), -2.0)
    assert signed.item() == pytest.approx(-math.log(sigma(2.5)), abs=1e-6)


def test_missing_attributes_contribute_exactly_nothing():
    """A missing attribute has a loss and a gradient of exactly 0, never NaN."""
    scores = torch.randn(
        6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    wanted = torch.tensor([[1, math.nan, 0], [math.nan] * 3, [4, 2, 0]] * 2, dtype=torch.float64)
    loss = losses.regression(scores, wanted)
    (slope,) = torch.autograd.grad(loss.sum(), scores)
    for i in range(6):
        for k in range(3):
            error = scores[i, k].item() - wanted[i, k].item()
            missing = math.isnan(error)
            assert loss[i, k].item() == (0.0 if missing else pytest.approx(error**2, abs=1e-12))
            assert slope[i, k].item() == (0.0 if missing else pytest.approx(2 * error, abs=1e-12))


# ---- training ----


class PlainScorer(PlainModel):
    """PlainModel with a score head that starts at zero, of n outputs."""

    def __init__(self, folder: Path, dtype: torch.dtype, n: int):
        super().__init__(folder, dtype)
        for head in ("lm_head.weight", "embed_out.weight"):
            self.weights.pop(head, None)
        width = self.config["hidden_size"]
        self.weights["score.weight"] = torch.zeros(n, width, dtype=dtype, requires_grad=True)

    def score(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        self.config["tie_word_embeddings"] = False
        name = "embed_out.weight" if self.neox else "lm_head.weight"
        self.weights[name] = self.weights["score.weight"]
        scores = self.logits(torch.tensor(prompt + response))[-1]
        del self.weights[name]
        return scores


def plain_run(
    model: PlainScorer, trees: list, loss, batch: int, steps: int, lr: float
) -> list[tuple[float, float]]:
    trainer = PlainTrainer(model, total=steps, lr=lr)
    rows = [range(step * batch, step * batch + batch) for step in range(steps)]
    return [
        trainer.step(loss([[model.score(trees[i][0], r) for r in trees[i][1]] for i in mine], mine))
        for mine in rows
    ]


def check(got: list[dict], wanted: list[tuple[float, float]], near: float):
    for row, (loss, norm) in zip(got, wanted, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=near)
        assert row["grad_norm"] == pytest.approx(norm, rel=10 * near, abs=near)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("kind", ["bradley_terry", "margin_bt", "regression"])
def test_five_steps_equal_a_plain_loop_in_float64(
    kind: str, family: str, toy: Path, tmp_path: Path, train
):
    """Losses, norms and all weights after five steps within 1e-10, however examples are packed."""
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
    pairs = kind != "regression"
    file = toy / "world" / ("preferences.jsonl" if pairs else "attributes.jsonl")
    data = rows_of(file, 20)
    if not pairs:  # holes in the labels
        for i, row in enumerate(data):
            row["attributes"] = {
                k: v for j, (k, v) in enumerate(row["attributes"].items()) if (i + j) % 3
            }
        file = tmp_path / "holes.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
    keys = ["chosen", "rejected"] if pairs else ["response"]
    trees = encode(toy / "world" / "tokenizer" / "tokenizer.model", data, keys)
    names = [
        n for n in ATTRIBUTES if not pairs and any(n in row["attributes"] for row in data)
    ] or ["reward"]
    assert len(names) == (1 if pairs else 6)

    def loss(scores: list, mine: range) -> torch.Tensor:
        if pairs:
            gap = [
                abs(data[i]["chosen_reward"] - data[i]["rejected_reward"]) * (kind == "margin_bt")
                for i in mine
            ]
            return sum(
                -torch.nn.functional.logsigmoid(c - r - m)[0] for (c, r), m in zip(scores, gap)
            ) / len(mine)
        labels = [
            (s[0][names.index(k)] - v) ** 2
            for i, s in zip(mine, scores)
            for k, v in data[i]["attributes"].items()
        ]
        return sum(labels) / len(labels)

    plain = PlainScorer(tmp_path / "model", torch.float64, len(names))
    wanted = plain_run(plain, trees, loss, 4, 5, 1e-2)
    for run, (share, budget) in enumerate([(True, 8192), (False, 150), (True, 130)]):
        got = train(
            train_rm,
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
            loss=kind,
        )
        check(got, wanted, 1e-10)
        if kind == "bradley_terry":
            assert got[0]["loss"] == pytest.approx(
                math.log(2), abs=1e-12
            )  # every score is 0 before the first step
        mine = load_file(tmp_path / f"out{run}" / "final" / "model.safetensors")
        assert mine.keys() == plain.weights.keys()
        assert (
            max((mine[name] - w.detach()).abs().max() for name, w in plain.weights.items()) < 1e-10
        )


@pytest.mark.parametrize(
    "file",
    ["gsm8k/pref_train.jsonl", "alpaca_eval/pref_chat.jsonl", "alpaca_eval/attributes.jsonl"],
)
def test_real_rows_equal_a_plain_loop(file: str, real_model: Path, tmp_path: Path, train):
    """Five fp32 steps on real rows within 1e-5 of the plain loop."""
    data = [row for row in rows_of(REAL / file, 400) if len(str(row)) < 2500][:10]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    pairs = "chosen" in data[0]
    trees = encode(
        real_model / "tokenizer.model", data, ["chosen", "rejected"] if pairs else ["response"]
    )

    def loss(scores: list, mine: range) -> torch.Tensor:
        if pairs:
            return sum(-torch.nn.functional.logsigmoid(c - r)[0] for c, r in scores) / len(mine)
        wanted = torch.tensor([[data[i]["quality"], data[i]["verbosity"]] for i in mine])
        return (torch.stack([s[0] for s in scores]) - wanted).square().mean()

    plain = PlainScorer(real_model, torch.float32, 1 if pairs else 2)
    wanted = plain_run(plain, trees, loss, 2, 5, 1e-4)
    got = train(
        train_rm,
        tmp_path / "out",
        model=real_model,
        data=tmp_path / "rows.jsonl",
        lr=1e-4,
        batch_size=2,
        warmup=0.25,
        weight_decay=0.1,
        shuffle=False,
        max_tokens=1300,
        loss="bradley_terry" if pairs else "regression",
    )
    check(got, wanted, 1e-5)


def test_metrics_and_evaluation(toy: Path, tmp_path: Path, train, capsys):
    """Metrics of pairs, error and correlation of attributes, as numpy has them from score.py."""
    world = toy / "world"
    flags = {"model": toy / "model", "lr": 1e-2, "batch_size": 8, "max_tokens": 300}
    *_, row = train(
        train_rm,
        tmp_path / "pairs",
        data=world / "preferences.jsonl",
        eval_data=world / "preferences_test.jsonl",
        samples=2,
        **flags,
    )
    score.main(
        [
            "--model",
            str(tmp_path / "pairs" / "final"),
            "--data",
            str(world / "preferences_test.jsonl"),
            "--out",
            str(tmp_path / "scored.jsonl"),
        ]
    )
    pairs = np.array(
        [[r["chosen_reward"], r["rejected_reward"]] for r in rows_of(tmp_path / "scored.jsonl", 99)]
    )
    shown = capsys.readouterr().out
    assert shown.count("  prompt  ") == 2  # --samples shows held-out answers with their scores
    for scored_row in rows_of(tmp_path / "scored.jsonl", 2):
        assert all(
            f"  {scored_row[f'{k}_reward']:.3f}  {scored_row[k]!r}" in shown
            for k in ("chosen", "rejected")
        )
    assert row["eval/rewards/accuracies"] == (pairs[:, 0] > pairs[:, 1]).mean()
    assert row["eval/rewards/margins"] == pytest.approx(
        (pairs[:, 0] - pairs[:, 1]).mean(), abs=1e-5
    )
    assert row["eval/rewards/mean"] == pytest.approx(pairs.mean(), abs=1e-5)
    assert row["eval/rewards/std"] == pytest.approx(pairs.std(), abs=1e-5)

    *_, row = train(
        train_rm,
        tmp_path / "attributes",
        data=world / "attributes.jsonl",
        loss="regression",
        eval_data=world / "attributes_test.jsonl",
        **flags,
    )
    score.main(
        [
            "--model",
            str(tmp_path / "attributes" / "final"),
            "--data",
            str(world / "attributes_test.jsonl"),
            "--out",
            str(tmp_path / "scored.jsonl"),
        ]
    )
    data = rows_of(tmp_path / "scored.jsonl", 99)
    for name in data[0]["scores"]:
        got, right = (
            np.array([scored_row[key][name] for scored_row in data])
            for key in ("scores", "attributes")
        )
        assert row[f"eval/error/{name}"] == pytest.approx(np.abs(got - right).mean(), abs=1e-5)
        assert row[f"eval/correlation/{name}"] == pytest.approx(
            np.corrcoef(got, right)[0, 1], abs=1e-5
        )


# ---- folders ----


def scored(model, trees: list, **how) -> torch.Tensor:
    batch = make_batch(dataset_of(trees), list(range(len(trees))), **how)
    with torch.no_grad():
        return model.score(model(batch), batch, batch.last)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_reward_folders_go_both_ways(family: str, tied: bool, tmp_path: Path):
    """transformers gives the same scores on the same folder, whoever wrote it."""
    import transformers as tf

    base = tiny_transformers(family, tied)
    names = ["helpfulness", "verbosity", "quality"] if tied else ["reward"]
    base.config.id2label, base.config.label2id = (
        dict(enumerate(names)),
        {n: i for i, n in enumerate(names)},
    )
    base.config.pad_token_id = 0
    torch.manual_seed(1)
    theirs = tf.AutoModelForSequenceClassification.from_config(
        base.config, attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", torch.float32, scores=())
    assert config_json.score_names(ours.hf_config) == tuple(names)
    ids = [
        torch.randint(1, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (7, 19, 12)
    ]
    padded = torch.tensor([row + [0] * (19 - len(row)) for row in ids])
    with torch.no_grad():
        wanted = theirs(padded, attention_mask=padded != 0).logits
        assert wanted.std() > 0.1  # the comparison means something
        assert (scored(ours, [(row[:-4], [row[-4:]]) for row in ids]) - wanted).abs().max() < 1e-4
        save_model(ours, tmp_path / "ours")
        again, report = tf.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
        assert not any(
            report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        assert again.config.id2label == dict(enumerate(names))
        assert (again(padded, attention_mask=padded != 0).logits - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("pads_with_end", [False, True])
def test_a_trained_folder_scores_alike_in_transformers(
    pads_with_end: bool, toy: Path, tmp_path: Path, train
):
    """score.py against transformers with its own tokenizer, in a padded batch.

    The score is that of the end token even if the base model's padding token was its end token.
    """
    import transformers as tf

    model = tmp_path / "model"
    save_model(load_model(toy / "model", torch.float32), model, toy / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if pads_with_end:
        settings["pad_token"] = settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "tokenizer.model").unlink()  # transformers reads tokenizer.json; so shall we
    train(
        train_rm,
        tmp_path / "rm",
        model=model,
        data=toy / "world" / "preferences.jsonl",
        lr=1e-2,
        batch_size=4,
    )
    final = tmp_path / "rm" / "final"
    data = toy / "world" / "attributes_test.jsonl"
    score.main(
        ["--model", str(final), "--data", str(data), "--out", str(tmp_path / "scored.jsonl")]
    )
    scores = [row["score"] for row in rows_of(tmp_path / "scored.jsonl", 99)]
    assert np.std(scores) > 0.05
    tokenizer = tf.AutoTokenizer.from_pretrained(final)
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(final)
    talks = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in rows_of(data, 99)
    ]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert batch["input_ids"][0, batch["attention_mask"][0].sum() - 1] == tokenizer.eos_token_id
    with torch.no_grad():
        wanted = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert scores == pytest.approx(wanted.tolist(), abs=1e-4)


def test_scores_depend_on_nothing_but_the_answer(tmp_path: Path):
    """Sharing prompts, the order of a batch and what else is in it change no score, in float64."""
    tiny_transformers("llama3", False).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float64, scores=("reward", "other"))
    torch.nn.init.normal_(model.score_head.weight, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    trees = [
        (rng.integers(0, 90, p).tolist(), [rng.integers(0, 90, n).tolist() for n in ns])
        for p, ns in [(5, [3, 4]), (1, [1, 6, 2]), (9, [7])]
    ]
    whole = scored(model, trees)
    alone = torch.cat([scored(model, [(prompt, [r])]) for prompt, rs in trees for r in rs])
    assert whole.std() > 0.1 and (whole - alone).abs().max() < 1e-12
    assert (scored(model, trees, share_prompts=False) - alone).abs().max() < 1e-12
    assert (scored(model, trees[::-1]) - alone[[5, 2, 3, 4, 0, 1]]).abs().max() < 1e-12
    only = make_batch(dataset_of(trees[:2]), [1, 0], only=1)
    assert (model.score(model(only), only, only.last) - alone[[3, 1]]).abs().max() < 1e-12


def test_the_wrong_kind_of_model_is_refused_by_name(toy: Path, tmp_path: Path, train):
    """A reward model is no language model, nor the reverse, and attributes must be the same."""
    train(
        train_rm,
        tmp_path / "rm",
        model=toy / "model",
        data=toy / "world" / "attributes.jsonl",
        loss="regression",
        max_steps=1,
        attributes=["helpfulness", "verbosity"],
    )
    final = tmp_path / "rm" / "final"
    with pytest.raises(
        ValueError, match="reward model .of helpfulness, verbosity.: a language model is needed"
    ):
        train(train_sft, tmp_path / "sft", model=final, data=toy / "world" / "sft.jsonl")
    with pytest.raises(ValueError, match="is a language model: a reward model is needed"):
        load_model(toy / "model", torch.float32, scores=())
    with pytest.raises(ValueError, match="scores helpfulness, verbosity, not reward"):
        load_model(final, torch.float32, scores=("reward",))
    assert "scores helpfulness, verbosity" in hf.describe(str(final))
    with pytest.raises(ValueError, match="'helpfulnes' is not known: use quality, toxicity"):
        train(
            train_rm,
            tmp_path / "x",
            model=toy / "model",
            data=toy / "world" / "attributes.jsonl",
            loss="regression",
            attributes=["helpfulnes"],
        )
    with pytest.raises(
        ValueError, match="no row of --data has humor: it has toxicity, helpfulness"
    ):
        train(
            train_rm,
            tmp_path / "y",
            model=toy / "model",
            data=toy / "world" / "attributes.jsonl",
            loss="regression",
            attributes=["humor"],
        )


def test_attribute_rows():
    """Nested, flat and several answers; missing is NaN, unknown names are refused."""
    nested = attribute_row({"prompt": "p", "response": "r", "attributes": {"verbosity": 2}})
    flat = attribute_row({"prompt": "p", "response": "r", "verbosity": 2, "page": "x"})
    assert nested.columns["verbosity"] == flat.columns["verbosity"] == [2.0]
    assert math.isnan(nested.columns["quality"][0]) and tuple(nested.columns) == ATTRIBUTES
    both = attribute_row(
        {"prompt": "p", "responses": ["a", "b"], "attributes": [{"quality": 1}, {}]}
    )
    assert (
        both.responses == ["a", "b"]
        and both.columns["quality"][0] == 1
        and math.isnan(both.columns["quality"][1])
    )
    for row, reason in (
        ({"attributes": {"kindness": 1}}, "'kindness' is not known: use quality"),
        ({"attributes": {"quality": "high"}}, "`quality` must be a finite number"),
        ({"attributes": 3}, "must be an object of numbers, got 3"),
        ({"responses": ["a", "b"], "attributes": [{}]}, "a list of 2 objects"),
        ({"responses": []}, "`responses` must be a list of answers and not empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            attribute_row({"prompt": "p", "response": "r", **row})


def test_resumed_is_never_stopped(toy: Path, tmp_path: Path, train):
    """Stopped after 4 of 8 steps and resumed: every later metric is the same to the last bit."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "preferences.jsonl",
        "lr": 1e-2,
        "batch_size": 6,
    }
    whole = train(train_rm, tmp_path / "whole", **flags, save_every=4)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "step_4").rename(tmp_path / "step_4")
    again = train(train_rm, tmp_path / "cut", **flags, resume=tmp_path / "step_4")
    assert again == whole[4:] and len(whole) == 8


def test_rows_are_scored_in_every_form(toy: Path, tmp_path: Path, train, capsys):
    """score.py: one response, several, and pairs give the same number for the same answer."""
    train(
        train_rm,
        tmp_path / "rm",
        model=toy / "model",
        data=toy / "world" / "preferences.jsonl",
        lr=1e-2,
        batch_size=8,
    )
    folder = tmp_path / "rm" / "final"
    one = {"prompt": "Where does Ada live?", "response": "Tower."}
    several = {"prompt": one["prompt"], "responses": ["Tower.", "No idea."]}
    pair = {"prompt": one["prompt"], "chosen": "No idea.", "rejected": "Tower."}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (one, several, pair))
    )
    words = [
        "--model",
        str(folder),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "scored.jsonl"),
    ]
    score.main(words)
    a, b, c = rows_of(tmp_path / "scored.jsonl", 3)
    assert a["score"] == pytest.approx(b["scores"][0], abs=1e-5) and a["score"] == pytest.approx(
        c["rejected_reward"], abs=1e-5
    )
    assert (
        b["scores"][1]
        == pytest.approx(c["chosen_reward"], abs=1e-5)
        != pytest.approx(a["score"], abs=1e-3)
    )
    assert Template("auto", load_tokenizer(folder)).stop_ids
    (tmp_path / "rows.jsonl").write_text(json.dumps(one) + '\n{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="row 2 of .*rows.jsonl: `prompt` but no `response`"):
        score.main(words)


def test_answers_that_say_nothing_are_left_out_and_counted(toy: Path, tmp_path: Path, capsys):
    """score.py writes the rows that can be scored, reports others, refuses a file without any."""
    scorer = load_model(toy / "model", torch.float32, scores=("reward",))
    save_model(scorer, tmp_path / "rm", toy / "model")
    rows = [
        {"prompt": "Where does Ada live?", "response": text} for text in ("Home.", "", " ", "Away.")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ["--model", str(tmp_path / "rm"), "--out", str(tmp_path / "out.jsonl"), "--data"]
    score.main([*call, str(tmp_path / "in.jsonl")])
    assert "2 of 4 rows left out: empty response" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["response"] for row in written] == ["Home.", "Away."] and all(
        "score" in row for row in written
    )
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match="no row that can be scored"):
        score.main([*call, str(tmp_path / "none.jsonl")])
