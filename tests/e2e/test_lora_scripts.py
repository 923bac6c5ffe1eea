"""--lora in every script: only adapters and score heads train; the outputs load; runs resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from launch import launch, weights_in
from plain import encode

import hf
import train_dpo
import train_kto
import train_nash
import train_online_dpo
import train_ppo
import train_reinforce
import train_rm
import train_sft
from data.rows import read_rows
from sampling.sampler import generate
from weights.adapters import Lora, attach, frozen_linears, without_adapters
from weights.folder import load_model

SHORT = "--batch-size 8 --max-steps 3 --lr 1e-2 --max-tokens 600 --dtype fp64 --lora 4".split()
REWARD = ["--reward", "length:3", "--max-new-tokens", "8"]
SCRIPTS = {
    "sft": (train_sft, "sft.jsonl", []),
    "dpo": (train_dpo, "preferences.jsonl", []),
    "kto": (train_kto, "labels.jsonl", []),
    "rm": (train_rm, "preferences.jsonl", []),
    "ppo": (train_ppo, "sft.jsonl", [*REWARD, "--ppo-epochs", "1"]),
    "reinforce": (train_reinforce, "sft.jsonl", REWARD),
    "online_dpo": (train_online_dpo, "sft.jsonl", [*REWARD, "--ref-every", "2"]),
    "nash": (train_nash, "sft.jsonl", REWARD),
}


def train(name: str, toy: Path, out: Path, *flags: str) -> Path:
    script, data, own = SCRIPTS[name]
    files = ["--model", str(toy / "model"), "--data", str(toy / "world" / data), "--out", str(out)]
    script.main([*files, *SHORT, *own, *flags])
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_adapters_alone(name: str, toy: Path, tmp_path: Path):
    """Norms and the embedding keep their bits, every linear moves; the adapter says its base."""
    out = train(name, toy, tmp_path / "out")
    start, final = weights_in(toy / "model"), weights_in(out / "final")
    moved = {n for n in start if n in final and not torch.equal(start[n].double(), final[n])}
    assert moved == {n for n in start if "_proj." in n}
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(toy / "model")
    assert config["r"] == 4 and config["lora_alpha"] == 8.0
    rows = read_metrics(out)
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    if name in ("ppo", "reinforce"):  # the reference is the base, not the policy of the moment
        assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    if name == "dpo":
        first = next(row for row in rows if "loss" in row)
        assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


def test_a_run_resumes_and_moves_to_another_layout(toy: Path, tmp_path: Path):
    """Stopped after step 2 and resumed with two tensor ranks: the numbers of the unbroken run."""
    whole = train("dpo", toy, tmp_path / "whole")
    train("dpo", toy, tmp_path / "cut", "--save-every", "2")
    # Go on from step 2 with the other layout.
    launch(
        2,
        train,
        "dpo",
        toy,
        tmp_path / "cut",
        "--resume",
        str(tmp_path / "cut/step_2"),
        "--tp",
        "2",
    )
    one, other = weights_in(whole / "final"), weights_in(tmp_path / "cut/final")
    assert max((one[n] - other[n]).abs().max().item() for n in one) < 1e-12


def test_merging_by_hand_gives_the_merged_model(toy: Path, tmp_path: Path):
    out = train("sft", toy, tmp_path / "out", "--dtype", "fp32")
    hf.main(["merge", str(toy / "model"), str(out / "adapter"), "--out", str(tmp_path / "merged")])
    merged, final = weights_in(tmp_path / "merged"), weights_in(out / "final")
    assert all((merged[n] - final[n]).abs().max() < 1e-6 for n in final)


def test_an_adapter_goes_on_and_is_the_reference(toy: Path, tmp_path: Path, capsys):
    """--adapter starts from SFT's adapter: DPO's first loss is ln 2. --no-merge: no final/."""
    out = train("sft", toy, tmp_path / "sft")
    flags = [f for f in SHORT if f not in ("--lora", "4")]
    train_dpo.main(
        ["--model", str(toy / "model"), "--adapter", str(out / "adapter"), "--no-merge"]
        + ["--data", str(toy / "world/preferences.jsonl"), "--out", str(tmp_path / "dpo"), *flags]
    )
    rows = [row for row in read_metrics(tmp_path / "dpo") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert (tmp_path / "dpo/adapter").is_dir() and not (tmp_path / "dpo/final").exists()
    assert "frozen" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_offloaded_adapters_keep_their_bits(dtype: str, toy: Path, tmp_path: Path):
    """With --offload optimizer --async-save the same checkpoint, adapter and merged model."""
    flags = ["--dtype", dtype, "--save-every", "2"]
    plain = train("sft", toy, tmp_path / "plain", *flags)
    more = ["--offload", "optimizer", "--async-save"]
    offloaded = train("sft", toy, tmp_path / "offloaded", *flags, *more)
    for name in ("step_2", "adapter", "final"):
        files = [
            {path.name: path.read_bytes() for path in (out / name).glob("*.safetensors")}
            for out in (plain, offloaded)
        ]
        assert files[0] and files[0] == files[1], name


def test_a_folder_with_only_an_adapter_says_what_to_do(toy: Path, tmp_path: Path):
    out = train("sft", toy, tmp_path / "out", "--no-merge")
    with pytest.raises(FileNotFoundError, match="--adapter, or merge the two: hf.py merge"):
        load_model(out / "adapter", torch.float32)


@pytest.mark.parametrize(("base_dtype", "bound"), [("int8", 0.002), ("nf4", 0.005)])
def test_a_quantised_base_learns_as_the_whole_one(
    base_dtype: str, bound: float, toy: Path, tmp_path: Path
):
    """DPO's loss follows that of the whole base: step by step no further away than `bound` nats,
    a share of what eight steps learn. The folder that comes out is merged from whole weights."""
    flags = "--batch-size 48 --epochs 8 --max-steps 8 --lr 5e-3 --warmup 0".split()
    whole = read_metrics(train("dpo", toy, tmp_path / "whole", *flags))
    out = train("dpo", toy, tmp_path / "fewer", *flags, "--base-dtype", base_dtype)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, read_metrics(out))]
    assert losses[0] != losses[1]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < bound
    assert losses[0][0] - losses[0][-1] > 5 * bound
    hf.main(["merge", str(toy / "model"), str(out / "adapter"), "--out", str(tmp_path / "merged")])
    merged, final = weights_in(tmp_path / "merged"), weights_in(out / "final")
    assert all((merged[n].double() - final[n]).abs().max() < 1e-6 for n in final)


def test_fewer_bits_want_a_frozen_base(toy: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--base-dtype nf4 is for weights that stay frozen"):
        train("sft", toy, tmp_path / "out", "--lora", "0", "--base-dtype", "nf4")


@pytest.mark.parametrize("flags", ["--pp 2", "--rollout-url http://x --rollout-reload y"])
def test_no_sample_comes_from_another_model(flags: str, toy: Path, tmp_path: Path):
    """Merged weights stand on the base before rounding: the policy is another one."""
    for name in ("ppo", "reinforce"):
        with pytest.raises(ValueError, match="not from the policy that trains"):
            train(name, toy, tmp_path / "out", "--base-dtype", "nf4", *flags.split())


# ---- one base for policy, critic and reward model ------------------------------------------------

PPO = f"{' '.join(SHORT)} --max-new-tokens 8 --ppo-epochs 1 --kl 0.1 --device cpu".split()


@pytest.fixture(scope="module")
def scorer(toy: Path, tmp_path_factory) -> Path:
    """Return the output of train_rm.py --lora, whose rank and scale are not the policy's."""
    out = tmp_path_factory.mktemp("scorer")
    return train("rm", toy, out, "--lora", "3", "--lora-alpha", "9")


