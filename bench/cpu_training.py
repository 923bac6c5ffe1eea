"""DPO, reward models and KTO of bench/cpu_vs_trl.py: one run of each kind, and their report."""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cpu_process import CLOCKS, ROOT, call, medians, start, timed
from cpu_rows import BATCH, MAX_LENGTH, choose_pairs, digest, read_rows, steps_reversed

BETA = 0.1  # of DPO and KTO
LR = {"dpo": 5e-7, "rm": 1e-5, "kto": 5e-7, "grpo": 1e-6, "gkd": 1e-4}
SCRIPTS = {"grpo": "reinforce", "gkd": "distill"}  # named otherwise than the algorithm
# TRL recomputes activations by default; the two others do not, which makes them faster.
RUNS = {
    "plumb": "plumb",
    "recompute": "TRL recompute",
    "stock": "TRL stock",
    "precompute": "TRL precompute",
}


def learning_rate(spec: dict) -> float:
    """Return the learning rate of both sides; adapters learn at a hundred times the usual one."""
    return LR[spec["algorithm"]] * (200 if spec["lora"] else 1)


# ---- plumb's side --------------------------------------------------------------------------------


def plumb_command(spec: dict, *flags: str) -> list[str]:
    """Return the command of plumb's script with TRL's settings and more flags."""
    algorithm = spec["algorithm"]
    words = [f"train_{SCRIPTS.get(algorithm, algorithm)}.py", "--no-shuffle"]
    words += f"--template plain --max-length {MAX_LENGTH} --batch-size {BATCH}".split()
    words += "--schedule constant --warmup 0 --weight-decay 0 --beta1 0.9 --beta2 0.95".split()
    words += "--eps 1e-8 --clip 1.0 --device cpu --seed 0".split()
    words += ["--dtype", spec.get("dtype", "fp32")]
    words += f"--lr {learning_rate(spec)} --max-steps {spec['steps']}".split()
    words += ["--max-tokens", str(spec["max_tokens"]), "--model", spec["model"]]
    words += ["--data", spec["data"], "--out", spec["out"], *flags]
    if algorithm in ("dpo", "kto"):
        words += ["--beta", str(BETA)]
    if spec["lora"]:
        words += ["--lora", str(spec["lora"]), "--no-merge"]
    return [sys.executable, str(ROOT / words[0]), *words[1:]]


def read_plumb(out: Path) -> dict:
    """Return the numbers of `run_trl`, and more, from OUT/metrics.jsonl."""
    rows = read_rows(out / "metrics.jsonl")
    # A reward model has no reference.
    reference = next((row for row in rows if "reference_cpu_seconds" in row), {})
    rows = [row for row in rows if "loss" in row]
    result = {name: [row.get(name) for row in rows] for name in ("tokens", "reward", "grad_norm")}
    result["losses"] = [row["loss"] for row in rows]
    result["steps"] = [{clock: row[key] for clock, key in CLOCKS.items()} for row in rows]
    means = {clock: reference.get(f"reference_{key}", 0.0) for clock, key in CLOCKS.items()}
    return {**result, "reference": means}


# ---- TRL's side ----------------------------------------------------------------------------------


