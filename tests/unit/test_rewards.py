"""Rewards: rules by hand, functions of a file, reward models that read tokens; helpful errors."""

import json
import sys
from pathlib import Path

import chat_templates
import numpy as np
import pytest
import torch
from conftest import REAL, dataset_of

import hf
import score as score_command
from data import toyworld
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import rewards, rollout
from sampling.sampler import Sample
from sampling.scoring import score
from weights.folder import load_model, save_model


def template_of(folder: Path) -> Template:
    """Return the chat template of a folder."""
    return Template("auto", load_tokenizer(folder))


def rewards_of(name: str, template, *answers: tuple) -> list[float]:
    """Return the rewards of (prompt, response, row) answers under a rule or a function."""
    return rewards.load_reward(name, template)(*map(list, zip(*answers)), None).tolist()


@pytest.mark.parametrize(
    ("answer", "given", "equal"),
    [
        ("9007199254740993", "9007199254740992", False),  # the same as floats
        ("9007199254740993", "9007199254740993.0", True),
        ("12", "1,2", False),
        ("1234567", "1,234,567", True),
        ("1234567", "1,234567", False),
        ("-1200", "-1,200.00", True),
        ("0.5", ".5", True),
        ("nan", "nan", True),
        ("inf", "infinity", False),
        ("1e3", "1000", False),
        ("x", ".", False),
    ],
)
def test_exact_numbers(answer: str, given: str, equal: bool):
    """Whole numbers of any size; commas only where thousands are; words are words."""
    assert rewards.exact("")("", f"so #### {given}", {"answer": answer}) == float(equal)


@pytest.mark.parametrize(
    ("answer", "given", "equal"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("0.5", "\\dfrac12", True),
        ("50\\%", "\\frac{1}{2}", True),
        ("1,234", "1234", True),
        ("12", "1,2", False),
        ("x^2+2x+1", "(x+1)^2", True),
        ("9007199254740993", "9007199254740992", False),
        ("2", "\\sqrt{4}", True),
        ("3", "-3", False),
        ("so \\boxed{7}", "7", True),
        ("7", "", False),
    ],
)
def test_boxed_answers(answer: str, given: str, equal: bool):
    pytest.importorskip("math_verify")
    reward = rewards.boxed("")
    assert reward("", f"\\boxed{{1}}, no: \\boxed{{{given}}}.", {"answer": answer}) == float(equal)
    assert reward("", f"{given}, in no box", {"answer": answer}) == 0.0


def test_the_last_box_of_a_text():
    assert rewards.in_box("\\boxed{1} then \\boxed{\\frac{1}{2}} end}") == "\\frac{1}{2}"
    assert rewards.in_box("\\boxed{1") is None and rewards.in_box("none") is None


def test_boxed_needs_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        rewards.boxed("")


def test_exact_answers_by_hand():
    """The text after the last marker is compared as a number or a word; no marker, no reward."""
    reward = rewards.exact("")
    for response, answer, wanted in (
        ("48 / 2 = 24\n#### 72", "72", 1),
        ("#### 72", "Natalia sold ...\n#### 72", 1),
        ("#### 71", "72", 0),
        ("72", "72", 0),
        ("#### 1,234.0", "1234", 1),
        ("#### $5.", "5", 1),
        ("#### 5\nor 6", "5", 1),
        ("#### 6 #### 5", "5", 1),
        ("#### 5 #### 6", "5", 0),
        ("#### Yes", "yes", 1),
        ("#### 72 clips", "72", 0),
        ("####", "72", 0),
        ("#### nan", "nan", 1),
        ("#### 7", 7, 1),
    ):
        assert reward("", response, {"answer": answer}) == wanted, (response, answer)
    assert rewards.exact("A:")("", "so\nA: 10", {"response": "text\nA: 10"}) == 1.0
    with pytest.raises(
        ValueError, match="needs rows with an answer: one of answer, .*; have prompt"
    ):
        reward("", "#### 1", {"prompt": "?"})


def test_expressions_and_lengths_by_hand(toy: Path):
    """A match or none; the distance from the target length."""
    template = template_of(toy / "model")
    answers = [("p", text, {}) for text in ("yes, it is", "I say yes", "no")]
    assert rewards_of("regex:^(yes|no)", template, *answers) == [1.0, 0.0, 1.0]
    assert rewards_of("regex:a:b", template, ("p", "xa:b", {})) == [1.0]
    texts = ["", "one two", "one two three four", "a " * 30]
    answers = [("p", text, {}) for text in texts]
    assert rewards_of("length:4", template, *answers) == [-1.0, -0.5, 0.0, -1.0]


