"""Counts of a step in sparse layers, and what keeps all their experts in use.

    balance = E Σ_e f_e P_e             f_e: share of tokens that chose expert e
    z       = mean (log Σ_e exp l_e)²   P_e: mean probability of expert e; l: the router's logits

(Switch Transformers, arXiv 2101.03961 Eq. 4 to 6; ST-MoE, 2202.08906 Eq. 5.) Both are means over
the sparse layers. Each of a token's K choices counts, as in transformers, so Σ_e f_e = K, and the
balance loss of even experts is K. transformers puts all layers into one mean first, where one layer
may make up for another; with one sparse layer the two are equal.

Exact, in any layout and packing: f and P are of the whole optimizer step, over all micro-batches
and ranks. The balance loss is no sum over tokens, so with more than one micro-batch a pass without
gradients counts f first. Given f and the number of tokens, the rest is a sum over tokens. A prompt
shared by k responses counts k times, as if it were repeated: --share-prompts changes nothing.

Where scores are sigmoids, P is of each token's scores divided by their sum (DeepSeek-V3, arXiv
2412.19437 Eq. 19), and the choice can be corrected without a loss: after a step expert e, which was
chosen n_e times in it, has

    b_e += u · sign(Σ n / E - n_e)

(Loss-free balancing, arXiv 2408.15664 Algorithm 1.) n is of the whole step as well.

Letters: T tokens, E experts, K experts of a token, L sparse layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from architecture import GPTConfig
from config import RunConfig
from kernels.device import upload
from layout import Spans
from parallel import Group, Mesh


@dataclass
class Routing:
    """Facts about the T tokens of a view that sparse layers need."""

    copies: Tensor | None  # (T,) fp64: responses that each token belongs to; None: do not count
    # (T, L, K): experts to use again, of every token and sparse layer; -1: the router's own choice
    fixed: Tensor | None = None
    chosen: list[Tensor] | None = None  # layers append the experts that they use, (T, K) each


def copies(spans: Spans, device: torch.device) -> Tensor:
    """Return how many responses each token of a flat row belongs to, (T,) fp64.

    [(2, [1, 2])] -> [2 2 | 1 | 1 1]
    """
    times = [n for _, responses in spans for n in (len(responses), *[1] * len(responses))]
    sizes = [size for prompt, responses in spans for size in (prompt, *responses)]
    return upload(torch.from_numpy(np.repeat(np.array(times, np.float64), sizes)), device)


class _Attach(torch.autograd.Function):
    """Return x; backward also starts from a loss, as if it were added to the script's loss.

    So a loss comes from the middle of the model and from any pipeline stage.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


class Tally:
    """Counts of a sparse layer's tokens, and the weights of its losses."""

    def __init__(self, experts: int, router: str = "softmax"):
        self.experts, self.router = experts, router
        self.balance = self.z = 0.0  # weights of the losses, divided by L
        self.rate = 0.0  # u, by which the correction moves; 0: never
        self.load: Tensor | None = None  # n since it moved, or a multiple of it, (E,) fp64
        self.counting = False  # the pass that counts before the step
        self.fractions: Tensor | None = None  # f of the whole step, (E,); None: of one micro-batch
        self.tokens = 0.0  # of the whole step
        # Chosen and probabilities of each expert, z, entropy and tokens, (2 E + 3,); None: nothing.
        self.sums: Tensor | None = None

    def observe(self, x: Tensor, logits: Tensor, chosen: Tensor, times: Tensor, ranks: int):
        """Count tokens and return x, (T, K), to whose backward the losses are attached.

        logits: (T, E). chosen: (T, K). times: copies of each token, (T,). ranks: how many tensor
        ranks add the gradients of the same logits.
        """
        if not (self.counting or torch.is_grad_enabled()):
            return x
        exact = torch.promote_types(logits.dtype, torch.float32)
        scores = F.logsigmoid(logits.to(exact)) if self.router == "sigmoid" else logits
        logps = torch.log_softmax(scores, -1, dtype=exact)
        p = logps.exp() * times[:, None]  # (T, E)
        z = torch.logsumexp(logits.to(exact), -1).square() * times  # (T,)
        with torch.no_grad():
            load = times.new_zeros(self.experts)
            load.index_add_(0, chosen.flatten(), times.repeat_interleave(chosen.shape[1]))
            rest = torch.stack([z.sum(), -(p * logps).sum(), times.sum()])
            sums = torch.cat([load, p.double().sum(0), rest.double()])
            self.sums = sums if self.sums is None else self.sums + sums
            if self.rate:
                self.load = load if self.load is None else self.load + load
        if self.counting or not (self.balance or self.z):
            return x
        fractions, tokens = self.fractions, torch.as_tensor(self.tokens)
        if fractions is None:
            tokens = times.sum()
            fractions = load / tokens
        loss = self.balance * self.experts * (fractions * p).sum() + self.z * z.sum()
        return _Attach.apply(x, loss / (tokens * ranks))


