"""Distillation: steps equal a plain loop on every layout, on data and on the student's samples."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from launch import launch, weights_in
from online import drawn
from plain import PlainModel, PlainTrainer, encode

import hf
import train_distill
from data.rows import read_rows
from weights.folder import save_model

LAYOUTS = ["", "dp2", "dp2 zero3", "tp2", "cp2", "pp2", "tp2 pp2"]
STUDENT = {"width": 24, "layers": 3, "heads": 6, "kv_heads": 3, "ffn": 37, "std": 0.3}
TEACHER = {"family": "qwen2", "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "std": 0.3}
COMMON = "--dtype fp64 --device cpu --max-tokens 400 --weight-decay 0.1 --no-shuffle --lr 1e-2"


@pytest.fixture(scope="module")
def folders(toy: Path, tmp_path_factory) -> Path:
    """Return a folder with student/ and teacher/, of two families and widths."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = toy / "world" / "tokenizer"
    for name, sizes in (("student", STUDENT), ("teacher", TEACHER)):
        model = hf.new_model(hf.New(**sizes, dtype="fp64", tokenizer=str(tokenizer), seed=3))
        save_model(model, folder / name, tokenizer)
    return folder


def plain_divergence(p: torch.Tensor, q: torch.Tensor, name: str, mix: float) -> torch.Tensor:
    """Return Σ over tokens and vocabulary, from probabilities (tokens, V)."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum()

    if name == "forward":
        return kl(p, q)
    if name == "reverse":
        return kl(q, p)
    assert name == "jsd"
    m = mix * p + (1 - mix) * q
    return mix * kl(p, m) + (1 - mix) * kl(q, m)


def chances(model: PlainModel, prompt: list[int], response: list[int], tau: float) -> torch.Tensor:
    """Return the distribution before each response token, (len(response), V)."""
    logits = model.logits(torch.tensor(prompt + response))[len(prompt) - 1 : -1]
    return (logits / tau).softmax(-1)


def check(words: str, out: Path, plain: PlainModel, rows: list[tuple[float, float]]) -> None:
    """Run the script on every layout: losses, norms and weights are the plain loop's."""
    for layout in LAYOUTS:
        sizes = {word[:-1]: int(word[-1]) for word in layout.split()}
        world = math.prod(n for axis, n in sizes.items() if axis != "zero")
        flags = [f"--{axis} {n}" for axis, n in sizes.items() if axis != "dp"]
        folder = out / (layout or "one").replace(" ", "_")
        launch(world, train_distill.main, f"{words} {' '.join(flags)} --out {folder}".split())
        got = [row for row in read_metrics(folder) if "loss" in row]
        for row, (loss, norm) in zip(got, rows, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=1e-10), layout
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-9), layout
        final = weights_in(folder / "final")
        for name, w in plain.weights.items():
            assert (final[name] - w).abs().max() < 1e-10, (layout, name)


@pytest.mark.parametrize(
    ("divergence", "mix", "tau", "sft"),
    [("forward", 0.5, 1.0, 0.3), ("reverse", 0.5, 2.0, 0.0), ("jsd", 0.2, 0.8, 0.0)],
)
def test_five_steps_equal_a_plain_loop(
    divergence: str, mix: float, tau: float, sft: float, folders: Path, toy: Path, tmp_path: Path
):
    """On data, with whole softmaxes of one response at a time."""
    file = toy / "world" / "sft.jsonl"
    data = list(read_rows(file))[:20]
    trees = encode(toy / "world/tokenizer/tokenizer.model", data, ["response"])
    student = PlainModel(folders / "student", torch.float64)
    teacher = PlainModel(folders / "teacher", torch.float64)
    trainer = PlainTrainer(student, 5, 1e-2)
    rows = []
    for step in range(5):
        loss = torch.zeros((), dtype=torch.float64)
        total = 0
        for prompt, (response,) in trees[4 * step : 4 * step + 4]:
            q = chances(student, prompt, response, tau)
            p = chances(teacher, prompt, response, tau).detach()
            loss = loss + plain_divergence(p, q, divergence, mix)
            if sft:
                loss = loss - sft * student.logps(prompt, response).sum()
            total += len(response)
        rows.append(trainer.step(loss / total))
    words = (
        f"--model {folders}/student --teacher {folders}/teacher --data {file} --max-steps 5 "
        f"--batch-size 4 --warmup 0.25 --template plain --divergence {divergence} --mix {mix} "
        f"--distill-temperature {tau} --sft-weight {sft} {COMMON}"
    )
    check(words, tmp_path, student, rows)