def trl_clock(steps: list[dict]):
    """Return a TrainerCallback that appends CPU and wall seconds of each optimizer step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_step_end(self, *_, **__):
            cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
            steps.append({"cpu": cpu, "wall": wall})

    return Clock()


def trl_settings(spec: dict) -> dict:
    """Return what every TRL config is given."""
    adam = dict(adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0)
    schedule = dict(learning_rate=learning_rate(spec), lr_scheduler_type="constant")
    schedule |= dict(warmup_steps=0, max_steps=spec["steps"], max_grad_norm=1.0, seed=0)
    bf16 = spec.get("trl_dtype") == "bf16"
    device = dict(use_cpu=True, bf16=bf16, dataloader_pin_memory=False)
    device |= dict(gradient_checkpointing=spec.get("run") == "recompute")
    device |= dict(model_init_kwargs={"dtype": "float32"})  # bf16 is by autocast
    output = dict(output_dir=spec["out"], save_strategy="no", report_to="none")
    output |= dict(logging_steps=1, disable_tqdm=True)
    return adam | schedule | device | output


def first_adapter(spec: dict) -> dict:
    """Write the adapter that plumb starts from, for TRL to start from too; return its folder."""
    import torch

    from weights.adapters import Lora, attach
    from weights.folder import load_model
    from weights.peft import save_adapter

    lora = Lora(spec["lora"], 2.0 * spec["lora"])
    scores = ("reward",) if spec["algorithm"] == "rm" else None
    model = attach(load_model(spec["model"], torch.float32, scores=scores), lora, 0)
    folder = Path(spec["work"]) / f"adapter_{spec['algorithm']}"
    save_adapter(model, folder, spec["model"], lora)
    return {"adapter": str(folder)}


def trl_adapter(spec: dict) -> dict:
    """Return peft_config for a trainer: all linears of the blocks, as plumb has them."""
    if not spec["lora"]:
        return {}
    from peft import LoraConfig

    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    task = "SEQ_CLS" if spec["algorithm"] == "rm" else "CAUSAL_LM"
    rank = spec["lora"]
    return {"peft_config": LoraConfig(task, r=rank, lora_alpha=2 * rank, target_modules=names)}


def run_trl(spec: dict) -> dict:
    """Train with TRL in this process; return losses, seconds of steps and of the reference pass.

    A step's clock runs from on_step_begin to on_step_end, without collating and logging. The
    reference pass counts its batches alone, the first of them, which is the first to touch the
    memory, as an average one. Both favour TRL.
    """
    import torch

    torch.set_num_threads(1)
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    algorithm = spec["algorithm"]
    name = {"dpo": "DPO", "rm": "Reward", "kto": "KTO"}[algorithm]
    own = {"beta": BETA, "precompute_ref_log_probs": spec["run"] == "precompute"}
    if algorithm == "rm":
        own = {"pad_token": AutoTokenizer.from_pretrained(spec["model"]).unk_token}
    steps, losses, scored = [], [], []

    class Timed(getattr(trl, f"{name}Trainer")):
        def compute_ref_log_probs(self, *args, **kwargs):
            return timed(super().compute_ref_log_probs, scored)(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    own |= dict(max_length=MAX_LENGTH, train_sampling_strategy="sequential")
    config = getattr(trl, f"{name}Config")(
        per_device_train_batch_size=BATCH, **trl_settings(spec), **own
    )
    in_order = steps_reversed if algorithm == "kto" else list
    rows = Dataset.from_list(in_order(read_rows(spec["data"])))
    trainer = Timed(
        spec["model"],
        args=config,
        train_dataset=rows,
        callbacks=[trl_clock(steps)],
        **trl_adapter(spec),
    )
    if spec["lora"]:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = load_file(Path(spec["adapter"]) / "adapter_model.safetensors")
        set_peft_model_state_dict(trainer.model, tensors)
    trainer.remove_callback(PrinterCallback)
    if algorithm == "rm":
        torch.nn.init.zeros_(trainer.model.score.weight)
    if digest(in_order(trl_sequences(trainer.train_dataset, algorithm))) != spec["digest"]:
        raise ValueError("TRL reads other tokens from these rows than plumb: nothing to compare")
    trainer.train()
    if spec["run"] == "precompute" and len(scored) != spec["steps"]:
        raise ValueError(
            f"the reference scored {len(scored)} batches, not {spec['steps']}: is this trl 1.16?"
        )
    batches = scored[1:] or [{"cpu": 0.0, "wall": 0.0}]  # stock scores inside its steps
    means = {clock: statistics.mean(batch[clock] for batch in batches) for clock in CLOCKS}
    reference = {clock: len(scored) * mean for clock, mean in means.items()}
    return {"steps": steps, "losses": losses, "reference": reference}


def trl_sequences(table, algorithm: str) -> list[list[list[int]]]:
    """Return the two sequences of every row of TRL's tokenised data set."""
    prompts = [[]] * len(table) if algorithm == "rm" else table["prompt_ids"]
    kinds = ("chosen_ids", "rejected_ids")
    if algorithm == "kto":
        kinds = ("completion_ids", "KL_completion_ids")
    answers = zip(*(table[kind] for kind in kinds), strict=True)
    return [[prompt + ids for ids in pair] for prompt, pair in zip(prompts, answers, strict=True)]


# ---- both ----------------------------------------------------------------------------------------


