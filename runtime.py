"""Start of a run: process, device, output folder, signals, errors, data and models.

    run = runtime.start(config)                     ranks, device, OUT, chat template, stop signals
    train = runtime.load_rows(run, config.data, "sft")
    model = runtime.load_model(run)
    optimizer = runtime.make_optimizer(model, config)

What happens from step to step is in training.py. Nothing here calls back into a script.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

import background
import checkpoint
import hub
import lock
import parallel
import plan
import sources
import weights.folder
from commandline import check_ranges, to_json
from config import RunConfig, check_layout
from data.dataset import Dataset, load_dataset
from data.jinja import read_kwargs
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import check_longest
from disk import write_text
from faults import is_about_others, last_words, said_by, who_failed_first
from identity import (
    DATA_FLAGS,
    MODEL_FLAGS,
    Description,
    changed_flags,
    check_resumed,
    compare_ranks,
    describe,
    script_of,
)
from kernels.device import keep_freed_memory, pick_device
from model import GPT
from optimizer import AdamW
from parallel import Mesh, init_mesh
from reporting import import_tensorboard, import_wandb
from routing import set_balance
from weights.adapters import BaseDtype, adapters_of, attach, target_names, without_adapters
from weights.peft import check_base, load_adapter, lora_of, save_adapter

_config: RunConfig | None = None  # of this process, for advice when GPU memory runs out
ECHO_SECONDS = 3.0  # a signal repeated within this time counts once
PATIENCE = 10.0  # seconds to wait for another rank to say why it failed
ALIKE_SECONDS = 2.0  # seconds to wait for the other ranks to fail for the same reason


@dataclass(frozen=True)
class Run:
    """Everything that is fixed once a run has started; `start` makes it."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype  # of weights and activations
    template: Template  # chat template, with the tokenizer of --model
    stop: "Stop"  # true once a signal or --max-minutes asks the run to stop
    checkpoint: Path | None  # folder that --resume names; None starts from --model
    description: Description  # goes into checkpoints
    warnings: tuple[str, ...] = ()  # what has changed since the checkpoint


