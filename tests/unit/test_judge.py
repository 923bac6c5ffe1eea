"""A language model as judge: expected values, both orders, unparsable replies, templates."""

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from online import read_samples
from plain import PlainModel

import score
import train_online_dpo
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling.judge import (
    agreement,
    judge_rewards,
    load_judge,
    ranked_right,
    read_template,
    split_name,
)
from sampling.judge_server import ask_server
from sampling.rewards import load_reward
from weights.folder import load_model, save_model

QUESTION = "rate {response} to {prompt}: {criterion}"
VERSUS = "{prompt}: {response} or {other}? {criterion}"


def write(path: Path, question: str, labels: dict, criteria: list | None = None) -> Path:
    """Write a template and return its path."""
    content = {"question": question, "labels": labels, "criteria": criteria or ["good", "kind"]}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def model(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    save_model(load_model(toy / "model", torch.float64), folder, toy / "model")
    return folder


def by_hand(folder: Path, question: str, labels: dict[str, float]) -> tuple[float, float]:
    """Return expectation and mass of a reply to a question, one label at a time."""
    tokenizer = load_tokenizer(folder)
    plain = PlainModel(folder, torch.float64)
    prompt = Template("auto", tokenizer).prompt(question)
    with torch.no_grad():
        logps = [plain.logps(prompt, list(tokenizer.encode(x))).sum().item() for x in labels]
    chances = [math.exp(x) for x in logps]
    return sum(p * v for p, v in zip(chances, labels.values())) / sum(chances), sum(chances)


def test_a_value_is_the_expectation_over_the_labels(model: Path, tmp_path: Path):
    """Mean over the criteria of Σ p v / Σ p, within 1e-12 of responses that are run one by one."""
    labels = {"no": -1.0, "yes": 2.0, "well": 0.5}
    file = write(tmp_path / "t.json", QUESTION, labels)
    judge = load_judge(str(model), file, torch.float64)
    result = judge.values([("who", "bob", ""), ("where", "the mill", "")])
    for i, (prompt, response) in enumerate((("who", "bob"), ("where", "the mill"))):
        hand = [
            by_hand(model, f"rate {response} to {prompt}: {criterion}", labels)
            for criterion in ("good", "kind")
        ]
        assert result.values[i] == pytest.approx(sum(v for v, _ in hand) / 2, abs=1e-12)
        assert result.mass[i] == pytest.approx(min(m for _, m in hand), rel=1e-9)
    assert result.values[0] != result.values[1]


def test_unlikely_labels_are_counted_and_never_zero(model: Path, tmp_path: Path, capsys):
    """A random model seldom replies with a label: every value is an expectation all the same."""
    file = write(tmp_path / "t.json", QUESTION, {"no": 1, "yes": 2})
    reward = load_reward(f"judge:{model}:{file}", None, dtype=torch.float64)
    values = reward(["who"] * 3, ["bob", "the mill", "no"], [{}] * 3, [None])
    assert (values > 1).all() and (values < 2).all()
    assert "3 of 3 replies unparsable" in capsys.readouterr().out


def test_both_orders_cancel_the_place(model: Path, tmp_path: Path):
    """Swapped pairs swap their values; a group's mean values sum to half its size; a tie is 0.5."""
    labels = {"one": 1, "two": 0, "same": 0.5}
    file = write(tmp_path / "t.json", VERSUS, labels)
    judge = load_judge(str(model), file, torch.float64)
    (ahead,), (behind,) = judge.compare([("who", "bob", "ann")])
    (other_ahead,), (other_behind,) = judge.compare([("who", "ann", "bob")])
    assert other_ahead == pytest.approx(1 - behind, abs=1e-12)
    assert other_behind == pytest.approx(1 - ahead, abs=1e-12)
    hand = [by_hand(model, f"who: bob or ann? {c}", labels)[0] for c in ("good", "kind")]
    assert ahead == pytest.approx(sum(hand) / 2, abs=1e-12)
    assert abs(ahead - behind) > 1e-6  # this judge does prefer a place

    responses = ["bob", "ann", "the mill", "x", "bob", "bob"]
    rewards = judge_rewards(judge, ["who"] * 3 + ["where"] * 3, responses, 3)
    assert rewards.reshape(2, 3).sum(1) == pytest.approx([1.5, 1.5], abs=1e-12)
    pair = np.mean([judge.compare([("who", "bob", x)]) for x in ("ann", "the mill")])
    assert rewards[0] == pytest.approx(pair, abs=1e-12)
    assert rewards[4] == pytest.approx(rewards[5], abs=1e-12)  # the same text
    with pytest.raises(ValueError, match="--group-size 2"):
        judge_rewards(judge, ["who"], ["bob"], 1)


def test_braces_in_texts_stay(tmp_path: Path):
    """A prompt or a response is never filled in; unknown braces stay too."""
    template = read_template(
        write(tmp_path / "t.json", "{x} {prompt} {response} {criterion}", {"a": 1, "b": 2})
    )
    assert (
        template.ask("{response}", "{other} {", "}{prompt}") == "{x} {other} { }{prompt} {response}"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "must be an object"),
        (
            '{"question": "{response}", "labels": {"1": 1, "2": 2}, "rubric": []}',
            "must be an object",
        ),
        ('{"question": "hello", "labels": {"1": 1, "2": 2}}', "{response}"),
        ('{"question": "{response}", "labels": {"1": 1}}', "two or more"),
        ('{"question": "{response}", "labels": {"1": true, "2": 2}}', "two or more"),
        ('{"question": "{response}", "labels": {"1": 1, "2": 2}, "criteria": []}', "list of texts"),
        ('{"question": "{response}", "labels": {"1": 1, "2": 2}, "criteria": ["a"]}', "add it"),
        ('{"question": "{response} {other}", "labels": {"1": 1, "2": 2}}', "0.5 for a tie"),
    ],
)
def test_templates_that_cannot_work_are_refused(content: str, message: str, tmp_path: Path):
    """Each with the file and what to write."""
    file = tmp_path / "t.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_template(file)


