"""KTO: the paper's formula, one z for the whole step, no answer mismatched with its own prompt."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, dataset_of, tiny_transformers
from plain import PlainModel, PlainTrainer, encode
from safetensors.torch import load_file

import hf
import losses
import train_kto
from data.formats import label_row
from data.mismatched import kto_trees, partners
from data.trees import make_batch, micro_batches, step_examples
from parallel import Mesh
from passes import token_lengths
from weights.folder import load_model, save_model


def rows_of(path: Path, n: int) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()][:n]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", losses.KTO_LOSSES)
def test_losses_and_gradients_are_the_formulas(name: str):
    """Values and derivatives of good and bad answers against the formulas in plain numbers."""
    rng = np.random.default_rng(0)
    for ratio, z, beta in zip(
        rng.normal(0, 8, 50), abs(rng.normal(0, 3, 50)), rng.uniform(0.05, 1, 50)
    ):
        for good in (1.0, 0.0):
            sign = 1 if good else -1
            x = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
            label = torch.tensor([good])
            if name == "kto":  # λ - v(x, y) of Eq. 8 with λ = 1
                loss, value = losses.kto(x, label, z, beta), sigma(sign * beta * (ratio - z))
                wanted, slope = 1 - value, -sign * beta * value * (1 - value)
            elif name == "apo_zero_unpaired":
                loss, value = losses.apo_zero_unpaired(x, label, beta), sigma(beta * ratio)
                wanted, slope = (1 - value if good else value), -sign * beta * value * (1 - value)
            else:
                loss, value = losses.bco(x, label, beta, z), sigma(sign * (beta * ratio - z))
                wanted, slope = -math.log(value), -sign * beta * (1 - value)
            assert loss.item() == pytest.approx(wanted, abs=1e-12)
            assert torch.autograd.grad(loss.sum(), x)[0].item() == pytest.approx(slope, abs=1e-12)
    assert (
        losses.reference_point(torch.tensor(-3.0), 4) == 0
        and losses.reference_point(torch.tensor(6.0), 4) == 1.5
    )


def test_no_answer_is_mismatched_with_its_own_prompt():
    """Every example gets another prompt's answer, even if prompts repeat; one prompt is refused."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompts = rng.integers(0, 4, rng.integers(2, 12)).tolist()
        if len(set(prompts)) > 1:
            assert all(prompts[i] != prompts[j] for i, j in enumerate(partners(prompts)))
    assert partners([0, 1, 2]) == [1, 2, 0]  # a rotation where all are different
    for prompts in ([5], [3, 3, 3]):
        with pytest.raises(ValueError, match=f"{len(prompts)} example.* of a single prompt"):
            partners(prompts)


def test_trees_hold_what_they_say():
    """prompt | own answer | another's: every token, cut at max_length, labels in order."""
    data = dataset_of(
        [([1, 2], [[10], [11, 12]]), ([3], [[13, 14, 15]]), ([1, 2], [[16]]), ([4] * 5, [[17]])],
        label=[1, 0, 1, 0, 1],
    )
    data.scored = data.scored.copy()
    data.scored[4] = 0  # token 12 is in the answer but not learned from
    steps = [np.array([0, 1, 2]), np.array([3, 4])]
    trees = kto_trees(data, steps, max_length=7)
    cut = [trees.tokens[a:b].tolist() for a, b in zip(trees.tree_start[:-1], trees.tree_start[1:])]
    assert cut == [
        [1, 2, 10, 13, 14, 15],
        [1, 2, 11, 12, 13, 14, 15],
        [3, 13, 14, 15, 10],
        [1, 2, 16, 17],
        [4, 4, 4, 4, 4, 17, 16],
    ]
    assert kto_trees(data, [np.array([4, 2])], max_length=7).tokens.tolist() == [4] * 5 + [
        17,
        13,
        14,
        3,
        13,
        14,
        15,
        17,
    ]
    assert trees.columns["label"].tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    assert trees.scored[trees.tree_start[1] : trees.tree_start[2]].tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert trees.key == kto_trees(data, steps, 7).key != kto_trees(data, steps[::-1], 7).key
    alone = kto_trees(data, steps, 7, mismatched=False)
    assert alone.response_len.tolist() == [1, 2, 3, 1, 1] and alone.columns["label"].tolist() == [
        1,
        0,
        1,
        0,
        1,
    ]
    with pytest.raises(ValueError, match="step 1 would be 3 examples of a single prompt"):
        kto_trees(data, [np.array([0, 1, 3])], 7)


