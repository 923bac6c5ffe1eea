"""Part trl of bench/gpu.py: optimizer steps of TRL on the work of gpu_steps.py."""

import gc
import os
import statistics
import tempfile
import time
from importlib.util import find_spec

import numpy as np
import torch
from gpu_steps import examples, shapes
from harness import Bench

from model import GPTConfig, parameter_count

NEEDED = ("trl", "transformers", "datasets")


def trl(bench: Bench) -> None:
    """Time TRL's trainers on the same examples and shapes, and say how much faster plumb is.

    Settings favour TRL: rows are sorted by length, micro-batches hold as many tokens as plumb's,
    collating is not timed, the reference is computed before. Its weights are bf16 without the fp32
    master weights that plumb keeps.
    """
    if missing := [name for name in NEEDED if not find_spec(name)]:
        bench.record("TRL", skipped=f"not importable: {', '.join(missing)}")
        return
    if bench.pretended:
        bench.record("TRL", skipped="only plumb runs on the pretend GPU")
        return
    for label, c, recomputed, _ in shapes(bench, ("whole",)):
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
    for row in bench.earlier_rows():
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