def test_the_templates_that_come_along_can_be_read():
    """Both of sampling/judges/."""
    files = sorted(Path("sampling/judges").glob("*.json"))
    assert [read_template(file).compares for file in files] == [True, False]


def test_labels_that_begin_one_another_are_refused(model: Path, tmp_path: Path):
    """P(1) would include P(10)."""
    tokenizer = load_tokenizer(model)
    ids = list(tokenizer.encode("yes no"))
    start = next(
        x for x in ("yes", "y") if ids[: len(tokenizer.encode(x))] == list(tokenizer.encode(x))
    )
    file = write(tmp_path / "t.json", QUESTION, {start: 1, "yes no": 2})
    with pytest.raises(ValueError, match="begins with"):
        load_judge(str(model), file)


def test_agreement_by_hand():
    """Four pairs: right twice, wrong in both orders, place alone, a tie."""
    ahead, behind = np.array([0.9, 0.2, 0.9, 0.5]), np.array([0.8, 0.1, 0.3, 0.5])
    result = agreement(ahead, behind)
    assert result.both == (1 + 0 + 1 + 0.5) / 4
    assert result.first == (1 + 0 + 1 + 0.5) / 4 and result.second == (1 + 0 + 0 + 0.5) / 4
    assert result.consistent == 0.75
    assert result.bias == pytest.approx((0.1 + 0.1 + 0.6 + 0) / 8)
    labels = np.array([True, True, False, False])
    assert ranked_right(np.array([3.0, 1.0, 2.0, 1.0]), labels) == (1 + 1 + 0 + 0.5) / 4


