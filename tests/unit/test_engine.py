"""Servers that sample: their new weights, their deaths and restarts, by stand-ins for vLLM.

tests/engine has the same with vLLM itself.
"""

import json
from pathlib import Path

import pytest
import torch

import generate
import train_reinforce
from config import RolloutConfig
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import ahead, rollout, server
from sampling import engine as engines
from sampling.engine import Engine, connect
from weights.folder import fingerprint, load_model, save_model

pytestmark = pytest.mark.slow  # together about twenty seconds: runs against servers
RELOAD = [
    "/pause",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/update_weight_version",
    "/resume",
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)


def ready(toy: Path, *stand_ins, **flags) -> tuple[Engine, list, list[int]]:
    """Return (engine of some servers, prompts as token ids, seeds of two samples to each)."""
    template = Template("auto", load_tokenizer(toy / "model"))
    urls = [stand_in.url for stand_in in stand_ins]
    config = RolloutConfig(
        model=str(toy / "model"), max_new_tokens=8, rollout_url=urls, rollout_timeout=5.0, **flags
    )
    prompts = rollout.load([str(toy / "world" / "prompts_test.jsonl")], template, config)
    ids = prompts.ids[:5]
    return connect(template, config, prompts), ids, ahead.seeds(0, 1, 5, 2)


def flags_of(toy: Path, *stand_ins, **more) -> dict:
    return {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 4,
        "group_size": 3,
        "lr": 1e-2,
        "max_new_tokens": 8,
        "max_steps": 3,
        "reward": "length:5",
        "rollout_url": [stand_in.url for stand_in in stand_ins],
        **more,
    }


def other_weights(toy: Path, folder: Path) -> Path:
    """Write the toy model with weights of twice the size; return the folder."""
    model = load_model(toy / "model", torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    save_model(model, folder, str(toy / "model"), None)
    return folder


def test_the_url_alone_is_enough_for_vllm(toy: Path, engine, tmp_path: Path, train):
    """Every rollout comes from the newest weights, which its own calls load, in this order."""
    stand_in = engine("vllm")
    rows = train(train_reinforce, tmp_path / "out", **flags_of(toy, stand_in))
    assert [row["sampler_gap"] < 1e-5 for row in rows] == [True] * 3
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["transfer_seconds"] > 0 for line in lines)
    pushed = (tmp_path / "out" / "rollout").resolve()
    assert stand_in.loaded[1:] == [str(pushed)] * 3
    probes = ["/reset_prefix_cache"]
    assert stand_in.calls == probes + RELOAD * 3
    assert fingerprint(pushed) != fingerprint(toy / "model")


def test_an_adapter_travels_alone(toy: Path, engine, tmp_path: Path, train):
    """The base first, which an earlier run may have changed; the merged model if it takes none."""
    takes, takes_not = engine("vllm"), engine("vllm")
    takes_not.absent = {"/v1/load_lora_adapter"}
    takes.load(other_weights(toy, tmp_path / "of an earlier run"))
    for name, stand_in in (("takes", takes), ("not", takes_not)):
        rows = train(train_reinforce, tmp_path / name, **flags_of(toy, stand_in, lora=4))
        assert all(row["sampler_gap"] < 1e-5 for row in rows)
        kept = tmp_path / name / "rollout"
        assert (kept / "adapter_config.json").exists() == (stand_in is takes)
        assert (kept / "model.safetensors").exists() == (stand_in is takes_not)
    assert {body["model"] for _, body in takes.requests} == {server.ADAPTER}
    assert takes.calls.count("/collective_rpc") == 1


def test_samples_do_not_depend_on_the_number_of_servers(toy: Path, engine, capsys):
    """One server, three, three of which one dies, and one that is restarted: the same samples."""
    alone, ids, seeds = ready(toy, engine("vllm"))
    wanted = alone.sample(ids, seeds, 2, 1.0)
    three = [engine("vllm") for _ in range(3)]
    several, _, _ = ready(toy, *three)
    assert several.sample(ids, seeds, 2, 1.0) == wanted
    assert [len(stand_in.requests) for stand_in in three] == [2, 2, 1]
    three[1].die()
    assert several.sample(ids, seeds, 2, 1.0) == wanted
    assert several.dead == {1}
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and three[1].url in said and "get its requests" in said
    assert several.sample(ids, seeds, 2, 1.0) == wanted
    assert not capsys.readouterr().out  # known by now
    for stand_in in three[::2]:
        stand_in.die()
    with pytest.raises(OSError, match="no answer in 4 tries"):
        several.sample(ids, seeds, 2, 1.0)
    several.dead = {0, 1, 2}  # where the last two die at the same moment
    with pytest.raises(OSError, match="none of 3 servers answers"):
        several.sample(ids, seeds, 2, 1.0)