def set_balance(
    c: GPTConfig, tallies: dict[int, Tally], config: RunConfig, folder: str = ""
) -> bool:
    """Set the weights of the losses and the step of the bias; return whether layers add losses.

    folder: of --model, where this is it: then ValueError names a flag that has no effect on it.
    """
    losses = {"--balance-loss": config.balance_loss, "--router-z-loss": config.router_z_loss}
    flags = {**losses, "--balance-bias": config.balance_bias}
    given = [flag for flag, value in flags.items() if value]
    sparse = sum(c.sparse(layer) for layer in range(c.layers))
    if given and folder and not sparse:
        raise ValueError(f"{given[0]}: {folder} has no experts, so leave it out")
    if config.balance_bias and folder and c.router != "sigmoid":
        raise ValueError(
            f"--balance-bias: the routers of {folder} ({c.family}) have no bias: use --balance-loss"
        )
    if config.balance_bias and (config.lora or config.adapter):
        raise ValueError(
            "--balance-bias moves a weight of the router, and with adapters no weight of the model "
            "moves: drop it, or --lora and --adapter"
        )
    for tally in tallies.values():
        tally.balance, tally.z = config.balance_loss / sparse, config.router_z_loss / sparse
        tally.rate = config.balance_bias if c.router == "sigmoid" else 0.0
    return sparse > 0 and any(losses.values())


def start_count(tallies: list[Tally]) -> list[Tensor | None]:
    """Begin the pass that counts the step to come; return the sums so far, for `end_count`."""
    before = [tally.sums for tally in tallies]
    for tally in tallies:
        tally.counting, tally.sums = True, None
    return before


def end_count(tallies: list[Tally], before: list[Tensor | None], group: Group) -> None:
    """Set what each layer's losses need of the whole step. group: ranks with other tokens."""
    for tally, sums in zip(tallies, before):
        counted = group.all_reduce(tally.sums, "router")
        tally.tokens = float(counted[-1])
        tally.fractions = counted[: tally.experts] / tally.tokens
        tally.counting, tally.sums = False, sums


def correct(routers: Sequence[tuple[Tensor, Tally]], group: Group) -> None:
    """Move the corrections of routers, (E,) each, towards even loads of a step. Collective.

    group: ranks with other tokens.
    """
    if not routers:
        return
    counted = [bias.new_zeros(t.experts) if t.load is None else t.load for bias, t in routers]
    loads = group.all_reduce(torch.stack([load.double() for load in counted]), "router")  # (L, E)
    for (correction, tally), load in zip(routers, loads):
        correction += tally.rate * torch.sign(load.sum() - len(load) * load)


def metrics(tallies: dict[int, Tally], layers: int, experts: int, mesh: Mesh) -> dict[str, float]:
    """Return how evenly the experts were used since the last call, and start anew; collective.

    tallies: of this rank's layers, by number. layers: of the whole model.
    """
    table = torch.zeros(layers, 2 * experts + 3, dtype=torch.float64)
    for layer, tally in tallies.items():
        if tally.sums is not None:
            table[layer] = tally.sums.cpu()
        tally.sums = None
    table = mesh.group("world").all_reduce(table, "router")
    table = table[table[:, -1] > 0]  # (L, 2 E + 3); tensor ranks count alike, ratios stay
    if not len(table):
        return {}
    tokens = table[:, -1:]
    load = table[:, :experts] / tokens
    probability = table[:, experts : 2 * experts] / tokens
    z, entropy = (table[:, 2 * experts : -1] / tokens).mean(0).tolist()
    return {
        "router/max_load": (load.amax(1) / load.mean(1)).max().item(),
        "router/dead_experts": int((load == 0).sum()),
        "router/entropy": entropy,
        "router/balance_loss": experts * (load * probability).sum(1).mean().item(),
        "router/z_loss": z,
    }
