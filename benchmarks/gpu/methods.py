"""Section "methods": one transformer block of the true shape with random weights, stock and with each sparse method.

python -m benchmarks.gpu.methods --out DIR --device cuda --until EPOCH NAME...

Needs diffusers. Random weights give nearly uniform attention, so methods run at a fixed budget (the published density)
and say nothing about quality here: what is measured is the time of planning and attention inside a real block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vdit_fast

from . import machine, timing
from .items import arguments, guarded
from .store import Store
from .supervise import Journal
from .timing import FULL, QUICK, Effort

SECTION = "methods"


@dataclass(frozen=True)
class Model:
    """A transformer with few blocks, and a clip."""

    name: str
    family: str  # wan, hunyuan_video
    heads: int
    dim: int
    feed_forward: int
    grid: tuple[int, int, int]  # tokens
    text: int
    blocks: tuple[int, ...] = (1,)

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width


WAN = Model("wan-14b-720p", "wan", 40, 128, 13824, (21, 45, 80), 512)
HUNYUAN = Model("hunyuan-720p", "hunyuan_video", 24, 128, 12288, (33, 45, 80), 256, (1, 2))
SMALL = Model("small", "wan", 2, 16, 64, (4, 6, 8), 7)


@dataclass(frozen=True)
class Case:
    """One method on one model.

    ``dense_share``: of the steps, as the authors run it; ``published``: their end-to-end speed-up, for comparison.
    """

    model: Model
    method: str
    attention: Mapping[str, Any] = field(default_factory=dict)
    dense_share: float = 0.0
    published: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model.name}/{self.method}"

    def spec(self) -> dict[str, Any]:
        return {**asdict(self), "attention": dict(self.attention)}


# Densities, dense steps and speed-ups as the papers print them: SVG2 2505.18875, Sparse-vDiT 2506.03065, DraftAttention
# 2505.14708, AdaSpa 2502.21079. SVG2's own rule is top-p; random weights need a budget. The others are peers at 30 %.
SVG2 = {"sparsity": 0.7, "iterations": 2}
FULL_CASES = (
    Case(WAN, "svg2", {**SVG2, "q_clusters": 300, "k_clusters": 1000}, 0.3, 1.89),
    Case(HUNYUAN, "svg2", {**SVG2, "sparsity": 0.745, "q_clusters": 400, "k_clusters": 1000}, 0.3, 2.30),
    Case(WAN, "draft", {"sparsity": 0.75}, 0.25),
    Case(HUNYUAN, "draft", {"sparsity": 0.9}, 0.25, 1.75),
    Case(HUNYUAN, "adaspa", {"sparsity": 0.8, "dense_steps": 0, "search": [0]}, 0.2, 1.78),
    Case(WAN, "sparse_vdit", {"modes": "dm" * 20, "sparsity": 0.7}, 0.0, 1.58),
    Case(HUNYUAN, "sparse_vdit", {"modes": "dm" * 12, "sparsity": 0.7}, 0.0, 1.85),
    Case(WAN, "svg1", {"sparsity": 0.7}, 0.2),
    Case(WAN, "vsa", {"sparsity": 0.7}),
    Case(WAN, "sparge", {"sparsity": 0.7}),
    Case(WAN, "xattention", {"top_p": 0.3}),
    Case(WAN, "radial"),
    Case(WAN, "sliding_tile", {"sparsity": 0.7}),
)
QUICK_CASES = (
    Case(SMALL, "draft", {"sparsity": 0.5, "pool": [3, 4]}, 0.25, 2.0),
    Case(SMALL, "svg2", {"sparsity": 0.5, "q_clusters": 8, "k_clusters": 16}),
)


def cases(quick: bool) -> tuple[Case, ...]:
    return QUICK_CASES if quick else FULL_CASES


def item_name(case: Case) -> str:
    return f"{SECTION}/{case.name}"


def journal_path(folder: Path) -> Path:
    return folder / "logs" / "methods.journal"


# ---- models


def build(model: Model, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer with random weights, and its inputs but for the timestep."""
    torch.manual_seed(0)
    frames, height, width = model.grid
    width_c = model.heads * model.dim
    latents = torch.randn(1, 16, frames, 2 * height, 2 * width, device=device, dtype=dtype)
    if model.family == "wan":
        from diffusers import WanTransformer3DModel

        with torch.device(device):
            net = WanTransformer3DModel(
                num_attention_heads=model.heads,
                attention_head_dim=model.dim,
                ffn_dim=model.feed_forward,
                num_layers=model.blocks[0],
            )
        text = torch.randn(1, model.text, 4096, device=device, dtype=dtype)
        inputs: dict[str, Any] = {"hidden_states": latents, "encoder_hidden_states": text}
    else:
        from diffusers import HunyuanVideoTransformer3DModel

        with torch.device(device):
            net = HunyuanVideoTransformer3DModel(
                num_attention_heads=model.heads,
                attention_head_dim=model.dim,
                mlp_ratio=model.feed_forward / width_c,
                num_layers=model.blocks[0],
                num_single_layers=model.blocks[1],
                num_refiner_layers=1,
            )
        mask = torch.ones(1, model.text, dtype=torch.long, device=device)
        mask[:, model.text // 2 :] = 0  # half of the text is padding
        inputs = {
            "hidden_states": latents,
            "encoder_hidden_states": torch.randn(1, model.text, 4096, device=device, dtype=dtype),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
            "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        }
    return net.to(dtype).eval().requires_grad_(False), {**inputs, "return_dict": False}


def caller(net: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Every call is the next denoising step: caches stay warm, nothing is taken for another guidance branch."""
    device = inputs["hidden_states"].device
    times: Iterator[float] = itertools.count(999.0, -0.5)

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = net(timestep=torch.full((1,), next(times), device=device), **inputs)[0]
        return out

    return call


# ---- measuring


def run(case: Case, *, device: str, dtype: torch.dtype, effort: Effort) -> dict[str, Any]:
    """Stock and own dense, eager and compiled, and the method in turn, each with its own copy of the block."""
    calls: dict[str, Callable[[], Tensor]] = {}
    skipped: dict[str, str] = {}
    stock, inputs = build(case.model, device, dtype)
    calls["stock"] = caller(stock, inputs)
    if device == "cuda":
        compiled, _ = build(case.model, device, dtype)
        try:
            compiled.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
            calls["stock, compiled"] = caller(compiled, inputs)
            calls["stock, compiled"]()
        except Exception as error:
            calls.pop("stock, compiled", None)
            skipped["stock, compiled"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    handles = {}
    for name, config in (
        ("dense", {}),
        (case.method, {"attention": {"method": case.method, **case.attention}, "on_unsupported": "error"}),
    ):
        own, _ = build(case.model, device, dtype)
        handles[name] = vdit_fast.accelerate(own, config)
        calls[name] = caller(own, inputs)
    if device == "cuda":
        both, _ = build(case.model, device, dtype)
        vdit_fast.accelerate(both)
        try:
            both.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
            calls["dense, compiled"] = caller(both, inputs)
            calls["dense, compiled"]()
        except Exception as error:
            calls.pop("dense, compiled", None)
            skipped["dense, compiled"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    want, got = calls["stock"](), calls["dense"]()
    error = float((got.double() - want.double()).norm() / want.double().norm())
    times = timing.interleaved(calls, effort, device)
    stats = handles[case.method].stats()["layers"]
    sparse = sum(layer["sparse_calls"] for layer in stats)
    median = {name: timing.summary(series)["ms"] for name, series in times.items()}
    share, method = case.dense_share, median[case.method]
    return {
        "tokens": case.model.tokens,
        "layers": len(stats),
        "density": sum(layer["density"][-1] for layer in stats if layer["density"]) / len(stats),
        "planning_ms_per_layer": 1e3 * sum(layer["plan_seconds"] for layer in stats) / max(1, sparse),
        "attention_ms_per_layer": 1e3 * sum(layer["attention_seconds"] for layer in stats) / max(1, sparse),
        "sparse_calls": sparse,
        "dense_error": error,
        "contenders": {name: timing.summary(series) for name, series in times.items()},
        "skipped_contenders": skipped,
        "sparse_step_speedup": timing.ratio(times["stock"], times[case.method]),
        "clip_speedup": median["stock"] / (share * median["dense"] + (1 - share) * method),
        "published_speedup": case.published,
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    store, journal = Store(args.out, machine.identity(args.device)), Journal(journal_path(args.out))
    table = {case.name: case for case in cases(args.quick)}
    for name in args.names:
        case = table[name]
        guarded(
            item_name(case),
            case.spec(),
            store,
            journal,
            args,
            45,
            lambda case=case: checked(case, args.device, args.quick),
        )


def checked(case: Case, device: str, quick: bool) -> tuple[dict[str, Any], str | None]:
    """The result, and what is wrong with it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    result = run(case, device=device, dtype=dtype, effort=QUICK if quick else FULL_EFFORT)
    right = result["dense_error"] < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    return result, None if right else f"dense result differs from stock by {result['dense_error']:.3g}"


FULL_EFFORT = Effort(warmups=2, launches=FULL.launches // 2, samples=FULL.samples, sample_ms=0.0)


if __name__ == "__main__":
    main()
