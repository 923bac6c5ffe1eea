"""Attention over prompt trees.

A batch is one flat row of T tokens holding trees: a prompt, then its responses side by side. A response sees its prompt
and itself, never a sibling. As a mask: key j is visible to query i iff j <= i < kv_end[j] and, with a sliding window
W, position[i] - position[j] < W.

Letters: T tokens, H query heads, G key/value heads, E head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class TreeLayout:
    """Where the trees of a batch lie, and the masks that attention needs: built once a batch, used by every layer.

    spans: for every tree (prompt length, [response lengths]), in the order of the flat row.
    """

    def __init__(self, spans: list[tuple[int, list[int]]], kv_end: Tensor, positions: Tensor):
        self.spans, self.kv_end, self.positions = spans, kv_end, positions
        self.sizes = [n for prompt, responses in spans for n in (prompt, *responses)]
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor | None] = {}

    def mask(self, queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor | None:
        """What the last `queries` of `keys` tokens in a row see, (queries, keys), added to the scores.

        None where plain causal attention over all of them is the same.
        """
        name = (queries, keys, window, dtype)
        if name not in self._masks:
            if queries == keys and not 0 < window < keys:
                self._masks[name] = None
            else:
                device = self.kv_end.device
                ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
                hidden = (ago < 0) | (ago >= window) if window else ago < 0
                self._masks[name] = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(
                    hidden, float("-inf")
                )
        return self._masks[name]


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int = 0) -> Tensor:
    """softmax(q kᵀ / √E + mask) v over the trees of `layout`.

    q (T, H, E), k and v (T, G, E) with H a multiple of G; window 0 sees everything. Returns (T, H, E).
    """
    return _attention_plain(q, k, v, layout, window)


def _attention_plain(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int) -> Tensor:
    """One scaled_dot_product_attention a response: its keys are [prompt; response].

    The first response of a tree carries the prompt's own queries along: the two are one causal sequence. `split`, not
    slices: its backward is one concatenation, where every slice would fill a whole (T, H, E) of zeros.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T, E)
    if k.shape[0] != q.shape[0]:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    parts = zip(*(x.split(layout.sizes, 1) for x in (q, k, v)))
    out = []
    for _, responses in layout.spans:
        prompt_q, prompt_k, prompt_v = next(parts)
        if not responses:
            out.append(_attend(prompt_q, prompt_k, prompt_v, layout, window))
        for i in range(len(responses)):
            own_q, own_k, own_v = next(parts)
            queries = torch.cat((prompt_q, own_q), 1) if i == 0 else own_q
            keys, values = torch.cat((prompt_k, own_k), 1), torch.cat((prompt_v, own_v), 1)
            out.append(_attend(queries, keys, values, layout, window))
    return torch.cat(out, 1).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int) -> Tensor:
    mask = layout.mask(q.shape[1], k.shape[1], window, q.dtype)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None)[0]
