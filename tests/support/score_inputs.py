"""Inputs of the search passes over scores, good and bad ones."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 2, 7, 31, 63, 64, 65, 96, 97, 127, 129, 193]
BLOCKS = [1, 3, 16, 48, 64, 128, 500]
STRIDES = ["plain", "heads_first", "every_7th", "dim_strided", "slice"]


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values behind other strides, with NaN around them."""
    nan = torch.full_like(t, torch.nan)
    if kind == "heads_first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "every_7th":
        return torch.stack([t, *[nan] * 6], 2).flatten(1, 2)[:, ::7]
    if kind == "dim_strided":
        return torch.stack([t, nan], -1)[..., 0]
    if kind == "slice":  # the text behind a video, inside a wider projection
        return torch.cat([torch.cat([nan, nan], 1), torch.cat([nan, t], 1)], 3)[:, t.shape[1] :, :, t.shape[3] :]
    return t


def tensors(lq=130, lk=150, batch=2, heads=4, kv_heads=2, dim=32, dtype=torch.float32, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, h, dim, generator=g).to(dtype) for n, h in ((lq, heads), (lk, kv_heads))]


def worst(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max()) if want.numel() else 0.0


BAD = {
    "float64": (lambda q, k, o: (q.double(), k.double(), o), "q is float64"),
    "mixed dtype": (lambda q, k, o: (q, k.half(), o), "k is float16 but q is float32"),
    "3-D": (lambda q, k, o: (q, k[0], o), r"k has shape \[150, 2, 32\]; expected \[batch, tokens, heads, dim\]"),
    "batch": (lambda q, k, o: (q, k[:1], o), "batch and head dim must agree"),
    "heads": (lambda q, k, o: (q[:, :, :3], k, o), "3 query heads are not a multiple of 2"),
    "no key heads": (lambda q, k, o: (q, k[:, :, :0], o), "not a multiple of 0"),
    "head dim": (lambda q, k, o: (q.repeat(1, 1, 1, 9), k.repeat(1, 1, 1, 9), o), "head dim is 288; supported are 1"),
    "no head dim": (lambda q, k, o: (q[..., :0], k[..., :0], o), "head dim is 0"),
    "fold 0": (lambda q, k, o: (q, k, o | {"fold": 0}), "fold is 0; expected 1 to 1024"),
    "fold": (lambda q, k, o: (q, k, o | {"fold": 1025}), "fold is 1025"),
    "scale": (lambda q, k, o: (q, k, o | {"scale": float("nan")}), "scale is nan; expected a finite number"),
    "kv_len": (
        lambda q, k, o: (q, k, o | {"kv_len": torch.tensor([3, 151])}),
        r"kv_len\[1\] is 151; expected 0 to 150",
    ),
    "kv_len dtype": (lambda q, k, o: (q, k, o | {"kv_len": torch.ones(2)}), "kv_len is float32"),
    "kv_len shape": (lambda q, k, o: (q, k, o | {"kv_len": torch.tensor([3])}), r"kv_len is int64 \[1\]"),
}
