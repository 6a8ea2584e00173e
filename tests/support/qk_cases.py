"""Cases of qk_norm_rope that cover its layouts, with answers in fp64: for the CPU operator and the emulated kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """``run()`` gives all that was written to: joint buffers whole; ``check`` compares with the answer."""

    run: Callable[[], list[Tensor]]
    check: Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Case:
    """One call; the name says what is special."""

    name: str
    heads: int = 2
    dim: int = 64
    tokens: int = 5
    batch: int = 2
    kv_heads: int = 0  # 0: as q
    kv_tokens: int = 0
    norm: str = "rms"
    affine: str = "own"  # "own" dtype, "float32", "none"
    bias: bool = False
    rope: str = "interleaved"  # or "half", "none"
    axes: tuple[int, ...] = ()
    rotary: int = 0  # 0: all
    table: str = "full"  # or "half"
    table_dtype: torch.dtype = torch.float32
    per: str = ""  # "batch", "head": who has an own table
    start: int | None = None
    rows: int = 0  # of the table; 0: one per token
    positions: str = ""  # "shared", "batch", "head"
    layout: str = "contiguous"
    place: str = ""  # "joint", "permuted", "permuted per head"
    relu: bool = False
    value: bool = True

    def __str__(self) -> str:
        return self.name

    def _inputs(self, dtype: torch.dtype) -> list[Tensor]:
        kv_heads, kv_tokens = self.kv_heads or self.heads, self.kv_tokens or self.tokens
        sizes = [(self.tokens, self.heads), (kv_tokens, kv_heads), (kv_tokens, kv_heads)]
        if self.layout == "fused":  # chunks of one projection
            wide = torch.randn(self.batch, self.tokens, 3 * self.heads * self.dim).to(dtype)
            return [t.unflatten(2, (self.heads, self.dim)) for t in wide.chunk(3, -1)]
        if self.layout == "heads first":
            return [torch.randn(self.batch, h, n, self.dim).to(dtype).transpose(1, 2) for n, h in sizes]
        if self.layout == "odd start":
            return [torch.randn(self.batch, n, h, self.dim + 8).to(dtype)[..., 1 : 1 + self.dim] for n, h in sizes]
        if self.layout == "broadcast":
            return [torch.randn(1, n, h, self.dim).to(dtype).expand(self.batch, -1, -1, -1) for n, h in sizes]
        return [torch.randn(self.batch, n, h, self.dim).to(dtype) for n, h in sizes]

    def build(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        from vdit_fast.ops import qk_norm_rope
        from vdit_fast.reference.qk_norm_rope import qk_norm_rope as exact

        streams = [x.to(device) for x in self._inputs(dtype)]
        named: dict[str, Any] = {"norm": self.norm, "eps": 1e-4, "relu": self.relu}
        own: list[dict[str, Any]] = [{}, {}]
        rotary = self.rotary or self.dim // 2 * 2
        widths = self.axes or ((rotary,) if self.rope == "half" else ())
        for x, prefix, mine in zip(streams, ("q", "k"), own, strict=False):
            width = x.shape[2] * self.dim if self.norm == "rms_across" else self.dim
            for what in ("weight", "bias") if self.bias else ("weight",):
                if self.norm == "none" or self.affine == "none":
                    continue
                t = torch.randn(width, device=device)
                mine[what] = named[f"{prefix}_{what}"] = t if self.affine == "float32" else t.to(dtype)
            if self.rope == "none":
                continue
            rows = self.rows or x.shape[1]
            shape = [x.shape[0] if self.per == "batch" else 1, rows, x.shape[2] if self.per == "head" else 1, rotary]
            angles = torch.rand([*shape[:3], rotary if self.table == "full" else rotary // 2], device=device) * 6
            mine["cos"], mine["sin"] = angles.cos().to(self.table_dtype), (angles + 1).sin().to(self.table_dtype)
            named |= {f"{'' if prefix == 'q' else 'k_'}{t}": mine[t] for t in ("cos", "sin")}
            if self.positions:
                size = [x.shape[0] if self.positions != "shared" else 1, x.shape[2] if self.positions == "head" else 1]
                place = torch.randint(-1, rows, (*size, x.shape[1]), dtype=torch.int32, device=device)
                mine["positions"] = named["positions" if prefix == "q" else "k_positions"] = place
            else:
                mine["start"] = self.start or 0
        if self.rope != "none":
            named |= {"rope": self.rope, "rotary_dim": rotary, "axes": self.axes or None, "rope_start": self.start}
        streams = streams if self.value else streams[:2]

        want: list[Tensor] = []
        for x, mine in zip(streams[:2], own, strict=True):
            wide = {k: t.double() if isinstance(t, Tensor) and k in ("weight", "bias") else t for k, t in mine.items()}
            rope = {"rotary": 0 if self.rope == "none" else rotary, "axes": widths}
            want.append(exact(x.double(), norm=self.norm, eps=1e-4, relu=self.relu, **rope, **wide))
        want += [x.double() for x in streams[2:]]

        buffers: list[Tensor] = []
        if self.place:
            for i, x in enumerate(streams):
                extra = 3 if self.place == "joint" else 0
                shape = (x.shape[0], x.shape[1] + extra, x.shape[2], self.dim)
                buffer = torch.randn(shape, device=device).to(dtype)
                buffers.append(buffer)
                answer = buffer.double().clone()
                slot = slice(2, 2 + x.shape[1]) if self.place == "joint" else slice(None)
                name = "qkv"[i]
                named[f"{name}_out"] = buffer[:, slot]
                if self.place != "joint":
                    heads = x.shape[2] if self.place.endswith("head") else 1
                    if i < 2:
                        rows = torch.rand(x.shape[0], heads, x.shape[1], device=device).argsort(-1).int()
                        named["q_rows" if i == 0 else "kv_rows"] = rows
                    index = rows.long().expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None]
                    answer.scatter_(1, index.expand(-1, -1, -1, self.dim), want[i])
                else:
                    answer[:, slot] = want[i]
                want[i] = answer

        def run() -> list[Tensor]:
            with torch.no_grad():
                got = qk_norm_rope(*streams, **named)
            return [b.clone() for b in buffers] if buffers else [t for t in got if t is not None]

        def check(got: Sequence[Tensor]) -> None:
            assert len(got) == len(want)
            for mine, answer in zip(got, want, strict=True):
                assert mine.dtype == dtype and mine.is_contiguous()
                half_ulp = 0.51 * torch.finfo(dtype).eps
                top = float(answer.abs().max()) if answer.numel() else 0.0
                torch.testing.assert_close(mine.double(), answer, rtol=half_ulp, atol=2e-6 * top)
            if self.value and not buffers:
                assert torch.equal(got[2], streams[2])

        return Call(run, check)


CASES = [
    Case("plain copy", norm="none", rope="none"),
    Case("rms per head", dim=128, layout="fused"),
    Case("rms per head, five heads", heads=5, dim=96, tokens=3),
    Case("no weight", affine="none", rope="half"),
    Case("fp32 weight", affine="float32", dim=40, layout="heads first"),
    Case("layer with bias, text first", norm="layer", bias=True, tokens=7, rows=4, start=3),
    Case("layer, fp32 weights", norm="layer", bias=True, affine="float32", dim=80, rope="half"),
    Case("text last", tokens=6, rows=4, start=0, table="half", place="joint"),
    Case("across heads", norm="rms_across", dim=128, heads=3, layout="fused"),
    Case("across heads, a table per head and batch", norm="rms_across", per="head", heads=4, batch=1),
    Case("across heads, half, half table", norm="rms_across", rope="half", table="half", per="head", heads=3),
    Case("across heads, relu", norm="rms_across", dim=112, relu=True, bias=True),
    Case("across heads, wide", norm="rms_across", heads=66, dim=128, tokens=2, batch=1, rope="half"),
    Case("across heads, grouped", norm="rms_across", heads=6, kv_heads=2, rope="none"),
    Case("grouped heads, other lengths", heads=6, kv_heads=2, kv_tokens=9, dim=72),
    Case("axes", norm="none", rope="half", axes=(32, 32, 32), dim=96, table="half"),
    Case("axes, uneven and partial", rope="half", axes=(16, 6, 10), dim=44, table="full", rotary=32),
    Case("partial rotation", dim=128, rotary=48, table="half"),
    Case("partial rotation of a chunk", dim=64, rotary=20, rope="half"),
    Case("odd dim", dim=33, rotary=30, layout="odd start"),
    Case("odd dim across heads", dim=7, rotary=6, heads=3, norm="rms_across", rope="half", table="half"),
    Case("dim 1", dim=1, rope="none", norm="layer", tokens=1, batch=1),
    Case("dim 160", dim=160, heads=3, rope="half"),
    Case("dim 256", dim=256, tokens=2, per="batch"),
    Case("unaligned rows", dim=64, layout="odd start", place="joint"),
    Case("bf16 table", table_dtype=torch.bfloat16, per="batch", rope="half", table="half"),
    Case("fp16 table per head", table_dtype=torch.float16, per="head", table="half", dim=128),
    Case("positions", tokens=9, rows=4, positions="shared", table="half"),
    Case("positions per head", tokens=6, rows=5, heads=5, positions="head", rope="half", place="joint"),
    Case("positions across heads", tokens=6, rows=5, norm="rms_across", positions="batch"),
    Case("permuted", tokens=11, place="permuted", dim=128),
    Case("permuted per head", tokens=11, place="permuted per head", layout="heads first", rope="half"),
    Case("permuted per head, across", tokens=8, place="permuted per head", norm="rms_across", heads=3),
    Case("broadcast batch", layout="broadcast", per="batch"),
    Case("one row", tokens=1, batch=1, heads=1),
    Case("without value", value=False),
    Case("no tokens", tokens=0),
    Case("no heads", heads=0, norm="rms_across", rope="none"),
    Case("no batch", batch=0),
]
