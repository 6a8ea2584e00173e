"""Problems of linear attention, their fp64 answers, and the error that plain torch makes in the same dtype.

Shared by the CPU kernel, the emulated kernels and the tests on a CUDA device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdit_fast import reference
from vdit_fast.reference.linear_attention import features

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class LinearCase:
    """One problem; everything random follows from the name."""

    name: str
    lq: int = 70
    lk: int = 150
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64
    dim_v: int = 64
    feature_map: str = "hedgehog"
    dtype: torch.dtype = BF16
    weight: str = "heads"  # "heads", "shared", "float32" or "none"; of hedgehog
    den: bool = False  # the denominator has inputs of its own
    kv_len: tuple[int, ...] | None = None
    kv_len_dtype: torch.dtype = torch.int32
    layout: str = "plain"  # "heads first", "sliced", "unaligned"
    magnitude: float = 1.0  # of values


@dataclass
class LinearProblem:
    """Tensors of a case, and its answers in fp64."""

    case: LinearCase
    q: Tensor
    k: Tensor
    v: Tensor
    state_options: dict[str, Any]
    readout_options: dict[str, Any]
    want_state: Tensor
    want: Tensor
    state_error: tuple[float, float]  # of torch in the same dtype: values, sums
    error: float
    wide_state_error: tuple[float, float]  # of torch in fp32, which rounds the result alone
    wide_error: float

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``linear_attention``."""
        state, readout = self.state_options, self.readout_options
        names = {k: state[k] for k in ("feature_map", "k_den", "kv_len")} | {"q_den": readout["q_den"]}
        return names | {"q_weight": readout["weight"], "k_weight": state["weight"]}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values [B, N, H, D] with other strides."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # rows of a wider tensor, every second token
        wide = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2] + 1, x.shape[3] + 16), torch.nan, dtype=x.dtype)
        view = wide[:, ::2, 1:, 8:-8]
        view.copy_(x)
        return view
    if layout == "unaligned":
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    assert layout == "plain"
    return x


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def no_worse(got: Tensor, twin: Tensor, truth: Tensor, name: str = "") -> None:
    """At most twice the error that ``twin``, plain torch in the same precision, has against fp64, and one rounding of
    the fp32 that kernels compute in: that of a 16-bit result is in the twin's error."""
    error, own = _relative(got, truth), _relative(twin, truth)
    allowed = 2 * own + torch.finfo(F32).eps
    assert error <= allowed, f"{name or 'relative'} error {error:.2e}, torch in the same precision {own:.2e}"


def widened(options: dict[str, Any]) -> dict[str, Any]:
    """Options in fp64."""
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}


def state_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative errors of the values' columns and of the sums."""
    return _relative(got[..., :-1], want[..., :-1]), _relative(got[..., -1], want[..., -1])


def in_order(phi: Tensor) -> Tensor:
    """The sum [B, H, F] of features [B, N, H, F] token by token, where torch's own sum adds in pairs."""
    total = torch.zeros_like(phi[:, 0])
    for row in phi.unbind(1):
        total += row
    return total