# ---- the process -------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Run a script's main; print an error that a user can fix as one line.

    PLUMB_TRACEBACK=1 shows where it came from. A rank that fails leaves its reason where the others
    find it, so that each names the first failure.
    """
    try:
        main()
        parallel.close()
        lock.release()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("PLUMB_TRACEBACK"):
            raise
        _exit(str(error), ask_others=is_about_others(error))
    except torch.cuda.OutOfMemoryError as error:
        world, memory = parallel.here().world, torch.cuda.mem_get_info()[1] / 2**30
        advice = plan.suggest(_config, world, memory) if _config else "lower --max-tokens"
        _exit(f"out of GPU memory ({error}): {advice}")
    except Exception as error:
        if parallel.here().world == 1:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _exit(reason, is_about_others(error), traceback.format_exc())


def _exit(reason: str, ask_others: bool = False, details: str = "") -> None:
    """End the process with one line that says what went wrong, here or on another rank.

    Where several ranks fail alike, one of them says it. details: text to print before the line.
    """
    mesh = parallel.here()
    background.settle(PATIENCE if mesh.world > 1 else None)
    lock.release()
    if mesh.world == 1:
        sys.exit(f"error: {reason}")
    messages = last_words(mesh, reason, PATIENCE if ask_others else ALIKE_SECONDS)
    if ask_others:
        others = who_failed_first(mesh.rank, mesh.world, messages)
        text = f"error on rank {mesh.rank}: {reason}\n  {others}"
    else:  # often all ranks fail alike: one of them says it
        who = said_by(mesh.rank, mesh.world, reason, messages)
        text = f"error on {who}: {reason}" if who else ""
    if text:
        print(details + text, file=sys.stderr, flush=True)
    os._exit(1)  # not through c10d's tear-down, which may wait for ranks that are gone


class Stop:
    """Request to save and stop: SIGTERM, SIGUSR1, SIGINT or --max-minutes; true once there is one.

    A second signal ends the process at once, unless it is an echo of the first: Slurm signals every
    process of a job, and torchrun then passes on what it got. Ranks agree in optimizer.step: a rank
    that is asked to stop stops them all, after the same step.
    """

    def __init__(self, max_minutes: float):
        self.reason = ""  # stays empty where another rank was asked
        self.first_signal = float("inf")  # time of it
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._signal)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self.first_signal = min(self.first_signal, time.monotonic())
        self.reason = self.reason or signal.Signals(number).name
        if time.monotonic() > self.first_signal + ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "--max-minutes"
        return bool(self.reason)


# ---- start -------------------------------------------------------------------------------------


def start(config: RunConfig) -> Run:
    """Join the other ranks, check the flags, seed every generator, make OUT, load the tokenizer.

    All ranks but 0 print nothing from here on. ValueError names the flag and the fix.
    """
    global _config
    hub.resolve(config, MODEL_FLAGS, DATA_FLAGS)
    mine = describe(config)
    mesh = parallel.join(config.device, config.timeout_minutes)
    _config = config
    if not mesh.main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    compare_ranks(mesh.everyone(mine))
    validate(config)
    config.out = config.out or mesh.ask(lambda: new_out(config))
    sizes = (config.tp, config.cp, config.pp)
    mesh = init_mesh(*sizes, config.device, config.timeout_minutes, config.ep)
    on_gpu = pick_device(config.device) == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    best_dtype = "bf16" if on_gpu else "fp32"
    dtype = weights.folder.DTYPES[best_dtype if config.dtype == "auto" else config.dtype]
    if not on_gpu:
        keep_freed_memory()
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    warnings = _make_out(config, mesh)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    layout = ""
    if mesh.world > 1:
        layout = f"{mesh.world} ranks: dp {mesh.dp}, tp {mesh.tp}, cp {mesh.cp}, pp {mesh.pp}"
        layout += f", ep {mesh.ep}; " if mesh.ep > 1 else "; "
    print(f"{name}, {layout}{str(dtype).removeprefix('torch.')}, output in {config.out}/")
    stop = Stop(config.max_minutes)
    resume_from = checkpoint.find(config.out, config.resume, mesh=mesh)
    if resume_from:
        warnings += mesh.ask(lambda: _compare(resume_from, mine, config))
    mesh.ask(lambda: write_text(Path(config.out) / "config.json", to_json(config)))
    environment = {"device": name, "layout": layout or "one process", **mine}
    del environment["flags"]  # they are in config.json
    text = json.dumps(environment, indent=2) + "\n"
    mesh.ask(lambda: write_text(Path(config.out) / "environment.json", text))
    kwargs = read_kwargs(config.template_kwargs)
    template = Template(config.template, load_tokenizer(config.model), kwargs)
    return Run(config, mesh, device, dtype, template, stop, resume_from, mine, tuple(warnings))


def new_out(config: RunConfig) -> str:
    """Return the name of a folder for a run without --out, after its script and the time."""
    return f"runs/{script_of(config)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _compare(folder: Path, mine: Description, config: RunConfig) -> list[str]:
    """Compare this run with the one that wrote a checkpoint; return warnings."""
    saved = checkpoint.description(folder)
    return check_resumed(folder, saved, mine, config.resume_changed) if saved else []


def validate(config: RunConfig) -> None:
    """Check the flags that every script shares. ValueError names the flag and the fix."""
    flags = {name: "--" + name.replace("_", "-") for name in vars(config)}
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ValueError(f"{flags[name]} is missing; --help lists the flags")
    if config.resume and not config.out:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    check_ranges(config)
    read_kwargs(config.template_kwargs)
    pick_device(config.device)
    if config.lora and config.adapter:
        raise ValueError("--adapter goes on with an adapter and its rank: drop --lora")
    if not config.merge and not (config.lora or config.adapter):
        raise ValueError("--no-merge is for --lora or --adapter: drop it")
    if config.base_dtype != "none" and not (config.lora or config.adapter):
        raise ValueError(
            f"--base-dtype {config.base_dtype} is for weights that stay frozen: "
            "add --lora 16, or drop it"
        )
    sources.shares(config.data)
    sources.named_sets(config.eval_data, config.best_by)
    if config.eval_every and not config.eval_data:
        raise ValueError("--eval-every has nothing to evaluate: add --eval-data, or drop it")
    if not (config.lora or config.adapter):
        for name in ("lora_alpha", "lora_dropout", "rslora"):
            if getattr(config, name):
                raise ValueError(f"{flags[name]} is for --lora or --adapter: add one, or drop it")
    target_names(config.lora_targets)
    check_layout(config)
    if config.samples and not config.eval_data:
        raise ValueError("--samples answers prompts of --eval-data: add that, or drop it")


def _make_out(config: RunConfig, mesh: Mesh) -> list[str]:
    """Make OUT and take its lock; return warnings of flags that differ from those it has.

    ValueError: OUT holds another run, is in use, or ranks do not share it.
    """
    name, warnings = mesh.ask(lambda: _open_out(config))
    marker = Path(config.out) / name
    shared = all(mesh.everyone(marker.exists()))
    if mesh.main:
        marker.unlink()
    if not shared:
        raise ValueError(
            f"--out {config.out} is not the same folder on every node: "
            "use one on a shared file system"
        )
    return warnings


def _open_out(config: RunConfig) -> tuple[str, list[str]]:
    """Make OUT; return the name of a new file in it for others to look for, and warnings."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock.take(out)
    if not config.resume and (out / "metrics.jsonl").exists():
        raise ValueError(
            f"{out} already holds a run: continue it with --resume auto, or choose another --out"
        )
    if config.wandb:
        import_wandb()
    if config.tensorboard:
        import_tensorboard()
    warnings = []
    if config.resume and (out / "config.json").exists():
        try:
            before = json.loads((out / "config.json").read_text())
            warnings = changed_flags(before, json.loads(to_json(config)))
        except (ValueError, TypeError, RecursionError):
            warnings = [f"{out / 'config.json'} is unreadable: flags may have changed"]
    marker = out / f".mark-{os.getpid()}-{time.time_ns()}"
    marker.touch()
    return marker.name, warnings


