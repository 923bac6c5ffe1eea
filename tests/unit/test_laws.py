"""Laws of the house: imports go downward, every flag is read, scripts share their sections, the README is true."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from config import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
LAYERS = [  # a file imports only from lines above its own; on its own line only what is named there before it
    ["config", "losses", "kernels.device", "kernels.tiles", "kernels.rmsnorm", "kernels.rope", "kernels.swiglu",
     "kernels.attention", "kernels.logprob"],
    ["parallel", "data.tokenizer", "data.templates", "data.formats", "data.attributes", "data.dataset", "data.trees",
     "data.mismatched", "data.toyworld", "data.prepare"],
    ["model"],
    ["hf", "plan", "checkpoint", "generate", "score", "rewards"],
    ["rollout", "runtime"],
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """Project modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if (ROOT / (name.replace(".", "/") + ".py")).exists()}


def test_imports_go_downward():
    """A library imports what lies below it; a script imports libraries, never a script; nobody imports a script."""
    order = [name for layer in LAYERS for name in layer]
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("data/*.py")]
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        below = order[: order.index(name)] if name in order else order
        assert imports(path) <= set(below), f"{name} imports {imports(path) - set(below)}"
    known = (
        set(order)
        | {name[:-3] for name in SCRIPTS}
        | {"demo", "plot", "data.__init__", "kernels.__init__"}
    )
    assert {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files} == known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script: str):
    """Every field that a script's Config has is read in the script or in what all scripts share."""
    shared = "".join(
        (ROOT / name).read_text() for name in ("runtime.py", "config.py", "rollout.py")
    )
    text = (ROOT / script).read_text() + shared
    config = importlib.import_module(script[:-3]).Config
    read = set(re.findall(r"\b(?:config|flags)\.(\w+)", text)) | {"config"}
    assert set(config.__dataclass_fields__) <= read, set(config.__dataclass_fields__) - read


def test_train_scripts_have_the_same_sections_in_the_same_order():
    """So that a diff of two scripts is the difference of two algorithms."""

    def sections(script: str) -> list[str]:
        text = (ROOT / script).read_text()
        return [
            name.split(" and ")[0] for name in re.findall(r"^ *# ---- ([a-z ]+) -+$", text, re.M)
        ]

    assert sections("train_dpo.py") == ["the algorithm", "data", "model", "the loop"]
    for script in SCRIPTS:
        assert sections(script) == sections("train_dpo.py")
        assert len((ROOT / script).read_text().splitlines()) <= 300