def test_a_restarted_server_gets_its_weights_and_samples_again(
    toy: Path, engine, tmp_path: Path, capsys
):
    """Old weights in the middle of a rollout: noticed by their name, nothing of them is kept."""
    stand_ins = engine("vllm"), engine("vllm")
    several, ids, seeds = ready(toy, *stand_ins)
    folder = other_weights(toy, tmp_path / "new")
    several.loaded(folder, *several.load(folder))
    wanted = several.sample(ids, seeds, 2, 1.0)
    stand_ins[0].restart()
    assert several.sample(ids, seeds, 2, 1.0) == wanted
    said = capsys.readouterr().out
    assert said.count("was restarted") == 1 and stand_ins[0].url in said
    assert stand_ins[0].loaded[-1] == str(folder)


def test_a_server_that_is_back_gets_prompts_again(toy: Path, engine, tmp_path: Path, capsys):
    """Every load of new weights asks the dead once more."""
    stand_ins = engine("vllm"), engine("vllm")
    several, ids, seeds = ready(toy, *stand_ins)
    several.dead = {1}
    several.loaded(toy / "model", *several.load(toy / "model"))
    assert several.dead == set() and "answers again" in capsys.readouterr().out
    several.sample(ids, seeds, 2, 1.0)
    assert len(stand_ins[1].requests) == 2
    stand_ins[1].die()
    several.loaded(toy / "model", *several.load(toy / "model"))
    assert several.dead == {1}


@pytest.mark.parametrize("case", ["no calls", "not in dev mode", "context", "folder"])
def test_what_a_server_cannot_do_is_said_before_the_first_step(case: str, toy: Path, engine):
    stand_in = engine("token_ids" if case == "no calls" else "vllm")
    if case == "not in dev mode":
        stand_in.absent = {"/reset_prefix_cache", "/collective_rpc"}
    if case == "context":
        stand_in.context = 12
    complaint = {
        "no calls": "from the initial weights forever: give the command",
        "not in dev mode": "start it with VLLM_SERVER_DEV_MODE=1",
        "context": r"takes 12 tokens, and a prompt .* may have \d+: start it with --max-model-len",
        "folder": r"does it see .*nowhere\? --out must be on its disk",
    }
    with pytest.raises((OSError, ValueError), match=complaint[case]):
        ready(toy, stand_in)[0].load(Path("/nowhere"))
    assert not stand_in.paused


def test_a_sampler_that_learns_nothing_needs_no_calls(toy: Path, engine):
    """best_of_n.py samples from the weights that a server was started with."""
    template = Template("auto", load_tokenizer(toy / "model"))
    config = RolloutConfig(rollout_url=[engine().url])
    assert not engines.connect(template, config, None, learns=False).learns
    assert engines.connect(template, RolloutConfig(), None) is None


# ---- --rollout-ahead ---------------------------------------------------------------------------


def texts_of(out: Path) -> dict[int, list[str]]:
    """Return step -> the samples of samples.jsonl."""
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return {step: [r["response"] for r in rows if r["step"] == step] for step in range(1, 6)}


def ages_of(rows: list[dict]) -> list[int]:
    return [row["rollout/age"] for row in rows]