def test_a_function_of_a_file_sees_prompt_response_and_row(tmp_path: Path, toy: Path):
    """A user's function is called once per response with its row; it can import its neighbours."""
    (tmp_path / "beside.py").write_text("SCALE = 10\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport beside\n"
        "@dataclass\nclass Case:\n    n: int\n"
        "def judge(prompt, response, row):\n"
        "    return beside.SCALE * len(response) + Case(row['n']).n + len(prompt)\n"
        "def nothing(prompt, response, row):\n    return None\n"
        "def endless(prompt, response, row):\n    return float('inf')\n"
    )
    template = template_of(toy / "model")
    answers = ("ab", "xyz", {"n": 4}), ("", "q", {"n": 1})
    assert rewards_of(f"{tmp_path}/mine.py:judge", template, *answers) == [36.0, 11.0]
    with pytest.raises(ValueError, match="mine.py:nothing returned None, not a number, for 'xyz'"):
        rewards_of(f"{tmp_path}/mine.py:nothing", template, *answers)
    with pytest.raises(ValueError, match="returned inf for 'xyz': it must be finite"):
        rewards_of(f"{tmp_path}/mine.py:endless", template, *answers)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    for name, error, words in (
        (
            f"{tmp_path}/mine.py:jugde",
            ValueError,
            "has no function jugde, only judge, nothing, endless",
        ),
        (f"{tmp_path}/none.py:f", FileNotFoundError, ".*none.py does not exist"),
        (
            f"{tmp_path}/broken.py:f",
            ValueError,
            "cannot be run: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("no/such/folder", ValueError, "is no folder of a reward model, no file.py:function"),
        ("", ValueError, r"\(missing\) is no folder"),
        ("regex:(", ValueError, "is no regular expression"),
        ("regex:", ValueError, "needs an expression"),
        ("length:x", ValueError, "needs a number of words"),
        (str(toy / "model"), ValueError, "is a language model: a reward model is needed here"),
    ):
        with pytest.raises(error, match=words):
            rewards.load_reward(name, template)


def test_the_toy_world_rewards_the_truth(toy: Path):
    """data/toyworld.py:reward is the scorer's utility; the prompt may be text or messages."""
    prompt, template = "Where does Ada live?", template_of(toy / "model")
    name = str(Path(toyworld.__file__)) + ":reward"
    answers = [
        (prompt, "Ada lives by the forest.", {}),
        (prompt, "Ada lives by the tower. Ugh, not again.", {}),
    ]
    assert rewards_of(name, template, *answers) == [4.0, 1.0]
    assert rewards_of(name, template, ([{"role": "user", "content": prompt}], "Forest.", {})) == [
        4.0
    ]


@pytest.fixture(scope="module")
def reward_folder(toy: Path, tmp_path_factory) -> Path:
    """Return a reward model of random weights, head included, with the toy tokenizer."""
    folder = tmp_path_factory.mktemp("rm") / "rm"
    model = load_model(toy / "model", torch.float64, scores=("reward",))
    with torch.no_grad():
        model.score_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, folder, toy / "model", template_of(toy / "model"))
    return folder