def measure(run: str, spec: dict, log: Path) -> dict:
    """Do one run of one kind, and take means over all steps but the first, which touches most of
    the memory for the first time."""
    spec = {**spec, "run": run, "out": str(log.with_suffix(""))}
    if run == "plumb":
        usage = start(plumb_command(spec), log, spec["malloc"])
        result = read_plumb(Path(spec["out"]))
    else:
        result, usage = call(run_trl, spec, log)
    steps = len(result["steps"])
    if steps != spec["steps"]:
        tail = log.read_text()[-3000:]
        raise ValueError(f"{RUNS[run]} made {steps} steps of {spec['steps']}; its output:\n{tail}")
    if result.get("tokens", spec["tokens"]) != spec["tokens"]:
        raise ValueError("plumb trained on other tokens than the rows hold: nothing to compare")
    for clock in CLOCKS:
        result[f"step_{clock}"] = statistics.mean(step[clock] for step in result["steps"][1:])
        result[f"epoch_{clock}"] = result[f"step_{clock}"] + result["reference"][clock] / steps
    return {**result, **usage}


def compare_training(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report one algorithm; yield each workload's name and numbers."""
    work, algorithm = Path(spec["work"]), spec["algorithm"]
    log = work / "rows.log"
    workloads, _ = call(choose_pairs, {**spec, "data": args.data}, log)
    if spec["lora"]:
        adapter, _ = call(first_adapter, spec, work / "adapter.log")
        spec = {**spec, **adapter}
    print(log.read_text(), end="")
    runs = list(args.runs)
    if algorithm == "rm" and "precompute" in runs:
        runs.remove("precompute")  # there is no reference
    for name, workload in workloads.items():
        lora = f" --lora {spec['lora']}" if spec["lora"] else ""
        name, stem = f"train_{algorithm}.py{lora}, {name}", Path(workload["data"]).stem
        results = {run: [] for run in runs}
        for repeat, run in itertools.product(range(args.repeats), runs):
            result = measure(run, {**spec, **workload}, work / f"{stem}_{run}_{repeat}.log")
            results[run].append(result)
            line = f"  {name}, {RUNS[run]}: {result['epoch_cpu']:.3f} CPU s/step"
            print(line, file=sys.stderr, flush=True)
        numbers = {**workload, "runs": results}
        numbers["medians"] = report(name, workload, results, args.steps)
        yield name, numbers


def report(name: str, workload: dict, results: dict[str, list[dict]], steps: int) -> dict:
    """Print one workload's medians and ratios; return them."""
    lengths = [statistics.mean(column) for column in zip(*workload["counts"], strict=True)]
    unit, parts = "examples", ("prompt", "answer")
    if len(lengths) == 3:
        unit, parts = "pairs", ("prompt", "chosen", "rejected")
    lengths = ", ".join(f"{part} {n:.0f}" for part, n in zip(parts, lengths, strict=True))
    print(f"\n{name}: {steps} steps of {BATCH} {unit}; mean tokens: {lengths}")
    print(" " * 18 + "CPU s/step  with reference  wall s/step  kernel  peak GB  first loss")
    keys = ("step_cpu", "epoch_cpu", "step_wall", "kernel_share", "peak_gb")
    typical = medians(results, keys)
    for run, m in typical.items():
        print(
            f"{RUNS[run]:16}{m['step_cpu']:12.3f}{m['epoch_cpu']:16.3f}{m['step_wall']:13.3f}"
            f"{m['kernel_share']:8.0%}{m['peak_gb']:9.2f}{results[run][0]['losses'][0]:12.6f}"
        )
    for run in [run for run in results if run != "plumb" and "plumb" in results]:
        ratio = {key: typical[run][key] / typical["plumb"][key] for key in keys}
        losses = zip(results["plumb"][0]["losses"], results[run][0]["losses"], strict=True)
        gap = max(abs(ours - theirs) for ours, theirs in losses)
        print(
            f"{RUNS[run]} / plumb: {ratio['epoch_cpu']:.2f} times the CPU time (steps only"
            f" {ratio['step_cpu']:.2f}), {ratio['peak_gb']:.2f} times the memory;"
            f" losses agree within {gap:.1e}"
        )
        typical[run]["ratios"] = ratio
    return typical