def test_samples_drawn_ahead_are_those_of_older_weights(toy: Path, engine, tmp_path: Path, train):
    """Step s has the samples of the weights that step s - K had, and its own prompts and seeds."""
    flags = flags_of(toy, engine("vllm"), max_steps=5, log_samples=1, kl=0.0)
    still = train(train_reinforce, tmp_path / "still", **{**flags, "lr": 0.0})
    drawn = {}
    for late in (1, 2):
        out = tmp_path / f"late{late}"
        rows = train(train_reinforce, out, **flags, rollout_ahead=late)
        assert ages_of(rows) == [min(late, step) for step in range(5)]
        drawn[late] = texts_of(out)
        # The first weights drew the first K + 1 steps.
        first = texts_of(tmp_path / "still")
        assert [drawn[late][step] == first[step] for step in range(1, 6)] == [
            step <= late + 1 for step in range(1, 6)
        ]
        # They are a trainer's step away from those of the rollout, and the weights say so.
        assert all(row["engine/weight"] == pytest.approx(1, abs=1e-5) for row in rows[:1])
        assert all(abs(row["engine/weight"] - 1) > 1e-4 for row in rows[1:])
    assert drawn[1] != drawn[2]
    assert "rollout/age" not in still[0]


def test_nothing_is_lost_or_repeated_when_a_run_that_draws_ahead_stops(
    toy: Path, engine, tmp_path: Path, train
):
    """The resumed run takes every step's own prompts once; its first samples are of age 0."""
    flags = flags_of(toy, engine("vllm"), max_steps=5, log_samples=1, save_every=1, lr=0.0)
    whole = train(train_reinforce, tmp_path / "whole", **flags, rollout_ahead=2)
    real, steps = engines.Engine.load, []

    def load(self, folder):
        steps.append(folder)
        if len(steps) == 4:
            raise OSError("gone")
        return real(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.Engine, "load", load)
        with pytest.raises(OSError, match="gone"):
            train(train_reinforce, tmp_path / "out", **flags, rollout_ahead=2)
    rows = train(train_reinforce, tmp_path / "out", **flags, rollout_ahead=2, resume="auto")
    assert ages_of(rows) == [0, 1, 2, 0, 1] and ages_of(whole) == [0, 1, 2, 2, 2]
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "whole")


def test_what_cannot_be_drawn_ahead_is_refused(toy: Path, tmp_path: Path, train):
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "reward": "length:5"}
    for more, complaint in (
        ({"rollout_ahead": 1}, "--rollout-ahead is for --rollout-url"),
        ({"rollout_ahead": 1, "rollout_url": ["http://x"], "refill": 2}, "--refill chooses"),
    ):
        with pytest.raises(ValueError, match=complaint):
            train(train_reinforce, tmp_path / "out", **flags, **more)


def test_a_failure_in_the_background_ends_the_run(toy: Path, engine, tmp_path: Path, train):
    stand_in = engine("vllm")
    complete = stand_in.complete

    def fail_later(body):
        stand_in.failures = [500] * 100 if len(stand_in.requests) > 8 else []
        return complete(body)

    stand_in.complete = fail_later
    with pytest.raises(OSError, match="no answer in 4 tries"):
        train(train_reinforce, tmp_path / "out", **flags_of(toy, stand_in, rollout_ahead=1))


# ---- generate.py -------------------------------------------------------------------------------


def test_generate_answers_through_servers(toy: Path, engine, tmp_path: Path):
    """The greedy answers of two servers are those of the model; other seeds draw others."""
    urls = [engine("vllm").url, engine().url]
    words = f"--model {toy}/model --data {toy}/world/prompts_test.jsonl --max-new-tokens 8"
    answers = {}
    for name, more in {
        "own": ["--temperature", "0"],
        "theirs": ["--temperature", "0", "--rollout-url", *urls],
        "drawn": ["--n", "2", "--rollout-url", *urls],
        "again": ["--n", "2", "--rollout-url", *urls],
        "other": ["--n", "2", "--seed", "1", "--rollout-url", *urls],
    }.items():
        generate.main([*words.split(), *more, "--out", str(tmp_path / name)])
        answers[name] = (tmp_path / name).read_text()
    assert answers["own"] == answers["theirs"]
    assert answers["drawn"] == answers["again"] != answers["other"]
    first = json.loads(answers["drawn"].splitlines()[0])["responses"]
    assert first[0] != first[1]
    for flag, more in (("--chat", ["--chat"]), ("--no-repeat", ["--no-repeat", "9"])):
        with pytest.raises(ValueError, match=f"{flag} needs each token"):
            more = [*more, "--prompt", "x"] if flag == "--no-repeat" else more
            generate.main([f"--model={toy}/model", *more, "--rollout-url", urls[0]])
