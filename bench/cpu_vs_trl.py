"""DPO, reward models and KTO on one CPU thread against TRL's trainers: CPU-seconds an optimizer step and peak memory.
And sampling against transformers' generate, and whole GRPO steps, samples and update, against TRL's.

    python bench/cpu_vs_trl.py --data gsm8k_pairs.jsonl chat_pairs.jsonl --tokenizer tokenizer.model --json out.json
    python bench/cpu_vs_trl.py --data pairs.jsonl --tokenizer tokenizer.model --algorithm rm kto
    python bench/cpu_vs_trl.py --data pairs.jsonl --tokenizer tokenizer.model --algorithm grpo --steps 4
    python bench/cpu_vs_trl.py --data pairs.jsonl --tokenizer tokenizer.model --tiny       only plumb's side, seconds

Both sides train the same random Llama on the same real rows in the same order with the same AdamW. Two workloads are
taken from the preference files ({prompt, chosen, rejected}, strings or messages):
  long prompts   pairs with short answers, other pairs of the file put before the question as solved examples (few-shot)
  long answers   pairs with a short prompt and answers of some hundred tokens
--algorithm dpo is train_dpo.py against DPOTrainer, rm is train_rm.py against RewardTrainer, kto is train_kto.py against
KTOTrainer on the same pairs taken apart, {prompt, completion, label}. TRL runs stock (the reference model scores inside
every step) and, where it has a reference, with precompute_ref_log_probs (once, up front, as plumb does). Every run is
its own process; the runs are interleaved, the medians over the repeats are printed.
--algorithm generate is plumb's sampler against transformers' generate: 64 new tokens, temperature 1, no early stop, for
32 prompts of the files and for 8 samples of each of 4. Both also answer greedily, which shows that they do the same.
--algorithm grpo is train_reinforce.py --advantage grpo --kl 0 against GRPOTrainer with beta=0 and loss_type="dapo", one
update a rollout: 8 samples of 64 tokens, no early stop, to each of 4 prompts a step, and the reward length:50. The two
draw different samples. So plumb also trains on TRL's (not timed): rewards and norms of the gradient must agree.

Only pairs that both tokenise alike are taken, and TRL's tokens are compared with plumb's before it trains; the losses
of every step are compared, which shows that they do the same work. Three starting points are made equal for that, none
of which costs or saves time: TRL's score head starts at zero, as plumb's does; it pads with another token than the end
token, at which the score is read; and KTO's steps, whose prompts all differ, reach it in reverse, because it takes the
mismatched answer from the row before and plumb from the row after.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BATCH, MAX_LENGTH, BETA = 4, 1024, 0.1  # rows a step, tokens of prompt + answer, β of DPO and KTO
NEEDED = {
    "trl": "trl==1.16.0",
    "transformers": "transformers",
    "datasets": "datasets",
    "google": "protobuf",
}
MODEL = {"width": 256, "layers": 6, "heads": 8, "kv-heads": 4, "ffn": 704}
TINY = {"width": 64, "layers": 2, "heads": 4, "kv-heads": 2, "ffn": 128}
# glibc gives every large tensor back to the kernel and takes it again, page by page. In a virtual machine that was more
# than half of TRL's CPU time, so both sides keep what they free unless --malloc default.
KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
RUNS = {"plumb": "plumb", "stock": "TRL stock", "precompute": "TRL precompute"}
CLOCKS = {"cpu": "cpu_seconds", "wall": "seconds"}  # as metrics.jsonl calls them
LR = {
    "dpo": 5e-7,
    "rm": 1e-5,
    "kto": 5e-7,
    "grpo": 1e-6,
}  # what is compared, and AdamW's rate for it


# ----------------------------------------------------------------------------------------------------------------- rows


def read_rows(path: str | Path, limit: int | None = None) -> list[dict]:
    """The first `limit` objects of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, limit)]


