"""Distillation in bench/cpu_vs_trl.py: train_distill.py against TRL's GKDTrainer, on data."""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from cpu_process import CLOCKS, ROOT, call, medians, start
from cpu_rows import BATCH, WORKLOADS, Tokens, fitting, read_pairs, write_rows
from cpu_training import plumb_command, read_plumb, trl_clock, trl_settings

TEACHER = {"width": 384, "layers": 8, "heads": 8, "kv-heads": 4, "ffn": 1056}
TINY_TEACHER = {"width": 96, "layers": 2, "heads": 4, "kv-heads": 2, "ffn": 192}
STD = 0.1  # of the teacher's weights: at 0.02 it would be as undecided as a new student
TOP_K = 64
DIVERGENCES = {"jsd": 0.5, "forward": 0.0, "reverse": 1.0}  # GKD's beta of each
RUNS = {"plumb": "plumb", "top": f"plumb, top {TOP_K}", "stock": "TRL"}


def choose_rows(spec: dict) -> dict:
    """Write work/<workload>.jsonl of {prompt, response} for each workload that the files fill.

    data: the file; ids: [prompt, response] of every row.
    """
    tokens = Tokens(spec["model"], spec["tiny"])
    files = [read_pairs(path) for path in spec["data"]]
    files = [[pair for pair in pairs if tokens.same_pair(pair[0], pair[1:])] for pairs in files]
    workloads = {}
    needed = spec["steps"] * BATCH
    for name in spec["workloads"]:
        candidates = itertools.chain.from_iterable(WORKLOADS[name](p, tokens) for p in files)
        chosen = list(itertools.islice(fitting(candidates, tokens), needed))
        if len(chosen) < needed:
            print(f"{name}: {len(chosen)} of {needed} rows: give another --data or fewer --steps")
            continue
        path = Path(spec["work"]) / f"distill_{name.replace(' ', '_')}.jsonl"
        rows = [{"prompt": prompt, "response": answers[0]} for prompt, answers, *_ in chosen]
        write_rows(path, rows)
        ids = [[prompt_ids, answers[0]] for *_, prompt_ids, answers in chosen]
        workloads[name] = {"data": str(path), "ids": ids}
    return workloads


def run_gkd(spec: dict) -> dict:
    """Train with GKDTrainer in this process on the ids that plumb reads; return losses and steps.

    Rows are padded on the left, as TRL's own collator does, to the longest of their step.
    """
    import torch

    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    steps, losses = [], []

    class Timed(GKDTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            prompt, answer = row["prompt"], row["answer"]
            padding = longest - len(prompt) - len(answer)
            batch["input_ids"].append([0] * padding + prompt + answer)
            batch["attention_mask"].append([0] * padding + [1] * (longest - padding))
            batch["labels"].append([-100] * (longest - len(answer)) + answer)
        return {name: torch.tensor(values) for name, values in batch.items()}

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    settings = trl_settings(spec)
    config = GKDConfig(
        **settings,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        lmbda=0.0,
        beta=DIVERGENCES[spec["divergence"]],
        temperature=1.0,
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer = Timed(
        spec["model"],
        spec["teacher"],
        args=config,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"prompt": p, "answer": a} for p, a in spec["ids"]]),
        processing_class=tokenizer,
        callbacks=[trl_clock(steps)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"steps": steps, "losses": losses}


def new_teacher(spec: dict) -> str:
    """Make a wider Llama of random weights, or return the one that spec names."""
    if spec["teacher"]:
        return spec["teacher"]
    sizes = TINY_TEACHER if spec["tiny"] else TEACHER
    flags = {"family": "llama", "tokenizer": spec["model"], **sizes, "std": STD, "seed": 1}
    out = Path(spec["work"]) / "teacher"
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    start([sys.executable, ROOT / "hf.py", "new", *words, "--out", out], out.with_suffix(".log"))
    return str(out)


def measure_distill(run: str, spec: dict, log: Path) -> dict:
    """Do one run of one kind, and take means over all steps but the first."""
    spec = {**spec, "out": str(log.with_suffix(""))}
    if run == "stock":
        result, usage = call(run_gkd, spec, log)
    else:
        flags = ["--teacher", spec["teacher"], "--divergence", spec["divergence"]]
        flags += ["--teacher-top-k", str(TOP_K)] if run == "top" else []
        usage = start(plumb_command(spec, *flags), log, spec["malloc"])
        result = read_plumb(Path(spec["out"]))
    if len(result["steps"]) != spec["steps"]:
        raise ValueError(f"{RUNS[run]} made {len(result['steps'])} steps of {spec['steps']}")
    for clock in CLOCKS:
        result[f"step_{clock}"] = statistics.mean(step[clock] for step in result["steps"][1:])
    return {**result, **usage}


def compare_distill(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report distillation; yield each workload's name and numbers."""
    work = Path(spec["work"])
    spec = {**spec, "teacher": new_teacher({**spec, "teacher": args.teacher})}
    workloads, _ = call(choose_rows, {**spec, "data": args.data}, work / "distill_rows.log")
    print((work / "distill_rows.log").read_text(), end="")
    runs = ["plumb", "top"] if args.tiny else list(RUNS)
    for (name, workload), divergence in itertools.product(workloads.items(), args.divergences):
        title = f"train_distill.py --divergence {divergence}, {name}"
        stem = f"{Path(workload['data']).stem}_{divergence}"
        results = {run: [] for run in runs}
        for repeat, run in itertools.product(range(args.repeats), runs):
            one = {**spec, **workload, "divergence": divergence}
            result = measure_distill(run, one, work / f"{stem}_{run}_{repeat}.log")
            results[run].append(result)
            line = f"  {title}, {RUNS[run]}: {result['step_cpu']:.3f} CPU s/step"
            print(line, file=sys.stderr, flush=True)
        yield title, {"runs": results, "medians": report(title, workload["ids"], results)}


def report(title: str, ids: list, results: dict[str, list[dict]]) -> dict:
    """Print one workload's medians and ratios; return them."""
    prompt, answer = (statistics.mean(map(len, column)) for column in zip(*ids, strict=True))
    print(f"\n{title}: {BATCH} rows a step; mean tokens: prompt {prompt:.0f}, answer {answer:.0f}")
    print(" " * 18 + "CPU s/step  process CPU s  wall s/step  kernel  peak GB  first loss")
    keys = ("step_cpu", "process_cpu", "step_wall", "kernel_share", "peak_gb")
    typical = medians(results, keys)
    for run, m in typical.items():
        print(
            f"{RUNS[run]:16}{m['step_cpu']:12.3f}{m['process_cpu']:15.1f}{m['step_wall']:13.3f}"
            f"{m['kernel_share']:8.0%}{m['peak_gb']:9.2f}{results[run][0]['losses'][0]:12.6f}"
        )
    if "stock" in results:
        for run in ("plumb", "top"):
            ratio = {key: typical["stock"][key] / typical[run][key] for key in keys}
            losses = zip(results[run][0]["losses"], results["stock"][0]["losses"], strict=True)
            gap = max(abs(ours - theirs) / theirs for ours, theirs in losses)
            print(
                f"TRL / {RUNS[run]}: {ratio['step_cpu']:.2f} times the CPU time, "
                f"{ratio['peak_gb']:.2f} times the memory; losses differ by {gap:.1e} of their size"
            )
            typical[run]["ratios"] = ratio
    return typical
