"""DualParal's denoising written down plainly for the stock diffusers Wan: one process, one block after another.

Keys and values of the noisier neighbour's first frames are kept before norm and RoPE and appended; positions count from
the first frame of a pass, so the keys' table is longer than the queries'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Context:
    """Stock self-attention with the neighbour's keys behind its own."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.start = 0
        self.tables: tuple[Tensor, Tensor] | None = None
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        n, own = q.shape[1], slice(self.start, self.start + self.rows)
        kept, self.kept = self.kept, (k[:, own], v[:, own])
        if kept is not None:
            k, v = torch.cat((k, kept[0]), 1), torch.cat((v, kept[1]), 1)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        assert self.tables is not None
        cos, sin = (table[:, : k.shape[1]] for table in self.tables)
        q, k = turned(q, cos[:, :n], sin[:, :n]), turned(k, cos, sin)
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    angle = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())
    return torch.view_as_real(pairs * angle).flatten(-2).to(x.dtype)


def draw(
    model: Any,
    make_scheduler: Callable[[], Any],
    noise: Callable[[], Tensor],
    arguments: dict[str, Any],
    *,
    blocks: int,
    num_per_block: int,
    num_cat: int,
    guidance: float,
) -> list[Tensor]:
    """The finished blocks [1, C, F, H, W]; ``noise()`` is what the next block starts from [C, F, H, W]."""
    steps, frames = len(make_scheduler().timesteps), num_cat + num_per_block
    latents: list[Tensor] = []
    schedulers: list[Any] = []
    contexts = []
    for block in model.blocks:
        contexts.append(Context(0))
        block.attn1.set_processor(contexts[-1])
    for iteration in range(steps + blocks - 1):
        if iteration < blocks:
            latents.append(noise()[None])
            schedulers.append(make_scheduler())
        for context in contexts:
            context.kept = None
        before = list(latents)  # cleaner blocks have not moved yet when a noisier one looks at them
        for block in range(min(iteration, blocks - 1), max(0, iteration - steps + 1) - 1, -1):
            left = num_cat if block else 0
            x = latents[block] if not left else torch.cat((before[block - 1][:, :, -num_cat:], latents[block]), 2)
            assert x.shape[2] == frames
            tokens = x.shape[3] // 2 * (x.shape[4] // 2)
            for context in contexts:
                context.rows, context.start = num_cat * tokens, left * tokens
                context.tables = model.rope(torch.empty(1, x.shape[1], frames + num_cat, *x.shape[3:]))
            t = schedulers[block].timesteps[iteration - block]
            batch = arguments["encoder_hidden_states"].shape[0]
            out = model(x.repeat(batch, 1, 1, 1, 1), t.float().repeat(batch), return_dict=False, **arguments)[0]
            if batch == 2:
                out = out[1:] + guidance * (out[:1] - out[1:])
            moved = schedulers[block].step(out[:, :, left:], t, latents[block], return_dict=False)[0]
            latents[block] = moved
    return latents