# ---- data and models ---------------------------------------------------------------------------


def cache_folder(config: RunConfig) -> Path:
    """Return the folder of tokenised data and reference log-probs."""
    return Path(config.cache or Path(config.out) / "cache")


def load_rows(run: Run, files: list[str], kind: str, whole_trees: bool = True) -> Dataset | None:
    """Return the rows of some files of --data as token trees; None without files.

    kind: see data.dataset.load_dataset. whole_trees=False skips `check_fit`, for data that is not
    trained on as it is. ValueError names a bad row, or the flag that makes all rows fit.
    """
    if not files:
        return None
    config = run.config
    files = sources.paths(files, "data")
    with run.mesh.one_first():  # tokenises once a node: the others read the cache
        data = load_dataset(
            files,
            kind,
            run.template,
            config.max_length,
            config.overlong,
            config.max_bad_rows,
            cache_folder(config),
            ignore=config.ignore_keys,
        )
    if whole_trees:
        check_fit(data, config)
    return data


def load_sets(run: Run, kind: str, words: list[str] | None = None) -> dict[str, Dataset]:
    """Return name -> rows of every set of --eval-data, or of some other words; see load_rows."""
    words = run.config.eval_data if words is None else words
    sets = sources.named_sets(words, run.config.best_by)
    return {name: load_rows(run, files, kind, kind != "label") for name, files in sets.items()}


def check_fit(data: Dataset, config: RunConfig) -> None:
    """ValueError: a tree that is longer than --max-tokens, which no micro-batch could hold."""
    check_longest(data.tree_lengths(config.share_prompts), config.max_tokens)


