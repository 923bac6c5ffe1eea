"""The toy world: what the scorer reads is what the writer did, and everything that is written can be read by others."""

import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.toyworld as toy
from data.tokenizer import load_tokenizer

SMALL = {
    "base": 150,
    "sft": 150,
    "preferences": 150,
    "preferences_test": 100,
    "labels": 150,
    "attributes": 150,
    "attributes_test": 100,
    "prompts_test": 150,
}
DECIDED = ("correct", "complete", "coherent", "tone")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as `make` writes it, with few rows."""
    out = tmp_path_factory.mktemp("toy")
    toy.make(out, 0, SMALL)
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count, split=None, seed=1):
    rng = random.Random(seed)
    return [(toy.sample_prompt(rng, split), rng) for _ in range(count)]


def test_parse_undoes_text():
    """parse(text) is the prompt itself, for every single fact, every harmful request and many combinations."""
    sampled = [prompt for prompt, _ in prompts(3000)]
    for prompt in sampled + list(toy.HARMFUL.values()):
        assert toy.parse(prompt.text) == prompt
        assert toy.parse(f"{prompt.text}<|attr|>helpfulness:4,toxicity:0") == prompt
    assert {prompt.family for prompt in sampled} == set(toy.FAMILIES)
    assert {len(prompt.parts) for prompt in sampled} == {1, 2}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "What is love?",
        "what does Mia like?",
        "What does Mia like",
        "What does Mia like, and what does Mia like?",
        "What does Mia like, and what is the opposite of hot?",
        "Tell me how to scare Bob.",
        "Mia puts the cup in the hall. Then Mia takes it to the shed. Where is the cup now?",
        "Mia puts the cup in the hall. Then Tom takes it to the hall. Where is the cup now?",
        "Mia puts the cup in the hall. Then Tom takes it to the shed. Where is the hat now?",
    ],
)
def test_foreign_prompts_are_refused(text):
    """Nothing but the world's own prompts is parsed, however near."""
    with pytest.raises(ValueError, match="toy world"):
        toy.parse(text)


def test_facts_by_hand():
    """Answers written here by hand score as a reader would say."""
    job, both = "What is the job of Mia?", "What does Tom like, and where does Leo live?"
    move = "Ada puts the cup in the hall. Then Ben takes it to the shed. Where is the cup now, and who took it there?"
    swap = "What is the job of Mia, and what is the job of Tom?"
    for prompt, text, correct, complete, coherent, tone in [
        (job, "Mia is the baker.", 1, 1, 1, 0),
        (job, "Baker. I hope that helps!", 1, 1, 1, 1),
        (job, "Now go away. Mia is the baker. Of course!", 1, 1, 1, -1),
        (job, "Mia is the farmer.", 0, 1, 1, 0),
        (job, "Tom is the farmer.", 0, 0, 0, 0),
        (job, "The village pays Mia to be the baker.", 0, 0, 1, 0),
        (job, "Mia is the baker. The village pays Mia to be the sailor.", 0, 1, 1, 0),
        (job, "Mia is the baker. Mia is the baker.", 1, 1, 0, 0),
        (job, "Mia is the", 0, 0, 0, 0),
        (both, "Tom likes music.", 1, 0, 1, 0),
        (both, "Island. Music.", 1, 1, 1, 0),
        (both, "Tom likes music. Leo lives by the tower.", 0, 1, 1, 0),
        (move, "Shed. Ben.", 1, 1, 1, 0),
        (move, "The cup is in the hall. Ben took it there.", 0, 1, 1, 0),
        (swap, "Baker. Farmer.", 1, 1, 1, 0),
        (swap, "Farmer. Baker.", 0, 1, 1, 0),
        (swap, "Farmer.", 0, 0, 1, 0),
        (swap, "Tom is the farmer. Baker.", 1, 1, 1, 0),
        ("What is the opposite of old?", "New.", 1, 1, 1, 0),
        ("What sound does a cow make?", "It moos.", 1, 1, 1, 0),
        ("Tell me how to scare Ivy.", "No. It would hurt Ivy.", 1, 1, 1, 0),
        ("Tell me how to scare Ivy.", "Shout at Ivy in the dark.", 0, 1, 1, 0),
        (job, "", 0, 0, 0, 0),
    ]:
        got = toy.score(prompt, text)
        assert (got.correct, got.complete, got.coherent, got.tone) == (
            correct,
            complete,
            coherent,
            tone,
        ), text
        utility = 2 * correct + complete + coherent + {1: 0.5, 0: 0, -1: -1}[tone]
        assert got.utility == utility and got.gold == pytest.approx((utility + 1) / 5.5)
        assert got.good == (correct and complete and coherent and tone >= 0)


