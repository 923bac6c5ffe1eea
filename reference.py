"""The reference's log-probs of the data, computed once before the first step and cached on disk.

The reference is the policy before its first update, or another folder (--ref), which is loaded,
scores and is freed: a script holds no second model. The cache key hashes weights, tokens, dtype and
examples, so a resumed run reads what it scored at first and never takes a half-trained policy for
its reference.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import checkpoint
import runtime
from config import RunConfig
from data.dataset import Dataset
from kernels.device import upload
from losses import length_weights
from model import GPT
from passes import forward
from reporting import Meter
from weights.folder import fingerprint, load_model, save_model


def add_ref_logps(
    policy: GPT,
    folder: str,
    data: Iterable[tuple[Dataset, np.ndarray | None]],
    config: RunConfig,
    ld_alpha: float = 1.0,
) -> dict[str, float]:
    """Add the column `ref_logps`, (R,), to data sets; return what scoring cost, {} if cached.

    data: (data set, examples to score or None for all); responses of others get NaN.
    folder: the reference; "" is the policy as it is now, "none" gives zeros. ld_alpha: weight of
    tokens by losses.length_weights, 1 for none. Collective.
    """
    cost: dict[str, float] = {}
    for dataset, examples in data:
        if folder == "none":
            dataset.columns["ref_logps"] = np.zeros(len(dataset.response_len))
            continue
        if examples is None:
            examples = np.arange(len(dataset))
        logps, spent = reference_logps(policy, folder, dataset, examples, config, ld_alpha)
        dataset.columns["ref_logps"] = logps
        cost = cost or spent
    return cost


@torch.no_grad()
def reference_logps(
    policy: GPT,
    folder: str,
    dataset: Dataset,
    examples: np.ndarray,
    config: RunConfig,
    ld_alpha: float = 1.0,
) -> tuple[np.ndarray, dict[str, float]]:
    """Return the reference's log-prob of every response, (R,), and what scoring cost, {} if cached.

    Responses that belong to none of `examples` get NaN. folder: the reference, "" for the policy as
    it is now. ld_alpha: as in `add_ref_logps`. Every rank scores its share and gets all of it.
    ValueError: a reference with another vocabulary than the policy's.
    """
    mesh = policy.mesh
    path = _cache_path(policy, folder, dataset, examples, config, ld_alpha)
    cached = _read_cache(path, len(dataset.response_len))
    if all(mesh.everyone(cached is not None)):
        print(f"reference: {len(examples)} examples from {path}")
        return cached, {}
    model = policy
    if folder:
        sharded = policy.shards is not None
        model = load_model(folder, policy.dtype, policy.device, mesh=mesh, sharded=sharded)
    if model.c.vocab != policy.c.vocab:
        raise ValueError(
            f"--ref {folder} has a vocabulary of {model.c.vocab}, the policy of {policy.c.vocab}: "
            "use a reference with the policy's tokenizer"
        )
    meter = Meter(model.c, policy.device, mesh)
    logps = response_logps(model, dataset, examples, config, ld_alpha, bar="reference")
    tokens = int(dataset.tree_lengths(config.share_prompts)[examples].sum())
    cost = meter.read(tokens)
    if mesh.main:
        _write_cache(path, logps)
    print(f"reference: {len(examples)} examples scored in {cost['seconds']:.1f} s, kept in {path}")
    return logps, {f"reference_{k}": cost[k] for k in ("seconds", "cpu_seconds") if k in cost}


@torch.no_grad()
def response_logps(
    model: GPT,
    dataset: Dataset,
    examples: np.ndarray,
    config: RunConfig,
    ld_alpha: float = 1.0,
    bar: str | None = None,
) -> np.ndarray:
    """Return a model's log-prob of the responses of some examples, (R,), NaN for others.

    ld_alpha: as in `add_ref_logps`. bar: label of a progress bar. Collective.
    """
    scored = torch.zeros(len(dataset.response_len), dtype=torch.float64, device=model.device)
    for batch, hidden in forward(model, dataset, examples, config, bar=bar):
        per_token = model.logps(hidden, batch)  # (M,)
        if ld_alpha != 1:
            per_token = per_token * length_weights(batch.response, batch.lengths, ld_alpha)
        sums = batch.sum_by_response(per_token)
        scored[upload(dataset.responses_of(batch.examples), model.device)] = sums
    logps = model.mesh.sum(scored.cpu()).numpy()  # one copy: the host runs ahead of the device
    unseen = np.ones(len(logps), bool)
    unseen[dataset.responses_of(examples)] = False
    logps[unseen] = np.nan
    return logps


def _cache_path(
    policy: GPT,
    folder: str,
    dataset: Dataset,
    examples: np.ndarray,
    config: RunConfig,
    ld_alpha: float,
) -> Path:
    """Return the cache file of these weights, tokens, dtype and examples."""
    start = [folder] if folder else [config.model, config.adapter]
    weights_hash = policy.mesh.ask(lambda: " ".join(fingerprint(f) for f in start if f))
    bits = "" if folder or config.base_dtype == "none" else f" {config.base_dtype}"
    weighed = "" if ld_alpha == 1 else f" ld {ld_alpha}"
    inputs = f"{weights_hash} {dataset.key} {policy.dtype}{bits}{weighed}"
    ordered = np.sort(examples).astype(np.int64)
    digest = hashlib.sha256(inputs.encode()).digest()
    key = hashlib.sha256(digest + ordered.tobytes()).hexdigest()[:24]
    return runtime.cache_folder(config) / f"reference-{key}.safetensors"


def _read_cache(path: Path, n: int) -> np.ndarray | None:
    """Return the cached log-probs of n responses, None if there are none or the file is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            cached = file.get_tensor("logps")
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        cached, digest = np.empty(0), None
    if len(cached) != n or digest != hashlib.sha256(cached.tobytes()).hexdigest():
        print(f"warning: {path} is damaged, scoring again")
        return None
    return cached


