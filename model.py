"""One compact GPT on flat rows of packed trees: Llama and its relatives, GPT-NeoX.

    hidden = model(batch)                             (T, D); a rank's rows of it with --tp or --cp
    logps = model.logps(hidden, batch)                (M,) log-prob of each scored token
    scores = model.score(hidden, batch, batch.last)   (R, outputs) of a reward model

A block is a mixer (mixers.py) and an MLP. With more than one rank a model holds its rank's slices
of its stage's weights, under the names they have in the whole model.

Letters: T tokens, M scored tokens, R responses, D width, F MLP width.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import routing
from architecture import GPTConfig
from data.trees import TreeBatch
from kernels.device import upload
from kernels.kl import Divergence
from kernels.top_k import bucket_divergence
from layers import Linear, Norm, Vocabulary, Weight, weights_of
from mixers import Angles, Attention, TreeView, View
from mlp import MLP
from moe import Experts
from parallel import Mesh, assemble, enter, split
from rotary import amplitude, frequencies
from routing import Routing, Tally, copies

ALONE = Mesh()


class Block(nn.Module):
    """One layer: a mixer and an MLP, one after the other or (GPT-NeoX) side by side.

    Each has a norm before it, or (OLMo 2) after it, or (Gemma) both.
    """

    def __init__(self, c: GPTConfig, layer: int, mesh: Mesh):
        super().__init__()
        self.parallel_residual, self.norms = c.parallel_residual, c.norms
        self.scale = c.residual_scale
        self.norm1 = Norm(c.width, c.norm, c.norm_eps, mesh)
        self.norm2 = Norm(c.width, c.norm, c.norm_eps, mesh)
        if c.norms == "both":
            self.after1 = Norm(c.width, c.norm, c.norm_eps, mesh)
            self.after2 = Norm(c.width, c.norm, c.norm_eps, mesh)
        self.mixer = Attention(c, layer, mesh)
        self.sparse = c.sparse(layer)
        self.mlp = Experts(c, layer, mesh) if self.sparse else MLP(c, c.ffn, mesh)

    def forward(self, x: Tensor, view: View) -> Tensor:
        """(T / tp, D) -> (T / tp, D)."""
        if self.parallel_residual:
            return x + self.mixer(self.norm1(x), view) + self.feed(self.norm2(x), view)
        if self.norms == "after":
            x = x + self.norm1(self.mixer(x, view))
            return x + self.norm2(self.feed(x, view))
        if self.norms == "both":
            x, normed = self.norm2.add(x, self.after1(self.mixer(self.norm1(x), view)))
            return x + self.after2(self.feed(normed, view))
        x, normed = self.norm2.add(x, self.scaled(self.mixer(self.norm1(x), view)))
        return x + self.scaled(self.feed(normed, view))

    def feed(self, x: Tensor, view: View) -> Tensor:
        """Return the MLP's output, (T / tp, D) -> (T / tp, D)."""
        tokens = len(view.positions)
        return self.mlp(x, tokens, view.routing) if self.sparse else self.mlp(x, tokens)

    def scaled(self, update: Tensor) -> Tensor:
        """Return what is added to the residual stream."""
        return update if self.scale == 1.0 else update * self.scale