def wide_state(k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Plain torch in fp32, the denominator's tokens added in their order."""
    state = reference.linear_attention_state(k, v, **options)
    den = k if options["k_den"] is None else options["k_den"]
    dead = missing_tokens(k, options["kv_len"])
    phi = features(den.masked_fill(dead, 0), options["feature_map"], options["weight"]).masked_fill(dead, 0)
    state[..., -1] = in_order(phi)
    return state


def missing_tokens(k: Tensor, kv_len: Tensor | None) -> Tensor:
    """bool [B, N, 1, 1]."""
    end = torch.full((k.shape[0],), k.shape[1]) if kv_len is None else kv_len
    return (torch.arange(k.shape[1]) >= end[:, None])[..., None, None]


def eager_state(k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Plain torch in the tokens' dtype."""

    def features(x: Tensor) -> Tensor:
        return eager_features(x, options["feature_map"], options["weight"]).masked_fill(dead, 0)

    dead = missing_tokens(k, options["kv_len"])
    sums = torch.einsum("blhf,blhv->bhfv", features(k), v.masked_fill(dead, 0))
    z = features(k if options["k_den"] is None else options["k_den"])
    return torch.cat((sums, in_order(z.float()).to(sums.dtype)[..., None]), -1)


def eager_features(x: Tensor, feature_map: str, weight: Tensor | None) -> Tensor:
    if feature_map == "hedgehog":
        if weight is not None:
            x = torch.einsum("blhd,hde->blhe" if weight.dim() == 3 else "blhd,de->blhe", x, weight.to(x.dtype))
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    return {"relu": torch.relu, "elu": lambda x: torch.nn.functional.elu(x) + 1, "identity": lambda x: x}[feature_map](
        x
    )


def eager_readout(q: Tensor, state: Tensor, options: dict[str, Any]) -> Tensor:
    state = state.to(q.dtype).repeat_interleave(q.shape[2] // state.shape[1], 1)
    phi = eager_features(q, options["feature_map"], options["weight"])
    den = phi
    if options["q_den"] is not None:
        den = eager_features(options["q_den"], options["feature_map"], options["weight"])
    total = torch.einsum("blhf,bhf->blh", den, state[..., -1])[..., None] + options.get("eps", 1e-15)
    return torch.einsum("blhf,bhfv->blhv", phi, state[..., :-1]) / total


def eager(q: Tensor, k: Tensor, v: Tensor, state: dict[str, Any], readout: dict[str, Any]) -> Tensor:
    """Both, with the options of each."""
    return eager_readout(q, eager_state(k, v, state), readout)


def build(case: LinearCase) -> LinearProblem:
    g = torch.Generator().manual_seed(sum(ord(c) << i % 16 for i, c in enumerate(case.name)))

    def draw(length: int, heads: int, dim: int, factor: float = 1.0) -> Tensor:
        x = factor * torch.randn(case.batch, length, heads, dim, generator=g)
        return laid_out(x.to(case.dtype), case.layout)

    q, k = draw(case.lq, case.heads, case.dim), draw(case.lk, case.kv_heads, case.dim)
    v = draw(case.lk, case.kv_heads, case.dim_v, case.magnitude)
    if case.feature_map == "identity":  # of a positive denominator, as models make it
        q, k = q.abs(), k.abs()
    q_den = k_den = None
    if case.den:
        q_den, k_den = draw(case.lq, case.heads, case.dim).abs(), draw(case.lk, case.kv_heads, case.dim).abs()
    weights: list[Tensor | None] = [None, None]
    if case.feature_map == "hedgehog" and case.weight != "none":
        shapes = [(h, case.dim, case.dim) if case.weight != "shared" else (case.dim, case.dim)
                  for h in (case.heads, case.kv_heads)]  # fmt: skip
        dtype = F32 if case.weight == "float32" else case.dtype
        weights = [(1.5 * case.dim**-0.5 * torch.randn(s, generator=g)).to(dtype) for s in shapes]
    kv_len = None if case.kv_len is None else torch.tensor(case.kv_len, dtype=case.kv_len_dtype)
    state_options = {"feature_map": case.feature_map, "weight": weights[1], "k_den": k_den, "kv_len": kv_len}
    readout_options = {"feature_map": case.feature_map, "weight": weights[0], "q_den": q_den}
    if kv_len is not None:  # what does not count may hold anything
        for b, n in enumerate(case.kv_len or ()):
            for x in (k, v, k_den):
                if x is not None:
                    x[b, n:] = torch.nan

    want_state = reference.linear_attention_state(k.double(), v.double(), **widened(state_options))
    want = reference.linear_attention_readout(q.double(), want_state, **widened(readout_options))
    twin, wide = eager_state(k, v, state_options), wide_state(k, v, state_options)
    return LinearProblem(
        case, q, k, v, state_options, readout_options, want_state, want,
        state_errors(twin, want_state), _relative(eager_readout(q, twin, readout_options).nan_to_num(), want),
        state_errors(wide, want_state),
        _relative(reference.linear_attention_readout(q, wide, **readout_options), want),
    )  # fmt: skip


def check_state(problem: LinearProblem, got: Tensor, *, wide: bool = False) -> None:
    """At most twice the error of torch in the tokens' dtype, and one rounding; ``wide``: of torch in fp32, for kernels
    that round neither features nor weights."""
    assert got.shape == problem.want_state.shape and got.dtype == F32
    assert torch.isfinite(got).all(), "not finite"
    errors, own = state_errors(got, problem.want_state), problem.wide_state_error if wide else problem.state_error
    for name, error, base in zip(("values", "sums"), errors, own, strict=True):
        allowed = 2 * base + torch.finfo(F32).eps
        assert error <= allowed, f"{name}: relative error {error:.2e}, torch in the same precision {base:.2e}"


def check_out(problem: LinearProblem, got: Tensor, *, wide: bool = False) -> None:
    """As ``check_state``, for the result, which is rounded to the tokens' dtype at its end."""
    assert got.shape == problem.want.shape and got.dtype == problem.case.dtype
    assert torch.isfinite(got).all(), "not finite"
    error, base = _relative(got, problem.want), problem.wide_error if wide else problem.error
    allowed = 2 * base + torch.finfo(F32).eps
    assert error <= allowed, f"relative error {error:.2e}, torch in the same precision {base:.2e}"


# Every map, dtype, way of weights and layout; lengths around tiles of 16, 64 and 96.
CASES = [
    LinearCase("hedgehog-64"),
    LinearCase("hedgehog-128", dim=128, dim_v=128, lq=130, lk=200),
    LinearCase("hedgehog-no-weight", weight="none"),
    LinearCase("hedgehog-shared", weight="shared", dtype=F16),
    LinearCase("hedgehog-float32-weight", weight="float32", heads=4, kv_heads=2),
    LinearCase("hedgehog-fp32", dtype=F32, dim=48, dim_v=40),
    LinearCase("hedgehog-fp16-128", dim=128, dim_v=64, dtype=F16, lk=65),
    LinearCase("hedgehog-dim-96", dim=96, dim_v=72, lk=97),
    LinearCase("hedgehog-dim-40-values-128", dim=40, dim_v=128),
    LinearCase("hedgehog-odd-dim", dim=33, dim_v=17, lk=40),
    LinearCase("hedgehog-odd-dim-fp32", dim=33, dim_v=7, lk=100, dtype=F32),
    LinearCase("hedgehog-den", den=True, lk=90),
    LinearCase("hedgehog-192", dim=192, dim_v=136, lk=40, lq=20),
    LinearCase("hedgehog-256-fp32", dim=256, dim_v=256, lk=20, lq=18, dtype=F32, heads=1, kv_heads=1),
    LinearCase("relu-64", feature_map="relu"),
    LinearCase("relu-112", feature_map="relu", dim=112, dim_v=112, lk=130),
    LinearCase("relu-fp16-128", feature_map="relu", dim=128, dim_v=128, dtype=F16),
    LinearCase("relu-fp32", feature_map="relu", dtype=F32, dim=24, dim_v=24),
    LinearCase("relu-fp16-large", feature_map="relu", dtype=F16, magnitude=3000.0, lk=300),
    LinearCase("elu-64", feature_map="elu"),
    LinearCase("elu-128", feature_map="elu", dim=128, dim_v=96, lk=129, dtype=F16),
    LinearCase("elu-odd", feature_map="elu", dim=20, dim_v=12),
    LinearCase("elu-fp32", feature_map="elu", dtype=F32, dim=5, dim_v=3),
    LinearCase("identity-den", feature_map="identity", den=True, dim=112, dim_v=112),
    LinearCase("identity-den-64", feature_map="identity", den=True, dtype=F16),
    LinearCase("identity-den-fp32", feature_map="identity", den=True, dtype=F32, dim=36, dim_v=20),
    LinearCase("identity-200", feature_map="identity", dim=200, dim_v=200, lk=33, lq=17),
    LinearCase("kv-len", batch=3, kv_len=(150, 0, 77)),
    LinearCase("kv-len-64", batch=3, kv_len=(1, 64, 65), kv_len_dtype=torch.int64, feature_map="elu", den=True),
    LinearCase("kv-len-fp32", batch=2, kv_len=(97, 3), dtype=F32, dim=16, dim_v=16, feature_map="elu"),
    LinearCase("length-1", lq=1, lk=1),
    LinearCase("length-1-relu-fp32", lq=1, lk=1, dtype=F32, feature_map="elu", dim=8, dim_v=8),
    LinearCase("heads-first", layout="heads first", batch=2),
    LinearCase("sliced", layout="sliced", batch=2, dim=128, dim_v=128),
    LinearCase("sliced-relu", layout="sliced", batch=2, feature_map="relu", den=True),
    LinearCase("unaligned", layout="unaligned", heads=1, kv_heads=1),
    LinearCase("unaligned-fp32", layout="unaligned", dtype=F32, dim=32, dim_v=32),
    LinearCase("gqa", heads=6, kv_heads=2, batch=2, feature_map="relu"),
    LinearCase("stages", lk=64 * 5, lq=16 * 9),
]