@pytest.mark.slow
def test_a_judge_rewards_training_and_scores_files(
    model: Path, toy: Path, tmp_path: Path, train, capsys
):
    """As --reward of online DPO; and score.py --judge on pairs and on labelled answers."""
    file = write(tmp_path / "v.json", VERSUS, {"one": 1, "two": 0, "same": 0.5})
    flags = {"model": model, "data": toy / "world" / "sft.jsonl", "dtype": "fp64", "batch_size": 3}
    flags |= {
        "group_size": 2,
        "max_new_tokens": 6,
        "max_steps": 1,
        "reward": f"judge:{model}:{file}",
    }
    (row,) = train(train_online_dpo, tmp_path / "out", **flags)
    assert row["reward"] == pytest.approx(0.5, abs=1e-9) and row["pairs"] == 3
    rewards = [row["reward"] for row in read_samples(tmp_path / "out")]
    assert [a + b for a, b in zip(rewards[::2], rewards[1::2])] == pytest.approx([1.0] * 3)

    for data, template, words in (
        ("preferences", file, "chosen wins"),
        ("labels", write(tmp_path / "p.json", QUESTION, {"no": 0, "yes": 1}), "above a bad one in"),
    ):
        out = tmp_path / f"{data}.jsonl"
        command = ["--model", str(model), "--judge", str(template), "--out", str(out)]
        score.main([*command, "--data", str(toy / "world" / f"{data}.jsonl"), "--dtype", "fp64"])
        text = capsys.readouterr().out
        assert words in text and "of 96 replies" in text if data == "preferences" else words in text
        first = json.loads(out.read_text().splitlines()[0])
        keys = ("ahead", "behind") if data == "preferences" else ("score",)
        assert all(0 < first[key] < 1 for key in keys)


# ---- behind a server -----------------------------------------------------------------------------


