"""The toy world: the scorer reads back what the writer did; other libraries read what it writes."""

import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import toyworld
from data.tokenizer import load_tokenizer
from data.toy.answers import ERRORS, LEXICON, Plan, answer, minimal_pair, preference, write
from data.toy.scoring import TONE, score
from data.toy.tokenizer import ATTRIBUTE_SYMBOLS, CHAT_SYMBOLS, VOCABULARY
from data.toy.village import FAMILIES, HARMFUL, parse, sample_prompt

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
    """Return a folder that `make` wrote, with few rows."""
    out = tmp_path_factory.mktemp("toy")
    toyworld.make(out, 0, SMALL)
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count, split=None, seed=1):
    rng = random.Random(seed)
    return [(sample_prompt(rng, split), rng) for _ in range(count)]


def test_parse_undoes_text():
    """parse(text) is the prompt: single facts, every harmful request, many combinations."""
    sampled = [prompt for prompt, _ in prompts(3000)]
    for prompt in sampled + list(HARMFUL.values()):
        assert parse(prompt.text) == prompt
        assert parse(f"{prompt.text}<|attr|>helpfulness:4,toxicity:0") == prompt
    assert {prompt.family for prompt in sampled} == set(FAMILIES)
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
    """Only the world's prompts are parsed; one changed word is an error."""
    with pytest.raises(ValueError, match="toy world"):
        parse(text)


def test_facts_by_hand():
    """Answers written by hand have the scores that a reader would give."""
    job = "What is the job of Mia?"
    both = "What does Tom like, and where does Leo live?"
    move = (
        "Ada puts the cup in the hall. Then Ben takes it to the shed. "
        "Where is the cup now, and who took it there?"
    )
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
        got = score(prompt, text)
        expected = (correct, complete, coherent, tone)
        assert (got.correct, got.complete, got.coherent, got.tone) == expected, text
        utility = 2 * correct + complete + coherent + {1: 0.5, 0: 0, -1: -1}[tone]
        assert got.utility == utility and got.gold == pytest.approx((utility + 1) / 5.5)
        assert got.good == (correct and complete and coherent and tone >= 0)


def test_scorer_reads_back_every_decision():
    """For every plan the score is the plan; damage always shows and never corrects an answer."""
    fields = itertools.product(range(5), (None, *ERRORS), (1, 2), (-1, 0, 1))
    for length, error, said, tone in fields:
        for prompt, rng in prompts(60, seed=length):
            plan = Plan(length, error, said, tone, damaged=False, seed=rng.random())
            got = score(prompt.text, write(prompt, plan))
            expected = (error is None, said >= len(prompt.parts), True, tone)
            assert tuple(getattr(got, name) for name in DECIDED) == expected, (prompt.text, plan)
            assert got.details == min(said, len(prompt.parts), (0, 0, 1, 1, 2)[length])
            assert got.faults == 0
            hurt = score(prompt, write(prompt, replace(plan, damaged=True)))
            assert not hurt.coherent and hurt.complete <= got.complete
            if length:  # a bare word may pass for the answer to a damaged one's question
                assert hurt.correct <= got.correct


def test_clean_is_good_and_base_is_right():
    """Clean answers are all good; base answers are right and whole, and some are rude."""
    clean = [score(prompt, answer(prompt, rng, "clean")) for prompt, rng in prompts(1500)]
    base = [score(prompt, answer(prompt, rng, "base")) for prompt, rng in prompts(1500)]
    assert all(s.good for s in clean)
    assert all(s.correct and s.complete and s.coherent for s in base)
    assert sum(s.tone < 0 for s in base) == pytest.approx(0.15 * 1500, abs=60)


def test_noisy_rates():
    """A third of the noisy answers are good, every flaw is common, every set phrase occurs."""
    answers = [(prompt, answer(prompt, rng)) for prompt, rng in prompts(5000)]
    assert all(any(phrase in text for _, text in answers) for phrase in TONE)
    means = toyworld.averages([score(prompt, text) for prompt, text in answers])
    assert means["good"] == pytest.approx(0.33, abs=0.04)
    assert means["correct"] == pytest.approx(0.48, abs=0.04)
    assert means["rude"] == pytest.approx(0.25, abs=0.03)
    assert means["coherent"] == pytest.approx(0.875, abs=0.03)
    assert 0.65 < means["complete"] < 0.76
    assert 13 < means["words"] < 17