def test_z_and_loss_are_those_of_the_whole_step(tmp_path: Path):
    """Law 5: z, loss and gradient of a step are the same within 1e-10 for every budget and for 1, 2
    and 4 shares of the examples, whose sums are added up as ranks would."""
    tiny_transformers("llama3", False).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float64)
    rng = np.random.default_rng(0)
    trees = [
        (
            rng.integers(0, 90, rng.integers(1, 9)).tolist(),
            [rng.integers(0, 90, rng.integers(1, 12)).tolist()],
        )
        for _ in range(13)
    ]
    data = kto_trees(dataset_of(trees, label=rng.integers(0, 2, 13)), [np.arange(13)], 64)
    everything = np.arange(13)
    with torch.no_grad():  # a policy that has moved by 1.5 nats on average
        batch = make_batch(data, list(everything))
        data.columns["ref_logps"] = batch.sum_by_response(
            model.logps(model(batch), batch)
        ).numpy() - rng.normal(1.5, 3, 26)

    def step(budget: int, ranks: int) -> tuple[float, float, torch.Tensor]:
        config = train_kto.Config(max_tokens=budget, beta=0.3)

        class Share(
            Mesh
        ):  # keeps what this rank would add, so that the shares can be added up outside
            def sum(self, values):
                shares.append(values)
                return values

        shares: list[torch.Tensor] = []
        for rank in range(ranks):
            model.mesh = Share(rank=rank, dp=ranks)
            train_kto.reference_point(model, data, everything, config)
        model.mesh = Mesh()
        z = losses.reference_point(torch.stack(shares).sum(), 13)
        total = 0.0
        for rank in range(ranks):
            bins = micro_batches(
                token_lengths(data, config, train_kto.OWN), everything, budget, rank, ranks
            )
            for items in bins:
                batch = make_batch(data, items, only=0)
                ratio, label = (
                    train_kto.log_ratios(model, model(batch), batch, config)[0],
                    batch.columns["label"],
                )
                per_example, _ = train_kto.example_losses(ratio, label, z, config, 0.0)
                total = total + per_example.sum() / 13
        gradient = torch.autograd.grad(total, list(model.parameters()))
        return z.item(), total.item(), torch.cat([g.flatten() for g in gradient])

    z, loss, gradient = step(8192, 1)
    assert z > 0.1 and gradient.norm() > 1e-3
    for budget in (8192, 60, 25):
        for ranks in (1, 2, 4):
            got = step(budget, ranks)
            assert got[0] == pytest.approx(z, abs=1e-10) and got[1] == pytest.approx(
                loss, abs=1e-10
            )
            assert (got[2] - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("loss", losses.KTO_LOSSES)
@pytest.mark.parametrize("rows", ["labels", "preferences"])
def test_steps_do_not_depend_on_micro_batches(
    loss: str, rows: str, toy: Path, tmp_path: Path, train
):
    """The metrics are the same in float64 for every budget and with prompts shared or not."""
    runs = [
        train(
            train_kto,
            tmp_path / str(i),
            model=toy / "model",
            data=toy / "world" / f"{rows}.jsonl",
            lr=1e-2,
            beta=0.5,
            eval_data=toy / "world" / "preferences_test.jsonl",
            batch_size=12,
            max_steps=4,
            dtype="fp64",
            loss=loss,
            max_tokens=budget,
            share_prompts=share,
            desirable_weight=1.3,
            undesirable_weight=0.8,
        )
        for i, (budget, share) in enumerate([(8192, True), (150, True), (200, False)])
    ]
    for other in runs[1:]:
        for one, many in zip(runs[0], other, strict=True):
            one.pop("tokens", 0), many.pop("tokens", 0)
            if one["step"] == 1:  # every reward is 0 but for rounding, which side of 0 is chance
                one.pop("rewards/accuracies", 0), many.pop("rewards/accuracies", 0)
            assert one == pytest.approx(many, abs=1e-10)
    steps = [row for row in runs[0] if "loss" in row]
    assert len({row["loss"] for row in steps}) == 4
    assert all(("kl" in row) == (loss == "kto") for row in steps)
    assert any(row.get("kl", 1) > 0 for row in steps)


def plain_loop(
    model, trees, labels, steps, lr, beta, loss="kto", average_logps=False, sft_weight=0.0
):
    """Run KTO one sequence at a time, mismatched by rotation; return its (loss, norm, z)."""
    trainer, rows = PlainTrainer(model, total=len(steps), lr=lr), []
    reference = {name: w.detach().clone() for name, w in model.weights.items()}

    def logps(pairs: list, weights=None) -> list[torch.Tensor]:
        mine = model.weights
        model.weights = weights or mine
        sums = [model.logps(prompt, response).sum() for prompt, response in pairs]
        model.weights = mine
        return sums

    rewards: dict[bool, list[float]] = {True: [], False: []}
    for mine in steps:
        own = [(trees[i][0], trees[i][1]) for i in mine]
        other = [(trees[i][0], trees[mine[(k + 1) % len(mine)]][1]) for k, i in enumerate(mine)]
        with torch.no_grad():
            ref = logps(own, reference)
            moved = [a - b for a, b in zip(logps(other), logps(other, reference))]
        if average_logps:
            moved = [ratio / len(response) for ratio, (_, response) in zip(moved, other)]
        good_tokens = sum(len(trees[i][1]) for i in mine if labels[i])
        z = max(0.0, float(sum(moved)) / len(moved))
        delta = sum(np.mean(r) for r in rewards.values() if r) / max(
            1, sum(bool(r) for r in rewards.values())
        )
        total = 0.0
        for i, policy, fixed in zip(mine, logps(own), ref):
            ratio, sign = policy - fixed, 1 if labels[i] else -1
            if average_logps:
                ratio = ratio / len(trees[i][1])
            if labels[i] and sft_weight:  # times the examples, by which the sum is divided
                total = total - sft_weight * policy / good_tokens * len(mine)
            if loss == "kto":
                total = total + (1.5 if labels[i] else 1.0) * (
                    1 - torch.sigmoid(sign * beta * (ratio - z))
                )
            else:
                total = total - (1.5 if labels[i] else 1.0) * torch.nn.functional.logsigmoid(
                    sign * (beta * ratio - delta)
                )
            rewards[bool(labels[i])].append(beta * ratio.item())
        rows.append((*trainer.step(total / len(mine)), z))
    return rows


@pytest.mark.parametrize(
    ("loss", "family", "more"),
    [
        ("kto", "llama", {}),
        ("bco", "llama", {}),
        ("kto", "gpt_neox", {}),
        ("kto", "llama", {"average_logps": True, "sft_weight": 0.3}),
        ("bco", "gpt_neox", {"average_logps": True, "sft_weight": 0.1}),
    ],
)
def test_five_steps_equal_a_plain_loop_in_float64(
    loss: str, family: str, more: dict, toy: Path, tmp_path: Path, train
):
    """Losses, norms, z and all weights after five steps within 1e-10 of an independent loop."""
    sizes = {} if family == "gpt_neox" else {"kv_heads": 2}
    flags = hf.New(
        family=family,
        width=32,
        layers=2,
        heads=4,
        std=0.3,
        dtype="fp64",
        tokenizer=str(toy / "world" / "tokenizer"),
        **sizes,
    )
    save_model(hf.new_model(flags), tmp_path / "model", flags.tokenizer)
    # Prompts that differ: the plain loop only knows the rotation.
    data = list(
        {row["prompt"]: row for row in rows_of(toy / "world" / "labels.jsonl", 48)}.values()
    )[:20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    encoded = encode(toy / "world" / "tokenizer" / "tokenizer.model", data, ["response"])
    plain = PlainModel(tmp_path / "model", torch.float64)
    labels = [row["label"] for row in data]
    assert 0 < sum(labels) < 20
    order = [step_examples(20, 4, step, 3, True) for step in range(5)]
    beta = 8.0 if more else 0.4  # of log-ratios a token
    trees = [(p, r[0]) for p, r in encoded]
    wanted = plain_loop(plain, trees, labels, order, 1e-2, beta, loss, **more)
    assert any(z > 0.001 for *_, z in wanted)
    for run, budget in enumerate((8192, 130)):
        got = train(
            train_kto,
            tmp_path / f"out{run}",
            model=tmp_path / "model",
            data=tmp_path / "rows.jsonl",
            lr=1e-2,
            beta=beta,
            **more,
            batch_size=4,
            warmup=0.25,
            weight_decay=0.1,
            seed=3,
            max_tokens=budget,
            dtype="fp64",
            template="plain",
            desirable_weight=1.5,
            loss=loss,
        )[1:]
        for row, (value, norm, z) in zip(got, wanted, strict=True):
            assert row["loss"] == pytest.approx(value, abs=1e-10) and row[
                "grad_norm"
            ] == pytest.approx(norm, rel=1e-10)
            assert loss != "kto" or row["kl"] == pytest.approx(z, abs=1e-10)
        mine = load_file(tmp_path / f"out{run}" / "final" / "model.safetensors")
        assert (
            max((mine[name] - w.detach()).abs().max() for name, w in plain.weights.items()) < 1e-10
        )


def test_real_rows_equal_a_plain_loop(real_model: Path, tmp_path: Path, train):
    """Five fp32 steps on real solutions within 1e-5 of the plain loop."""
    data = list(
        {row["prompt"]: row for row in rows_of(REAL / "gsm8k" / "kto_train.jsonl", 400)}.values()
    )[:15]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    trees = [(p, r[0]) for p, r in encode(real_model / "tokenizer.model", data, ["response"])]
    plain = PlainModel(real_model, torch.float32)
    steps = [list(range(k, k + 3)) for k in range(0, 15, 3)]
    wanted = plain_loop(plain, trees, [row["label"] for row in data], steps, 1e-4, 0.1)
    got = train(
        train_kto,
        tmp_path / "out",
        model=real_model,
        data=tmp_path / "rows.jsonl",
        lr=1e-4,
        beta=0.1,
        batch_size=3,
        warmup=0.25,
        weight_decay=0.1,
        shuffle=False,
        max_tokens=1300,
        desirable_weight=1.5,
        max_length=600,
    )[1:]
    for row, (value, norm, z) in zip(got, wanted, strict=True):
        assert row["loss"] == pytest.approx(value, abs=1e-5) and row["grad_norm"] == pytest.approx(
            norm, rel=1e-3
        )
        assert row["kl"] == pytest.approx(z, abs=2e-3)


def test_steps_that_cannot_be_are_refused_before_training(toy: Path, tmp_path: Path, train):
    """A step of one example, and one of a single pair, are refused before anything is computed."""
    world = toy / "world"
    with pytest.raises(ValueError, match="step 1 would be 1 example of a single prompt"):
        train(
            train_kto,
            tmp_path / "a",
            model=toy / "model",
            data=world / "labels.jsonl",
            batch_size=1,
        )
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(rows_of(world / "preferences.jsonl", 1)[0]) + "\n")
    with pytest.raises(
        ValueError,
        match="step 1 would be 2 examples of a single prompt.*choose another --batch-size",
    ):
        train(train_kto, tmp_path / "b", model=toy / "model", data=one, batch_size=2)
    with pytest.raises(ValueError, match="step 2 would be 1 example"):  # 48 rows
        train(
            train_kto,
            tmp_path / "c",
            model=toy / "model",
            data=world / "labels.jsonl",
            batch_size=47,
            epochs=2,
        )
    train(
        train_kto,
        tmp_path / "d",
        model=toy / "model",
        data=world / "labels.jsonl",
        batch_size=1,
        max_steps=2,
        loss="apo_zero_unpaired",
    )


def test_comparisons_give_mixed_steps(toy: Path, tmp_path: Path, train):
    """Pairs become single answers: good and bad ones in every step, shuffled or not."""
    flags = {"model": toy / "model", "data": toy / "world" / "preferences.jsonl", "batch_size": 16}
    for shuffle in (True, False):
        rows = train(train_kto, tmp_path / str(shuffle), **flags, shuffle=shuffle)[1:]
        assert len(rows) == 6  # 48 pairs are 96 examples
        assert all("rewards/chosen" in row and "rewards/rejected" in row for row in rows)


def test_label_rows():
    """label or preference, response or completion, pairs; anything else is refused with the fix."""
    for row, label in (
        ({"response": "r", "label": True}, 1),
        ({"completion": "r", "label": False}, 0),
        ({"response": "r", "label": 0}, 0),
        ({"response": "r", "preference": "chosen"}, 1),
        ({"response": "r", "preference": "rejected"}, 0),
    ):
        assert label_row({"prompt": "p", **row}).columns == {"label": [label]}
    assert label_row({"prompt": "p", "chosen": "a", "rejected": "b"}).columns == {"label": [1, 0]}
    for row, reason in (
        ({"response": "r"}, "`label` must be true or false .*got None"),
        ({"response": "r", "label": "yes"}, "got 'yes'"),
        ({"response": "r", "label": 2}, "got 2"),
        ({"label": True}, "a KTO row needs `prompt`, `response`"),
    ):
        with pytest.raises(ValueError, match=reason):
            label_row({"prompt": "p", **row})


def test_resumed_is_never_stopped(toy: Path, tmp_path: Path, train):
    """Resumed after 4 of 8 steps over two epochs: later metrics have the same bits, bco's δ too."""
    for loss in ("kto", "bco"):
        flags = {
            "model": toy / "model",
            "data": toy / "world" / "labels.jsonl",
            "lr": 1e-2,
            "batch_size": 12,
            "epochs": 2,
            "loss": loss,
            "cache": tmp_path / loss,
        }
        whole = train(train_kto, tmp_path / f"whole {loss}", **flags, save_every=4)
        again = train(
            train_kto,
            tmp_path / f"cut {loss}",
            **flags,
            resume=tmp_path / f"whole {loss}" / "step_4",
        )
        rows = [row for row in whole if "loss" in row]
        assert again == rows[4:] and len(rows) == 8


def test_the_balance_rule_is_printed(toy: Path, tmp_path: Path, train, capsys):
    """The first lines say how the classes are weighted and which weight the paper advises."""
    assert "within the paper's" in train_kto.balance(100, 100, train_kto.Config())
    assert "--desirable-weight 2.00 to 2.67 would be" in train_kto.balance(
        100, 200, train_kto.Config()
    )
    assert "warning: all rows are desirable" in train_kto.balance(5, 0, train_kto.Config())
    train(
        train_kto,
        tmp_path / "a",
        model=toy / "model",
        data=toy / "world" / "preferences.jsonl",
        max_steps=1,
    )
    assert "48 desirable, 48 undesirable, weighted 1.00 to 1; within" in capsys.readouterr().out