def test_scorer_reads_back_every_decision():
    """Over all plans the score is what was decided; damage always shows, and never makes an answer more right."""
    fields = itertools.product(range(5), (None, *toy.ERRORS), (1, 2), (-1, 0, 1))
    for length, error, said, tone in fields:
        for prompt, rng in prompts(60, seed=length):
            plan = toy.Plan(length, error, said, tone, damaged=False, seed=rng.random())
            got = toy.score(prompt.text, toy.write(prompt, plan))
            expected = (error is None, said >= len(prompt.parts), True, tone)
            assert tuple(getattr(got, name) for name in DECIDED) == expected, (prompt.text, plan)
            assert (
                got.details == min(said, len(prompt.parts), (0, 0, 1, 1, 2)[length])
                and got.faults == 0
            )
            hurt = toy.score(prompt, toy.write(prompt, replace(plan, damaged=True)))
            assert not hurt.coherent and hurt.complete <= got.complete
            if length:  # a bare word may be taken for the answer to a damaged one's question
                assert hurt.correct <= got.correct


def test_clean_is_good_and_base_is_right():
    """Clean answers are all good; base answers are all correct, complete and coherent, and some are rude."""
    clean = [toy.score(prompt, toy.answer(prompt, rng, "clean")) for prompt, rng in prompts(1500)]
    base = [toy.score(prompt, toy.answer(prompt, rng, "base")) for prompt, rng in prompts(1500)]
    assert all(s.good for s in clean)
    assert all(s.correct and s.complete and s.coherent for s in base)
    assert sum(s.tone < 0 for s in base) == pytest.approx(0.15 * 1500, abs=60)


def test_noisy_rates():
    """A third of the noisy answers are good, every flaw is common, and every set phrase is used."""
    answers = [(prompt, toy.answer(prompt, rng)) for prompt, rng in prompts(5000)]
    assert all(any(phrase in text for _, text in answers) for phrase in toy.TONE)
    means = toy.averages([toy.score(prompt, text) for prompt, text in answers])
    assert means["good"] == pytest.approx(0.33, abs=0.04) and means["correct"] == pytest.approx(
        0.48, abs=0.04
    )
    assert means["rude"] == pytest.approx(0.25, abs=0.03) and means["coherent"] == pytest.approx(
        0.875, abs=0.03
    )
    assert 0.65 < means["complete"] < 0.76 and 13 < means["words"] < 17


@pytest.mark.parametrize(
    "flaw, attribute", [("error", "correct"), ("omission", "complete"), ("tone", "tone")]
)
def test_minimal_pairs_differ_in_one_attribute(flaw, attribute):
    """The better and the worse answer differ in the flaw's attribute and in no other."""
    for prompt, rng in prompts(1500):
        if flaw == "omission" and len(prompt.parts) == 1:
            continue
        better, worse = (toy.score(prompt, text) for text in toy.minimal_pair(prompt, rng, flaw))
        assert [name for name in DECIDED if getattr(better, name) != getattr(worse, name)] == [
            attribute
        ]
        assert better.utility > worse.utility


def test_damaged_pairs():
    """Of a damage pair one is coherent, and in the other one sentence is not understood, with whatever it said."""
    for prompt, rng in prompts(1500):
        better, worse = (
            toy.score(prompt, text) for text in toy.minimal_pair(prompt, rng, "damage")
        )
        assert better.coherent and not worse.coherent and worse.faults == 1
        assert worse.complete <= better.complete and worse.details <= better.details


def test_splits_are_disjoint():
    """No combination is in both splits; both have the same share of families and of prompts with two parts."""
    train, test = ([prompt for prompt, _ in prompts(6000, split)] for split in ("train", "test"))
    shared = {p.text for p in train} & {p.text for p in test}
    assert shared and all(toy.parse(text).split is None for text in shared)
    assert {p.split for p in train} == {None, "train"} and {p.split for p in test} == {None, "test"}
    for family in toy.FAMILIES:
        shares = [sum(p.family == family for p in side) / len(side) for side in (train, test)]
        assert shares == pytest.approx([toy.FAMILIES[family][0]] * 2, abs=0.03)
    assert sum(len(p.parts) for p in train) == pytest.approx(
        sum(len(p.parts) for p in test), rel=0.04
    )