class JudgeStandIn(BaseHTTPRequestHandler):
    """A server whose next-token distribution is `table`; asked keeps what it was asked."""

    table: ClassVar[dict[str, float]] = {}
    asked: ClassVar[list[tuple[str, dict]]] = []
    ports: ClassVar[list[int]] = []  # of the servers that were asked
    forms: ClassVar[dict[str, dict]] = {}  # path -> a reply in place of the usual one

    def reply(self, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.reply({"data": [{"id": "big"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        self.ports.append(self.server.server_address[1])
        logps = {token: math.log(p) for token, p in self.table.items()}
        if self.path == "/v1/completions":
            choice: dict = {"logprobs": {"top_logprobs": [logps]}}
        else:
            top = [{"token": token, "logprob": logp} for token, logp in logps.items()]
            choice = {"logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}
        self.reply(self.forms.get(self.path, {"choices": [choice]}))

    def log_message(self, *args):
        pass


@pytest.fixture
def judge_url():
    """Start a server of JudgeStandIn; return its address."""
    JudgeStandIn.asked.clear()
    JudgeStandIn.ports.clear()
    JudgeStandIn.forms.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeStandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["", "/v1/completions"])
def test_a_server_judges_by_the_log_probs_of_labels(judge_url: str, path: str, tmp_path: Path):
    """Σ p v / Σ p by hand, "2" and " 2" are one reply; a rubric is a mean; both of the two APIs."""
    file = write(tmp_path / "t.json", QUESTION, {"1": 1, "2": 2, "9": 9})
    JudgeStandIn.table = {"2": 0.3, " 2": 0.1, "1": 0.2, "well": 0.1}
    judge = ask_server(judge_url + path, file)
    result = judge.values([("who", "bob", ""), ("where", "the mill", "")])
    assert result.values == pytest.approx([(0.4 * 2 + 0.2 * 1) / 0.6] * 2, rel=1e-12)
    assert result.mass == pytest.approx([0.6] * 2, rel=1e-12)
    paths, bodies = zip(*JudgeStandIn.asked)
    assert set(paths) == {path or "/v1/chat/completions"}
    shown = [body["prompt"] if path else body["messages"][0]["content"] for body in bodies]
    assert sorted(shown) == sorted(
        f"rate {response} to {prompt}: {criterion}"
        for prompt, response in (("who", "bob"), ("where", "the mill"))
        for criterion in ("good", "kind")
    )
    assert all(body["max_tokens"] == 1 for body in bodies)


def test_a_server_that_replies_otherwise_is_counted(judge_url: str, tmp_path: Path, capsys):
    """No label among the likeliest: the mean of the labels, counted; few: the expectation."""
    file = write(tmp_path / "t.json", QUESTION, {"1": 1, "5": 5})
    JudgeStandIn.table = {"Sure": 0.9}
    reward = load_reward(f"judge:{judge_url}:{file}", None)
    assert reward(["who"] * 2, ["bob", "ann"], [{}] * 2, [None]).tolist() == [3.0, 3.0]
    assert "2 of 2 replies unparsable" in capsys.readouterr().out
    JudgeStandIn.table = {"Sure": 0.9, "5": 0.05}
    assert reward(["who"], ["bob"], [{}], [None]).tolist() == [5.0]
    assert "3 of 3 replies unparsable" in capsys.readouterr().out


def test_servers_that_cannot_judge_are_refused(judge_url: str, tmp_path: Path):
    """No log-probs, nobody there, labels that begin one another: each is named with the flag."""
    file = write(tmp_path / "t.json", QUESTION, {"1": 1, "10": 10})
    with pytest.raises(ValueError, match="'10' begins with '1'"):
        ask_server(judge_url, file)
    write(file, QUESTION, {"1": 1, "2": 2})
    for reply in ({"choices": [{"logprobs": None}]}, {"choices": []}, {"choices": [{"text": "1"}]}):
        JudgeStandIn.forms["/v1/chat/completions"] = reply
        with pytest.raises(OSError, match="judge:http.*no log-probs"):
            ask_server(judge_url, file).values([("who", "bob", "")])
    assert split_name("http://host:80:mine.json") == ("http://host:80", "mine.json")
    assert split_name("https://host:80/v1/completions")[0] == "https://host:80/v1/completions"
    silent = ask_server(judge_url, file, asks=False)  # another rank asks
    assert silent.values([("who", "bob", "")]).values.tolist() == [0.0]


def test_several_servers_share_the_questions(judge_url: str, tmp_path: Path, capsys, monkeypatch):
    """Each gets some; one that dies is named, and the values are those of one server."""
    monkeypatch.setattr("sampling.server.time.sleep", lambda seconds: None)
    other = ThreadingHTTPServer(("127.0.0.1", 0), JudgeStandIn)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    second = f"http://127.0.0.1:{other.server_port}"
    file = write(tmp_path / "t.json", QUESTION, {"1": 1, "2": 2})
    JudgeStandIn.table = {"2": 0.3, "1": 0.1}
    reward = load_reward(f"judge:{judge_url},{second}:{file}", None)
    asked = (["who"] * 4, ["bob", "ann", "eve", "kim"], [{}] * 4, [None])
    assert reward(*asked).tolist() == [1.75] * 4
    assert set(JudgeStandIn.ports) == {urlsplit(judge_url).port, other.server_port}
    other.shutdown()
    other.server_close()
    assert reward(*asked).tolist() == [1.75] * 4
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and f"judge:{second}" in said
    assert split_name("http://a:80,https://b:90/v1:x.json") == (
        "http://a:80,https://b:90/v1",
        "x.json",
    )


def test_a_served_judge_scores_a_file(judge_url: str, tmp_path: Path, capsys):
    """score.py --model URL needs no folder; a server does nothing but judge."""
    file = write(tmp_path / "t.json", QUESTION, {"1": 1, "2": 2})
    JudgeStandIn.table = {"2": 0.3, "1": 0.1}
    rows = [{"prompt": "who", "response": "bob", "label": True}, {"prompt": "who", "response": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--model {judge_url} --data {tmp_path}/rows.jsonl --out {tmp_path}/out.jsonl".split()
    score.main([*words, "--judge", str(file)])
    judged = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in judged] == [
        1.75
    ] * 2 and "2 rows judged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a server, which can only judge: give --judge"):
        score.main(words)
