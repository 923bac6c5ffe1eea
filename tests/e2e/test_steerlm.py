"""SteerLM: attribute lines, conditioned SFT and bootstrapping against plain loops; 2.0's loss."""

import json
import math
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

NEMO_LINE = (
    "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,"
    "complexity:4,verbosity:4"
)
LINE = "{prompt}<|attr|>{attributes}"
TOY_NAMES = ("toxicity", "helpfulness", "correctness", "coherence", "complexity", "verbosity")


def rows_of(path: Path, n: int | None = None) -> list[dict]:
    """Return the first n rows of a JSONL file, or all."""
    return [json.loads(line) for line in path.read_text().splitlines()][:n]


def write(path: Path, rows: list[dict]) -> Path:
    """Write a JSONL file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(**flags) -> list[str]:
    """Return flags as words of a command line; True is a flag without a value."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def new_model(toy: Path, folder: Path, **flags) -> Path:
    """Write a tiny model of random weights in float64 with the toy world's tokenizer."""
    tokenizer = str(toy / "world" / "tokenizer")
    sizes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "std": 0.3, "dtype": "fp64"}
    settings = hf.New(**{**sizes, **flags}, tokenizer=tokenizer)
    save_model(hf.new_model(settings), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def predictor(toy: Path, tmp_path_factory) -> Path:
    """Return an attribute model whose large random weights tell responses apart, untrained."""
    folder = tmp_path_factory.mktemp("predictor")
    new_model(toy, folder / "new", std=0.7, dtype="fp32")
    model = load_model(folder / "new", torch.float32, scores=TOY_NAMES)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.score_head.weight, std=0.5, generator=generator)
    save_model(model, folder / "final", folder / "new")
    return folder / "final"


@pytest.fixture(scope="module")
def steered(toy: Path, tmp_path_factory) -> Path:
    """Train a model on attribute lines for a few steps."""
    out = tmp_path_factory.mktemp("steered")
    train_sft.main(
        words_of(
            out=out,
            attributes=True,
            attribute_template=LINE,
            model=toy / "model",
            data=toy / "world" / "attributes.jsonl",
            lr=1e-2,
            batch_size=6,
        )
    )
    return out / "final"


# ---- the line --------------------------------------------------------------------------------


def test_the_line_is_nemo_aligners():
    """All nine attributes at their best make NeMo-Aligner's line, in its place."""
    best = attributes.best(ATTRIBUTES)
    assert attributes.line(best) == NEMO_LINE
    asked = attributes.condition("User: hi\nAssistant:\n", best, attributes.TEMPLATE)
    assert asked == f"User: hi\nAssistant:\n<extra_id_2>{NEMO_LINE}\n"