ONLINE = ("train_ppo.py", "train_reinforce.py")
# What all scripts share word for word, in this order; … stands for what differs within a line. Then who does without a
# block and why.
BLOCKS = [
    ("""
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
""", {}),
    ("""
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)
""", {}),
    ("""
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
""", {}),
    ("""
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows(…, template, config)
        heldout = runtime.load_rows(…, template, config)
""", dict.fromkeys((*ONLINE, "train_rejection.py"), "rows are prompts")),
    ("""
    for data in filter(None, (train, heldout)):
        pack(data.tree_lengths(config.share_prompts), config.max_tokens)  # a row that does not fit is refused here
""", dict.fromkeys((*ONLINE, "train_rejection.py"), "answers are not there yet, or only those to train on")),
    ("""
    model = load_model(config.model, dtype, device, …mesh)
    runtime.prepare_model(model, config, tokenizer)
""", {"train_rejection.py": "its model samples the data first"}),
    ("""
    per_epoch = steps_per_epoch(…, config.batch_size)
    total = runtime.total_steps(config, per_epoch)
""", {"train_kto.py": "comes earlier: its trees are made for the steps of the run"}),
    ("""
    print(runtime.describe(config, model, …, total))
""", {}),
    ("""
    optimizer = AdamW(model, (config.beta1, config.beta2), config.eps, config.weight_decay, config.zero)
""", {"train_ppo.py": "two optimizers"}),
    ("""
    state = checkpoint.State()
    if start:
        state = checkpoint.load(start, …)
        print(f"resumed from {start} after step {state.step}")
""", {}),
    ("""
    log = runtime.Log(config, state.step, total, mesh)
    meter, nonfinite = runtime.Meter(model.c, device, mesh), runtime.NonFinite()
""", {}),
    ("""
    for step in range(state.step, total):
        meter.start()
        examples = …
""", {}),
    ("""
        bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
        batches = [make_batch(train, items, …) for items in bins]
        # Counted over the whole step, so that the loss does not depend on how it is cut into micro-batches.
""", dict.fromkeys(ONLINE, "several updates a step, each with micro-batches of its own")),
    ("""
        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
""", dict.fromkeys(ONLINE, "several updates a step")),
    ("""
            runtime.add(totals, {"loss": …})
        lr = runtime.learning_rate(config, step, total)
        norm, stopping = optimizer.step(lr, config.clip, stop)
""", dict.fromkeys(ONLINE, "several updates a step")),
    ("""

        state.step = step + 1
        row …= {…runtime.means(totals, …, mesh)…
""", {"train_ppo.py": "two losses"}),
    ("""
        row |= {"epoch": state.step / per_epoch, **meter.read(tokens, batches)}
        state.tokens += tokens
""", {}),
    ("""
        if nonfinite.check(norm, state.step):
            state.skipped += 1
            log.say(f"step {state.step}: the gradient is not finite, no update ({state.skipped} so far)")
""", dict.fromkeys(ONLINE, "after each of several updates")),
    ("""
        if runtime.due(config.log_every, state.step) or state.step == total:
            log.row(row)
""", {}),
    ("""

        if heldout and (runtime.due(config.eval_every, state.step) or state.step == total):
""", {}),
    ("""
            log.row({"step": state.step, **result})
            log.say(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
""", {}),
    ("""
            if state.best is None or …result["eval/…"] < state.best:
                state.best, state.best_step = …result["eval/…"], state.step
                save_model(model, … / "best", config.model, template)
""", {}),
    ("""
        stopping = stopping and state.step < total
        if runtime.due(config.save_every, state.step) or stopping:
            checkpoint.save(config.out, state, …, config.keep)
        if stopping:
            why = stop.reason or "another rank"
            log.say(f"stopped by {why} after step {state.step} of {total}; --resume auto goes on from here")
            log.close()
            return
    log.close()
""", {}),
    ("""
    save_model(model, … / "final", config.model, template)
""", {}),
    ("""
    print(f"{total} steps done, {state.tokens:,} tokens; the model is in {config.out}/final")


if __name__ == "__main__":
    runtime.run(main)
""", {}),
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_blocks_are_the_same_word_for_word(script: str):
    """All that a script does not do in its own way it does as every other script does, in the same order."""
    text, at = (ROOT / script).read_text(), 0
    for block, without in BLOCKS:
        pattern = re.escape(block).replace("…", ".*")
        found = re.compile(pattern).search(text, at)
        if script in without:
            assert not found, f"{script} has this block after all, strike its exception:{block}"
            continue
        assert found, f"{script} does not have, or not after what goes before it:{block}"
        at = found.end() - 1  # the line break is the next block's first


def test_no_unfinished_marks():
    """What is committed is finished."""
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"))
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for path in listed.stdout.split():
        if path.endswith((".py", ".md", "Makefile", "run")):
            text = (ROOT / path).read_text()
            assert not re.search(rf"\b({marks})\b", text), path


def test_weights_cannot_run_code():
    """Nothing is unpickled: no torch.load, no pickle, anywhere in the project."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("kernels/*.py")]:
        assert not re.search(
            r"torch\.load|\bpickle\b|np\.load\((?!.*mmap_mode)|allow_pickle=True", path.read_text()
        )


def test_shared_flags_are_those_of_every_script(capsys):
    """--help of each script runs and names every shared flag."""
    for script in SCRIPTS:
        with pytest.raises(SystemExit, match="^0$"):
            importlib.import_module(script[:-3]).main(["--help"])
        said = capsys.readouterr().out
        for name in RunConfig.__dataclass_fields__:
            assert name.replace("_", "-") in said