def read_pairs(path: str, limit: int = 400) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) as plain texts of the first `limit` rows of a preference file."""

    def text(field) -> str:
        return field if isinstance(field, str) else field[-1]["content"]

    return [
        tuple(text(row[key]) for key in ("prompt", "chosen", "rejected"))
        for row in read_rows(path, limit)
    ]


def prepare(spec: dict) -> dict:
    """Write work/<workload>.jsonl for each workload that the files can fill; return what is in it, by its name.

    counts: tokens of prompt and answers of every row; tokens: what plumb computes in each step; digest: of every token
    that a step trains on or scores. The prompts end in a line break, which the tokenizer merges with nothing.
    """
    sys.path.insert(0, str(ROOT))
    from data.templates import Template
    from data.tokenizer import load_tokenizer

    template = Template("plain", load_tokenizer(Path(spec["model"])))
    peer = None
    if not spec["tiny"]:
        from transformers import AutoTokenizer

        peer = AutoTokenizer.from_pretrained(spec["model"])

    def tokens(prompt: str, answers: tuple[str, str]) -> tuple[list[int], list[list[int]]]:
        prompt_ids, responses, _ = template.pair(prompt, list(answers))
        return list(prompt_ids), [list(ids) for ids, _ in responses]

    def alike(prompt: str, answers: tuple[str, str]) -> bool:
        """Does transformers see the same tokens? It splits runs of spaces otherwise than sentencepiece does."""
        prompt_ids, ids = tokens(prompt, answers)
        if peer is None:
            return True
        whole = [peer(prompt + answer + peer.eos_token)["input_ids"] for answer in answers]
        return peer(prompt)["input_ids"] == prompt_ids and whole == [
            prompt_ids + answer for answer in ids
        ]

    def long_prompts(pairs: list) -> Iterator[tuple[str, str, str]]:
        short = [
            pair for pair in pairs if max(map(len, tokens(pair[0] + "\n", pair[1:])[1])) <= 200
        ]
        for i, (question, *answers) in enumerate(short):
            prompt, shot = f"Question: {question}\nAnswer:\n", i
            while len(template.pair(prompt, answers)[0]) < 500:
                shot = (shot + 1) % len(short)
                prompt = f"Question: {short[shot][0]}\nAnswer:\n{short[shot][1]}\n\n{prompt}"
            yield prompt, *answers

    def long_answers(pairs: list) -> Iterator[tuple[str, str, str]]:
        for question, *answers in pairs:
            prompt_ids, ids = tokens(question + "\n", answers)
            if len(prompt_ids) <= 100 and min(map(len, ids)) >= 150:
                yield question + "\n", *answers

    files = [
        [pair for pair in read_pairs(path) if alike(pair[0] + "\n", pair[1:])]
        for path in spec["data"]
    ]
    found = {}
    for name, workload in {"long prompts": long_prompts, "long answers": long_answers}.items():
        pairs = []
        for prompt, *answers in itertools.chain.from_iterable(map(workload, files)):
            if len(pairs) == spec["steps"] * BATCH:
                break
            prompt_ids, ids = tokens(prompt, answers)
            if len(prompt_ids) + max(map(len, ids)) <= MAX_LENGTH and alike(prompt, answers):
                pairs.append((prompt, answers, prompt_ids, ids))
        if len(pairs) < spec["steps"] * BATCH:
            print(
                f"{name}: {len(pairs)} of {spec['steps'] * BATCH} pairs found: give another --data or fewer --steps"
            )
            continue
        if spec["algorithm"] == "kto":
            rows, counts, sequences = take_apart(pairs)
        else:
            rows = [
                {"prompt": prompt, "chosen": good, "rejected": bad}
                for prompt, (good, bad), _, _ in pairs
            ]
            counts = [[len(prompt_ids), *map(len, ids)] for _, _, prompt_ids, ids in pairs]
            sequences = [[prompt_ids + answer for answer in ids] for _, _, prompt_ids, ids in pairs]
        file = Path(spec["work"]) / f"{spec['algorithm']}_{name.replace(' ', '_')}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        # A pair's prompt is computed once for both answers; KTO computes it with the own and with the other answer.
        passes = 2 if spec["algorithm"] == "kto" else 1
        sums = [passes * sum(map(sum, counts[i : i + BATCH])) for i in range(0, len(counts), BATCH)]
        found[name] = {
            "data": str(file),
            "counts": counts,
            "tokens": sums,
            "digest": digest(sequences),
        }
    return found


def take_apart(pairs: list[tuple]) -> tuple[list[dict], list, list]:
    """As many single answers as pairs: (rows, token counts, [own, mismatched] sequences).

    Four pairs fill two steps, good and bad in turn, so that a step holds four prompts: TRL would take the other answer
    to the same prompt for a mismatched one.
    """
    examples = []
    for i in range(0, len(pairs), BATCH):
        for first in (0, 1):
            for j, (prompt, answers, prompt_ids, ids) in enumerate(pairs[i : i + BATCH]):
                k = (first + j) % 2
                examples.append(
                    (
                        {"prompt": prompt, "completion": answers[k], "label": k == 0},
                        prompt_ids,
                        ids[k],
                    )
                )
    examples = examples[: len(pairs)]
    after = [
        i + 1 if (i + 1) % BATCH else i + 1 - BATCH for i in range(len(examples))
    ]  # within the step
    sequences = [
        [ids + own, ids + examples[j][2]] for (_, ids, own), j in zip(examples, after, strict=True)
    ]
    return (
        [row for row, _, _ in examples],
        [[len(ids), len(own)] for _, ids, own in examples],
        sequences,
    )


def digest(sequences: list[list[list[int]]]) -> str:
    """Of the token ids of every sequence of every row."""
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()


def steps_reversed(rows: list) -> list:
    """The same steps, each with its rows from last to first."""
    return [row for i in range(0, len(rows), BATCH) for row in reversed(rows[i : i + BATCH])]


# ------------------------------------------------------------------------------------------------------------- the runs


def timed(function: Callable, into: list[dict]) -> Callable:
    """The function, with CPU and wall seconds of each call appended to `into`."""

    def call(*args, **kwargs):
        cpu, wall = time.process_time(), time.perf_counter()
        result = function(*args, **kwargs)
        into.append({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})
        return result

    return call


def trl_clock(steps: list[dict]):
    """A TrainerCallback that appends CPU and wall seconds of each optimizer step to `steps`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append(
                {"cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall}
            )

    return Clock()


def trl_settings(spec: dict) -> dict:
    """What every TRL trainer's config is given."""
    return dict(
        output_dir=spec["out"], max_steps=spec["steps"],
        learning_rate=LR[spec["algorithm"]], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, seed=0,
        gradient_checkpointing=False, bf16=False, use_cpu=True, model_init_kwargs={"dtype": "float32"},
        dataloader_pin_memory=False, disable_tqdm=True, report_to="none", logging_steps=1, save_strategy="no",
    )  # fmt: skip


def run_trl(spec: dict) -> dict:
    """A TRL trainer's run in this process: CPU and wall seconds of every step and of the reference pass, the losses.

    A step's clock runs from on_step_begin to on_step_end: collating and logging are outside. The reference pass is its
    batches alone, the first one, which is the first to touch the memory, counted as an average one. Both favour TRL.
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

    config = getattr(trl, f"{name}Config")(
        per_device_train_batch_size=BATCH, max_length=MAX_LENGTH, train_sampling_strategy="sequential",
        **trl_settings(spec), **own,
    )  # fmt: skip
    in_order = steps_reversed if algorithm == "kto" else list
    rows = in_order(read_rows(spec["data"]))
    trainer = Timed(
        spec["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[trl_clock(steps)],
    )
    trainer.remove_callback(PrinterCallback)
    if algorithm == "rm":
        torch.nn.init.zeros_(trainer.model.score.weight)
    table = trainer.train_dataset
    prompts = [[]] * len(table) if algorithm == "rm" else table["prompt_ids"]
    kinds = (
        ("completion_ids", "KL_completion_ids")
        if algorithm == "kto"
        else ("chosen_ids", "rejected_ids")
    )
    answers = zip(*(table[kind] for kind in kinds), strict=True)
    found = [[prompt + ids for ids in pair] for prompt, pair in zip(prompts, answers, strict=True)]
    if digest(in_order(found)) != spec["digest"]:
        raise ValueError(
            "TRL reads other tokens from these rows than plumb does, so the two cannot be compared"
        )
    trainer.train()
    if spec["run"] == "precompute" and len(scored) != spec["steps"]:
        raise ValueError(
            f"the reference scored {len(scored)} batches, not {spec['steps']}: is this trl 1.16?"
        )
    batches = scored[1:] or [{"cpu": 0.0, "wall": 0.0}]  # stock scores inside its steps
    reference = {
        clock: len(scored) * statistics.mean(b[clock] for b in batches) for clock in CLOCKS
    }
    return {"steps": steps, "losses": losses, "reference": reference}


def plumb_command(spec: dict) -> list[str]:
    """plumb's script with TRL's settings."""
    flags = {
        "model": spec["model"], "data": spec["data"], "out": spec["out"], "template": "plain", "max-length": MAX_LENGTH,
        "batch-size": BATCH, "max-tokens": spec["max_tokens"], "max-steps": spec["steps"],
        "lr": LR[spec["algorithm"]], "schedule": "constant", "warmup": 0, "weight-decay": 0, "beta1": 0.9,
        "beta2": 0.95, "eps": 1e-8, "clip": 1.0, "dtype": "fp32", "device": "cpu", "seed": 0,
    }  # fmt: skip
    flags |= {"beta": BETA} if spec["algorithm"] in ("dpo", "kto") else {}
    if spec["algorithm"] == "grpo":
        flags |= {
            "advantage": "grpo",
            "loss": "grpo",
            "aggregate": "token",
            "kl": 0,
            "group-size": GROUP,
        }
        flags |= {"max-new-tokens": NEW_TOKENS, "reward": f"length:{WORDS}", "log-samples": 0}
    script = {"grpo": "reinforce"}.get(spec["algorithm"], spec["algorithm"])
    command = [sys.executable, str(ROOT / f"train_{script}.py"), "--no-shuffle"]
    return command + [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def read_plumb(out: Path) -> dict:
    """The same numbers as run_trl's, from OUT/metrics.jsonl."""
    rows = read_rows(out / "metrics.jsonl")
    reference = next(
        (row for row in rows if "reference_cpu_seconds" in row), {}
    )  # a reward model has none
    rows = [row for row in rows if "loss" in row]
    return {
        "steps": [{clock: row[key] for clock, key in CLOCKS.items()} for row in rows],
        "losses": [row["loss"] for row in rows],
        "reference": {
            clock: reference.get(f"reference_{key}", 0.0) for clock, key in CLOCKS.items()
        },
        "tokens": [row["tokens"] for row in rows],
        "reward": [row.get("reward") for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
    }


def start(command: list[str], log: Path, malloc: str = "default") -> dict:
    """Run a command on one thread to its end; its peak memory and CPU time. Its output goes to `log`.

    This process must stay small: the kernel counts a parent's pages at fork in the child's peak.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if malloc == "keep":
        env |= KEEP
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(log.parent / "hf"),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise ValueError(
            f"{' '.join(command)} ended with {process.returncode}: see its output\n{tail}"
        )
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "peak_gb": usage.ru_maxrss / 2**20,
        "process_cpu": cpu,
        "kernel_share": usage.ru_stime / cpu,
    }


def worker(job: str, spec: dict, log: Path) -> tuple[dict, dict]:
    """Run one of this file's functions in a process of its own: (its result, its usage)."""
    asked, answer = log.with_suffix(".in.json"), log.with_suffix(".out.json")
    asked.write_text(json.dumps(spec))
    usage = start(
        [sys.executable, __file__, "worker", job, str(asked), str(answer)], log, spec["malloc"]
    )
    return json.loads(answer.read_text()), usage


def measure(run: str, spec: dict, log: Path) -> dict:
    """One run of one kind. The first step is not counted: it is the first to touch most of the memory."""
    spec = {**spec, "run": run, "out": str(log.with_suffix(""))}
    if run == "plumb":
        usage = start(plumb_command(spec), log, spec["malloc"])
        result = read_plumb(Path(spec["out"]))
    else:
        result, usage = worker("trl", spec, log)
    steps = len(result["steps"])
    if steps != spec["steps"]:
        raise ValueError(
            f"{RUNS[run]} made {steps} steps of {spec['steps']}: its output:\n{log.read_text()[-3000:]}"
        )
    if result.get("tokens", spec["tokens"]) != spec["tokens"]:
        raise ValueError(
            "plumb trained on other tokens than the rows hold, so the two cannot be compared"
        )
    for clock in CLOCKS:
        result[f"step_{clock}"] = statistics.mean(step[clock] for step in result["steps"][1:])
        result[f"epoch_{clock}"] = result[f"step_{clock}"] + result["reference"][clock] / steps
    return {**result, **usage}


# ------------------------------------------------------------------------------------------------------------- sampling

SAMPLES, NEW_TOKENS = 32, 64
GROUP, WORDS = (
    8,
    50,
)  # of GRPO: samples to each of BATCH prompts, and what the reward length:WORDS wants


def read_prompts(spec: dict) -> dict:
    """Texts and token ids of prompts that both tokenise alike, from the first rows of the files, at most 200 each."""
    sys.path.insert(0, str(ROOT))
    from data.templates import Template
    from data.tokenizer import load_tokenizer

    template = Template("plain", load_tokenizer(Path(spec["model"])))
    peer = None
    if not spec["tiny"]:
        from transformers import AutoTokenizer

        peer = AutoTokenizer.from_pretrained(spec["model"])
    files = zip(*(read_pairs(path, 4 * spec["prompts"]) for path in spec["data"]))
    texts = [pair[0] + "\n" for pairs in files for pair in pairs]
    found = [(text, template.prompt(text)) for text in texts]
    found = [
        (text, ids)
        for text, ids in found
        if len(ids) <= 200 and (not peer or peer(text)["input_ids"] == ids)
    ]
    return dict(zip(("texts", "prompts"), map(list, zip(*found[: spec["prompts"]]))))


def run_generate(spec: dict) -> dict:
    """CPU and wall seconds of one sampling of SAMPLES answers, after a short one; and the greedy answers."""
    import torch

    torch.set_num_threads(1)
    prompts, n = spec["prompts"], spec["n"]
    if spec["run"] == "plumb":
        sys.path.insert(0, str(ROOT))
        from sampling.sampler import generate
        from weights.folder import load_model

        model = load_model(spec["model"], torch.float32)

        def answer(new: int, temperature: float, n: int) -> list[list[int]]:
            return [sample.tokens for sample in generate(model, prompts, new, temperature, n=n)]
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # no early stop
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

        def answer(new: int, temperature: float, n: int) -> list[list[int]]:
            how = {
                "do_sample": True,
                "temperature": temperature,
                "top_k": 0,
                "top_p": 1.0,
                "num_return_sequences": n,
            }
            how = how if temperature else {"do_sample": False}
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **how
            )
            return found[:, longest:].tolist()

    answer(4, 1.0, n)
    cpu, wall = time.process_time(), time.perf_counter()
    found = answer(NEW_TOKENS, 1.0, n)
    times = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if [len(tokens) for tokens in found] != [NEW_TOKENS] * SAMPLES:
        raise ValueError("an answer ended early, so the two cannot be compared")
    return {**times, "greedy": answer(NEW_TOKENS, 0.0, 1)}


def compare_generate(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report sampling: (workload, every number of it), for one sample a prompt and for eight."""
    work = Path(spec["work"])
    prompts = worker(
        "prompts", {**spec, "data": args.data, "prompts": SAMPLES}, work / "prompts.log"
    )[0]["prompts"]
    if len(prompts) < SAMPLES:
        raise ValueError(
            f"{len(prompts)} prompts of at most 200 tokens found, {SAMPLES} needed: give another --data"
        )
    names = {"plumb": "plumb"} if args.tiny else {"plumb": "plumb", "peer": "transformers"}
    for n in (1, 8):
        name = f"generate.py, {SAMPLES // n} prompts, {n} samples of {NEW_TOKENS} tokens each"
        workload = {"prompts": prompts[: SAMPLES // n], "n": n}
        results = {run: [] for run in names}
        for repeat, run in itertools.product(range(args.repeats), names):
            log = work / f"generate_{n}_{run}_{repeat}.log"
            result, usage = worker("generate", {**spec, **workload, "run": run}, log)
            results[run].append({**result, **usage})
        lengths = [len(ids) for ids in workload["prompts"]]
        print(
            f"\n{name}; prompts of {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}"
        )
        print(" " * 18 + "CPU s   wall s  peak GB")
        keys = ("cpu", "wall", "peak_gb")
        medians = {
            run: {key: statistics.median(r[key] for r in of) for key in keys}
            for run, of in results.items()
        }
        for run, m in medians.items():
            print(f"{names[run]:16}{m['cpu']:7.2f}{m['wall']:9.2f}{m['peak_gb']:9.2f}")
        if "peer" in names:
            ratio = medians["peer"]["cpu"] / medians["plumb"]["cpu"]
            pairs = list(
                zip(results["plumb"][0]["greedy"], results["peer"][0]["greedy"], strict=True)
            )
            same = sum(ours == theirs for ours, theirs in pairs)
            print(
                f"transformers / plumb: {ratio:.2f} times the CPU time; greedy answers alike: {same} of {len(pairs)}"
            )
        yield name, {"medians": medians, "runs": results}


# ----------------------------------------------------------------------------------------------------------------- GRPO


def run_grpo(spec: dict) -> dict:
    """GRPO on one side: CPU and wall seconds of every step and of its rollout (samples, texts and rewards).

    tokens: what the update computes, padding included, a step. samples: token ids of each step. With spec["replay"]
    plumb takes those for its samples.
    """
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    steps, rollouts, prompts, samples, tokens = [], [], [], [], []
    if spec["run"] == "plumb":
        import train_reinforce as script
        from sampling.sampler import Sample

        class Endless(script.Template):
            def __init__(self, *args):
                super().__init__(*args)
                self.stop_ids = frozenset()  # no early stop

        def collect(*args):
            found = draw(*args)
            prompts.extend(found.prompts.ids)
            samples.append([sample.tokens for sample in found.samples])
            return found

        draw, script.rollout.collect, script.Template = (
            timed(script.rollout.collect, rollouts),
            collect,
            Endless,
        )
        if "replay" in spec:
            given, none = iter(spec["replay"]), [0.0] * NEW_TOKENS
            script.rollout.sampler = lambda *_: (
                lambda *_: [Sample(ids, none, none, False) for ids in next(given)]
            )
        script.main(plumb_command(spec)[2:])
        result = read_plumb(Path(spec["out"]))
    else:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        from sampling.rewards import length

        words = length(str(WORDS))
        never = json.loads((Path(spec["model"]) / "config.json").read_text())[
            "vocab_size"
        ]  # no token has this id
        config = GRPOConfig(
            per_device_train_batch_size=BATCH * GROUP, num_generations=GROUP, max_completion_length=NEW_TOKENS,
            beta=0.0, num_iterations=1, loss_type="dapo", scale_rewards="group", temperature=1.0, top_p=1.0, top_k=0,
            shuffle_dataset=False, generation_kwargs={"eos_token_id": never}, **trl_settings(spec),
        )  # fmt: skip

        def reward(prompts, completions, **_):
            return [
                words(prompt, text, {}) for prompt, text in zip(prompts, completions, strict=True)
            ]

        rows = Dataset.from_list(read_rows(spec["data"]))
        trainer = GRPOTrainer(spec["model"], reward, config, rows, callbacks=[trl_clock(steps)])
        trainer.remove_callback(PrinterCallback)
        trainer.eos_token_ids = [never]  # where it cuts what was sampled
        trainer._generate_and_score_completions = timed(
            trainer._generate_and_score_completions, rollouts
        )
        draw = trainer._generate_single_turn

        def keep(ids, *args, **kwargs):
            found = draw(ids, *args, **kwargs)
            prompts.extend(ids[::GROUP])
            samples.append(found[0])
            tokens.append(len(ids) * (max(map(len, ids)) + max(map(len, found[0]))))
            return found

        trainer._generate_single_turn = keep
        trainer.train()
        logs = [row for row in trainer.state.log_history if "grad_norm" in row]
        result = {"steps": steps, "tokens": tokens}
        result |= {key: [row[key] for row in logs] for key in ("reward", "grad_norm")}
    if prompts != spec["prompts"]:
        raise ValueError(
            f"{spec['run']} read other prompts than the file's, so the two cannot be compared"
        )
    if [len(ids) for step in samples for ids in step] != [NEW_TOKENS] * (
        GROUP * BATCH * spec["steps"]
    ):
        raise ValueError(
            f"{spec['run']} drew samples of another number or length, so the two cannot be compared"
        )
    return {**result, "rollouts": rollouts, "samples": samples}


def compare_grpo(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report GRPO's whole steps, the first not counted: (workload, every number of it)."""
    work, count = Path(spec["work"]), spec["steps"] * BATCH
    found, _ = worker(
        "prompts", {**spec, "data": args.data, "prompts": count}, work / "grpo_prompts.log"
    )
    if len(found["prompts"]) < count:
        raise ValueError(
            f"{len(found['prompts'])} of {count} prompts found: give another --data or fewer --steps"
        )
    spec = {**spec, "prompts": found["prompts"], "data": str(work / "grpo.jsonl")}
    Path(spec["data"]).write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in found["texts"])
    )
    names = {"plumb": "plumb"} if args.tiny else {"plumb": "plumb", "stock": "TRL"}
    results = {run: [] for run in names}

    def measured(run: str, stem: str, **more) -> dict:
        log = work / f"grpo_{stem}.log"
        result, usage = worker(
            "grpo", {**spec, "run": run, "out": str(log.with_suffix("")), **more}, log
        )
        for clock in CLOCKS:
            result[f"step_{clock}"], result[f"rollout_{clock}"] = (
                statistics.mean(step[clock] for step in result[of][1:])
                for of in ("steps", "rollouts")
            )
        return {**result, **usage, "update_cpu": result["step_cpu"] - result["rollout_cpu"]}

    for repeat, run in itertools.product(range(args.repeats), names):
        results[run].append(measured(run, f"{run}_{repeat}"))
    name = f"train_reinforce.py, GRPO, {BATCH} prompts, {GROUP} samples of {NEW_TOKENS} tokens each"
    print(
        f"\n{name}: {args.steps} steps; prompts of {statistics.mean(map(len, spec['prompts'])):.0f} tokens"
    )
    print(
        " " * 16
        + "CPU s/step  rollout   update  wall s/step  peak GB  tokens a step: sampled  in the update"
    )
    keys = ("step_cpu", "rollout_cpu", "update_cpu", "step_wall", "peak_gb")
    medians = {
        run: {key: statistics.median(r[key] for r in of) for key in keys}
        for run, of in results.items()
    }
    for run, m in medians.items():
        first = results[run][0]
        sampled = statistics.mean(sum(map(len, step)) for step in first["samples"])
        print(f"{names[run]:16}{m['step_cpu']:10.3f}{m['rollout_cpu']:9.3f}{m['update_cpu']:9.3f}{m['step_wall']:13.3f}"
              f"{m['peak_gb']:9.2f}{sampled:24.0f}{statistics.mean(first['tokens']):15.0f}")  # fmt: skip
    if "stock" in names:
        theirs = results["stock"][0]
        again = measured("plumb", "replay", replay=theirs["samples"])
        pairs = {
            key: list(zip(again[key], theirs[key], strict=True)) for key in ("reward", "grad_norm")
        }
        gaps = {
            key: max(abs(ours - peer) / abs(peer) for ours, peer in of) for key, of in pairs.items()
        }
        ratio = {key: medians["stock"][key] / medians["plumb"][key] for key in keys}
        print(
            f"TRL / plumb: {ratio['step_cpu']:.2f} times the CPU time (rollout {ratio['rollout_cpu']:.2f}, ",
            end="",
        )
        print(
            f"update {ratio['update_cpu']:.2f}), {ratio['peak_gb']:.2f} times the memory. On TRL's samples plumb"
        )
        print(
            f"agrees within {gaps['reward']:.1e} with its rewards, {gaps['grad_norm']:.1e} with its gradient norms"
        )
        medians["stock"] |= {"ratios": ratio, "gaps": gaps}
    yield (
        name,
        {
            "medians": medians,
            "runs": {run: [{**r, "samples": None} for r in of] for run, of in results.items()},
        },
    )