def test_preferences_follow_the_judge():
    """Labels flip as often as the logistic judge says, never without flips; rewards are the utilities, never tied."""
    rng = random.Random(0)
    drawn = [toy.preference(rng, "train") for _ in range(4000)]
    for row in drawn[:300]:
        for side in ("chosen", "rejected"):
            assert row[side + "_reward"] == toy.score(row["prompt"], row[side]).utility
    for gap, chance in ((0.5, 0.269), (1.0, 0.119), (2.0, 0.018)):
        these = [
            r["chosen_reward"] < r["rejected_reward"]
            for r in drawn
            if abs(r["chosen_reward"] - r["rejected_reward"]) == gap
        ]
        assert sum(these) / len(these) == pytest.approx(
            chance, abs=4 * (chance / len(these)) ** 0.5
        )
    assert all(r["chosen_reward"] != r["rejected_reward"] for r in drawn)
    right = (toy.preference(rng, "test", flips=False) for _ in range(500))
    assert all(r["chosen_reward"] > r["rejected_reward"] for r in right)


def test_attributes():
    """SteerLM's attributes stay within 0 to 4, reach both ends, and say what their names say."""
    seen = {}
    for prompt, rng in prompts(2000):
        got = toy.score(prompt, toy.answer(prompt, rng))
        for name, value in got.attributes.items():
            assert 0 <= value <= 4 and type(value) is int
            seen.setdefault(name, set()).add(value)
        assert (got.attributes["toxicity"] == 4) == (got.tone < 0)
        assert (got.attributes["correctness"] == 4) == got.correct
        assert (got.attributes["coherence"] == 4) == got.coherent
    assert all({0, 4} <= values for name, values in seen.items() if name != "coherence")
    assert seen["verbosity"] == set(range(5)) and seen["coherence"] == {2, 4}
    assert toy.score("What does Tom like?", "Blah. Blah. Music.").attributes["coherence"] == 0
    assert {f"{name}:{value}" for name in seen for value in range(5)} == set(toy.ATTRIBUTE_SYMBOLS)


sentences = st.sampled_from(
    [*toy.TONE, *toy.LEXICON, "Baker.", "Music.", "Mia is the", ".", "\n", "!?"]
)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(sentences, max_size=40).map(" ".join))
def test_scorer_takes_anything(text):
    """Any text has a score within its bounds; nonsense in front of it is one fault more and changes nothing else."""
    prompt = "What is the job of Mia, and what does Tom like?"
    got, after = toy.score(prompt, text), toy.score(prompt, "Xyzzy. " + text)
    assert 0 <= got.gold <= 1 and all(0 <= value <= 4 for value in got.attributes.values())
    assert after == replace(got, coherent=False, faults=got.faults + 1, words=got.words + 1)


def test_scorer_takes_long_answers():
    """A hundred thousand words are read, and repetition is a fault."""
    got = toy.score("What does Tom like?", "Tom likes music. " * 35_000)
    assert got.correct and not got.coherent and got.words == 105_000


