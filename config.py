"""A dataclass becomes the command line; the comment beside a field is its --help.

    @dataclass
    class Config(RunConfig):
        beta: float = 0.1  # temperature of the implicit reward; smaller strays further from the reference

    config = parse(Config, __doc__)      # default < --config file.json < flag

Kinds of field: int, float, str, bool (--flag / --no-flag), Literal[...] (one of), list[str] (one or more words).
Both --max-tokens and --max_tokens are taken. A flag or a key that does not exist, or a value that does not fit, is
refused with the nearest name that would.
"""

import dataclasses
import difflib
import inspect
import json
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass
class RunConfig:
    """The flags that every training script shares."""

    # what goes in and out
    model: str = ""  # Hugging Face folder to start from: config.json, *.safetensors and a tokenizer
    data: list[str] = field(
        default_factory=list
    )  # training rows, .jsonl or .jsonl.gz; several files are read in order
    out: str = "out"  # folder for metrics.jsonl, checkpoints step_N/, best/ and final/
    eval_data: list[str] = field(default_factory=list)  # held-out rows for --eval-every
    resume: str = (
        ""  # "auto" goes on from the newest good checkpoint in --out; or one checkpoint's folder
    )
    config: str = (
        ""  # JSON file of flags, such as OUT/config.json; a flag on the command line wins over it
    )
    cache: str = ""  # folder for tokenised data and reference log-probs; default OUT/cache, share one between runs

    # rows to tokens
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # chat format; auto = the folder's own, else plain: bos, prompt, response, eos
    )
    max_length: int = (
        1024  # tokens of a prompt with one response; what is longer falls under --overlong
    )
    overlong: Literal["drop", "truncate"] = (
        "drop"  # drop the row, or cut its prompt from the left (never the response)
    )
    max_bad_rows: int = (
        0  # unreadable rows to skip and report before giving up; 0 stops at the first
    )
    shuffle: bool = (
        True  # a new order every epoch, a function of (seed, epoch); --no-shuffle keeps the file's
    )
    seed: int = 0  # of the data order, of sampling and of anything else random

    # batches
    batch_size: int = 64  # examples an optimizer step, over all ranks
    max_tokens: int = 8192  # tokens of a micro-batch on one rank: lower it when memory runs out, results do not change
    share_prompts: bool = (
        True  # compute a prompt once for all its responses; --no-share-prompts is the slow twin
    )

    # how long
    epochs: int = 1  # passes over the data; preference losses overfit after 1-3
    max_steps: int = 0  # stop after this many optimizer steps; 0 = when the epochs are done
    max_minutes: float = 0.0  # save and stop after this long; 0 = never

    # optimizer (AdamW, fp32 master weights, no decay on norms and biases)
    lr: float = (
        5e-7  # peak learning rate; 5e-7 suits preference losses on 7B models, 1e-5 to 2e-5 SFT
    )
    schedule: Literal["cosine", "linear", "constant"] = (
        "cosine"  # after warm-up: down to 0, or flat
    )
    warmup: float = 0.1  # share of all steps over which the rate rises from 0
    weight_decay: float = 0.0  # 0 to 0.1; matters little in short runs
    beta1: float = 0.9  # AdamW's mean of gradients; leave it
    beta2: float = 0.95  # AdamW's mean of squared gradients; 0.999 for very noisy gradients
    eps: float = 1e-8  # AdamW's floor under the square root; leave it
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping

    # numbers and machine
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = (
        "auto"  # of weights and activations; auto: bf16 on GPUs, else fp32
    )
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto = a GPU when there is one
    checkpoint_activations: bool = (
        False  # recompute each layer in the backward: a third more time, far less memory
    )
    compile: bool = False  # torch.compile the model: slow start, faster steps

    # many processes (torchrun); what --tp x --cp x --pp leaves of them is data parallel
    tp: int = 1  # ranks that share every matrix: as few as make the model fit, within one node
    cp: int = 1  # ranks that share one flat row of tokens: for very long prompts
    pp: int = 1  # stages of layers: for models that --tp within a node cannot hold; wants many micro-batches a step
    zero: Literal[1, 2] = (
        1  # 2 keeps only a piece of the gradients, and adds them up after every micro-batch
    )
    timeout_minutes: float = (
        30.0  # how long a rank may let the others wait before the run ends and names it
    )

    # watching and saving
    eval_every: int = (
        0  # optimizer steps between evaluations; 0 = only at the end when there is --eval-data
    )
    samples: int = 0  # answers to held-out prompts to print at every evaluation
    save_every: int = 0  # optimizer steps between checkpoints; 0 = only when stopped
    keep: int = (
        2  # newest checkpoints to keep, 0 = all; the best model is kept besides, in OUT/best
    )
    log_every: int = 1  # optimizer steps between rows of metrics.jsonl
    wandb: str = ""  # project to log to as well (pip install wandb)