def ppo(toy: Path, scorer: Path, out: Path, *flags: str) -> list[dict]:
    files = ["--model", str(toy / "model"), "--data", str(toy / "world/sft.jsonl")]
    reward = ["--reward", str(scorer / "adapter"), "--shared-base"]
    train_ppo.main([*files, *PPO, *reward, "--out", str(out), *flags])
    return read_metrics(out)


def test_one_base_does_what_three_models_do(toy: Path, scorer: Path, tmp_path: Path):
    """Rewards, first values and the policy's first update are those with the merged reward model
    as reward and critic; nothing of the base moves, and the critic keeps its own rank and scale."""
    shared = ppo(toy, scorer, tmp_path / "shared", "--max-steps", "1")
    merged = ["--no-shared-base", "--reward", str(scorer / "final"), "--max-steps", "1"]
    apart = ppo(toy, scorer, tmp_path / "apart", *merged)
    for name in ("reward", "value/mean", "value/explained_variance", "loss", "grad_norm", "kl"):
        assert shared[0][name] == pytest.approx(apart[0][name], abs=1e-10), name
    assert abs(shared[0]["value/mean"]) > 1e-4
    one, other = (weights_in(tmp_path / name / "final") for name in ("shared", "apart"))
    assert max((one[n] - other[n]).abs().max().item() for n in one) < 1e-10
    critic = weights_in(tmp_path / "shared/critic_adapter")
    start = weights_in(scorer / "adapter")
    assert critic.keys() == start.keys() and "base_model.model.score.weight" in critic
    assert all(critic[n].shape == start[n].shape for n in critic)
    assert any(not torch.equal(critic[n], start[n]) for n in critic)
    hf.main(
        ["merge", str(toy / "model"), str(tmp_path / "shared/critic_adapter")]
        + ["--out", str(tmp_path / "merged")]
    )
    by_hand, whole = weights_in(tmp_path / "merged"), weights_in(tmp_path / "shared/critic")
    assert max((by_hand[n].double() - whole[n]).abs().max().item() for n in whole) < 1e-6


