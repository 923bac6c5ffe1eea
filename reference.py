import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from config import RunConfig
from data.dataset import Dataset
from data.trees import make_batch, micro_batches
from model import GPT
from pipeline import pipeline
from reporting import Meter
from runtime import cache_folder
from weights.folder import fingerprint, load_model


@torch.no_grad()
def reference_logps(
    policy: GPT,
    other: str,
    dataset: Dataset,
    examples: np.ndarray,
    config: RunConfig,
    say: Callable[[str], Any],
) -> tuple[np.ndarray, dict[str, float]]:
    """Log-prob of every response of some examples under the reference, (R,), NaN for those of other examples; and what
    it cost, {} if it was cached.

    The reference is the policy before its first update, or the folder `other`, which is loaded, scores, and is freed.
    The result is kept in the cache under the hash of weights, tokens and type: a resumed run reads it and cannot take
    a half-trained policy for its reference. Every rank scores its share and gets all of it.
    """
    dtype, device, mesh = policy.dtype, policy.device, policy.mesh
    inputs = hashlib.sha256(
        f"{mesh.ask(lambda: fingerprint(other or config.model))} {dataset.key} {dtype}".encode()
    )
    key = hashlib.sha256(
        inputs.digest() + np.sort(examples).astype(np.int64).tobytes()
    ).hexdigest()[:24]
    path = cache_folder(config) / f"reference-{key}.safetensors"
    cached = _cached_logps(path, len(dataset.response_len), say)
    if all(mesh.everyone(cached is not None)):
        say(f"reference: {len(examples)} examples from {path}")
        return cached, {}
    model = load_model(other, dtype, device, mesh=mesh) if other else policy
    if model.c.vocab != policy.c.vocab:
        raise ValueError(
            f"--ref {other} has a vocabulary of {model.c.vocab}, the policy {policy.c.vocab}: not a pair"
        )
    meter = Meter(model.c, device, mesh)
    logps = np.zeros(len(dataset.response_len))
    lengths = dataset.tree_lengths(config.share_prompts)
    bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
    batches = (make_batch(dataset, items, config.share_prompts) for items in bins)
    shown = tqdm(
        pipeline(model, batches), "reference", len(bins), disable=None if mesh.main else True
    )
    for batch, hidden in shown:
        logps[dataset.responses_of(batch.examples)] = (
            batch.sum_by_response(model.logps(hidden, batch)).cpu().numpy()
        )
    logps = mesh.sum(torch.from_numpy(logps)).numpy()
    unseen = np.ones(len(logps), bool)
    unseen[dataset.responses_of(examples)] = False
    logps[unseen] = np.nan
    cost = meter.read(int(lengths[examples].sum()))
    if mesh.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"logps": logps}, partial)
        partial.replace(path)
    say(f"reference: {len(examples)} examples scored in {cost['seconds']:.1f} s, kept in {path}")
    return logps, {f"reference_{k}": cost[k] for k in ("seconds", "cpu_seconds") if k in cost}


def _cached_logps(path: Path, n: int, say: Callable[[str], Any]) -> np.ndarray | None:
    """The cached log-probs of n responses, None where there are none or the file is damaged."""
    try:
        cached = load_file(path)["logps"] if path.exists() else None
    except (SafetensorError, KeyError):
        say(f"warning: {path} is damaged, scoring again")
        return None
    return cached if cached is not None and len(cached) == n else None