class GPT(nn.Module):
    """Embedding, blocks, final norm, and output head or score head; its weights are uninitialised.

    ValueError: more tensor ranks than key/value heads, more stages than layers, or experts that
    the ranks of --ep cannot share evenly.
    """

    hf_config: dict[str, Any]  # the raw config.json, set by whoever fills in the weights
    # Reads this rank's slice of a weight from disk, as it was before it was quantised.
    original: Callable[[str], Tensor] | None = None

    def __init__(self, c: GPTConfig, mesh: Mesh = ALONE):
        super().__init__()
        if c.kv_heads < mesh.tp:
            raise ValueError(
                f"--tp {mesh.tp}: the model has {c.kv_heads} key/value heads, use at most that many"
            )
        if c.layers < mesh.pp:
            raise ValueError(
                f"--pp {mesh.pp}: the model has {c.layers} layers, use at most that many stages"
            )
        if c.experts % mesh.ep:
            fitting = [n for n in range(1, c.experts + 1) if c.experts % n == 0]
            raise ValueError(
                f"--ep {mesh.ep}: the model has {c.experts} experts a layer, use one of "
                f"{', '.join(map(str, fitting))}"
            )
        self.c, self.mesh, self.tp = c, mesh, mesh.group("tp")
        first, last = split(c.layers, mesh.pp, mesh.pp_rank)
        has_head = mesh.last_stage and not c.outputs
        tied = c.tied and not c.outputs
        self.embed = None
        if first == 0 or has_head and c.tied:
            self.embed = Vocabulary(c.vocab, c.width, mesh, tied, c.logit_cap)
        self.blocks = nn.ModuleDict({str(i): Block(c, i, mesh) for i in range(first, last)})
        self.norm = Norm(c.width, c.norm, c.norm_eps, mesh) if mesh.last_stage else None
        self.head = None
        if has_head and not c.tied:
            self.head = Vocabulary(c.vocab, c.width, mesh, logit_cap=c.logit_cap)
        if c.outputs and mesh.last_stage:
            self.score_head = Linear(c.width, c.outputs, mesh)
        self.checkpoint_activations = False
        self.replays = False  # tokens go to the experts that their batch names
        self.balancing = False  # sparse layers add losses of their own (routing.py)
        self.pending: dict[str, list] = {}  # part of the model -> buckets whose weights may be late
        self.shards: Any = None  # --zero 3: sharding.Shards, which gathers a part for its use
        self._frequencies: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def output(self) -> Vocabulary:
        """The output head, which is the embedding itself where the two are tied."""
        return self.embed if self.head is None else self.head

    @property
    def sparse_layers(self) -> dict[int, Experts]:
        """This rank's sparse layers, by number of the layer."""
        layers = {int(name): block.mlp for name, block in self.blocks.items()}
        return {layer: mlp for layer, mlp in layers.items() if isinstance(mlp, Experts)}

    @property
    def tallies(self) -> dict[int, Tally]:
        """Counts of this rank's sparse layers, by number of the layer."""
        return {layer: mlp.tally for layer, mlp in self.sparse_layers.items()}

    def weights(self) -> dict[str, Weight]:
        """Return the declaration of every weight of this rank's stage, by name."""
        return weights_of(self)

    @torch.no_grad()
    def correct_routers(self, updated: bool) -> None:
        """End a step for the routers' corrections, which move where it updated. Collective."""
        corrections = {n: mlp.router.correction for n, mlp in self.sparse_layers.items()}
        tallies = {n: tally for n, tally in self.tallies.items() if tally.rate}
        if updated:
            moving = [(corrections[n], tally) for n, tally in tallies.items()]
            routing.correct(moving, self.mesh.group("dp cp"))
        for tally in tallies.values():
            tally.load = None

    def wait(self, part: str | None = None) -> None:
        """Wait for updated weights that other ranks are still sending: of one part, or of all."""
        for name in [part] if part else list(self.pending):
            for bucket in self.pending.pop(name, ()):
                bucket.wait()

    def open(self, part: str, x: Tensor) -> Tensor:
        """Return x, which goes into a part of the model, once the part's weights are here.

        Parts: embed, blocks.N, and head, which has the last norm as well.
        """
        self.wait(None if part == "head" else part)
        return x if self.shards is None else self.shards.open(part, x)

    def close(self, part: str, y: Tensor) -> Tensor:
        """Return y, which comes out of a part of the model, whose weights may be freed."""
        return y if self.shards is None else self.shards.close(part, y)

    @contextlib.contextmanager
    def whole(self, part: str | None = None) -> Iterator[None]:
        """Hold the up-to-date weights of one part, or of all, for the block; to read or sample.

        Collective where the model is sharded.
        """
        self.wait()
        with self.shards.whole(part) if self.shards else contextlib.nullcontext():
            yield

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Draw all weights as declared: normal(0, std), smaller in front of the residual stream."""
        generator = torch.Generator().manual_seed(seed)
        scales = {"normal": std, "residual": std / math.sqrt(2 * self.c.layers)}
        parameters = dict(self.named_parameters())
        for name, weight in self.weights().items():
            p = parameters[name]
            if weight.start in scales:
                p.data.copy_(torch.randn(p.shape, generator=generator) * scales[weight.start])
            else:
                nn.init.constant_(p, 1.0 if weight.start == "ones" else 0.0)

    def angles(self, positions: Tensor) -> Angles:
        """Return cos and sin of every rotation, in fp32 as transformers does."""
        c, size = self.c, self.c.rope_size or self.c.head_size
        if c.longest:
            message = f"the model's rope ends at {c.longest} positions: lower --max-length"
            torch._assert_async((positions < c.longest).all(), message)
        if not self._frequencies or self._frequencies["main"].device != positions.device:
            ropes = {"main": frequencies(c.rope_theta, size, c.rope_scaling)}
            if c.local_theta:
                ropes["local"] = frequencies(c.local_theta, size)
            self._frequencies = {
                name: upload(rope, positions.device) for name, rope in ropes.items()
            }
        angles = {}
        for name, frequency in self._frequencies.items():
            angle = positions.float()[:, None] * frequency
            factor = amplitude(c.rope_scaling) if name == "main" else 1.0
            cos, sin = angle.cos(), angle.sin()
            angles[name] = (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)
        return angles

    def forward(self, batch: TreeBatch, x: Tensor | None = None) -> Tensor:
        """Return the hidden states of a batch before the final norm, (T, D), or this rank's rows.

        With pipeline stages those after this rank's blocks; x: the output of the stage before.
        """
        cp = self.mesh.group("cp")
        times = copies(batch.spans, self.device) if self.c.experts else None
        if cp.n == 1:
            view = TreeView(batch.positions, batch.layout, [], cp)
            view.routing = None if times is None else Routing(times, self.fixed_experts(batch))
            return self.run(batch.tokens, view, x)
        shares = batch.shares(cp.n)
        rows = shares[cp.place]
        layout = batch.share_layout(cp.n, cp.place)
        view = TreeView(batch.positions[rows], layout, shares, cp)
        if times is not None:
            fixed = self.fixed_experts(batch)
            view.routing = Routing(times[rows], None if fixed is None else fixed[rows])
        return self.run(batch.tokens[rows], view, x)

    def fixed_experts(self, batch: TreeBatch) -> Tensor | None:
        """Return the experts that each token of a batch has to go to, (T, L, K), if any are set."""
        return batch.experts if self.replays else None

    def hidden_shape(self, batch: TreeBatch) -> tuple[int, int]:
        """Shape of this rank's hidden states of a batch."""
        rows = len(batch.tokens)
        if self.mesh.cp > 1:
            rows = len(batch.shares(self.mesh.cp)[self.mesh.cp_rank])
        return -(-rows // self.mesh.tp), self.c.width

    def run(self, tokens: Tensor, view: View, x: Tensor | None = None) -> Tensor:
        """Return the hidden states of T tokens as a view places them, (T / tp, D)."""
        if self.mesh.pp_rank == 0:
            x = self.close("embed", self.embed.embed(self.open("embed", tokens)))
            if self.c.embedding_scale != 1.0:
                # rounded to the dtype of the weights, as Gemma's is
                x = x * torch.tensor(self.c.embedding_scale, dtype=x.dtype).item()
        view.angles = self.angles(view.positions)
        for name, block in self.blocks.items():
            x = self.open(f"blocks.{name}", x)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, view, use_reentrant=False)
            else:
                x = block(x, view)
            x = self.close(f"blocks.{name}", x)
        return x

    @overload
    def logps(
        self,
        hidden: Tensor,
        batch: TreeBatch,
        temperature: float = 1.0,
        entropy: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def logps(
        self, hidden: Tensor, batch: TreeBatch, temperature: float = 1.0, *, entropy: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def logps(
        self, hidden: Tensor, batch: TreeBatch, temperature: float = 1.0, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the log-prob of each scored token, (M,), fp32 at least, all M on every rank.

        entropy: also that of each distribution, (M,). Only scored tokens reach the vocabulary.
        """
        normed, places = self._states(self.open("head", hidden), batch)
        target = batch.target if places is None else batch.target[places]
        result = self.output.logps(normed, target, temperature, entropy)
        if isinstance(result, tuple):
            logps, entropies = result
            return self._assemble(logps, places, batch), self._assemble(entropies, places, batch)
        return self._assemble(result, places, batch)

    def _assemble(self, values: Tensor, places: Tensor | None, batch: TreeBatch) -> Tensor:
        """Return what the head has computed for all scored tokens, (M,), from this rank's."""
        values = self.close("head", values)
        if places is None:
            return values
        return assemble(values, places, len(batch.target), self.mesh.group("cp"))

    def states(self, hidden: Tensor, batch: TreeBatch) -> tuple[Tensor, Tensor | None]:
        """Return what the output head reads for the scored tokens, (M, D), and which they are.

        With context parallelism a rank has some of the M, at the places that come second; else
        they are None.
        """
        normed, places = self._states(self.open("head", hidden), batch)
        return self.close("head", normed), places

    def _states(self, hidden: Tensor, batch: TreeBatch) -> tuple[Tensor, Tensor | None]:
        index, places, cp = batch.logit_index, None, self.mesh.group("cp")
        rows = len(batch.tokens)
        if cp.n > 1:
            share = batch.shares(cp.n)[cp.place]
            places, index = locate(share, index)
            rows = len(share)
        if cp.n == 1 and self.tp.n == 1:
            return self.before_head(hidden.index_select(0, index)), places
        return enter(self.before_head(hidden), rows, self.tp).index_select(0, index), places

    def before_head(self, hidden: Tensor) -> Tensor:
        """Return what the output head multiplies with, (..., D) -> (..., D)."""
        normed, scale = self.norm(hidden), self.c.logit_scale
        return normed if scale == 1.0 else normed * scale

    def kl(
        self,
        hidden: Tensor,
        batch: TreeBatch,
        teacher: "GPT",
        teacher_states: Tensor,
        divergence: Divergence,
        mix: float = 0.5,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the divergence from a teacher at each scored token, (M,), all M on every rank.

        teacher_states: the teacher's `states` of the same batch. See kernels/kl.py.
        """
        hidden = self.open("head", teacher.open("head", hidden))
        normed, places = self._states(hidden, batch)
        head = teacher.output
        result = self.output.kl(normed, head, teacher_states, divergence, mix, temperature)
        return self._assemble(teacher.close("head", result), places, batch)

    def top_k(
        self, hidden: Tensor, batch: TreeBatch, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the K likeliest tokens at each scored place, (M, K), and log-probs (M, K + 1).

        The last log-prob is that of all other tokens. All M on every rank. See kernels/top_k.py.
        """
        normed, places = self._states(self.open("head", hidden), batch)
        ids, logps = self.output.top_k(normed, k, temperature)
        return self._assemble(ids, places, batch), self._assemble(logps, places, batch)

    def top_kl(
        self,
        hidden: Tensor,
        batch: TreeBatch,
        ids: Tensor,
        teacher_logps: Tensor,
        divergence: Divergence,
        mix: float = 0.5,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the divergence from a teacher's top K at each scored token, (M,), on every rank.

        ids (M, K) and teacher_logps (M, K + 1) of the teacher's `top_k`; (M, K) where K is the
        whole vocabulary.
        """
        normed, places = self._states(self.open("head", hidden), batch)
        if places is not None:
            ids, teacher_logps = ids[places], teacher_logps[places]
        sums = self.output.buckets(normed, ids, temperature)[:, : teacher_logps.shape[1]]
        result = bucket_divergence(teacher_logps, sums.log_softmax(1), divergence, mix)
        return self._assemble(result, places, batch)

    def logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Return the logits at places index (n,) of the flat row, (n, V); to sample from."""
        hidden = self.open("head", hidden)
        if self.tp.n == 1:
            normed = self.before_head(hidden.index_select(0, index))
        else:
            normed = enter(self.before_head(hidden), self.tp.n * len(hidden), self.tp)
            normed = normed.index_select(0, index)
        return self.close("head", self.output.logits(normed))

    def score(self, hidden: Tensor, batch: TreeBatch, index: Tensor) -> Tensor:
        """Return scores read at places index (n,), (n, outputs), fp32 at least, on every rank."""
        hidden = self.open("head", hidden)
        places, group = None, self.mesh.group("cp tp")
        total = len(index)
        if group.n > 1:  # every token is on one rank, which scores it
            rows = torch.arange(len(batch.tokens), device=index.device)
            if self.mesh.cp > 1:
                rows = batch.shares(self.mesh.cp)[self.mesh.cp_rank]
            rows = rows[self.mesh.tp_rank * hidden.shape[0] :][: hidden.shape[0]]
            places, index = locate(rows, index)
        z = self.score_head(self.norm(hidden.index_select(0, index)))
        z = self.close("head", z.to(torch.promote_types(z.dtype, torch.float32)))
        return z if places is None else assemble(z, places, total, group)


def locate(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries of `index` are among `rows` (ascending), and where among them.

    rows [2, 5, 7], index [7, 3, 2] -> [0, 2], [2, 0]
    """
    at = torch.searchsorted(rows, index)
    at = at.clamp(max=max(0, len(rows) - 1))
    inside = rows[at] == index if len(rows) else torch.zeros_like(index, dtype=torch.bool)
    places = inside.nonzero()[:, 0]
    return places, at[places]


@functools.cache
def declared_weights(c: GPTConfig) -> dict[str, Weight]:
    """Return the declaration of every weight of the whole model, by name."""
    with torch.device("meta"):
        return GPT(c).weights()


def parameter_count(c: GPTConfig) -> int:
    """Return the number of weights of the whole model."""
    return sum(math.prod(weight.shape) for weight in declared_weights(c).values())


def active_count(c: GPTConfig) -> int:
    """Return the number of weights that a token meets: fewer than all with mixtures of experts."""
    idle = sum(c.sparse(i) for i in range(c.layers)) * (c.experts - c.active)
    return parameter_count(c) - idle * c.width * c.expert_ffn * (3 if c.gated else 2)