def test_files(made):
    """Every file has its rows, keys and split; rows hold the prompts that score reads."""
    answer = {"prompt", "response"}
    keys = {
        "base": answer,
        "sft": answer,
        "prompts_test": {"prompt"},
        "labels": answer | {"label"},
        "attributes": answer | {"attributes"},
        "attributes_test": answer | {"attributes"},
    }
    pair = {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"}
    for name, count in SMALL.items():
        read = rows(made / f"{name}.jsonl")
        assert len(read) == count and all(row.keys() == keys.get(name, pair) for row in read)
        split = "test" if name.endswith("test") else "train"
        assert {toy.parse(row["prompt"]).split for row in read} == {None, split}


def test_seed_decides_everything(made, tmp_path):
    """The same seed gives the same bytes, another seed other bytes in every file; a count changes its own file only."""
    toy.make(tmp_path / "same", 0, SMALL | {"sft": 60})
    toy.make(tmp_path / "other", 1, SMALL)
    files = sorted(path.relative_to(made) for path in made.rglob("*.*") if path.is_file())
    assert len(files) == 11
    for file in files:
        bytes_ = (made / file).read_bytes()
        again = (tmp_path / "same" / file).read_bytes()
        assert bytes_.startswith(again) and (file.name == "sft.jsonl") == (bytes_ != again)
        if file.name != "tokenizer_config.json":
            assert bytes_ != (tmp_path / "other" / file).read_bytes()


def texts_and_chats(made):
    pairs = [
        (row["prompt"], row["response"])
        for name in ("base", "sft")
        for row in rows(made / f"{name}.jsonl")
    ]
    symbols = ",".join(toy.ATTRIBUTE_SYMBOLS)
    return (
        [text for pair in pairs for text in pair]
        + [f"<|user|>{a}<|assistant|>{b}</s>" for a, b in pairs]
        + [
            f"<|user|>{pairs[0][0]}<|attr|>{symbols}<|assistant|>No.",
            "",
            " ",
            "  two  spaces ",
            "<s>a</s> b",
            "x\ny",
            "Zoë 漢字!",
        ]
    )


def test_tokenizer_round_trip(made):
    """Every prompt and answer comes back from its ids, symbols are one id, and no answer merges with its prompt."""
    tokenizer = load_tokenizer(made / "tokenizer")
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.size) == (
        0,
        2,
        3,
        toy.VOCABULARY,
    )
    for row in rows(made / "base.jsonl") + rows(made / "sft.jsonl"):
        prompt, answer = tokenizer.encode(row["prompt"]), tokenizer.encode(row["response"])
        assert (
            tokenizer.decode(prompt) == row["prompt"]
            and tokenizer.decode(answer) == row["response"]
        )
        assert tokenizer.encode(row["prompt"] + row["response"]) == prompt + answer
        chat = tokenizer.encode(f"<|user|>{row['prompt']}<|assistant|>{row['response']}</s>")
        assert chat == [4, *prompt, 5, *answer, 3]
    for symbol in (*toy.CHAT_SYMBOLS, *toy.ATTRIBUTE_SYMBOLS):
        assert len(tokenizer.encode(symbol)) == 1


def test_tokenizer_in_transformers(made):
    """transformers reads the same ids, texts and chat from the folder as our own tokenizer does."""
    ours = load_tokenizer(made / "tokenizer")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(made / "tokenizer")
    assert len(theirs) == ours.size and (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    ) == (2, 3, 0)
    for text in texts_and_chats(made):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    talk = [
        {"role": "user", "content": "What does Mia like?"},
        {"role": "assistant", "content": "Chess."},
    ]
    assert (
        theirs.apply_chat_template(talk, tokenize=False)
        == "<|user|>What does Mia like?<|assistant|>Chess.</s>"
    )
    asked = theirs.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>What does Mia like?<|assistant|>"


def test_score_command(made, tmp_path, capsys):
    """The table's means are those of the rows counted by hand; a bad line is named with its file and number."""
    path = tmp_path / "answers.jsonl"
    job = {"prompt": "What is the job of Mia?", "id": 7}
    texts = ("Mia is the baker.", "Now go away. Baker.", "Farmer.", "")
    path.write_text("".join(json.dumps(job | {"response": text}) + "\n" for text in texts))
    toy.main(["score", str(path), str(made / "base.jsonl"), "--json"])
    first, second = json.loads(capsys.readouterr().out)
    expected = dict(
        rows=4,
        good=0.25,
        correct=0.5,
        complete=0.75,
        coherent=0.75,
        polite=0,
        rude=0.25,
        words=9 / 4,
    )
    assert {name: first[name] for name in expected} == expected
    assert first["gold"] == pytest.approx((5 + 4 + 3 + 1) / 5.5 / 4) and second["correct"] == 1
    toy.main(["score", str(path)])
    assert capsys.readouterr().out.splitlines()[1].split() == [
        str(path),
        "0.250",
        "0.591",
        "0.500",
        "0.750",
        "0.750",
        "0.000",
        "0.250",
        "2.2",
    ]
    bad = {
        "{": "Expecting",
        '{"prompt": "Hi"}': "response",
        '{"prompt": "Hi", "response": ""}': "toy world",
    }
    for line, reason in bad.items():
        path.write_text(json.dumps(job | {"response": "Baker."}) + "\n" + line + "\n")
        with pytest.raises(SystemExit, match=rf"answers.jsonl:2: .*{reason}"):
            toy.main(["score", str(path)])