# ------------------------------------------------------------------------------------------------- where the time goes


def profile(spec: dict) -> dict:
    """Share of plumb's operator time: attention, matmuls, log-probs, optimizer, the rest."""
    import runpy

    import torch

    torch.set_num_threads(1)
    sys.argv = plumb_command(spec)[1:]
    sys.path.insert(0, str(ROOT))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise
    return split(profiler.events())


def split(events) -> dict[str, float]:
    """Self time of every operator, by what it or the scope around it is called."""
    kinds = {
        "log-probs": ("logp", "log_prob", "logprob"),
        "optimizer": ("optimizer", "adam"),
        "attention": ("scaled_dot_product", "attention"),
        "matmuls": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    }
    seconds = dict.fromkeys((*kinds, "rest"), 0.0)
    for event in events:
        names, scope = [], event
        while scope is not None:
            names.append(scope.name.lower())
            scope = scope.cpu_parent
        kind = next(
            (
                k
                for k, marks in kinds.items()
                if any(mark in name for mark in marks for name in names)
            ),
            "rest",
        )
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


# ---------------------------------------------------------------------------------------------------------- the report


def report(name: str, workload: dict, results: dict[str, list[dict]], steps: int) -> dict:
    """Print one workload's medians and ratios; return them."""
    lengths = [statistics.mean(column) for column in zip(*workload["counts"], strict=True)]
    unit, parts = (
        ("pairs", ("chosen", "rejected")) if len(lengths) == 3 else ("examples", ("answer",))
    )
    print(f"\n{name}: {steps} steps of {BATCH} {unit}; mean tokens: ", end="")
    print(", ".join(f"{part} {n:.0f}" for part, n in zip(("prompt", *parts), lengths, strict=True)))
    print(" " * 18 + "CPU s/step  with reference  wall s/step  kernel  peak GB  first loss")
    keys = ("step_cpu", "epoch_cpu", "step_wall", "kernel_share", "peak_gb")
    medians = {
        run: {key: statistics.median(r[key] for r in of) for key in keys}
        for run, of in results.items()
    }
    for run, m in medians.items():
        print(
            f"{RUNS[run]:16}{m['step_cpu']:12.3f}{m['epoch_cpu']:16.3f}{m['step_wall']:13.3f}",
            end="",
        )
        print(f"{m['kernel_share']:8.0%}{m['peak_gb']:9.2f}{results[run][0]['losses'][0]:12.6f}")
    ours = results.get("plumb", [None])[0]
    for run, m in medians.items():
        if run == "plumb" or ours is None:
            continue
        ratio = {key: m[key] / medians["plumb"][key] for key in keys}
        gap = max(
            abs(a - b) for a, b in zip(ours["losses"], results[run][0]["losses"], strict=True)
        )
        print(
            f"{RUNS[run]} / plumb: {ratio['epoch_cpu']:.2f} times the CPU time (steps only", end=""
        )
        print(
            f" {ratio['step_cpu']:.2f}), {ratio['peak_gb']:.2f} times the memory; losses agree within {gap:.1e}"
        )
        medians[run]["ratios"] = ratio
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="preference JSONL files")
    parser.add_argument(
        "--tokenizer", required=True, help="tokenizer.model, or a folder with a Llama tokenizer"
    )
    parser.add_argument(
        "--model",
        help="a Hugging Face Llama folder with its tokenizer, instead of new random weights",
    )
    parser.add_argument(
        "--algorithm", nargs="+", choices=[*LR, "generate"], default=["dpo"], help="what to compare"
    )
    parser.add_argument(
        "--steps", type=int, default=12, help=f"steps to time, {BATCH} rows each, after one more"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--max-tokens", type=int, default=8192, help="plumb's micro-batch")
    parser.add_argument(
        "--malloc", choices=("keep", "default"), default="keep", help="keep freed memory"
    )
    parser.add_argument("--profile", action="store_true", help="also print where plumb's time goes")
    parser.add_argument("--json", help="write every number to this file")
    parser.add_argument(
        "--tiny", action="store_true", help="smoke test: only plumb's side, two layers, two steps"
    )
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.repeats, args.runs = 1, 1, ["plumb"]
    missing = [
        package for module, package in NEEDED.items() if not importlib.util.find_spec(module)
    ]
    if missing and not args.tiny:
        sys.exit(
            f"TRL's side needs what is not here: pip install {' '.join(missing)} (or --tiny, without TRL)"
        )

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = args.model or new_model(args.tokenizer, TINY if args.tiny else MODEL, work)
        spec = {
            "model": str(model),
            "steps": args.steps + 1,
            "max_tokens": args.max_tokens,
            "tiny": args.tiny,
        }
        spec |= {"work": folder, "malloc": args.malloc}
        if not args.tiny:
            print(
                "TRL in fp32, without gradient checkpointing: its faster setting (its default has it on)."
            )
        print(
            "CPU s/step: mean of all steps but the first, user and kernel. with reference: plus one scoring of these"
        )
        print(
            "rows by the reference, spread over the steps; TRL stock pays it inside them. kernel: its share of the"
        )
        print(
            f"process's CPU time. peak GB: the whole process. malloc: {args.malloc}. Medians of {args.repeats} runs."
        )
        everything = {"settings": vars(args), "workloads": {}}
        for algorithm in args.algorithm:
            measured = {"generate": compare_generate, "grpo": compare_grpo}.get(algorithm, compare)
            for name, result in measured({**spec, "algorithm": algorithm}, args):
                everything["workloads"][name] = result
                if args.json:
                    Path(args.json).write_text(json.dumps(everything, indent=1))


def compare(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report one algorithm: (workload, every number of it), one workload after the other."""
    work, algorithm = Path(spec["work"]), spec["algorithm"]
    workloads, _ = worker("prepare", {**spec, "data": args.data}, work / "prepare.log")
    print((work / "prepare.log").read_text(), end="")
    runs = [
        run for run in args.runs if (algorithm, run) != ("rm", "precompute")
    ]  # nothing to precompute
    for name, workload in workloads.items():
        name, stem = f"train_{algorithm}.py, {name}", Path(workload["data"]).stem
        results = {run: [] for run in runs}
        for repeat, run in itertools.product(range(args.repeats), runs):
            results[run].append(
                measure(run, {**spec, **workload}, work / f"{stem}_{run}_{repeat}.log")
            )
            m = results[run][-1]
            print(
                f"  {name}, {RUNS[run]}: {m['epoch_cpu']:.3f} CPU s/step",
                file=sys.stderr,
                flush=True,
            )
        result = {
            **workload,
            "medians": report(name, workload, results, args.steps),
            "runs": results,
        }
        if args.profile:
            log = work / f"{stem}.profile.log"
            shares, _ = worker(
                "profile", {**spec, **workload, "out": str(log.with_suffix(""))}, log
            )
            total = sum(shares.values())
            print(
                "where plumb's operators spend their time (the steps and the reference pass): ",
                end="",
            )
            print(", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in shares.items()))
            result["profile"] = shares
        yield name, result


def new_model(tokenizer: str, sizes: dict[str, int], work: Path) -> Path:
    """A Llama of random weights, by hf.py new, with a tokenizer that both sides read."""
    source = Path(tokenizer)
    if source.is_file():
        (work / "tokenizer").mkdir()
        (work / "tokenizer" / "tokenizer.model").write_bytes(source.read_bytes())
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        config |= {"add_bos_token": True, "add_eos_token": False, "legacy": True}
        (work / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
        source = work / "tokenizer"
    command = [
        sys.executable,
        str(ROOT / "hf.py"),
        "new",
        "--family",
        "llama",
        "--tokenizer",
        str(source),
    ]
    command += [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    start([*command, "--out", str(work / "model"), "--seed", "0"], work / "new.log")
    return work / "model"


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        job, asked, answer = sys.argv[2:]
        jobs = {
            "prepare": prepare,
            "trl": run_trl,
            "profile": profile,
            "prompts": read_prompts,
            "generate": run_generate,
            "grpo": run_grpo,
        }
        result = jobs[job](json.loads(Path(asked).read_text()))
        Path(answer).write_text(json.dumps(result))
    else:
        main()
