"""Split a module of your own by rules, and compare it with the unsplit one: output and gradients.

torchrun --nproc-per-node 2 examples/own_module.py
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import partita.torch as pt

WIDTH, HEADS, LAYERS, VOCAB = 24, 3, 2, 31


class Attention(nn.Module):
    """Causal self-attention. It counts the heads of its input, so it works with any number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, length, width]."""
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward network, each beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.ff = nn.ModuleDict({"up": nn.Linear(WIDTH, 4 * WIDTH), "down": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, length, width]."""
        x = x + self.attn(self.norm1(x))
        return x + self.ff["down"](F.gelu(self.ff["up"](self.norm2(x))))


class Model(nn.Module):
    """A small language model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, vocab]."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ranks = pt.join()  # the ranks of the launcher, or this process alone
torch.manual_seed(0)  # every rank builds the same unsplit model
unsplit = Model().double()
ids = torch.randint(VOCAB, (2, 9))

# The rules. 3 heads and a vocabulary of 31 are no multiples of 2, which rules need not care about. Before it splits the model,
# Partita compares the split model with the unsplit one on the sample: the outputs of all modules and every gradient.
split = pt.shard(
    copy.deepcopy(unsplit),
    tp=ranks,
    rules={
        "attn.{q,k,v}": "column heads",
        "attn.out": "row heads",
        "ff.up": "column",
        "ff.down": "row",
        "{embed,head}": "vocab",
    },
    num_heads=HEADS,
    sample_input=ids,
)

# The same comparison by hand.
plan, groups = pt.plan_of(split)
rank = groups.tp.rank
expected, output = unsplit(ids), split(ids)
expected.square().sum().backward()
output.square().sum().backward()
torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
for name, parameter in split.named_parameters():
    path = name.replace(".linear.", ".").replace(".embedding.", ".")  # sharded layers wrap an inner layer
    part, cut = unsplit.get_parameter(path).grad, plan.tensor(path)
    if cut.split is not None:
        ranges = cut.split.ranges(rank)  # of dim `cut.dim`, the ranges that this rank holds
        part = torch.cat([part.narrow(cut.dim, start, stop - start) for start, stop in ranges], cut.dim)
    torch.testing.assert_close(parameter.grad, part, rtol=1e-11, atol=1e-11)
parts = f"{plan.rank_parameters(rank)} of {plan.spec.parameters} parameters"
# In one write, since all ranks print.
print(f"rank {rank} of {ranks}: output and gradients equal, {parts}\n", end="", flush=True)