def test_lines_and_templates_by_hand():
    """Any subset in the fixed order; NaN is left out; values are rounded; bad input is named."""
    values = {"verbosity": 1.0, "quality": math.nan, "helpfulness": 3.0}
    assert attributes.line(values) == "helpfulness:3,verbosity:1"
    parsed = attributes.read_line(" verbosity:1, helpfulness:4 ")
    assert parsed == {"verbosity": 1, "helpfulness": 4}
    assert [attributes.whole(x) for x in (-3, 0.49, 0.5, 2.5, 3.2, 9)] == [0, 0, 1, 3, 3, 4]
    assert attributes.condition("p", {}, LINE) == "p"
    quoted = attributes.condition("{prompt} {attributes}", {"quality": 2}, LINE)
    assert quoted == "{prompt} {attributes}<|attr|>quality:2"
    messages = [
        {"role": "user", "content": "a {attributes}"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    last = {"role": "user", "content": "c<|attr|>quality:2"}
    assert attributes.condition(messages, {"quality": 2.0}, LINE) == [*messages[:2], last]
    for text, reason in (
        ("kindness:4", "'kindness' is not known: use quality, toxicity"),
        ("quality", "NAME:VALUE"),
        ("quality:5", "from 0 to 4"),
        ("quality:x", "from 0 to 4"),
    ):
        with pytest.raises(ValueError, match=reason):
            attributes.read_line(text)
    with pytest.raises(ValueError, match="must hold .attributes. once"):
        attributes.check_template("{prompt}")
    assert attributes.check_template("{prompt}\\n{attributes}") == "{prompt}\n{attributes}"


def test_generate_takes_attributes(toy: Path, steered: Path, tmp_path: Path):
    """--attributes conditions as training did; names that the model does not know are refused."""
    rows = rows_of(toy / "world" / "prompts_test.jsonl", 5)
    prompts = write(tmp_path / "prompts.jsonl", rows)
    line = "<|attr|>helpfulness:4,verbosity:1"
    by_hand = [{"prompt": row["prompt"] + line} for row in rows]
    conditioned = write(tmp_path / "by_hand.jsonl", by_hand)
    flags = {"model": steered, "temperature": 0, "max_new_tokens": 12}
    asked = "verbosity:1,helpfulness:4"
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    generate.main(words_of(data=prompts, out=a, attributes=asked, **flags))
    generate.main(words_of(data=conditioned, out=b, **flags))
    assert [row["response"] for row in rows_of(a)] == [row["response"] for row in rows_of(b)]
    assert [row["prompt"] for row in rows_of(a)] == [row["prompt"] for row in rows]
    with pytest.raises(ValueError, match="'humor' is not known: use toxicity, helpfulness"):
        generate.main(words_of(data=prompts, out=a, attributes="humor:1", **flags))
    flags["model"] = toy / "model"
    with pytest.raises(ValueError, match="was not trained with attributes"):
        generate.main(words_of(data=prompts, out=a, attributes="verbosity:1", **flags))


# ---- annotation and conditioned SFT ----------------------------------------------------------


def test_annotation_is_the_score_rounded(toy: Path, predictor: Path, tmp_path: Path):
    """score.py --attributes writes scores clamped to 0-4 and rounded, for rows of every kind."""
    data = rows_of(toy / "world" / "sft.jsonl", 20)
    prompt, response = data[0]["prompt"], data[0]["response"]
    pair = {"prompt": prompt, "chosen": response, "rejected": data[1]["response"]}
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    file = write(tmp_path / "rows.jsonl", [*data, pair, {"messages": messages}])
    annotated, scored = tmp_path / "annotated.jsonl", tmp_path / "scored.jsonl"
    score.main(words_of(model=predictor, data=file, out=annotated, attributes=True))
    score.main(words_of(model=predictor, data=file, out=scored))
    rows = rows_of(annotated)
    for row, raw in zip(rows[:20], rows_of(scored)):
        rounded = {k: min(4, max(0, math.floor(v + 0.5))) for k, v in raw["scores"].items()}
        assert row["attributes"] == rounded
        assert (row["prompt"], row["response"]) == (raw["prompt"], raw["response"])
    assert rows[20]["responses"] == [pair["chosen"], pair["rejected"]]
    assert rows[20]["attributes"][0] == rows[0]["attributes"]
    assert rows[21]["response"] == response
    assert rows[21]["attributes"] == rows[0]["attributes"]
    assert len({json.dumps(row["attributes"]) for row in rows}) > 3  # it tells responses apart
    with pytest.raises(ValueError, match="--ref compares language models"):
        score.main(words_of(model=predictor, data=file, out=scored, attributes=True, ref="x"))


def plain_sft(
    folder: Path, dtype: torch.dtype, trees: list, batch: int, lr: float
) -> tuple[list[tuple[float, float]], PlainModel]:
    """Take five steps of plain SFT; return (loss, gradient norm) of each, and the model."""
    plain = PlainModel(folder, dtype)
    trainer = PlainTrainer(plain, total=5, lr=lr)
    steps = []
    for step in range(5):
        own = trees[step * batch : (step + 1) * batch]
        nll = -sum(plain.logps(prompt, response).sum() for prompt, (response,) in own)
        steps.append(trainer.step(nll / sum(len(response) for _, (response,) in own)))
    return steps, plain


def test_five_steps_of_sft_equal_a_plain_loop_in_float64(toy: Path, tmp_path: Path, train):
    """train_sft.py --attributes equals a plain loop over prompts with lines written by hand."""
    folder = new_model(toy, tmp_path / "model")
    data = rows_of(toy / "world" / "attributes.jsonl", 20)
    by_hand = []
    for i, row in enumerate(data):
        kept = {k: v for j, (k, v) in enumerate(row["attributes"].items()) if (i + j) % 3}
        row["attributes"] = kept
        line = ",".join(f"{name}:{kept[name]}" for name in TOY_NAMES if name in kept)
        by_hand.append({**row, "prompt": f"{row['prompt']}<|attr|>{line}"})
    tokenizer = toy / "world" / "tokenizer" / "tokenizer.model"
    trees = encode(tokenizer, by_hand, ["response"])
    wanted, plain = plain_sft(folder, torch.float64, trees, batch=4, lr=1e-2)
    file = write(tmp_path / "rows.jsonl", data)
    for budget in (8192, 130):
        out = tmp_path / f"out{budget}"
        rows = train(
            train_sft,
            out,
            attributes=True,
            attribute_template=LINE,
            model=folder,
            data=file,
            lr=1e-2,
            batch_size=4,
            warmup=0.25,
            weight_decay=0.1,
            shuffle=False,
            max_tokens=budget,
            dtype="fp64",
            template="plain",
        )
        for row, (loss, norm) in zip(rows, wanted, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=1e-10)
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-10)
        trained = load_file(out / "final" / "model.safetensors")
        gaps = [(trained[name] - w.detach()).abs().max() for name, w in plain.weights.items()]
        assert max(gaps) < 1e-10
        assert attributes.load(out / "final") == (LINE, TOY_NAMES)


def test_real_rows_equal_a_plain_loop(real_model: Path, tmp_path: Path, train):
    """Five fp32 steps on real answers with two attributes, in NeMo-Aligner's place, within 1e-5."""
    rows = rows_of(REAL / "alpaca_eval" / "attributes.jsonl", 300)
    data = [row for row in rows if len(str(row)) < 1200][:10]
    by_hand = []
    for row in data:
        line = f"quality:{row['quality']},verbosity:{row['verbosity']}"
        by_hand.append({**row, "prompt": f"{row['prompt']}<extra_id_2>{line}\n"})
    trees = encode(real_model / "tokenizer.model", by_hand, ["response"])
    wanted, _ = plain_sft(real_model, torch.float32, trees, batch=2, lr=1e-4)
    steps = train(
        train_sft,
        tmp_path / "out",
        attributes=True,
        model=real_model,
        data=write(tmp_path / "rows.jsonl", data),
        lr=1e-4,
        batch_size=2,
        warmup=0.25,
        weight_decay=0.1,
        shuffle=False,
    )
    for row, (loss, norm) in zip(steps, wanted, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_dropout_leaves_values_out(toy: Path, tmp_path: Path, train):
    """--attribute-dropout writes random subsets, the same for the same seed; 0 keeps all values."""
    flags = {
        "attributes": True,
        "model": toy / "model",
        "data": toy / "world" / "attributes.jsonl",
        "max_steps": 1,
        "attribute_template": LINE,
    }
    counts = []
    for run, share in enumerate((0.0, 0.5, 0.5)):
        out = tmp_path / str(run)
        train(train_sft, out, attribute_dropout=share, **flags)
        rows = rows_of(out / "conditioned_train.jsonl")
        counts.append([row["prompt"].partition("<|attr|>")[2].count(":") for row in rows])
    assert set(counts[0]) == {6}
    assert counts[1] == counts[2]
    assert 2 < np.mean(counts[1]) < 4
    assert min(counts[1]) < 2


# ---- bootstrapping, and the whole pipeline ---------------------------------------------------


def test_bootstrap_learns_from_its_own_samples(
    toy: Path, steered: Path, predictor: Path, tmp_path: Path, train
):
    """It samples at the asked attributes, labels, trains; a resumed run takes the same samples."""
    flags = {
        "model": steered,
        "predictor": predictor,
        "data": toy / "world" / "sft.jsonl",
        "answers": 2,
        "max_new_tokens": 40,
        "ask": "helpfulness:4,toxicity:0",
        "batch_size": 8,
        "lr": 1e-3,
    }
    out = tmp_path / "out"
    whole = train(train_steerlm, out, **flags, save_every=2, keep=9)
    samples = rows_of(out / "bootstrap.jsonl")
    for row in samples:
        if "responses" in row:
            assert len(row["responses"]) == len(row["attributes"]) == 2
        else:
            row["responses"], row["attributes"] = [row["response"]], [row["attributes"]]
    labels = [one for row in samples for one in row["attributes"]]
    assert all(set(one) == set(attributes.load(steered)[1]) for one in labels)
    assert len({json.dumps(one) for one in labels}) > 1
    rows = rows_of(out / "conditioned_train.jsonl")
    assert len(rows) == sum(len(row["responses"]) for row in samples)
    line = attributes.line(samples[0]["attributes"][0])
    assert rows[0]["prompt"] == f"{samples[0]['prompt']}<|attr|>{line}"
    (out / "metrics.jsonl").rename(tmp_path / "old.jsonl")
    again = train(train_steerlm, out, **flags, resume=out / "step_2")
    assert len(whole) > 2
    assert again == whole[2:]


def test_the_pipeline_runs_end_to_end(toy: Path, tmp_path: Path, train):
    """Attribute model, annotation, SFT on attributes, bootstrap, answers: the four commands."""
    world = toy / "world"
    short = {"max_steps": 20, "epochs": 9, "batch_size": 8, "lr": 1e-2}
    regression = {"loss": "regression", "data": world / "attributes.jsonl"}
    train(train_rm, tmp_path / "rm", model=toy / "model", **regression, **short)
    predictor = tmp_path / "rm" / "final"
    annotated = tmp_path / "annotated.jsonl"
    score.main(words_of(model=predictor, data=world / "sft.jsonl", out=annotated, attributes=True))
    assert len(rows_of(annotated)) == 60
    assert rows_of(annotated, 1)[0]["attributes"].keys() == set(TOY_NAMES)
    conditioned = {"attributes": True, "data": annotated, "attribute_template": LINE}
    train(train_sft, tmp_path / "sft", model=toy / "model", **conditioned, **short)
    model = tmp_path / "sft" / "final"
    rows = train(
        train_steerlm,
        tmp_path / "boot",
        model=model,
        predictor=predictor,
        data=world / "prompts_test.jsonl",
        answers=8,
        max_new_tokens=60,
        batch_size=4,
        lr=1e-3,
    )
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert attributes.load(tmp_path / "boot" / "final") == (LINE, TOY_NAMES)
    out = tmp_path / "answers.jsonl"
    generate.main(
        words_of(
            model=tmp_path / "boot" / "final",
            data=world / "prompts_test.jsonl",
            out=out,
            attributes="helpfulness:4",
            max_new_tokens=12,
        )
    )
    assert len(rows_of(out)) == 8


# ---- SteerLM 2.0 -----------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    """Return the softmax of some numbers, in plain Python."""
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def test_steerlm2_and_its_gradient_are_the_formula():
    """Σ w log(w / b) over a prompt's responses; its derivative by log π is -(w - b)."""
    rng = np.random.default_rng(0)
    group = rng.permutation([0] * 4 + [1] * 2 + [2] + [3] * 5)
    pi, q, wanted = rng.normal(-30, 4, (3, 12))
    logps = torch.tensor(pi, requires_grad=True)
    terms = losses.steerlm2(logps, torch.tensor(q), torch.tensor(wanted), torch.tensor(group))
    (slope,) = torch.autograd.grad(terms.sum(), logps)
    for g in range(4):
        own = np.flatnonzero(group == g)
        w, b = softmax(list(wanted[own])), softmax(list(pi[own] - q[own]))
        divergence = sum(x * math.log(x / y) for x, y in zip(w, b))
        assert terms[own].sum().item() == pytest.approx(divergence, abs=1e-12)
        assert slope[own].tolist() == pytest.approx([y - x for x, y in zip(w, b)], abs=1e-12)
    huge = [torch.tensor([-3e4, -100.0, 3e3]) for _ in range(3)]
    assert losses.steerlm2(*huge, torch.zeros(3, dtype=torch.int64)).isfinite().all()
    none = torch.zeros(0)  # a data-parallel rank without a prompt in a step
    assert losses.steerlm2(none, none, none, none.long()).shape == (0,)


def test_steerlm2_equals_a_plain_loop_in_float64(toy: Path, predictor: Path, tmp_path: Path, train):
    """Three steps over groups of responses, with weights by hand from predictor and prior.

    The same for every micro-batch size and with prompts shared or not, to the fp32 of the weights.
    """
    folder = new_model(toy, tmp_path / "model", seed=0)
    prior_folder = new_model(toy, tmp_path / "prior", seed=1)
    source = rows_of(toy / "world" / "attributes.jsonl", 30)
    asked = {"helpfulness": 4, "verbosity": 1}
    data = []
    for i in range(9):
        responses = [row["response"] for row in source[3 * i : 3 * i + 2 + i % 2]]
        data.append({"prompt": source[i]["prompt"], "responses": responses, "attributes": asked})
    tokenizer = toy / "world" / "tokenizer" / "tokenizer.model"

    def trees(line: str) -> list:
        """Return (prompt, responses) of token ids, with a line after each prompt."""
        result = []
        for row in data:
            answers = {f"r{k}": text for k, text in enumerate(row["responses"])}
            flat = {"prompt": row["prompt"] + line, **answers}
            result += encode(tokenizer, [flat], list(answers))
        return result

    plain = PlainModel(folder, torch.float64)
    prior = PlainModel(prior_folder, torch.float64)
    model, names = scoring.load_scorer(str(predictor), torch.float64, "cpu")
    template = Template("plain", load_tokenizer(predictor))
    scores = scoring.score(model, template, [answers_of(row) for row in data])
    conditioned = trees("<|attr|>helpfulness:4,verbosity:1")
    with torch.no_grad():
        q = [[plain.logps(p, r).sum().item() for r in rs] for p, rs in conditioned]
        p_y = [[prior.logps(p, r).sum().item() for r in rs] for p, rs in trees("")]
    wanted = []
    trainer = PlainTrainer(plain, total=3, lr=1e-2)
    for step in range(3):
        total = 0.0
        for i in range(3 * step, 3 * step + 3):
            prompt, responses = conditioned[i]
            fit = [
                -sum((s[names.index(k)] - v) ** 2 for k, v in asked.items()) / (2 * 0.7**2)
                for s in scores[i]
            ]
            w = softmax([a + b - c for a, b, c in zip(fit, p_y[i], q[i])])
            logps = torch.stack([plain.logps(prompt, r).sum() for r in responses])
            log_b = (logps - torch.tensor(q[i], dtype=torch.float64)).log_softmax(0)
            total = total + sum(x * (math.log(x) - b) for x, b in zip(w, log_b)) / 3
        wanted.append(trainer.step(total))
    file = write(tmp_path / "rows.jsonl", data)
    for run, (budget, share) in enumerate([(8192, True), (200, True), (8192, False)]):
        rows = train(
            train_steerlm,
            tmp_path / f"out{run}",
            model=folder,
            data=file,
            loss="steerlm2",
            answers=0,
            predictor=predictor,
            prior=prior_folder,
            spread=0.7,
            lr=1e-2,
            batch_size=3,
            warmup=0.25,
            weight_decay=0.1,
            shuffle=False,
            max_tokens=budget,
            share_prompts=share,
            dtype="fp64",
            template="plain",
            attribute_template=LINE,
        )
        for row, (loss, norm) in zip(rows, wanted, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=2e-5)
            assert row["grad_norm"] == pytest.approx(norm, rel=2e-5)


def test_steerlm2_samples_for_itself(
    toy: Path, steered: Path, predictor: Path, tmp_path: Path, train
):
    """--loss steerlm2 --answers 4 weighs samples of the model; its divergence is above 0."""
    rows = train(
        train_steerlm,
        tmp_path / "out",
        loss="steerlm2",
        model=steered,
        predictor=predictor,
        prior=toy / "model",
        data=toy / "world" / "sft.jsonl",
        answers=4,
        max_steps=3,
        max_new_tokens=40,
        batch_size=4,
    )
    assert len(rows) == 3
    assert all(row["loss"] > 0 for row in rows)
    names = {name for row in rows_of(tmp_path / "out" / "bootstrap.jsonl") for name in row}
    assert names == {"prompt", "responses", "attributes"}


def test_impossible_settings_are_refused(
    toy: Path, steered: Path, predictor: Path, tmp_path: Path, train
):
    """One line that names the flag or the rows, and the script that makes what is missing."""
    world = toy / "world"
    two = {
        "loss": "steerlm2",
        "model": steered,
        "predictor": predictor,
        "prior": toy / "model",
        "data": world / "attributes.jsonl",
        "answers": 0,
    }
    mixed = {"prompt": "p", "responses": ["a", "b"]}
    mixed["attributes"] = [{"quality": 1}, {"quality": 2}]
    mixed_file = write(tmp_path / "mixed.jsonl", [mixed])
    other = {"prompt": "p", "responses": ["a", "b"], "attributes": {"humor": 1}}
    other_file = write(tmp_path / "other.jsonl", [other])
    sft = {"model": toy / "model", "data": world / "sft.jsonl"}
    for script, flags, words in (
        (train_steerlm, two, "has a single response.*raise --answers"),
        (train_steerlm, {**two, "predictor": ""}, "needs --predictor DIR"),
        (train_steerlm, {**two, "loss": "nll"}, "use train_sft.py --attributes"),
        (train_steerlm, {**two, "data": mixed_file}, "one set of attributes for all responses"),
        (train_steerlm, {**two, "data": other_file}, "does not predict humor, only"),
        (train_steerlm, sft, "needs a --model of train_sft.py --attributes and a --predictor"),
        (train_sft, {**sft, "attributes": True}, "no row of .* has an attribute: score.py"),
        (train_sft, {**sft, "attribute_dropout": 0.1}, "need --attributes"),
        (train_sft, {**sft, "model": predictor}, "a language model is needed"),
    ):
        out = tmp_path / f"{script.__name__} {words[:12]}"
        with pytest.raises(ValueError, match=words):
            train(script, out, **flags)
