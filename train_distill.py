"""Distillation: a student learns the distribution of a teacher, token by token.

    python train_distill.py --model small --teacher big --data demos.jsonl --out distilled
    python train_distill.py --model distilled/final --teacher big --data demos.jsonl --on-policy 1
    torchrun --nproc_per_node 8 train_distill.py --model small --teacher big --data demos.jsonl

Rows: {prompt, response} or {messages}, as for train_sft.py. At every scored token the loss is a
divergence between the teacher's distribution and the student's over the whole vocabulary:
--divergence forward, reverse, jsd (GKD, arXiv 2306.13649), skew_forward or skew_reverse (DistiLLM,
2402.03898). --sft-weight adds the log-likelihood of the data.

--on-policy λ is the share of steps whose responses the student samples itself, to the same prompts;
the teacher then corrects what the student really writes (GKD, Algorithm 1). Gradients do not flow
through the sampling.

--teacher-top-k K lets the teacher score the data once: its K likeliest tokens, and all others as
one, are kept on disk, and no teacher is in memory while the student learns.

Student and teacher must read the same tokens; sizes and families may differ.

Watch kl, the mean divergence a token in nats: it falls fast, then slowly. On-policy it may rise at
first, while the student finds prompts that it answers badly.

Letters: M scored tokens of a micro-batch, D the teacher's width.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

import runtime
import training
from commandline import parse
from config import Amount, Count, Number, Part, RolloutConfig, Share, Temperature
from data.dataset import Dataset
from data.tokenizer import load_tokenizer
from data.trees import TreeBatch
from kernels.kl import Divergence
from model import GPT
from passes import forward, make_batches
from pipeline import pipeline
from reporting import add, means
from sampling import rollout
from sampling.engine import connect
from sampling.rewards import no_reward, same_tokens
from teacher import TopK, read_top_k, score_top_k, top_k_path


@dataclass
class Config(RolloutConfig):
    batch_size: Number = 64  # examples an optimizer step, over all ranks
    lr: Amount = 1e-5  # peak learning rate; as for SFT, 1e-5 to 2e-5 for 7B models
    teacher: str = ""  # Hugging Face folder of the teacher, with the student's tokenizer
    teacher_top_k: Count = 0  # likeliest tokens of the teacher, scored once and kept on disk, the
    # others count as one; 16 to 128. 0: the whole vocabulary of a teacher in memory
    divergence: Divergence = "forward"  # forward covers the teacher, reverse keeps to its peaks
    mix: Part = 0.5  # β of jsd, α of the skewed ones (0.1 in DistiLLM); between 0 and 1
    distill_temperature: Temperature = 1.0  # of both distributions in the divergence; 1 to 2
    sft_weight: Amount = 0.0  # of the log-likelihood of the data, on steps that are not on-policy
    on_policy: Share = 0.0  # share of steps on the student's own samples; 0.5 to 1 after SFT
    group_size: Number = 1  # samples a prompt on on-policy steps


# ---- the algorithm -----------------------------------------------------------------------------


@torch.no_grad()
def teacher_states(teacher: GPT, batches: list[TreeBatch]) -> list[torch.Tensor]:
    """Return what the teacher's output head reads in each micro-batch, (M, D), on the last stage.

    They are a few numbers a token; its distributions, (M, V), are computed chunk by chunk beside
    the student's.
    """
    return [teacher.states(hidden, batch)[0] for batch, hidden in pipeline(teacher, batches)]


def divergences(
    student: GPT,
    hidden: torch.Tensor,
    batch: TreeBatch,
    teacher: GPT | None,
    target: torch.Tensor | TopK,
    config: Config,
) -> torch.Tensor:
    """Return the divergence at each scored token, (M,).

    target: the teacher's states of the micro-batch, or its cached top K.
    """
    settings = config.divergence, config.mix, config.distill_temperature
    if isinstance(target, TopK):
        ids, logps = target.of(batch)
        return student.top_kl(hidden, batch, ids, logps, *settings)
    return student.kl(hidden, batch, teacher, target, *settings)


def is_on_policy(config: Config, step: int) -> bool:
    """Return whether a step trains on samples: a draw with chance --on-policy, by seed and step."""
    return np.random.default_rng([config.seed, step]).random() < config.on_policy


@torch.no_grad()
def evaluate(
    student: GPT, teacher: GPT | None, data: Dataset, top: TopK | None, config: Config
) -> dict[str, float]:
    """Return divergence and log-likelihood of a whole data set, under eval/.

    top: the teacher's cache of it; None asks the teacher itself.
    """
    totals: dict[str, torch.Tensor] = {}
    examples = np.arange(len(data))
    batches = make_batches(data, examples, config, student.mesh)
    targets = [top] * len(batches) if top else teacher_states(teacher, batches)
    for i, (batch, hidden) in enumerate(forward(student, data, examples, config)):
        kl = divergences(student, hidden, batch, teacher, targets[i], config)
        nll = -student.logps(hidden, batch)
        add(totals, {"loss": kl + config.sft_weight * nll, "kl": kl, "nll": nll})
    row = means(totals, int(data.scored_len.sum()), student.mesh)
    return {f"eval/{name}": value for name, value in row.items()}


def check_tokenizer(run: runtime.Run, config: Config) -> None:
    """ValueError: the teacher reads other tokens than the student."""
    if not same_tokens(run.template.tokenizer, load_tokenizer(config.teacher)):
        raise ValueError(
            f"--teacher {config.teacher} has another tokenizer than --model {config.model}: "
            "distributions over different tokens cannot be compared"
        )


def load_teacher(run: runtime.Run, student: GPT, config: Config) -> GPT:
    """Load the frozen teacher. ValueError: it has another vocabulary than the student."""
    teacher = runtime.load_reference(run, student, config.teacher)
    if teacher.c.vocab != student.c.vocab:
        raise ValueError(
            f"--teacher {config.teacher} has {teacher.c.vocab} rows of vocabulary, the student "
            f"{student.c.vocab}: pad the smaller embedding to the same size"
        )
    return teacher


def cached_top_k(
    run: runtime.Run, student: GPT, sets: list[tuple[Dataset, np.ndarray]], config: Config
) -> list[TopK]:
    """Return the teacher's top K of some examples of every data set.

    The teacher is loaded only for what the cache lacks, and freed.
    """
    k, tau, folder = config.teacher_top_k, config.distill_temperature, config.teacher
    teacher = None
    tops = []
    for data, examples in sets:
        path = top_k_path(runtime.cache_folder(config), folder, student, data, examples, k, tau)
        top = read_top_k(path, data, examples, student.mesh)
        if top is None:
            teacher = teacher or load_teacher(run, student, config)
            top = score_top_k(path, teacher, data, examples, k, tau, config)
        tops.append(top)
    return tops


def validate(config: Config) -> None:
    """Raise ValueError for flags that contradict each other or would have no effect."""
    rollout.validate(config)
    rollout.refuse_correction(config, "its loss is exact for whatever was sampled")
    if not config.teacher:
        raise ValueError("--teacher is missing: the folder of the model to learn from")
    defaults = {f.name: f.default for f in fields(Config)}
    for name in ("reward", "no_eos_penalty", "eval_temperature"):
        if getattr(config, name) != defaults[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} has no effect here, the teacher judges: drop it")
    if config.divergence in ("forward", "reverse") and config.mix != defaults["mix"]:
        raise ValueError(
            f"--mix has no effect on --divergence {config.divergence}: drop it, or choose jsd or a "
            "skewed one"
        )
    if config.on_policy == 1 and config.sft_weight:
        raise ValueError("--sft-weight has no effect with --on-policy 1: drop one of them")
    if config.on_policy == 1 and config.teacher_top_k:
        raise ValueError(
            "--teacher-top-k keeps what the teacher says of the data, which --on-policy 1 never "
            "trains on: drop one of them"
        )
    if config.divergence == "jsd" and config.mix == 0:
        raise ValueError("--mix must be above 0 for jsd, whose divergence it would make 0")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    validate(config)
    run = runtime.start(config)
    template, mesh = run.template, run.mesh

    # ---- data ----------------------------------------------------------------------------------
    train = runtime.load_rows(run, config.data, "sft")
    heldout = runtime.load_sets(run, "sft")
    prompts = None
    if config.on_policy:
        prompts = rollout.load(config.data, template, config)
        rollout.check_fits(prompts, config)
    steps = training.plan_steps(config, len(train), train.file_start)

    # ---- model and teacher ---------------------------------------------------------------------
    student = runtime.load_model(run)
    check_tokenizer(run, config)
    teacher, top, heldout_tops = None, None, dict.fromkeys(heldout)
    if config.teacher_top_k:
        scored = [(data, np.arange(len(data))) for data in heldout.values()]
        top, *others = cached_top_k(run, student, [(train, steps.visited()), *scored], config)
        heldout_tops = dict(zip(heldout, others))
    if config.on_policy or top is None:  # samples are new: the teacher has to be there
        teacher = load_teacher(run, student, config)
    print(training.describe(student, train.tree_lengths(config.share_prompts), steps, config))
    server = connect(template, config, prompts)
    optimizer = runtime.make_optimizer(student, config)
    loop = training.begin(run, steps, optimizer)
    rollout.drop_samples_after(loop.state.step, config, mesh)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        data, examples, sft_weight = train, steps.examples(step), config.sft_weight
        on_policy = prompts is not None and is_on_policy(config, step)
        if on_policy:
            chosen = prompts.take(examples % len(prompts.ids))
            samples = rollout.draw(chosen, step + 1, student, no_reward, template, config, server)
            data, examples, sft_weight = samples.data, np.arange(len(samples.data)), 0.0
            rollout.log_samples(samples, step + 1, config, mesh)
        batches = make_batches(data, examples, config, mesh)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_scored = int(data.scored_len[data.responses_of(examples)].sum())

        cached = top and not on_policy
        targets = [top] * len(batches) if cached else teacher_states(teacher, batches)
        totals: dict[str, torch.Tensor] = {}
        for i, (batch, hidden) in enumerate(pipeline(student, batches, optimizer)):
            kl = divergences(student, hidden, batch, teacher, targets[i], config)  # (M,)
            loss = kl
            if sft_weight:
                nll = -student.logps(hidden, batch)
                loss = kl + sft_weight * nll
                add(totals, {"nll": nll})
            (loss.sum() / n_scored).backward()
            add(totals, {"loss": loss, "kl": kl})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        training.check_update(loop, norm)
        row = {**means(totals, n_scored, mesh), "grad_norm": norm, "lr": lr}
        row["on_policy"] = float(on_policy)
        tokens = int(data.tree_lengths(config.share_prompts)[examples].sum())
        training.report_step(loop, row, tokens, batches)
        if heldout and training.evaluation_due(loop):
            results = {
                name: evaluate(student, teacher, data, heldout_tops[name], config)
                for name, data in heldout.items()
            }
            result = training.report_evaluation(loop, results)
            training.print_samples(loop, student, heldout)
            if training.is_best(loop, result["eval/loss"]):
                runtime.save_model(run, student, "best")
        if training.save_or_stop(loop, stopping):
            return
    training.finish(loop, student)


if __name__ == "__main__":
    runtime.run(main)