def load_model(run: Run, folder: str = "", scores: tuple[str, ...] | None = None) -> GPT:
    """Load a model to train: a Hugging Face folder, --model by default, with adapters for --lora.

    scores: names of the outputs of a score head, as in weights.folder.load_model. ValueError:
    another kind of model, or a vocabulary smaller than the tokenizer's.
    """
    config = run.config
    model = _load(run, folder or config.model, scores, config.base_dtype)
    if config.ep > 1 and not model.c.experts:
        raise ValueError(
            f"--ep {config.ep} shares experts, and {folder or config.model} has none: drop --ep, "
            "whose ranks are data parallel then"
        )
    own = folder in ("", config.model)
    model.balancing = set_balance(model.c, model.tallies, config, config.model if own else "")
    if config.adapter and folder in ("", config.model):
        load_adapter(model, config.adapter)
    elif config.lora:
        attach(model, lora_of(config), config.seed)
    return model


def load_reference(run: Run, policy: GPT, folder: str = "") -> GPT:
    """Return a frozen model: that of a folder, or by default the policy as it was at step 0.

    With --lora that is the policy's own base without its adapters, which costs no memory.
    """
    if folder or not adapters_of(policy) or run.config.adapter:
        base_dtype: BaseDtype = "none" if folder else run.config.base_dtype
        model = _load(run, folder or run.config.model, base_dtype=base_dtype)
        if run.config.adapter and not folder:
            load_adapter(model, run.config.adapter)
        return model.requires_grad_(False)
    return without_adapters(policy)


def load_over(run: Run, policy: GPT, folder: str) -> GPT:
    """Return a model with one score over the policy's frozen base, for --shared-base.

    folder: the adapter, with its head, that it starts from; "" is a new one, whose head gives 0.
    ValueError: the folder holds no adapter, or one of another base.
    """
    config = run.config
    model = without_adapters(policy, ("value",))
    if not folder:
        return attach(model, lora_of(config), config.seed)
    run.mesh.ask(lambda: check_base(folder, config.model))
    load_adapter(model, folder)
    return model


def _load(
    run: Run, folder: str, scores: tuple[str, ...] | None = None, base_dtype: BaseDtype = "none"
) -> GPT:
    """Load a Hugging Face folder in the run's dtype, layout and options."""
    config = run.config
    model = weights.folder.load_model(
        folder, run.dtype, run.device, scores, run.mesh, base_dtype, sharded=config.zero == 3
    )
    ids = run.template.tokenizer.size
    if ids > model.c.vocab:
        raise ValueError(
            f"{folder} embeds {model.c.vocab} tokens, the tokenizer of {config.model} has {ids}: "
            "use the tokenizer that the model was trained with"
        )
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        for block in model.blocks.values():
            block.compile(dynamic=True)
    return model


def make_optimizer(model: GPT, config: RunConfig) -> AdamW:
    """Return the optimizer of a model with the settings of the flags."""
    settings = ((config.beta1, config.beta2), config.eps, config.weight_decay, config.zero)
    return AdamW(model, *settings, config.offload == "optimizer", config.grad_dtype == "bf16")


def save_model(run: Run, model: GPT, name: str) -> Path:
    """Write OUT/`name`, a Hugging Face folder with tokenizer and chat template; return its path.

    Adapters are merged into it (not with --no-merge), and written besides: OUT/adapter for "final",
    OUT/`name`_adapter for others.
    """
    config = run.config
    folder = Path(config.out) / name
    run.mesh.ask(lock.check)
    if config.lora or config.adapter:
        adapter = folder.with_name("adapter" if name == "final" else f"{name}_adapter")
        save_adapter(model, adapter, config.model, lora_of(config))
        if not config.merge:
            return adapter
    weights.folder.save_model(model, folder, config.model, run.template)
    return folder