def _write_cache(path: Path, logps: np.ndarray) -> None:
    """Write the log-probs to a temporary file and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"logps": logps}, partial, {"sha256": hashlib.sha256(logps.tobytes()).hexdigest()})
    partial.replace(path)


# ---- a reference that follows its policy -------------------------------------------------------


def first_reference(run: runtime.Run, model: GPT, folder: str, every: int, step: int) -> GPT:
    """Return the frozen reference of a run that starts, or goes on, after `step` steps.

    folder: --ref, where "" is the policy at step 0. every: --ref-every, steps between renewals; a
    resumed run finds the last one beside its checkpoint.
    """
    since = _since(every, step)
    if since and run.checkpoint:
        folder = str(run.checkpoint.parent / f"reference_{since}")
    return runtime.load_reference(run, model, folder)


def renew_reference(
    run: runtime.Run, model: GPT, every: int, step: int, old: GPT | None = None, mix: float = 1.0
) -> GPT:
    """Write the policy to OUT/reference_N, N = step, and return it as the new reference.

    With mix α < 1 the new reference's weights are α policy + (1 - α) old: TR-DPO's soft update,
    arXiv 2404.09656. It is read back from the disk, so that a resumed run has the same one. Folders
    that no checkpoint needs are removed. Collective.
    """
    config = run.config
    folder = Path(config.out) / f"reference_{step}"
    save_model(model, folder, config.model, run.template)
    if mix < 1:
        mixed = runtime.load_reference(run, model, str(folder))
        before = _tensors(old)
        for name, weight in _tensors(mixed).items():
            weight.copy_(mix * weight.double() + (1 - mix) * before[name].double())
        save_model(mixed, folder, config.model, run.template)
    run.mesh.ask(lambda: _drop_references(config, every, step))
    return runtime.load_reference(run, model, str(folder))


def _tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Return what this rank holds of a frozen model: parameters, or pieces of them (--zero 3)."""
    flats = [flat for part in model.shards.own.values() for flat in part] if model.shards else []
    pieces = {" ".join(name for name, _ in flat.named): flat.piece for flat in flats}
    in_pieces = {name for flat in flats for name, _ in flat.named}
    whole = {name: p.data for name, p in model.named_parameters() if name not in in_pieces}
    return {**whole, **pieces}


def _since(every: int, step: int) -> int:
    """Return after which step the policy was taken that is the reference after `step` steps."""
    return step // every * every if every else 0


def _drop_references(config: RunConfig, every: int, step: int) -> None:
    """Remove the folders of references that neither this step nor a checkpoint needs."""
    saved = checkpoint.steps_begun(config.out)
    needed = {f"reference_{_since(every, s)}" for s in (*saved, step)}
    for path in Path(config.out).glob("reference_*"):
        if path.name not in needed:
            shutil.rmtree(path)