def merged(chances: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the chances of some tokens and of all others together, (tokens, K + 1)."""
    inside = torch.zeros_like(chances).scatter(1, ids, 1.0)
    rest = (chances * (1 - inside)).sum(1, keepdim=True)
    return torch.cat([chances.gather(1, ids), rest], 1)


def test_five_steps_on_the_cached_top_k_equal_a_plain_loop(
    folders: Path, toy: Path, tmp_path: Path
):
    """The teacher's five likeliest tokens and the rest as one, on every layout."""
    file = toy / "world" / "sft.jsonl"
    trees = encode(
        toy / "world/tokenizer/tokenizer.model", list(read_rows(file))[:20], ["response"]
    )
    student = PlainModel(folders / "student", torch.float64)
    teacher = PlainModel(folders / "teacher", torch.float64)
    trainer = PlainTrainer(student, 5, 1e-2)
    rows = []
    for step in range(5):
        loss = torch.zeros((), dtype=torch.float64)
        total = 0
        for prompt, (response,) in trees[4 * step : 4 * step + 4]:
            p = chances(teacher, prompt, response, 1.5).detach()
            ids = p.topk(5).indices
            q = chances(student, prompt, response, 1.5)
            loss = loss + plain_divergence(merged(p, ids), merged(q, ids), "reverse", 0.5)
            total += len(response)
        rows.append(trainer.step(loss / total))
    words = (
        f"--model {folders}/student --teacher {folders}/teacher --data {file} --max-steps 5 "
        f"--batch-size 4 --warmup 0.25 --template plain --divergence reverse "
        f"--distill-temperature 1.5 --teacher-top-k 5 {COMMON}"
    )
    check(words, tmp_path, student, rows)


def test_a_top_k_of_the_whole_vocabulary_is_no_approximation(
    folders: Path, toy: Path, tmp_path: Path
):
    """The same numbers as with the live teacher, and a shard of fewer than K tokens is enough."""
    words = f"--model {folders}/student --teacher {folders}/teacher --data {toy}/world/sft.jsonl"
    shuffled = COMMON.replace("--no-shuffle ", "")
    words += f" --batch-size 4 --max-steps 3 --divergence jsd {shuffled}"
    vocab = json.loads((folders / "student/config.json").read_text())["vocab_size"]
    runs = {}
    for name, ranks, flags in (("live", 1, ""), ("all", 1, ""), ("split", 2, "--tp 2")):
        if name != "live":
            flags += f" --teacher-top-k {vocab}"
        launch(ranks, train_distill.main, f"{words} {flags} --out {tmp_path / name}".split())
        runs[name] = [row for row in read_metrics(tmp_path / name) if "loss" in row]
    for name in ("all", "split"):
        for row, live in zip(runs[name], runs["live"], strict=True):
            assert row["loss"] == pytest.approx(live["loss"], abs=1e-12)
            assert row["grad_norm"] == pytest.approx(live["grad_norm"], rel=1e-10)


def test_an_on_policy_step_equals_a_plain_loop(folders: Path, toy: Path, tmp_path: Path):
    """The student's own samples, two a prompt; no gradient flows through the sampling."""
    config = train_distill.Config(group_size=2, max_new_tokens=8, reward="length:5")
    samples = drawn(toy, folders / "student", config)
    student = PlainModel(folders / "student", torch.float64)
    teacher = PlainModel(folders / "teacher", torch.float64)
    trainer = PlainTrainer(student, 1, 1e-2)
    loss = torch.zeros((), dtype=torch.float64)
    for i, sample in enumerate(samples.samples):
        prompt = samples.prompts.ids[i // 2]
        q = chances(student, prompt, sample.tokens, 1.0)
        p = chances(teacher, prompt, sample.tokens, 1.0).detach()
        loss = loss + plain_divergence(p, q, "reverse", 0.5)
    rows = [trainer.step(loss / sum(len(sample.tokens) for sample in samples.samples))]
    words = (
        f"--model {folders}/student --teacher {folders}/teacher --data {toy}/world/sft.jsonl "
        f"--batch-size 6 --group-size 2 --max-new-tokens 8 --max-steps 1 --warmup 0 --schedule "
        f"constant --on-policy 1 --divergence reverse {COMMON}"
    )
    check(words, tmp_path, student, rows)


def run(folders: Path, toy: Path, out: Path, *flags: str) -> list[dict]:
    words = f"--model {folders}/student --teacher {folders}/teacher --data {toy}/world/sft.jsonl"
    words += " --batch-size 6 --max-steps 8 --max-new-tokens 8 --on-policy 0.5 " + COMMON
    train_distill.main([*words.split(), "--out", str(out), *flags])
    return read_metrics(out)


def test_resumed_is_never_stopped(folders: Path, toy: Path, tmp_path: Path):
    """Steps on data and on samples, mixed by seed and step; stopped after four, the same bits."""
    whole = run(folders, toy, tmp_path / "whole", "--save-every", "4")
    kinds = [row["on_policy"] for row in whole if "loss" in row]
    assert 0 < sum(kinds) < 8
    resumed = ["--resume", str(tmp_path / "whole/step_4")]
    again = run(folders, toy, tmp_path / "again", *resumed)
    assert again == whole[-len(again) :] and len(again) == 4
    one, other = (weights_in(tmp_path / name / "final") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_top_k_is_scored_once(
    folders: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """A resumed run reads the cache and loads no teacher; a damaged cache is written again.

    Of fp32 runs the log-probs are kept in fp16: the divergence moves by less than 1 in 1,000.
    """
    cache = tmp_path / "cache"
    few = ["--teacher-top-k", "4", "--cache", str(cache), "--on-policy", "0"]
    flags = [*few, "--eval-data", f"{toy}/world/sft.jsonl"]
    whole = run(folders, toy, tmp_path / "whole", *flags, "--save-every", "4")
    load, loaded = train_distill.load_teacher, []
    monkeypatch.setattr(
        train_distill, "load_teacher", lambda *args: loaded.append(1) or load(*args)
    )
    resumed = ["--resume", str(tmp_path / "whole/step_4")]
    again = run(folders, toy, tmp_path / "again", *flags, *resumed)
    assert again == whole[-len(again) :] and not loaded
    kept = sorted(cache.glob("teacher-*/logps.npy"))
    assert len(kept) == 2  # of the rows to train on, and of those to evaluate
    content = bytearray(kept[0].read_bytes())
    content[-1] ^= 1
    kept[0].write_bytes(content)
    third = run(folders, toy, tmp_path / "third", *flags)
    assert third == whole and loaded == [1]
    run(folders, toy, tmp_path / "warmer", *few, "--distill-temperature", "2")
    assert loaded == [1, 1]  # another temperature has another tail
    capsys.readouterr()
    single = run(folders, toy, tmp_path / "single", *few, "--dtype", "fp32")
    assert "18 bytes a token" in capsys.readouterr().out  # 4 ids of 2, 5 log-probs of 2
    assert single[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-3)
    mixed = run(folders, toy, tmp_path / "mixed", *few[:-2])  # samples need the teacher itself
    assert {row["on_policy"] for row in mixed if "loss" in row} == {0, 1}


def test_a_teacher_is_reached(folders: Path, toy: Path, tmp_path: Path):
    """Trained on one batch the student comes near the teacher; adapters alone do too."""
    flags = ["--on-policy", "0", "--eval-data", f"{toy}/world/sft.jsonl", "--max-steps", "40"]
    whole = run(folders, toy, tmp_path / "whole", *flags, "--epochs", "4")
    assert whole[-1]["eval/kl"] < 0.5 * whole[0]["kl"]
    lora = run(folders, toy, tmp_path / "lora", *flags, "--epochs", "4", "--lora", "8")
    assert lora[-1]["eval/kl"] < 0.9 * lora[0]["kl"]
    assert (tmp_path / "lora/adapter").is_dir()


def test_what_cannot_be_is_refused(folders: Path, toy: Path, tmp_path: Path):
    model = hf.new_model(hf.New(**TEACHER, dtype="fp64", vocab=700))
    save_model(model, tmp_path / "padded", toy / "world" / "tokenizer")
    other = tmp_path / "other"
    save_model(hf.new_model(hf.New(**TEACHER, dtype="fp64", vocab=700)), other)
    for flags, complaint in (
        (["--teacher", ""], "--teacher is missing"),
        (["--teacher", str(tmp_path / "padded")], "700 rows of vocabulary, the student"),
        (["--teacher", str(other)], "tokenizer"),
        (["--divergence", "jsd", "--mix", "0"], "--mix must be above 0 for jsd"),
        (["--divergence", "reverse", "--mix", "0.1"], "--mix has no effect on --divergence rev"),
        (["--reward", "length:5"], "--reward has no effect here, the teacher judges"),
        (["--no-eos-penalty", "1"], "--no-eos-penalty has no effect here"),
        (["--on-policy", "1", "--sft-weight", "1"], "--sft-weight has no effect"),
        (["--on-policy", "1", "--teacher-top-k", "8"], "--teacher-top-k keeps what the teacher"),
        (["--teacher-top-k", "100000"], "more than the vocabulary: use at most"),
    ):
        with pytest.raises((ValueError, OSError), match=complaint):
            run(folders, toy, tmp_path / "out", *flags)
