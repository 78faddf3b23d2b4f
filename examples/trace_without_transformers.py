"""One attention layer learns to say, in a later call, what it was told in an earlier one: through its trace alone."""

import torch
from torch import nn

from diffmas_ops import KVTrace, cached_attention


class Layer(nn.Module):
    def __init__(self, width=32, sizes=(32, 16, 16)):
        super().__init__()
        self.sizes, self.qkv, self.out = sizes, nn.Linear(width, sum(sizes)), nn.Linear(sizes[0], width)

    def forward(self, x, call):  # x: [new tokens of all rows, width], packed
        q, k, v = (t.unflatten(1, (-1, 8)) for t in self.qkv(x).split(self.sizes, dim=1))
        return x + self.out(cached_attention(q, k, v, call, layer=0).flatten(1))


def train(steps=200, batch=16, words=8, width=32):
    torch.manual_seed(0)
    embed, layer, read = nn.Embedding(words + 1, width), Layer(width), nn.Linear(width, words)
    parameters = [*embed.parameters(), *layer.parameters(), *read.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(steps):
        trace = KVTrace.allocate(num_layers=1, batch=batch, num_kv_heads=2, capacity=2, head_dim=8)
        secret = torch.randint(words, (batch,))
        layer(embed(secret), trace.open(1))  # one call tells every row its secret; what it returns is thrown away
        asked = layer(embed(torch.full((batch,), words)), trace.open(1))  # a later call asks for it
        loss = nn.functional.cross_entropy(read(asked), secret)
        optimizer.zero_grad()
        loss.backward()  # reaches the first call through the keys and values it wrote
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
