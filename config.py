"""The flags that scripts share, and the types of numbers with their valid values.

commandline.py turns these classes, and those that scripts derive from them, into command lines.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from commandline import LARGEST, Range

# Types of numbers, with their valid values.
Count = Annotated[int, Range(0, LARGEST)]
Number = Annotated[int, Range(1, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy's limit
Real = Annotated[float, Range()]
Amount = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
Part = Annotated[float, Range(0, 1, below=True)]
Epsilon = Annotated[float, Range(1e-30)]  # fp32 holds no less for sure
Temperature = Annotated[float, Range(1e-3)]  # logits / 1e-3 still fit
SampleTemperature = Annotated[float, Range(1e-3, zero=True)]  # 0: the likeliest token
Wait = Annotated[float, Range(0, 1e6, above=True)]  # timers take no more


@dataclass
class RunConfig:
    """The flags of every training script; a comment after a blank line opens a group of them."""

    # data
    data: list[str] = field(default_factory=list)  # training rows: JSONL, a JSON array, CSV
    # or TSV, each also as .gz; Parquet, Arrow, folders of save_to_disk, org/name of the hub.
    # FILE:WEIGHT of each blends them: a.jsonl:0.7 b.jsonl:0.3
    eval_data: list[str] = field(default_factory=list)  # held-out rows for evaluation; NAME=FILE
    # for several sets, whose metrics are eval/NAME/...
    best_by: str = ""  # name of the set of --eval-data that decides what OUT/best is; default: the
    # first
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = "auto"  # of chats;
    # auto: that of --model if it has one, else plain: bos, prompt, response, eos
    template_kwargs: str = ""  # values for the chat template, as in '{"enable_thinking": false}'
    max_length: Number = 1024  # most tokens of a prompt with one response; see --overlong
    overlong: Literal["drop", "truncate"] = "drop"  # longer rows: drop them, or cut the prompt from
    # the left (never the response)
    ignore_keys: list[str] = field(
        default_factory=list
    )  # keys of rows to leave out, such as images
    max_bad_rows: Count = 0  # unreadable rows to skip and report; 0 stops at the first
    shuffle: bool = True  # new order every epoch, from --seed; --no-shuffle keeps that of the files
    seed: Seed = 0  # of data order, sampling and everything else random
    cache: str = ""  # folder of tokenised data and reference log-probs, can be shared by runs;
    # default: OUT/cache

    # model
    model: str = ""  # Hugging Face folder to start from (config.json, *.safetensors, a tokenizer),
    # or its name on the hub
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # of weights and activations;
    # auto: bf16 on GPUs, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one
    checkpoint_activations: bool = False  # recompute layers in the backward pass: a third more
    # time, far less memory
    compile: bool = False  # torch.compile the layers: slow start, faster steps

    # experts: losses of the router beside the algorithm's own, over the whole step
    balance_loss: Amount = 0.0  # weight of the loss that evens the load of experts; 0 = none, 0.001
    # to 0.02 as in pretraining
    router_z_loss: Amount = 0.0  # weight of the loss that keeps the router's logits small; 0.001
    balance_bias: Amount = 0.0  # step of the bias by which the router evens the load without a
    # loss, where it has one (glm4_moe); 0 = it stays, 0.001 as in pretraining

    # adapters: LoRA, of which alone is trained where --lora or --adapter is given
    lora: Count = 0  # rank of an adapter beside every target, 8 to 64; 0: train all weights
    lora_alpha: Amount = 0.0  # an adapter counts alpha / rank; 0: twice the rank
    lora_targets: list[str] = field(
        default_factory=lambda: ["all"]
    )  # all, attention, mlp, or names
    # of linears: q k v out gate up down
    lora_dropout: Part = 0.0  # share of an adapter's inputs dropped in training; 0 to 0.1
    rslora: bool = False  # scale alpha / √rank, for ranks of 64 and more
    base_dtype: Literal["none", "bf16", "fp8", "int8", "nf4"] = "none"  # of the frozen linears;
    # none: --dtype. nf4 takes a quarter of bf16's memory, int8 and fp8 half
    adapter: str = ""  # folder of an adapter in PEFT's format to go on from
    merge: bool = True  # --no-merge writes OUT/adapter alone, without the merged OUT/final

    # optimisation: AdamW with fp32 master weights, no decay on norms and biases
    batch_size: Number = 64  # examples an optimizer step, over all ranks
    epochs: Number = 1  # passes over the data; preference losses overfit after 1 to 3
    max_steps: Count = 0  # stop after this many steps; 0: when the epochs are done
    max_minutes: Amount = 0.0  # save and stop after this long; 0: never
    lr: Amount = 5e-7  # peak learning rate; for 7B models 5e-7 (preferences), 1e-5 to 2e-5 (SFT)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up: to 0, or flat
    warmup: Share = 0.1  # share of all steps over which the learning rate rises from 0
    weight_decay: Amount = 0.0  # 0 to 0.1; matters little in short runs
    beta1: Part = 0.9  # AdamW's decay of the mean gradient; rarely worth changing
    beta2: Part = 0.95  # AdamW's decay of the mean squared gradient; 0.999 for noisy gradients
    eps: Epsilon = 1e-8  # AdamW's term in the denominator; rarely worth changing
    clip: Amount = 1.0  # largest gradient norm; 0: no clipping

    # layout: torchrun starts the processes; those that --tp, --cp and --pp leave are data parallel
    max_tokens: Number = 8192  # tokens of a micro-batch on a rank; lower it when memory runs out:
    # results change by rounding alone
    share_prompts: bool = True  # compute a prompt once for all its responses; --no-share-prompts
    # repeats it, with the same results
    tp: Number = 1  # ranks that split every matrix: as few as make the model fit, within one node
    cp: Number = 1  # ranks that split a row of tokens: for very long prompts
    pp: Number = 1  # pipeline stages: for models that --tp within a node cannot hold; needs many
    # micro-batches a step
    ep: Number = 1  # ranks, of those that --tp and --pp leave, that share the experts of a layer:
    # for mixtures of experts; it divides their number
    zero: Literal[1, 2, 3] = (
        1  # 1 shards the optimizer; 2 gradients too, reduced every micro-batch;
    )
    # 3 weights too, gathered layer by layer: for models that no other layout fits
    offload: Literal["none", "optimizer"] = "none"  # optimizer: AdamW in host memory, on the CPU;
    # 12 bytes less a parameter that a GPU owns, and a slower step
    grad_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients add up over micro-batches and
    # ranks; bf16 halves them, and rounds: with few of both
    timeout_minutes: Wait = 30.0  # longest wait for another rank before the run ends and names it

    # output
    out: str = ""  # folder of metrics.jsonl, checkpoints step_N/, best/ and final/; default: a new
    # one after script and time, such as runs/train_dpo-20261127-090059
    resume: str = ""  # auto: continue from the newest intact checkpoint of --out; or one's folder
    resume_changed: bool = False  # resume although what --data, --model or another flag names has
    # changed since the checkpoint was written
    config: str = ""  # JSON or YAML file of flags, such as OUT/config.json; other flags override it
    eval_every: Count = 0  # steps between evaluations; 0: only at the end, if there is --eval-data
    samples: Count = 0  # answers to held-out prompts to print at every evaluation
    save_every: Count = 0  # steps between checkpoints; 0: only when stopped
    async_save: bool = False  # write checkpoints while training goes on, from a copy in host memory
    keep: Count = 2  # newest checkpoints to keep, 0: all; OUT/best is kept as well
    log_every: Number = 1  # steps between rows of metrics.jsonl
    wandb: str = ""  # Weights & Biases project to log to as well (pip install wandb)
    tensorboard: bool = False  # write OUT/tensorboard as well (pip install tensorboard)


@dataclass
class RolloutConfig(RunConfig):
    """The flags of scripts that train on samples of their own policy."""

    batch_size: Number = 64  # prompts a step, over all ranks; each has --group-size samples, which
    # several updates may use

    # rollout
    group_size: Number = 4  # samples a prompt; more make better baselines, 4 to 16
    max_new_tokens: Number = 256  # longest sample; its prompt may have the rest of --max-length
    temperature: Temperature = 1.0  # of samples and of the trained policy; 1 unless it stops
    # exploring
    top_k: Count = 0  # draw samples from the k likeliest tokens; 0: all
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0  # draw from the likeliest tokens that
    # make up this much probability; both leave the loss's own log-probs whole: docs/reinforce.md
    min_new_tokens: Count = 0  # tokens of a sample before it may end; 0 unless samples end at once
    stop: list[str] = field(default_factory=list)  # texts that end a sample, which keeps them
    rollout_batch: Number = 128  # samples drawn at a time on a rank; lower it when memory runs out
    reward: str = ""  # reward-model folder, judge:DIR or judge:URL, file.py:function, exact:MARKER,
    # boxed:, regex:PATTERN or length:WORDS (sampling/rewards.py)
    reward_read: Literal["auto", "end", "last"] = "auto"  # token at which a reward model is read:
    # the end of turn, or the last of its template; auto: by the folder, which is said
    reward_weights: list[str] = field(default_factory=list)  # NAME:WEIGHT of each of several named
    # rewards; those left out are only logged; default: all count 1
    overlong_buffer: Count = 0  # tokens before --max-new-tokens in which DAPO's penalty for length
    # grows from 0 to --overlong-penalty; a fifth of the longest response
    overlong_penalty: Amount = 1.0  # subtracted from the reward of a response of full length
    no_eos_penalty: Amount = 0.0  # subtracted from the reward of a sample that did not end;
    # about one standard deviation of the reward
    eval_temperature: SampleTemperature = 0.7  # of the sample to each prompt of --eval-data; their
    # mean reward is eval/reward
    log_samples: Count = 10  # steps between samples in OUT/samples.jsonl, besides the first; 0:
    # never
    rollout_url: list[str] = field(default_factory=list)  # OpenAI-compatible servers to sample
    # from, http://host:8000; several share the prompts; vLLM needs no more (docs/engine.md)
    rollout_reload: str = ""  # for other engines: command that makes the servers load new weights
    # from {folder}, which is also in the environment as PLUMB_FOLDER
    rollout_transfer: Literal["folder", "nccl"] = "folder"  # how new weights reach vLLM: it reads
    # OUT/rollout, or a GPU here sends them (docs/engine.md)
    rollout_ahead: Annotated[int, Range(0, 64)] = 0  # steps by which the servers draw ahead, while
    # this process trains; samples are as many steps old. 0: on policy; 1 uses both all the time
    engine_correction: Literal["auto", "none", "truncate", "mask"] = "auto"  # weigh tokens by
    # policy / sampler where the two differ: cut at --engine-cap, or left out beyond it; auto:
    # truncate with --rollout-ahead, else none
    engine_by: Literal["token", "sequence"] = "token"  # sequence: the product over a response
    engine_cap: Annotated[float, Range(1, 1e6)] = 2.0  # largest weight; 2 to 5
    replay_routing: bool = False  # of a mixture of experts: train with the experts that sampling
    # chose, which rounding can change
    rollout_timeout: Wait = 600.0  # seconds that a request or a reload may take


def check_layout(config: RunConfig) -> None:
    """Check that the flags of the layout go together. ValueError names the flag and the fix."""
    if config.zero == 3 and config.pp > 1:
        raise ValueError(f"--zero 3 is not supported with --pp {config.pp}: use --tp, or --zero 2")
    if config.zero == 3 and config.base_dtype != "none":
        raise ValueError(
            f"--zero 3 does not shard a base of --base-dtype {config.base_dtype}: drop one of them"
        )
    for axis in ("pp", "ep"):
        if config.samples and getattr(config, axis) > 1:
            raise ValueError(f"--samples is not supported with --{axis} > 1: drop one of them")