def test_a_reward_model_scores_the_very_tokens(toy: Path, reward_folder: Path):
    """Trees get the scores of their texts alone; ids that no text has get their own score."""
    template = template_of(toy / "model")
    rows = [
        json.loads(line)
        for line in (toy / "world" / "preferences.jsonl").read_text().splitlines()[:5]
    ]
    pairs = [template.pair(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
    samples = [Sample(ids, [], [], True) for _, answers, _ in pairs for ids, _ in answers]
    texts = [text for row in rows for text in (row["chosen"], row["rejected"])]
    reward = rewards.load_reward(str(reward_folder), template, dtype=torch.float64, max_tokens=90)
    double = [row for row in rows for _ in range(2)]
    prompts = [row["prompt"] for row in double]
    trees = rollout.trees([p for p, _, _ in pairs], samples)
    scores = reward(prompts, texts, double, trees)
    model = load_model(reward_folder, torch.float64, scores=())
    wanted = [
        score(model, template, [(prompt, [text])])[0][0, 0] for prompt, text in zip(prompts, texts)
    ]
    assert scores.tolist() == pytest.approx(wanted, abs=1e-12)
    assert scores.dtype == np.float64
    # A response spelled in single letters decodes to the same text, but it is another sample.
    ids = template.tokenizer.encode("chess")
    apart = [template.tokenizer.encode(letter)[-1] for letter in "chess"]
    assert template.tokenizer.decode(apart) == "chess"
    assert len(apart) > len(ids)
    pair = rollout.trees([pairs[0][0]], [Sample(ids, [], [], False), Sample(apart, [], [], False)])
    one, other = reward(["p"] * 2, ["chess"] * 2, [{}] * 2, pair)
    assert abs(one - other) > 1e-3


def test_unusable_reward_models_are_refused(
    toy: Path, reward_folder: Path, tmp_path: Path, real_model: Path
):
    """Another tokenizer, scores that are not finite."""
    template = template_of(toy / "model")
    other = load_model(real_model, torch.float32, scores=("reward",))
    save_model(other, tmp_path / "other", real_model)
    with pytest.raises(
        ValueError, match="has another tokenizer than the policy.*from the policy's family"
    ):
        rewards.load_reward(str(tmp_path / "other"), template)
    broken = load_model(reward_folder, torch.float32, scores=())
    broken.score_head.weight.data[:] = 3e38  # finite, and its products are not
    save_model(broken, tmp_path / "broken", reward_folder)
    reward = rewards.load_reward(str(tmp_path / "broken"), template)
    data = rollout.trees([[5, 6]], [Sample([7, 8], [], [], False)])
    with pytest.raises(ValueError, match="gives 'some text' a score that is not finite"):
        reward(["p"], ["some text"], [{}], data)


def test_prompts_of_every_kind_of_row(tmp_path: Path, toy: Path):
    """Text, messages, pairs, conversations; long ones are dropped or cut, bad ones named."""
    logged = []
    question = "Where does Ada live?"
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": "x"}
    transcript = f"\n\nHuman: {question}\n\nAssistant: "
    rows = [
        {"prompt": question, "answer": "forest"},
        {"prompt": [user]},
        {"messages": [user]},
        {"messages": [user, assistant]},
        {"chosen": transcript + "a", "rejected": transcript + "b"},
        {"prompt": f"{question} " * 9},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = template_of(toy / "model")
    prompts = load_prompts([file], template, 20, log=logged.append)
    assert len({tuple(ids) for ids in prompts.ids}) == 1
    assert len(prompts.ids) == 5
    assert prompts.rows[0]["answer"] == "forest"
    assert "6 rows, 5 prompts kept, 1 longer than 20 tokens (drop), 0 bad" in logged[-1]
    cut = load_prompts([file], template, 20, "truncate", log=logged.append)
    assert len(cut.ids) == 6
    assert len(cut.ids[-1]) == 20
    assert cut.ids[-1][-1] == prompts.ids[0][-1]
    with pytest.raises(ValueError, match="no prompt is left of 6 rows, 6 longer than 3 tokens"):
        load_prompts([file], template, 3, log=logged.append)
    with open(file, "a") as more:
        more.write('{"text": "?"}\n')
    with pytest.raises(
        ValueError,
        match=r"rows.jsonl:7: no `prompt` \(nor `input` or `messages`\); this row has 'text'",
    ):
        load_prompts([file], template, 20, log=logged.append)
    assert len(load_prompts([file], template, 20, max_bad_rows=1, log=logged.append).ids) == 5
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        load_prompts([tmp_path / "none.jsonl"], template, 20, log=logged.append)


def test_gsm8k_answers_are_recognised():
    """A real row's own solution gets 1, its neighbour's 0 but for a rare coincidence."""
    file = REAL / "gsm8k" / "sft_train.jsonl"
    if not file.exists():
        pytest.skip("shared/data is absent")
    rows = [json.loads(line) for line in file.read_text().splitlines()[:300]]
    reward = rewards.exact("A:")
    assert all(reward(row["prompt"], row["response"], row) == 1.0 for row in rows)
    wrong = [reward(a["prompt"], b["response"], a) for a, b in zip(rows, rows[1:] + rows[:1])]
    assert 0 <= sum(wrong) < 15


def test_a_function_gets_its_own_copies_and_every_space(tmp_path: Path, toy: Path):
    """Popping a key or a message changes no sibling's reward and no caller's row."""
    file = tmp_path / "pops.py"
    file.write_text(
        "def reward(prompt, response, row):\n"
        "    prompt.append({'role': 'user', 'content': 'more'})\n"
        "    row['list'].append(1)\n"
        "    right = float(row.pop('answer', 'no') == 'yes')\n"
        "    return right + 10 * len(prompt) + 100 * len(row['list']) + len(response)\n"
    )
    prompt = [{"role": "user", "content": "a"}]
    row = {"prompt": prompt, "answer": "yes", "list": []}
    reward = rewards.load_reward(f"{file}:reward", template_of(toy / "model"))
    for _ in range(2):
        got = reward([prompt] * 3, [" a ", "b", ""], [row] * 3, None).tolist()
        assert got == [124.0, 122.0, 121.0]
    assert row == {"prompt": [{"role": "user", "content": "a"}], "answer": "yes", "list": []}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "    return row['gold']",
            r"raised KeyError: 'gold' \(.*mine\.py, line 3\) for 'an answer'",
        ),
        ("    raise SystemExit(3)", r"raised SystemExit: 3 \(.*mine\.py, line 3\) for 'an answer'"),
        ("    sys.exit('enough')", r"raised SystemExit: enough \(.*mine\.py, line 3\)"),
        ("    return json.loads(response)", r"raised JSONDecodeError: .*mine\.py, line 3\)"),
        ("    return 1 / 0", r"raised ZeroDivisionError: division by zero \(.*line 3\)"),
        ("    return 'high'", "returned 'high', not a number, for 'an answer'"),
    ],
)
def test_a_reward_function_that_fails_is_named(body: str, said: str, toy: Path, tmp_path: Path):
    """With its file, the line and the answer; sys.exit ends no training without a word."""
    (tmp_path / "mine.py").write_text(f"import json, sys\ndef f(prompt, response, row):\n{body}\n")
    template = Template("plain", load_tokenizer(toy / "model"))
    reward = rewards.load_reward(f"{tmp_path}/mine.py:f", template)
    trees = dataset_of([([3, 4], [[5, 6]])])
    with pytest.raises(ValueError, match=said):
        reward(["a prompt"], ["an answer"], [{"prompt": "a prompt"}], trees)


