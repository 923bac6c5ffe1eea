"""Parts steps and trl of bench/gpu.py: whole optimizer steps of plumb, and of TRL on the same work.

Models are random Llamas. Examples are as long as UltraFeedback's.
"""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import torch
from harness import Bench, read_rows

import losses
from data.dataset import Dataset
from data.trees import TreeBatch, make_batch, micro_batches
from model import GPT, GPTConfig, parameter_count
from optimizer import AdamW

SHAPES = {
    "1B": dict(
        vocab=128256, width=2048, layers=16, heads=32, kv_heads=8, head_size=64, ffn=8192, tied=True
    ),
    "7B": dict(vocab=32000, width=4096, layers=32, heads=32, kv_heads=8, head_size=128, ffn=14336),
    "tiny": dict(vocab=300, width=64, layers=2, heads=4, kv_heads=2, head_size=16, ffn=96),
}
NEEDED = ("trl", "transformers", "datasets")


def examples(bench: Bench, responses: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the token counts of one step's examples: prompts (n,), answers (n, responses)."""
    rng = np.random.default_rng(0)
    count, shrink = (2, 40) if bench.tiny else (32, 1)

    def lengths(n: int, median: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(median // shrink), 0.8, n).astype(int)
        return np.clip(drawn, 4, 512 // shrink)

    return lengths(count, 160), lengths(count * responses, 280).reshape(count, responses)


def llama(sizes: dict) -> GPTConfig:
    """Return the config of a Llama."""
    return GPTConfig(family="llama", **sizes)


def shapes(bench: Bench) -> Iterator[tuple[str, GPTConfig, bool]]:
    """Yield the models to train: label, config, whether activations are recomputed.

    A model that does not fit gets fewer layers.
    """
    for label in ["tiny"] if bench.tiny else ["1B", "7B"]:
        sizes = dict(SHAPES[label])
        whole = sizes["layers"]
        if bench.cuda:
            room = torch.cuda.mem_get_info()[1] - 14e9  # left for activations
            while sizes["layers"] > 1 and 18 * parameter_count(llama(sizes)) > room:
                sizes["layers"] -= 1
        name = label
        if sizes["layers"] < whole:
            name += f" shape with {sizes['layers']} of {whole} layers"
        yield name, llama(sizes), label == "7B"


# ---- plumb ---------------------------------------------------------------------------------------


def steps(bench: Bench) -> None:
    """Time DPO with prompts shared and repeated, and SFT."""
    for label, c, recomputed in shapes(bench):
        bench.attempt(label, build_and_train, bench, label, c, recomputed)
        gc.collect()
        bench.free()


def build_and_train(bench: Bench, label: str, c: GPTConfig, recomputed: bool) -> dict:
    """Build a model, record the steps of every task, and return its parameter count."""
    with torch.device(bench.device):
        model = GPT(c).to(bench.dtype)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    model.checkpoint_activations = recomputed
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0)
    tasks = [("DPO", "prompts shared"), ("DPO", "prompts repeated"), ("SFT", "packed")]
    for task, packing in tasks[: 1 if bench.tiny else 3]:
        batches = make_batches(bench, c, task, packing != "prompts repeated")
        name = f"{label} {task}, {packing}"
        bench.attempt(name, time_step, bench, model, optimizer, task, batches)
    return {"parameters": parameter_count(c)}


def make_batches(bench: Bench, c: GPTConfig, task: str, shared: bool) -> list[TreeBatch]:
    """Pack one step of random tokens into micro-batches."""
    responses = 2 if task == "DPO" else 1
    prompts, answers = examples(bench, responses)
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *(prompts + answers.sum(1))])
    scored = [np.repeat([0, 1], [p, sum(row)]) for p, row in zip(prompts, answers, strict=True)]
    data = Dataset(
        tokens=rng.integers(0, c.vocab, starts[-1]).astype(np.int32),
        scored=np.concatenate(scored).astype(np.uint8),
        tree_start=starts,
        prompt_len=prompts.astype(np.int32),
        response_start=np.arange(0, answers.size + 1, responses),
        response_len=answers.ravel().astype(np.int32),
    )
    budget = 200 if bench.tiny else 16384
    bins = micro_batches(data.tree_lengths(shared), np.arange(len(prompts)), budget)
    return [make_batch(data, items, shared) for items in bins]


def time_step(
    bench: Bench, model: GPT, optimizer: AdamW, task: str, batches: list[TreeBatch]
) -> dict:
    """Time an optimizer step, and count what it computes."""
    count = sum(len(batch.examples) for batch in batches)

    def step() -> None:
        for batch in batches:
            batch = batch.to(bench.device)
            sums = batch.sum_by_response(model.logps(model(batch), batch))
            if task == "DPO":
                chosen, rejected = sums.view(-1, 2).unbind(1)
                chosen, rejected = chosen - chosen.detach(), rejected - rejected.detach()
                loss = losses.sigmoid(chosen, rejected, 0.1).sum() / count
            else:
                loss = -sums.sum() / 1e4
            loss.backward()
        optimizer.step(1e-7, 1.0)

    bench.reset_peak()
    seconds = bench.seconds(step, least=3, budget=6)
    tokens = sum(len(b.tokens) for b in batches)
    scored = sum(len(b.target) for b in batches)
    seen = sum(b.context * len(b.tokens) for b in batches)
    # Only scored tokens reach the head; recomputed activations do not count as work.
    flop = sum(len(b.tokens) * model.c.flops_per_token(b.context) for b in batches)
    flop -= 6 * (tokens - scored) * model.c.vocab * model.c.width
    values = {
        "seconds": seconds,
        "examples_per_s": count / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "context": seen / tokens,
        "tflops": flop / seconds / 1e12,
    }
    return values | ({"peak_gb": bench.peak_gb()} if bench.cuda else {})


# ---- TRL -----------------------------------------------------------------------------------------


def trl(bench: Bench) -> None:
    """Time TRL's trainers on the same examples and shapes, and say how much faster plumb is.

    Settings favour TRL: rows are sorted by length, micro-batches hold as many tokens as plumb's,
    collating is not timed, the reference is computed before. Its weights are bf16 without the fp32
    master weights that plumb keeps.
    """
    if missing := [name for name in NEEDED if not find_spec(name)]:
        bench.record("TRL", skipped=f"not importable: {', '.join(missing)}")
        return
    for label, c, recomputed in shapes(bench):
        for task in ("DPO", "SFT"):
            bench.attempt(f"{label} {task}, TRL", trl_steps, bench, task, label, c, recomputed)
            gc.collect()  # a trainer and its model hold each other
            bench.free()


def trl_steps(bench: Bench, task: str, label: str, c: GPTConfig, recomputed: bool) -> dict:
    """Time an optimizer step of TRL's DPOTrainer or SFTTrainer on token ids."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import datasets
    import transformers
    from transformers.utils import is_flash_attn_2_available

    datasets.disable_progress_bars()
    attention = "flash_attention_2" if bench.cuda and is_flash_attn_2_available() else "sdpa"
    prompts, answers = examples(bench, 2 if task == "DPO" else 1)
    rows = datasets.Dataset.from_list(trl_rows(task, c.vocab, prompts, answers))
    micro = 1 if bench.tiny else 16 // answers.shape[1]  # 16 sequences of at most 1024 tokens
    times = []
    clock = trl_clock(bench, times)
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, max_steps=100, max_length=None, learning_rate=1e-7)
        settings |= dict(train_sampling_strategy="sequential", gradient_checkpointing=recomputed)
        settings |= dict(per_device_train_batch_size=micro)
        settings |= dict(gradient_accumulation_steps=len(rows) // micro)
        settings |= dict(bf16=bench.cuda, use_cpu=not bench.cuda, dataloader_pin_memory=bench.cuda)
        settings |= dict(logging_strategy="no", save_strategy="no", report_to="none")
        settings |= dict(disable_tqdm=True)
        trainer = trl_trainer(bench, task, c, attention, settings, rows, clock)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    seconds = statistics.median(times[clock.warm :])
    tokens = int(prompts.sum()) * answers.shape[1] + int(answers.sum())
    how = [attention, f"{micro} rows x {len(rows) // micro}"]
    how.append("checkpointing" if recomputed else "no checkpointing")
    if task == "DPO":
        how.append("reference precomputed")
    values = {
        "seconds": seconds,
        "examples_per_s": len(rows) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
    }
    if bench.cuda:
        values["peak_gb"] = bench.peak_gb()
    ours = f"{label} {task}, {'prompts shared' if task == 'DPO' else 'packed'}"
    for row in read_rows(bench.rows):
        if row["name"] == ours and "seconds" in row:
            values["plumb_faster"] = seconds / row["seconds"]
            if bench.cuda:
                values["plumb_memory_share"] = row["peak_gb"] / values["peak_gb"]
    return values | {"how": ", ".join(how)}


def trl_rows(task: str, vocab: int, prompts: np.ndarray, answers: np.ndarray) -> list[dict]:
    """Draw the step's examples as TRL's token id columns, longest first."""
    longest_first = np.argsort(-prompts - answers.max(1))
    rows = []
    for sizes in np.column_stack([prompts, answers])[longest_first].tolist():
        ids = [torch.randint(2, vocab, (n,)).tolist() for n in sizes]
        if task == "DPO":
            row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))
        else:
            mask = [0] * sizes[0] + [1] * sizes[1]
            row = {"input_ids": sum(ids, []), "completion_mask": mask}
        rows.append(row)
    return rows


def trl_clock(bench: Bench, times: list[float]):
    """Return a TrainerCallback that appends the seconds of every step to `times`, and ends the run
    when there are enough."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        warm, least, budget = (1, 1, 0) if bench.tiny else (2, 3, 6)

        def now(self) -> float:
            if bench.cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, args, state, control, **_):
            if len(times) == self.warm:
                bench.reset_peak()
            self.start = self.now()

        def on_step_end(self, args, state, control, **_):
            times.append(self.now() - self.start)
            measured = times[self.warm :]
            enough = len(measured) >= self.least and sum(measured) > self.budget
            late = bool(measured) and time.monotonic() > bench.deadline
            control.should_training_stop = enough or late

    return Clock()