@pytest.mark.parametrize("layout", ["--tp 2", "--pp 2", "--zero 2", "--base-dtype nf4 --tp 2"])
def test_one_base_under_every_layout(layout: str, toy: Path, scorer: Path, tmp_path: Path):
    """Three steps within 1e-10 of one process; stopped after two and resumed, the same bits."""
    words = layout.split()
    bits = words[:2] if "nf4" in layout else []
    ppo(toy, scorer, tmp_path / "one", *bits, "--save-every", "2")
    launch(2, ppo, toy, scorer, tmp_path / "ranks", *words)
    for name in ("adapter", "critic_adapter"):
        one, ranks = (weights_in(tmp_path / run / name) for run in ("one", "ranks"))
        assert max((one[n] - ranks[n]).abs().max().item() for n in one) < 1e-10, name
    if layout == "--tp 2":
        resumed = ["--resume", str(tmp_path / "one/step_2")]
        launch(1, ppo, toy, scorer, tmp_path / "again", *bits, *resumed)
        for name in ("adapter", "critic_adapter"):
            one, again = (weights_in(tmp_path / run / name) for run in ("one", "again"))
            assert all(torch.equal(one[n], again[n]) for n in one), name


def test_one_base_takes_no_memory_for_others(toy: Path):
    """The tensors of critic and reward model are the policy's, quantised ones included."""
    for base_dtype in ("none", "nf4"):
        policy = load_model(toy / "model", torch.float32, base_dtype=base_dtype)
        attach(policy, Lora(2, 4.0))
        critic = attach(without_adapters(policy, ("value",)), Lora(2, 4.0))
        held = {p.data_ptr() for p in policy.parameters() if not p.is_meta}
        for name, p in critic.named_parameters():
            own = ".adapter." in name or name == "score_head.weight"
            assert p.is_meta or (p.data_ptr() not in held) == own, name
        for path, linear in frozen_linears(policy).items():
            assert frozen_linears(critic)[path].base is linear.base


def test_a_shared_base_wants_adapters_of_it(toy: Path, scorer: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is no adapter: give the one that was trained on"):
        ppo(toy, scorer, tmp_path / "a", "--reward", str(scorer / "final"))
    config = json.loads((scorer / "adapter/adapter_config.json").read_text())
    shutil.copytree(scorer / "adapter", tmp_path / "other")
    config["base_model_name_or_path"] = str(scorer / "final")
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained on .*final, not on"):
        ppo(toy, scorer, tmp_path / "b", "--reward", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="--shared-base trains adapters on one frozen base"):
        ppo(toy, scorer, tmp_path / "c", "--lora", "0")
    with pytest.raises(ValueError, match="--shared-base cannot score with sharded weights"):
        ppo(toy, scorer, tmp_path / "d", "--zero", "3")


# ---- with transformers and peft ------------------------------------------------------------------


def test_transformers_generates_from_the_merged_folder_what_plumb_does(toy: Path, tmp_path: Path):
    """Greedy tokens of four prompts, from OUT/final as it is."""
    transformers = pytest.importorskip("transformers")
    out = train("sft", toy, tmp_path / "out", "--dtype", "fp32", "--epochs", "4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    model = load_model(out / "final", torch.float32)
    prompts = [[2, 20, 30, 40], [2, 100, 101], [2, 50], [2, 300, 200, 100, 50, 60]]
    answers = generate(model, prompts, 24, temperature=0.0, stop_ids=set())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer.tokens == wanted[0, len(prompt) :].tolist()


def test_an_adapter_of_peft_trains_on(toy: Path, tmp_path: Path):
    """The first loss is that of peft's model, and peft reads what comes out."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(toy / "model")
    names = ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        "CAUSAL_LM", r=5, lora_alpha=7, target_modules=names, init_lora_weights=False
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    rows = list(read_rows(toy / "world/sft.jsonl"))[:8]
    trees = encode(toy / "world/tokenizer/tokenizer.model", rows, ["response"])
    total = torch.zeros(())
    for prompt, (response,) in trees:
        logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1)[range(len(response)), response].sum().detach()
    flags = [f for f in SHORT if f not in ("--lora", "4")]
    words = ["--model", str(toy / "model"), "--adapter", str(tmp_path / "theirs"), "--no-shuffle"]
    words += ["--data", str(toy / "world/sft.jsonl"), "--template", "plain"]
    train_sft.main([*words, *flags, "--out", str(tmp_path / "out")])
    first = next(row for row in read_metrics(tmp_path / "out") if "loss" in row)
    scored = sum(len(response) for _, (response,) in trees)
    assert first["loss"] == pytest.approx(total.item() / scored, abs=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(toy / "model")
    after = peft.PeftModel.from_pretrained(again, tmp_path / "out/adapter")
    start, end = (dict(model.named_parameters()) for model in (theirs, after))
    adapted = [name for name in end if "lora_" in name]
    assert len(adapted) == len([name for name in start if "lora_" in name])
    assert all(not torch.equal(start[name], end[name]) for name in adapted)