@pytest.mark.parametrize(
    "flaw, attribute", [("error", "correct"), ("omission", "complete"), ("tone", "tone")]
)
def test_minimal_pairs_differ_in_one_attribute(flaw, attribute):
    """The better and the worse answer differ in the flaw's attribute and in no other."""
    for prompt, rng in prompts(1500):
        if flaw == "omission" and len(prompt.parts) == 1:
            continue
        better, worse = (score(prompt, text) for text in minimal_pair(prompt, rng, flaw))
        different = [name for name in DECIDED if getattr(better, name) != getattr(worse, name)]
        assert different == [attribute]
        assert better.utility > worse.utility


def test_damaged_pairs():
    """One answer is coherent; the other has one unknown sentence and lost its content."""
    for prompt, rng in prompts(1500):
        better, worse = (score(prompt, text) for text in minimal_pair(prompt, rng, "damage"))
        assert better.coherent and not worse.coherent and worse.faults == 1
        assert worse.complete <= better.complete and worse.details <= better.details


def test_splits_are_disjoint():
    """No combination is in both splits; families and two-part prompts are equally frequent."""
    train, test = ([prompt for prompt, _ in prompts(6000, split)] for split in ("train", "test"))
    shared = {p.text for p in train} & {p.text for p in test}
    assert shared and all(parse(text).split is None for text in shared)
    assert {p.split for p in train} == {None, "train"} and {p.split for p in test} == {None, "test"}
    for family in FAMILIES:
        shares = [sum(p.family == family for p in side) / len(side) for side in (train, test)]
        assert shares == pytest.approx([FAMILIES[family][0]] * 2, abs=0.03)
    train_parts, test_parts = (sum(len(p.parts) for p in side) for side in (train, test))
    assert train_parts == pytest.approx(test_parts, rel=0.04)


def test_preferences_follow_the_judge():
    """Labels flip as often as a logistic judge's; rewards are the utilities, never equal."""
    rng = random.Random(0)
    drawn = [preference(rng, "train") for _ in range(4000)]
    for row in drawn[:300]:
        for side in ("chosen", "rejected"):
            assert row[side + "_reward"] == score(row["prompt"], row[side]).utility
    for gap, chance in ((0.5, 0.269), (1.0, 0.119), (2.0, 0.018)):
        gaps = [row["chosen_reward"] - row["rejected_reward"] for row in drawn]
        flipped = [signed < 0 for signed in gaps if abs(signed) == gap]
        spread = (chance / len(flipped)) ** 0.5
        assert sum(flipped) / len(flipped) == pytest.approx(chance, abs=4 * spread)
    assert all(r["chosen_reward"] != r["rejected_reward"] for r in drawn)
    right = (preference(rng, "test", flips=False) for _ in range(500))
    assert all(r["chosen_reward"] > r["rejected_reward"] for r in right)


def test_attributes():
    """SteerLM's attributes are integers 0 to 4, reach both ends, and follow the score."""
    seen = {}
    for prompt, rng in prompts(2000):
        got = score(prompt, answer(prompt, rng))
        for name, value in got.attributes.items():
            assert 0 <= value <= 4 and type(value) is int
            seen.setdefault(name, set()).add(value)
        assert (got.attributes["toxicity"] == 4) == (got.tone < 0)
        assert (got.attributes["correctness"] == 4) == got.correct
        assert (got.attributes["coherence"] == 4) == got.coherent
    assert all({0, 4} <= values for name, values in seen.items() if name != "coherence")
    assert seen["verbosity"] == set(range(5)) and seen["coherence"] == {2, 4}
    assert score("What does Tom like?", "Blah. Blah. Music.").attributes["coherence"] == 0
    assert {f"{name}:{value}" for name in seen for value in range(5)} == set(ATTRIBUTE_SYMBOLS)


sentences = st.sampled_from([*TONE, *LEXICON, "Baker.", "Music.", "Mia is the", ".", "\n", "!?"])


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(sentences, max_size=40).map(" ".join))
def test_scorer_takes_anything(text):
    """Any text has a score within bounds; nonsense before it adds one fault and changes no more."""
    prompt = "What is the job of Mia, and what does Tom like?"
    got = score(prompt, text)
    after = score(prompt, "Xyzzy. " + text)
    assert 0 <= got.gold <= 1 and all(0 <= value <= 4 for value in got.attributes.values())
    assert after == replace(got, coherent=False, faults=got.faults + 1, words=got.words + 1)


