"""The MLP of a block; its kinds are those of GPTConfig.mlp.

Letters: T tokens, N rows, D width, F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from architecture import GPTConfig
from kernels.swiglu import swiglu
from layers import ColumnLinear, RowLinear, columns
from parallel import Mesh


class MLP(nn.Module):
    """An MLP of a kind of GPTConfig.mlp; tensor ranks share the hidden width F."""

    def __init__(self, c: GPTConfig, ffn: int, mesh: Mesh):
        super().__init__()
        self.kind = c.mlp
        if c.gated:
            self.gate = ColumnLinear(c.width, ffn, ffn, mesh, c.mlp_bias)
        self.up = ColumnLinear(c.width, ffn, ffn, mesh, c.mlp_bias)
        self.down = RowLinear(ffn, c.width, ffn, mesh, c.mlp_bias)

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """(T / tp, D), T = tokens -> (T / tp, D)."""
        if self.kind == "swiglu":
            gate, up = columns(x, tokens, self.gate, self.up)
            return self.down(swiglu(gate, up))
        if self.kind == "geglu":
            gate, up = columns(x, tokens, self.gate, self.up)
            return self.down(F.gelu(gate, approximate="tanh") * up)
        if self.kind == "relu2":
            return self.down(F.relu(self.up(x, tokens)).square())
        approximate = "tanh" if self.kind == "gelu_tanh" else "none"
        return self.down(F.gelu(self.up(x, tokens), approximate=approximate))