def parse(cls: type, doc: str | None = None, argv: list[str] | None = None) -> Any:
    """Fills the dataclass `cls` from its defaults, then `--config FILE`, then the flags in `argv` (default sys.argv).

    Prints the help (`doc`, then a line a flag) and exits on --help. Exits with status 2 and one line on bad input.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "-h" in argv or "--help" in argv:
            print(help_text(cls, doc))
            raise SystemExit(0)
        flags = _read_flags(cls, argv)
        values = from_file(cls, flags["config"]) if flags.get("config") else {}
        return cls(**{**values, **flags})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_file(cls: type, path: str) -> dict[str, Any]:
    """The checked values of a JSON file of flags. ValueError: not readable, unknown key, bad value."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold one JSON object of flags")
    checked = {}
    for key, value in values.items():
        name = _known(cls, key, f"{path}: unknown key")
        words = value if isinstance(value, list) else [value]
        if any(isinstance(word, (dict, list)) or word is None for word in words):
            raise ValueError(f"{path}: {key} cannot be {json.dumps(value)}")
        checked[name] = _convert(cls, name, [str(word) for word in words], f"{path}: {key}")
    return checked


def to_json(config: Any) -> str:
    """The whole config as a JSON file that --config reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def comments(cls: type) -> dict[str, str]:
    """field name -> the comment beside its default, over the class and its parents."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        names = "|".join(base.__dict__.get("__annotations__", {}))
        # A field runs to the next line that opens another one; its comment is the last on it.
        name = None
        for line in inspect.getsource(base).splitlines():
            if opens := re.match(rf"    ({names}):", line):
                name = opens[1]
            comment = re.search(r"\s{2}# (.*)$", line)
            if name and comment:
                found[name], name = comment[1], None
    return found


def help_text(cls: type, doc: str | None) -> str:
    """What --help prints: the script's docstring, then every flag with its default and meaning."""
    lines = [(doc or "").strip(), "", "flags:"]
    meanings = comments(cls)
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        flag = f.name.replace("_", "-")
        if hints[f.name] is bool:
            head = f"--no-{flag}" if default else f"--{flag}"
        elif get_origin(hints[f.name]) is Literal:
            head = f"--{flag} {'|'.join(map(str, get_args(hints[f.name])))}"
        else:
            head = f"--{flag} {_word(hints[f.name])}"
        shown = "" if isinstance(default, bool) or default in ("", []) else f" [{default}]"
        lines.append(f"  {head}")
        lines += textwrap.wrap(
            meanings.get(f.name, "") + shown, 104, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
    return "\n".join(lines)


def _word(hint) -> str:
    return {int: "N", float: "X", str: "TEXT"}.get(hint, "TEXT [TEXT ...]")


def _known(cls: type, name: str, complaint: str) -> str:
    names = [f.name for f in dataclasses.fields(cls)]
    plain = name.replace("-", "_")
    if plain in names:
        return plain
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0].replace('_', '-')}?" if near else "; --help lists them"
    raise ValueError(f"{complaint} {name}{hint}")


def _read_flags(cls: type, argv: list[str]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    at = 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if not word.startswith("--"):
            raise ValueError(f"unexpected word {word!r}: flags start with --, --help lists them")
        name, equals, attached = word[2:].partition("=")
        positive = True
        if name.startswith(("no-", "no_")) and hints.get(name[3:].replace("-", "_")) is bool:
            name, positive = name[3:], False
        name = _known(cls, name, "unknown flag --")
        if hints[name] is bool and not equals:
            values[name] = positive
            continue
        words = [attached] if equals else []
        while not equals and at < len(argv) and not _is_flag(argv[at]):
            words.append(argv[at])
            at += 1
            if get_origin(hints[name]) is not list:
                break
        if not words:
            raise ValueError(f"--{name.replace('_', '-')} needs a value")
        value = _convert(cls, name, words, f"--{name.replace('_', '-')}")
        values[name] = value if positive else not value
    return values


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _convert(cls: type, name: str, words: list[str], label: str) -> Any:
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is list:
        return words
    if len(words) != 1:
        raise ValueError(f"{label} takes one value, not {len(words)}")
    word = words[0]
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        if word in choices:
            return choices[word]
        near = difflib.get_close_matches(word, choices, n=1)
        raise ValueError(
            f"{label} cannot be {word!r}: take one of {', '.join(choices)}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    if hint is bool:
        if word.lower() in ("true", "false"):
            return word.lower() == "true"
        raise ValueError(f"{label} is true or false, not {word!r}")
    try:
        return hint(word)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{label} needs {kind}, not {word!r}") from None


@dataclass
class RolloutConfig(RunConfig):
    """The flags of scripts that learn from samples of their own."""

    batch_size: int = 64  # prompts an optimizer step, over all ranks; each has --group-size samples
    group_size: int = 4  # samples a prompt; more make better baselines, 4 to 16
    max_new_tokens: int = 256  # longest sample; a prompt may have the rest of --max-length
    temperature: float = 1.0  # of the samples, and of the policy that is trained; leave it at 1 unless it stops exploring
    rollout_batch: int = 128  # samples drawn at a time on a rank: lower it when memory runs out
    reward: str = ""  # reward-model folder, file.py:function, exact:MARKER, regex:PATTERN or length:WORDS (rewards.py)
    no_eos_penalty: float = (
        0.0  # taken off the reward of a sample that did not end; about the reward's deviation
    )
    eval_temperature: float = (
        0.7  # of one sample to each prompt of --eval-data, whose mean reward is eval/reward
    )
    log_samples: int = (
        10  # steps between samples written to OUT/samples.jsonl, the first besides; 0 = never
    )
    rollout_url: str = (
        ""  # sample from this OpenAI-compatible server instead (vLLM, SGLang): http://host:8000
    )
    rollout_reload: str = (
        ""  # command that makes the server load new weights, "{folder}" stands for where they are
    )
    rollout_timeout: float = 600.0  # seconds that a request or a reload may take