def trl_trainer(bench: Bench, task: str, c: GPTConfig, attention: str, settings, rows, clock):
    """Build TRL's trainer with a Llama of the same shape."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class OnTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # SFTTrainer sees by itself that rows hold token ids

    shape = dict(vocab_size=c.vocab, tie_word_embeddings=c.tied, attn_implementation=attention)
    shape |= dict(hidden_size=c.width, num_hidden_layers=c.layers, intermediate_size=c.ffn)
    shape |= dict(num_attention_heads=c.heads, num_key_value_heads=c.kv_heads)
    shape |= dict(head_dim=c.head_size)
    # TRL hashes all weights of the reference on the CPU. It scores outside the step, so a small
    # reference will do.
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    small |= {"hidden_size": 64, "head_dim": 64, "intermediate_size": 64}
    with torch.device(bench.device):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(bench.dtype)
        reference = LlamaForCausalLM(LlamaConfig(**shape | small)).to(bench.dtype)
    theirs, ours = model.num_parameters(), parameter_count(c)
    if theirs != ours:
        raise ValueError(f"transformers' model has {theirs} weights, plumb's has {ours}")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    more = {"train_dataset": rows, "processing_class": words, "callbacks": [clock]}
    if task == "DPO":
        config = DPOConfig(precompute_ref_log_probs=True, **settings)
        return OnTokenIds(model, reference, args=config, **more)
    config = SFTConfig(padding_free=attention != "sdpa", completion_only_loss=True, **settings)
    return SFTTrainer(model, args=config, **more)
