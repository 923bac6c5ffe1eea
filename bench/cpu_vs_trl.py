"""Compare CPU-seconds a step and peak memory with TRL's trainers, on one thread.

    python bench/cpu_vs_trl.py --data gsm8k.jsonl chat.jsonl --tokenizer t.model --json out.json
    python bench/cpu_vs_trl.py --data pairs.jsonl --tokenizer t.model --algorithm rm kto
    python bench/cpu_vs_trl.py --data pairs.jsonl --tokenizer t.model --algorithm grpo --steps 4
    python bench/cpu_vs_trl.py --data pairs.jsonl --tokenizer t.model --tiny     plumb alone
    python bench/cpu_vs_trl.py --data pairs.jsonl --model SmolLM2-135M [--lora 16]

--algorithm dpo, rm, kto  train_dpo.py, train_rm.py and train_kto.py against TRL's DPOTrainer,
    RewardTrainer and KTOTrainer (for KTO the pairs are taken apart into {prompt, completion,
    label}). TRL runs with recomputing of activations, its default; stock, without it; and with
    precompute_ref_log_probs as well, where the reference scores once, up front, as in plumb, and
    not inside every step. Two workloads:
      long prompts   pairs with short answers, solved examples of the same file put before them
      long answers   pairs with a short prompt and answers of some hundred tokens
    --workloads "as they are" takes the rows of a file in their order.
--algorithm generate  plumb's sampler against transformers' generate: 64 new tokens, temperature 1,
    no early stop, for 32 prompts and for 8 samples of each of 4. Both also answer greedily, which
    shows that they do the same work.
--algorithm grpo  train_reinforce.py --advantage grpo --kl 0 against GRPOTrainer with beta=0
    and loss_type="dapo", one update a rollout: 8 samples of 64 tokens, no early stop, to each of 4
    prompts a step, rewarded by length:50. The two draw different samples, so plumb also trains on
    TRL's (untimed): rewards and gradient norms must agree.
--algorithm gkd  train_distill.py, with the live teacher and with its top K on disk, against
    GKDTrainer (trl.experimental) with lmbda=0: the chosen answers are the data. The teacher is a
    wider random Llama, or that of --teacher. --divergences: jsd (beta 0.5), forward (0),
    reverse (1).

--dtype is plumb's, --trl-dtype TRL's if it is another. On a CPU bf16 (by autocast) is TRL's default
and fp32 is plumb's. Master weights are in fp32, and losses in bf16 agree less closely. Most laptops
have no instructions for bf16: ONEDNN_MAX_CPU_ISA=AVX512_CORE before the command hides them, which
makes bf16 as slow as it is there, and changes nothing in fp32.

--lora RANK gives all linears of the blocks adapters, TRL's by peft; both start from the same ones.

Both sides train the same random Llama, or that of --model, on the same real rows, {prompt, chosen,
rejected} as strings or messages, in the same order with the same AdamW. Every run is a process of
its own; runs are interleaved, and medians over the repeats are printed.

Only texts that both sides tokenise alike are taken. TRL's tokens are compared with plumb's before
it trains, and the losses of every step after. Three starting points are made equal, none of which
costs or saves time: TRL's score head starts at zero, as plumb's does; TRL pads with another token
than the end token, at which the score is read; KTO's steps reach TRL in reverse order of rows,
because it takes the mismatched answer from the row before and plumb from the row after.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from cpu_distill import DIVERGENCES, compare_distill
from cpu_grpo import compare_grpo
from cpu_process import ROOT, start
from cpu_rows import BATCH, WORKLOADS
from cpu_sampling import compare_sampling
from cpu_training import RUNS, compare_training

NEEDED = {  # module: what to install
    "trl": "trl==1.16.0",
    "transformers": "transformers",
    "datasets": "datasets",
    "google": "protobuf",
}
MODEL = {"width": 256, "layers": 6, "heads": 8, "kv-heads": 4, "ffn": 704}
TINY_MODEL = {"width": 64, "layers": 2, "heads": 4, "kv-heads": 2, "ffn": 128}
COMPARE = {
    "dpo": compare_training,
    "rm": compare_training,
    "kto": compare_training,
    "generate": compare_sampling,
    "grpo": compare_grpo,
    "gkd": compare_distill,
}


def new_model(tokenizer: str, sizes: dict[str, int], work: Path) -> Path:
    """Make a Llama of random weights with hf.py new, and a tokenizer that both sides read."""
    source = Path(tokenizer)
    if source.is_file():
        folder = work / "tokenizer"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(source.read_bytes())
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        source = folder
    flags = {"family": "llama", "tokenizer": source, **sizes, "out": work / "model", "seed": 0}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    start([sys.executable, ROOT / "hf.py", "new", *words], work / "new.log")
    return work / "model"


def with_bos(model: Path, work: Path) -> Path:
    """Return the model with a tokenizer whose texts open with bos, as plumb's plain template does.

    A byte-level tokenizer often adds none of its own, and then no text would be the same.
    """
    if not (model / "tokenizer.json").exists() or (model / "tokenizer.model").exists():
        return model
    folder = work / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    bos = json.loads((model / "tokenizer_config.json").read_text())["bos_token"]
    bos = bos if isinstance(bos, str) else bos["content"]
    token = {"id": next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == bos)}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {bos: {"id": bos, "ids": [token["id"]], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def print_legend(args: argparse.Namespace) -> None:
    """Explain the columns of the tables."""
    if not args.tiny:
        print(f"plumb in {args.dtype}, TRL in {args.trl_dtype}. Only `TRL recompute` recomputes")
        print("activations, its default.")
    print(
        "CPU s/step: mean of all steps but the first, user and kernel. with reference: plus one\n"
        "scoring of these rows by the reference, spread over the steps; TRL stock pays it inside\n"
        "them. kernel: its share of the process's CPU time. peak GB: the whole process.\n"
        f"malloc: {args.malloc}. Medians of {args.repeats} runs."
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", nargs="+", required=True, help="preference files, JSONL")
    flag("--tokenizer", help="tokenizer.model, or a folder with a Llama tokenizer")
    flag("--model", help="a Hugging Face Llama with its tokenizer, instead of random weights")
    flag("--teacher", help="a Hugging Face Llama of the same vocabulary, for gkd")
    flag("--divergences", nargs="+", choices=DIVERGENCES, default=["jsd"], help="of gkd")
    flag("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    flag("--algorithm", nargs="+", choices=COMPARE, default=["dpo"], help="what to compare")
    flag("--workloads", nargs="+", choices=WORKLOADS, default=["long prompts", "long answers"])
    flag("--steps", type=int, default=12, help=f"timed steps of {BATCH} rows, after one more")
    flag("--repeats", type=int, default=3, help="runs of each kind")
    flag("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products and activations")
    flag("--trl-dtype", choices=("fp32", "bf16"), help="the same of TRL (default: --dtype)")
    flag("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    flag("--max-tokens", type=int, default=8192, help="plumb's micro-batch")
    flag("--malloc", choices=("keep", "default"), default="keep", help="keep freed memory")
    flag("--json", help="write every number to this file")
    flag("--tiny", action="store_true", help="test of this command: plumb alone, two steps")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.trl_dtype = args.trl_dtype or args.dtype
    if not (args.model or args.tokenizer):
        sys.exit("error: give --model DIR, or --tokenizer for a model of random weights")
    if args.tiny:
        args.steps, args.repeats, args.runs = 1, 1, ["plumb"]
    missing = [
        package for module, package in NEEDED.items() if not importlib.util.find_spec(module)
    ]
    if missing and not args.tiny:
        sys.exit(f"TRL's side needs: pip install {' '.join(missing)} (or use --tiny, without TRL)")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = TINY_MODEL if args.tiny else MODEL
        spec = {
            "model": str(
                with_bos(Path(args.model), work)
                if args.model
                else new_model(args.tokenizer, sizes, work)
            ),
            "lora": args.lora,
            "workloads": args.workloads,
            "steps": args.steps + 1,
            "max_tokens": args.max_tokens,
            "dtype": args.dtype,
            "trl_dtype": args.trl_dtype,
            "tiny": args.tiny,
            "work": folder,
            "malloc": args.malloc,
        }
        print_legend(args)
        everything = {"settings": vars(args), "workloads": {}}
        for algorithm in args.algorithm:
            compare = COMPARE[algorithm]
            for name, numbers in compare({**spec, "algorithm": algorithm}, args):
                everything["workloads"][name] = numbers
                if args.json:
                    Path(args.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
