"""A plain reference for training: one padded sequence at a time, whole logits, torch's AdamW.

Reads the weights of a Hugging Face folder under their names there, and shares no code with plumb.
transformers cannot be the reference in float64: its RMSNorm rounds to fp32.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

CORRECTION = ".e_score_correction_bias"  # of a router; no gradient moves it


class PlainModel:
    """Llama, Mistral, Qwen2 and 3, mixtures, or GPT-NeoX; its weights take gradients."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {
            name: w.to(dtype).requires_grad_(not name.endswith(CORRECTION))
            for name, w in weights.items()
        }
        self.neox = self.config["model_type"] == "gpt_neox"
        self.adapter: dict[str, Tensor] = {}  # LoRA: A and B under PEFT's names
        self.adapter_scale = 0.0  # 0 switches the adapter off
        self.routed: dict[str, list[Tensor]] = {}  # sparse layer -> router's logits, (tokens, E)

    def adapt(self, folder: Path, scale: float) -> None:
        """Freeze all weights and train the adapter of a folder: y = W x + scale B (A x)."""
        for w in self.weights.values():
            w.requires_grad_(False)
        for name, w in load_file(folder / "adapter_model.safetensors").items():
            if ".lora_" in name:
                self.adapter[name.removeprefix("base_model.model.")] = w.clone().requires_grad_()
        self.adapter_scale = scale

    def trained(self) -> list[Tensor]:
        """Return the tensors that train."""
        tensors = (*self.weights.values(), *self.adapter.values())
        return [tensor for tensor in tensors if tensor.requires_grad]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))
        if not self.adapter_scale or f"{name}.lora_A.weight" not in self.adapter:
            return y
        a, b = (self.adapter[f"{name}.lora_{part}.weight"] for part in "AB")
        return y + self.adapter_scale * (x @ a.T @ b.T)

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.neox:
            bias = self.weights[name + ".bias"]
            return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"], bias, 1e-5)
        rms = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / rms * self.weights[name + ".weight"]

    def turn(self, x: Tensor, size: int) -> Tensor:
        """Apply the rotary embedding to (heads, tokens, head size), in its first `size` features.

        Complex numbers are made of the two halves; angles are in fp32, as is usual.
        """
        half = size // 2
        frequency = 1.0 / (10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        a = x[..., :half]
        b = x[..., half:size]
        return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., size:]), -1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        hidden = torch.full(scores.shape[1:], float("-inf"), dtype=q.dtype)
        scores = scores + hidden.triu(1)
        if window := self.config.get("sliding_window"):
            scores = scores + hidden.tril(-window)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of one sequence, (tokens, vocabulary)."""
        return self.neox_logits(ids) if self.neox else self.llama_logits(ids)

    def neox_logits(self, ids: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        x = self.weights["gpt_neox.embed_in.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            at = f"gpt_neox.layers.{i}"
            y = self.norm(x, f"{at}.input_layernorm")
            fused = self.linear(y, f"{at}.attention.query_key_value")
            q, k, v = fused.view(len(ids), heads, -1).transpose(0, 1).chunk(3, -1)
            size = q.shape[-1] // 4
            y = self.attention(self.turn(q, size), self.turn(k, size), v)
            attended = self.linear(y, f"{at}.attention.dense")
            y = self.norm(x, f"{at}.post_attention_layernorm")
            y = F.gelu(self.linear(y, f"{at}.mlp.dense_h_to_4h"))
            x = x + attended + self.linear(y, f"{at}.mlp.dense_4h_to_h")
        return self.linear(self.norm(x, "gpt_neox.final_layer_norm"), "embed_out")

    def llama_logits(self, ids: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        size = self.config["head_dim"]
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{i}"
            y = self.norm(x, f"{at}.input_layernorm")
            q, k, v = (
                self.linear(y, f"{at}.self_attn.{p}_proj").view(len(ids), -1, size) for p in "qkv"
            )
            if f"{at}.self_attn.q_norm.weight" in self.weights:
                q = self.norm(q, f"{at}.self_attn.q_norm")
                k = self.norm(k, f"{at}.self_attn.k_norm")
            q, k, v = (p.transpose(0, 1) for p in (q, k, v))
            k, v = (p.repeat_interleave(heads // len(p), 0) for p in (k, v))
            turned = int(size * self.config.get("partial_rotary_factor", 1.0))
            y = self.attention(self.turn(q, turned), self.turn(k, turned), v)
            x = x + self.linear(y, f"{at}.self_attn.o_proj")
            y = self.norm(x, f"{at}.post_attention_layernorm")
            routed = f"{at}.mlp.gate.weight" in self.weights
            x = x + (self.experts(y, f"{at}.mlp") if routed else self.mlp(y, f"{at}.mlp"))
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.linear(self.norm(x, "model.norm"), head)

    def mlp(self, x: Tensor, at: str) -> Tensor:
        gated = F.silu(self.linear(x, f"{at}.gate_proj")) * self.linear(x, f"{at}.up_proj")
        return self.linear(gated, f"{at}.down_proj")

    def experts(self, x: Tensor, at: str) -> Tensor:
        """Mix the outputs of each token's likeliest experts, one token after another."""
        logits = self.linear(x, f"{at}.gate")
        self.routed.setdefault(at, []).append(logits)
        score = self.scores(logits, at)
        outputs = []
        for token, p, chosen in zip(x, score, self.choice(score, at)):
            weights = p[chosen]
            if self.config.get("norm_topk_prob", True):
                weights = weights / weights.sum()
            weights = weights * self.config.get("routed_scaling_factor", 1.0)
            parts = [w * self.mlp(token, f"{at}.experts.{e}") for w, e in zip(weights, chosen)]
            outputs.append(sum(parts))
        y = torch.stack(outputs)
        if f"{at}.shared_experts.up_proj.weight" in self.weights:
            y = y + self.mlp(x, f"{at}.shared_experts")
        if f"{at}.shared_expert_gate.weight" in self.weights:
            gate = self.linear(x, f"{at}.shared_expert_gate").sigmoid()
            y = y + gate * self.mlp(x, f"{at}.shared_expert")
        return y

    def scores(self, logits: Tensor, at: str) -> Tensor:
        """Return each token's scores of the experts, (tokens, E)."""
        return logits.sigmoid() if f"{at}.gate{CORRECTION}" in self.weights else logits.softmax(-1)

    def choice(self, score: Tensor, at: str) -> list[list[int]]:
        """Return the experts of each token."""
        corrected = score + self.weights.get(f"{at}.gate{CORRECTION}", 0.0)
        return corrected.topk(self.config["num_experts_per_tok"]).indices.tolist()

    def correct_routers(self, rate: float) -> None:
        """Move each router's bias by the tokens of all rows since the last call: 2408.15664."""
        with torch.no_grad():
            for at, rows in self.routed.items():
                bias = self.weights[f"{at}.gate{CORRECTION}"]
                chosen = sum(self.choice(self.scores(torch.cat(rows), at), at), [])
                for e in range(len(bias)):
                    lacking = len(chosen) / len(bias) - chosen.count(e)
                    bias[e] += rate * ((lacking > 0) - (lacking < 0))
        self.routed = {}

    def router_losses(self) -> tuple[Tensor, Tensor]:
        """Return the balance loss and the z-loss of all rows of the step.

        One expert after another, the mean over layers: arXiv 2101.03961 Eq. 4, 2202.08906 Eq. 5.
        """
        balance, z = [], []
        for at, rows in self.routed.items():
            logits = torch.cat(rows)  # (tokens, E)
            score = self.scores(logits, at)
            share = score / score.sum(-1, keepdim=True)
            chosen = self.choice(score, at)
            n = logits.shape[1]
            f = [sum(e in some for some in chosen) / len(chosen) for e in range(n)]
            balance.append(n * sum(f[e] * share[:, e].mean() for e in range(n)))
            z.append(logits.exp().sum(-1).log().square().mean())
        layers = len(self.routed)
        return sum(balance) / layers, sum(z) / layers

    def logps(self, prompt: list[int], response: list[int]) -> Tensor:
        """Return the log-prob of each response token, (len(response),) fp64, from a padded row."""
        logp = self.logits(torch.tensor(prompt + response + [0] * 7)).log_softmax(-1)
        for rows in self.routed.values():
            rows[-1] = rows[-1][:-7]  # padding
        first = len(prompt) - 1  # predicts the first response token
        return torch.stack([logp[first + i, token] for i, token in enumerate(response)]).double()


