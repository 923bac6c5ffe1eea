"""Flags and values of TRL, OpenRLHF and axolotl, and what they are called here.

config.py gives these as hints where it refuses an unknown flag or value; docs/from_trl.md has the
table for people.
"""

NO_NEED = "leave it out: "
BATCH = (
    "--batch-size counts the examples of a step (online: its prompts) over all ranks, --max-tokens "
    "bounds memory"
)
# Flag of another system, with underscores -> what to write here; of several the first that the
# script has.
FLAGS: dict[str, str | tuple[str, ...]] = {
    # models and data
    "model_name_or_path": "--model",
    "pretrain": "--model",
    "base_model": "--model",
    "dataset_name": "--data org/name",
    "train_file": "--data",
    "datasets": "--data",
    "prompt_data": "--data",
    "eval_dataset": "--eval-data",
    "val_file": "--eval-data",
    "validation_file": "--eval-data",
    "dataset_train_split": "--data org/name:split",
    "dataset_test_split": "--eval-data org/name:split",
    "output_dir": "--out",
    "save_path": "--out",
    "ckpt_path": "--out",
    "sequence_len": "--max-length",
    "max_seq_length": "--max-length",
    "max_len": "--max-length",
    "max_prompt_length": "--max-length, which bounds a prompt with one response",
    "prompt_max_len": "--max-length, which bounds a prompt with one response",
    "truncation_mode": "--overlong truncate",
    "apply_chat_template": "--template",
    "chat_template_path": "--template",
    "input_key": NO_NEED + "docs/data.md lists the keys that are read",
    "packing": NO_NEED + "rows are always packed, and never see one another",
    "packing_samples": NO_NEED + "rows are always packed, and never see one another",
    "sample_packing": NO_NEED + "rows are always packed, and never see one another",
    "padding_free": NO_NEED + "nothing is ever padded",
    # optimisation
    "learning_rate": "--lr",
    "actor_learning_rate": "--lr",
    "critic_learning_rate": "--critic-lr",
    "per_device_train_batch_size": "--batch-size and --max-tokens: " + BATCH,
    "micro_train_batch_size": "--max-tokens: " + BATCH,
    "micro_batch_size": "--max-tokens: " + BATCH,
    "train_batch_size": "--batch-size",
    "rollout_batch_size": "--batch-size",
    "gradient_accumulation_steps": NO_NEED + BATCH,
    "num_train_epochs": "--epochs",
    "num_epochs": "--epochs",
    "max_epochs": "--epochs",
    "warmup_ratio": "--warmup",
    "warmup_steps": "--warmup, a share of all steps",
    "lr_warmup_ratio": "--warmup",
    "lr_scheduler_type": "--schedule",
    "lr_scheduler": "--schedule",
    "max_grad_norm": "--clip",
    "max_norm": "--clip",
    "gradient_clipping": "--clip",
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "adam_betas": "--beta1 and --beta2",
    "adam_epsilon": "--eps",
    "optim": NO_NEED + "the optimizer is AdamW with fp32 master weights",
    "optimizer": NO_NEED + "the optimizer is AdamW with fp32 master weights",
    "l2": "--weight-decay",
    # precision, memory, ranks
    "bf16": "--dtype bf16, the default on GPUs",
    "fp16": "--dtype bf16: fp16 needs a loss scale and is not there",
    "tf32": NO_NEED + "matrices are bf16, or fp32 with --dtype fp32",
    "torch_dtype": "--dtype",
    "gradient_checkpointing": "--checkpoint-activations",
    "torch_compile": "--compile",
    "attn_implementation": NO_NEED + "attention is fused in its own kernels",
    "flash_attn": NO_NEED + "attention is fused in its own kernels",
    "flash_attention": NO_NEED + "attention is fused in its own kernels",
    "use_liger_kernel": NO_NEED + "logits are never held whole",
    "deepspeed": "--zero 1, 2 or 3",
    "zero_stage": "--zero",
    "fsdp": "--zero 3, or --tp",
    "ds_tensor_parallel_size": "--tp",
    "ring_attn_size": "--cp",
    "load_in_4bit": "--base-dtype nf4 with --lora 16",
    "load_in_8bit": "--base-dtype int8 with --lora 16",
    # adapters
    "use_peft": "--lora 16",
    "lora_r": "--lora",
    "lora_rank": "--lora",
    "lora_target_modules": "--lora-targets",
    "target_modules": "--lora-targets",
    "lora_target_linear": "--lora-targets all, the default",
    "use_rslora": "--rslora",
    # output
    "report_to": "--wandb PROJECT or --tensorboard",
    "use_wandb": "--wandb PROJECT",
    "wandb_project": "--wandb",
    "run_name": "--out, whose last part is the run's name",
    "use_tensorboard": "--tensorboard",
    "logging_steps": "--log-every",
    "save_steps": "--save-every",
    "eval_steps": "--eval-every",
    "eval_strategy": "--eval-every",
    "evaluation_strategy": "--eval-every",
    "save_strategy": "--save-every",
    "save_total_limit": "--keep",
    "max_ckpt_num": "--keep",
    "resume_from_checkpoint": "--resume auto",
    "load_checkpoint": "--resume auto",
    "overwrite_output_dir": "another --out: nothing that was saved is overwritten",
    # preferences
    "loss_type": "--loss; GRPO's loss_type is --aggregate",
    "ref_model": "--ref",
    "ref_pretrain": "--ref",
    "rpo_alpha": "--sft-weight",
    "loss_weights": "--mix NAME:WEIGHT, beside --loss",
    "sync_ref_model": "--ref-every",
    "ref_model_sync_steps": "--ref-every",
    "ref_model_mixup_alpha": "--ref-mix",
    "f_divergence_type": "--f-divergence",
    "use_weighting": "--wpo",
    "nll_loss_coef": "--sft-weight",
    "simpo_gamma": "--gamma",
    "precompute_ref_log_probs": NO_NEED + "the reference is scored once, before training",
    "center_rewards_coefficient": "--centering",
    # online
    "reward_model_path": "--reward",
    "reward_model_name_or_path": "--reward",
    "reward_pretrain": "--reward",
    "reward_funcs": "--reward file.py:function",
    "remote_rm_url": "--reward file.py:function, a function that asks the server",
    "num_generations": "--group-size",
    "n_samples_per_prompt": "--group-size",
    "max_completion_length": "--max-new-tokens",
    "response_length": "--max-new-tokens",
    "generate_max_len": "--max-new-tokens",
    "use_vllm": "--rollout-url http://host:8000",
    "vllm_server_base_url": "--rollout-url",
    "num_ppo_epochs": "--ppo-epochs",
    "num_mini_batches": "--minibatches",
    "num_iterations": "--rollout-epochs",
    "steps_per_generation": "--minibatches",
    "beta": ("--kl", "--mix, the share of jsd"),  # of GRPO and RLOO, of GKD
    "init_kl_coef": "--kl",
    "kl_coef": "--kl",
    "cliprange": "--clip-ratio",
    "cliprange_value": "--clip-value",
    "eps_clip": "--clip-ratio (PPO), --clip-low and --clip-high (REINFORCE)",
    "epsilon": "--clip-low",
    "epsilon_high": "--clip-high",
    "vf_coef": "--critic-lr: the critic has an optimizer of its own",
    "lambd": "--lam",
    "missing_eos_penalty": "--no-eos-penalty",
    "scale_rewards": "--advantage",
    "advantage_estimator": "--advantage",
    "use_kl_loss": "--kl-in loss",
    "delta": "--dual-clip",
    "mask_truncated_completions": "--mask-cut",
    "importance_sampling_level": "--loss gspo for sequence",
    "vllm_mode": "--rollout-url",
    "lmbda": "--on-policy",
}
# (flag, value) of another system -> what to write here
VALUES = {
    ("loss", "dpo"): "DPO's loss is sigmoid",
    ("loss", "orpo"): "docs/add_an_algorithm.md adds ORPO",
    ("loss", "cpo"): "with --reference-free sigmoid is CPO's, --sft-weight adds its second part",
    ("loss", "kto_pair"): "KTO is train_kto.py",
    ("loss", "kto"): "KTO is train_kto.py",
    ("loss", "bnpo"): "GRPO's loss_type is --aggregate here: token",
    ("loss", "dr_grpo"): "--aggregate constant --advantage dr_grpo",
    ("loss", "grpo"): "GRPO is --loss grpo --advantage grpo in train_reinforce.py",
    ("schedule", "constant_with_warmup"): "constant, after --warmup",
    ("schedule", "cosine_with_min_lr"): "cosine goes to 0",
    ("dtype", "bfloat16"): "bf16",
    ("dtype", "float16"): "fp16 needs a loss scale and is not there: bf16",
    ("dtype", "float32"): "fp32",
    ("advantage", "group_norm"): "GRPO's is grpo",
}


def flag_hint(name: str, known: list[str]) -> str:
    """Return what a flag of another system is called here, "" if it is none of theirs.

    known: names of the script's own flags; a hint at another flag is none.
    """
    hints = FLAGS.get(name, "")
    for hint in (hints,) if isinstance(hints, str) else hints:
        words = [word.strip(",:;()") for word in hint.split() if word.startswith("--")]
        own = not words or words[0][2:].replace("-", "_") in known
        if own or not hint.startswith("--"):
            return hint
    return ""


def value_hint(name: str, value: str) -> str:
    """Return what a value of another system is called here, "" if it is none of theirs."""
    return VALUES.get((name, value), "")