def test_scorer_takes_long_answers():
    """A hundred thousand words are read, and repetition is a fault."""
    got = score("What does Tom like?", "Tom likes music. " * 35_000)
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
        assert {parse(row["prompt"]).split for row in read} == {None, split}


def test_seed_decides_everything(made, tmp_path):
    """A seed decides every byte of every file; a count changes only its own file."""
    toyworld.make(tmp_path / "same", 0, SMALL | {"sft": 60})
    toyworld.make(tmp_path / "other", 1, SMALL)
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
    symbols = ",".join(ATTRIBUTE_SYMBOLS)
    texts = [text for pair in pairs for text in pair]
    texts += [f"<|user|>{a}<|assistant|>{b}</s>" for a, b in pairs]
    texts.append(f"<|user|>{pairs[0][0]}<|attr|>{symbols}<|assistant|>No.")
    texts += ["", " ", "  two  spaces ", "<s>a</s> b", "x\ny", "Zoë 漢字!"]
    return texts


def test_tokenizer_round_trip(made):
    """Texts come back from their ids; a symbol is one id; no answer merges with its prompt."""
    tokenizer = load_tokenizer(made / "tokenizer")
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 2, 3)
    assert tokenizer.size == VOCABULARY
    for row in rows(made / "base.jsonl") + rows(made / "sft.jsonl"):
        prompt = tokenizer.encode(row["prompt"])
        answer = tokenizer.encode(row["response"])
        assert tokenizer.decode(prompt) == row["prompt"]
        assert tokenizer.decode(answer) == row["response"]
        assert tokenizer.encode(row["prompt"] + row["response"]) == prompt + answer
        chat = tokenizer.encode(f"<|user|>{row['prompt']}<|assistant|>{row['response']}</s>")
        assert chat == [4, *prompt, 5, *answer, 3]
    for symbol in (*CHAT_SYMBOLS, *ATTRIBUTE_SYMBOLS):
        assert len(tokenizer.encode(symbol)) == 1


def test_tokenizer_in_transformers(made):
    """transformers gets the same ids, texts and chats from the folder as our tokenizer."""
    ours = load_tokenizer(made / "tokenizer")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(made / "tokenizer")
    assert len(theirs) == ours.size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 3, 0)
    for text in texts_and_chats(made):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    talk = [
        {"role": "user", "content": "What does Mia like?"},
        {"role": "assistant", "content": "Chess."},
    ]
    chat = theirs.apply_chat_template(talk, tokenize=False)
    assert chat == "<|user|>What does Mia like?<|assistant|>Chess.</s>"
    asked = theirs.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>What does Mia like?<|assistant|>"


def test_score_command(made, tmp_path, capsys):
    """The means are those counted by hand; a bad line is reported as file:line."""
    path = tmp_path / "answers.jsonl"
    job = {"prompt": "What is the job of Mia?", "id": 7}
    texts = ("Mia is the baker.", "Now go away. Baker.", "Farmer.", "")
    path.write_text("".join(json.dumps(job | {"response": text}) + "\n" for text in texts))
    toyworld.main(["score", str(path), str(made / "base.jsonl"), "--json"])
    first, second = json.loads(capsys.readouterr().out)
    expected = {"rows": 4, "good": 0.25, "correct": 0.5, "complete": 0.75}
    expected |= {"coherent": 0.75, "polite": 0, "rude": 0.25, "words": 9 / 4}
    assert {name: first[name] for name in expected} == expected
    assert first["gold"] == pytest.approx((5 + 4 + 3 + 1) / 5.5 / 4) and second["correct"] == 1
    toyworld.main(["score", str(path)])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == f"{path} 0.250 0.591 0.500 0.750 0.750 0.000 0.250 2.2".split()
    bad = {
        "{": "Expecting",
        '{"prompt": "Hi"}': "response",
        '{"prompt": "Hi", "response": ""}': "toy world",
    }
    for line, reason in bad.items():
        path.write_text(json.dumps(job | {"response": "Baker."}) + "\n" + line + "\n")
        with pytest.raises(SystemExit, match=rf"answers.jsonl:2: .*{reason}"):
            toyworld.main(["score", str(path)])