class PlainTrainer:
    """AdamW with decay 0.1 on matrices, clipping at 1, warm-up over a quarter, cosine to 0."""

    def __init__(self, model: PlainModel, total: int, lr: float):
        self.weights = model.trained()
        groups = [
            {"params": [w for w in self.weights if w.dim() > 1], "weight_decay": 0.1},
            {"params": [w for w in self.weights if w.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        self.total = total
        self.lr = lr
        self.done = 0

    def step(self, loss: Tensor) -> tuple[float, float]:
        """Make a step and return (loss, gradient norm before clipping)."""
        loss.backward()
        for w in self.weights:  # an expert without tokens decays as the others do
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0).item()
        warm = int(0.25 * self.total)
        share = (self.done - warm) / (self.total - warm)
        rate = (self.done + 1) / warm if self.done < warm else 0.5 * (1 + math.cos(math.pi * share))
        for group in self.adam.param_groups:
            group["lr"] = self.lr * rate
        self.adam.step()
        self.adam.zero_grad()
        self.done += 1
        return loss.item(), norm


def encode(
    tokenizer: Path, rows: list[dict], keys: list[str]
) -> list[tuple[list[int], list[list[int]]]]:
    """Encode rows as bos, prompt, response, eos, split at the longest common prefix.

    keys: of the responses. Returns one (prompt ids, [response ids, ...]) a row.
    """
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    trees = []
    for row in rows:
        prompt = [sp.bos_id(), *sp.encode(row["prompt"])]
        texts = [row[k] if isinstance(row[k], str) else row[k][-1]["content"] for k in keys]
        wholes = [[sp.bos_id(), *sp.encode(row["prompt"] + text), sp.eos_id()] for text in texts]
        border = 0
        while border < len(prompt) and all(whole[border] == prompt[border] for whole in wholes):
            border += 1
        trees.append((prompt[:border], [whole[border:] for whole in wholes]))
    return trees


def five_steps(
    folder: Path,
    trees: list,
    batch: int,
    dpo: bool,
    router: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Make five steps of DPO (β = 0.1) or SFT at rate 1e-2 on `batch` trees each, in float64.

    router: weights of the balance loss and the z-loss, which are no part of the returned losses,
    and the step of the routers' biases.
    Returns [(loss, norm), ...] and the weights.
    """
    plain = PlainModel(folder, torch.float64)
    trainer = PlainTrainer(plain, total=5, lr=1e-2)
    with torch.no_grad():
        ref = [
            [plain.logps(prompt, r).sum() for r in responses]
            for prompt, responses in trees[: 5 * batch]
        ]
    plain.routed = {}
    taken = []
    for step in range(5):
        total = 0.0
        mine = range(step * batch, step * batch + batch)
        for i in mine:
            logps = [plain.logps(trees[i][0], response) for response in trees[i][1]]
            if dpo:
                delta = (logps[0].sum() - ref[i][0]) - (logps[1].sum() - ref[i][1])
                total = total - torch.nn.functional.logsigmoid(0.1 * delta) / batch
            else:
                total = total - logps[0].sum() / sum(len(trees[j][1][0]) for j in mine)
        extra = 0.0
        if any(router[:2]):
            balance, z = plain.router_losses()
            extra = router[0] * balance + router[1] * z
        _, norm = trainer.step(total + extra)
        if router[2]:
            plain.correct_routers(router[2])
        plain.routed = {}
        taken.append((total.item(), norm))
    return taken, {name: w.detach() for name, w in plain.weights.items()}