@pytest.mark.parametrize(
    "text", ["import sys\nsys.exit(0)\n", "def f(:\n", "import nothing_here\n"]
)
def test_a_reward_file_that_cannot_be_run_is_named(text: str, toy: Path, tmp_path: Path):
    (tmp_path / "broken.py").write_text(text)
    template = Template("plain", load_tokenizer(toy / "model"))
    with pytest.raises(ValueError, match=r"broken\.py cannot be run: .*broken\.py, line \d"):
        rewards.load_reward(f"{tmp_path}/broken.py:f", template)


@pytest.mark.parametrize("names", [("LABEL_0",), ("reward",)], ids=str)
def test_a_chat_reward_model_is_read_where_its_training_read(
    names: tuple, toy: Path, tmp_path: Path, capsys
):
    """One from transformers at the line end that ChatML writes, one of train_rm.py at the end of
    turn; both as transformers scores the texts; --reward-read decides for all.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    folder, source = tmp_path / "rm", chat_templates.MODELS["qwen2.5"]
    tokenizer = chat_templates.save(tmp_path / "tokenizer", *source, {"pad_token": "<s>"})
    size = load_tokenizer(tokenizer).size
    shape = {"width": 32, "layers": 2, "heads": 4, "std": 0.3, "vocab": size}
    save_model(hf.new_model(hf.New(**shape, tokenizer=str(tokenizer))), tmp_path / "lm", tokenizer)
    model = load_model(tmp_path / "lm", torch.float32, scores=names)
    torch.manual_seed(0)
    model.score_head.weight.data.normal_(0, 0.3)
    save_model(model, folder, tokenizer)
    template = Template("auto", load_tokenizer(folder))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    text = tok.apply_chat_template(chat, tokenize=False)
    wanted = {}
    for read, whole in (("last", text), ("end", text.rstrip("\n"))):
        ids = torch.tensor([tok(whole, add_special_tokens=False)["input_ids"]])
        wanted[read] = theirs(ids).logits.item()
    assert abs(wanted["last"] - wanted["end"]) > 1e-3
    wanted["auto"] = wanted["last" if names == ("LABEL_0",) else "end"]
    prompt, [(ids, _)], _ = template.pair("2+2?", ["four"])
    data = rollout.trees([prompt], [Sample(ids, [], [], True), Sample(ids[:-1], [], [], False)])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "2+2?", "response": "four"}) + "\n")
    for read in ("auto", "last", "end"):
        reward = rewards.load_reward(str(folder), template, read=read)
        got, cut = reward([""] * 2, [""] * 2, [{}] * 2, data)
        assert got == pytest.approx(wanted[read], abs=1e-5), read
        assert cut != pytest.approx(got, abs=1e-5)
        said = "is read at the last token" in capsys.readouterr().out
        assert said == (wanted[read] == wanted["last"])
        out = tmp_path / f"{read}.jsonl"
        score_command.main(
            f"--model {folder} --data {file} --out {out} --reward-read {read}".split()
        )
        row = json.loads(out.read_text())
        [value] = [row[key] for key in row.keys() - {"prompt", "response"}]
        assert value == pytest.approx(wanted[read], abs=1e-5)
        capsys.readouterr()
