"""Bugs for the kernels of linear attention: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, file: str, old: str, new: str, select: str) -> Mutant:
    path = f"kernels/linear/{file}"
    return Mutant("linear_attention", f"linear_attention: {name}", path, old, new, "test_linear_attention.py", select)


_STATE, _READOUT, _PLAIN, _TILE = "state_matrix.h", "readout_matrix.h", "plain.h", "tile.h"

MUTANTS = [
    # ---- hazards of the state's kernel
    _bug(
        "values are read before they have landed",
        _STATE,
        "      arch::cp_async_wait<0>();\n      arch::syncthreads();\n      if (j + 1 < end) load(p.k, j + 1",
        "      arch::syncthreads();\n      if (j + 1 < end) load(p.k, j + 1",
        "hedgehog-64 or stages",
    ),
    _bug(
        "features are read before all warps have stored theirs",
        _STATE,
        "      arch::cp_async_wait<0>();\n      arch::syncthreads();\n      if (j + 1 < end) load(p.k, j + 1",
        "      arch::cp_async_wait<0>();\n      if (j + 1 < end) load(p.k, j + 1",
        "hedgehog-64 or hedgehog-128 or stages",
    ),
    _bug(
        "values are overwritten while a warp reads them",
        _STATE,
        "      arch::cp_async_wait<0>();\n      arch::syncthreads();\n      load(p.v, j, p.dim_v",
        "      arch::cp_async_wait<0>();\n      load(p.v, j, p.dim_v",
        "hedgehog-64 or hedgehog-128 or stages",
    ),
    _bug(
        "halves of rows are read before they are stored",
        _STATE,
        "    arch::syncthreads();\n    VD_UNROLL for (int r = 0; r < 2; ++r) {\n      const uint4 v",
        "    VD_UNROLL for (int r = 0; r < 2; ++r) {\n      const uint4 v",
        "hedgehog-128",
    ),
    _bug(
        "both buffers are one",
        _STATE,
        "const uint32_t to = smem + (stage - begin) % 2 * buffer;",
        "const uint32_t to = smem;",
        "relu-64",
    ),
    # ---- which tokens
    _bug(
        "tokens beyond kv_len are read",
        _STATE,
        "first + row + n * kStep < end && chunk * 8 < dim",
        "chunk * 8 < dim",
        "kv-len",
    ),
    _bug("missing tokens count", _STATE, "token < valid ? 1.f : 0.f,", "1.f,", "hedgehog-64"),
    _bug("missing tokens of the upper half count", _STATE, "token + 9 < valid ? 1.f", "true ? 1.f", "hedgehog-128"),
    _bug("the part before is added as well", _STATE, "(int64_t(a.stages) * part / a.splits)", "(0)", "parts or kv"),
    _bug("lengths of 64 bits read as 32", _TILE, "lengths.bytes == 8 ?", "lengths.bytes == 9 ?", "kv-len-64 or wild"),
    _bug("wild lengths are believed", _TILE, "n < 0 ? 0 : n < most ? int32_t(n) : most", "int32_t(n)", "wild"),
    # ---- features
    _bug(
        "columns that do not exist count",
        _TILE,
        "exists(n, c) ? y[n][c] : -INFINITY",
        "y[n][c]",
        "dim-96 or dim-40 or far",
    ),
    _bug(
        "features of columns that do not exist",
        _TILE,
        "exists(n, c) ? arch::ex2(y[n][c] - top[c / 2]) : 0.f",
        "arch::ex2(y[n][c] - top[c / 2])",
        "dim-96 or dim-40",
    ),
    _bug(
        "the negative half is the positive one",
        _TILE,
        "arch::ex2(low[c / 2] - y[n][c])",
        "arch::ex2(y[n][c] - top[c / 2])",
        "hedgehog-64",
    ),
    _bug("halves of a row are scaled alike", _STATE, "a / (plus[r] * a +", "1.f / (plus[r] * a +", "hedgehog-128"),
    _bug(
        "a row's sum is of its own half",
        _STATE,
        " + arch::as_float(v.w) * arch::ex2(low - arch::as_float(v.z)));",
        ");",
        "hedgehog-128",
    ),
    _bug("relu loses NaN", _TILE, "return x < 0.f ? 0.f : x;", "return fmaxf(x, 0.f);", "nan"),
    _bug("elu without its one", _TILE, "x > 0.f ? x + 1.f :", "x > 0.f ? x :", "elu"),
    _bug("weights of the first head for all", _TILE, "head * w.head_stride", "0 * w.head_stride", "hedgehog-64"),
    _bug(
        "the denominator's keys are the numerator's",
        _STATE,
        "if (den != phi) load_left(map, den",
        "if (false) load_left(map, den",
        "identity-den",
    ),
    _bug(
        "sums of the wrong features",
        _STATE,
        "m / C::kSumTiles == group()",
        "m / C::kSumTiles == 0",
        "hedgehog-128",
    ),
    # ---- parts
    _bug("the last part is left out", "state.cu", "s < splits; ++s", "s < splits - 1; ++s", "parts or hedgehog-64"),
    _bug(
        "parts overwrite each other",
        _STATE,
        "(int64_t(part) * p.batch * p.heads + sequence) * floats",
        "int64_t(sequence) * floats",
        "parts or hedgehog-64",
    ),
    # ---- readout
    _bug(
        "columns of q in memory's order",
        _READOUT,
        "return r / 32 * 32 + r % 8 / 2 * 8 + r % 32 / 16 * 4 + r / 8 % 2 * 2 + r % 2;",
        "return r;",
        "relu-64 or hedgehog-64",
    ),
    _bug(
        "columns of results in memory's order",
        _READOUT,
        "return c / 32 * 32 + c % 8 / 2 * 8 + c / 8 % 4 * 2 + c % 2;",
        "return c;",
        "relu-64 or hedgehog-64",
    ),
    _bug(
        "what rounding left over is left out",
        _READOUT,
        "arch::pack<T>(x[0] - rounded[0], x[1] - rounded[1])",
        "0u",
        "cancel",
    ),
    _bug(
        "the state overflows fp16",
        _READOUT,
        "if (exponent > 73 || exponent < -48) return 1.f;",
        "return 1.f;",
        "relu-fp16-large",
    ),
    _bug("the scale of the state stays", _READOUT, "arch::as_uint(z * scale)", "arch::as_uint(z)", "fp16"),
    _bug("eps is not scaled as the state is", _READOUT, "arch::as_uint(p.eps * scale)", "arch::as_uint(p.eps)", "eps"),
    _bug("eps is left out", _READOUT, "quad_sum(lane_sums[r]) + eps", "quad_sum(lane_sums[r])", "eps"),
    _bug(
        "zero denominators divide",
        _READOUT,
        "factor[r] = total == 0.f ? 0.f : 1.f / total;",
        "factor[r] = 1.f / total;",
        "no_key",
    ),
    _bug(
        "the state is not complete when it is read",
        _READOUT,
        "  load_operands<T, kDim, kHedgehog>(p, head, state, scale, smem);\n  arch::syncthreads();",
        "  load_operands<T, kDim, kHedgehog>(p, head, state, scale, smem);",
        "hedgehog-64",
    ),
    _bug(
        "query heads take every second state",
        _READOUT,
        "kv_head = head / (p.heads / p.kv_heads)",
        "kv_head = head % p.kv_heads",
        "gqa",
    ),
    _bug(
        "rows beyond the end are written",
        _READOUT,
        "if (first + lane / 4 + 8 * r >= p.length) continue;",
        "",
        "hedgehog-64",
    ),
    _bug(
        "rows beyond the end are read",
        _READOUT,
        "const bool exists = first + lane / 4 + 8 * r < p.length;",
        "const bool exists = true;",
        "hedgehog-64",
    ),
    _bug(
        "the next tile is the next warp's",
        _READOUT,
        "load_next(tile + C::kWarps);\n      VD_UNROLL for (int r = 0; r < 2; ++r) {\n        const float ratio",
        "load_next(tile + 1);\n      VD_UNROLL for (int r = 0; r < 2; ++r) {\n        const float ratio",
        "stages",
    ),
    _bug(
        "halves keep their own sums",
        _READOUT,
        "const float ratio = rows.plus[r] / rows.minus[r];",
        "const float ratio = 1.f;",
        "hedgehog-64",
    ),
    _bug(
        "products of the negative half are not scaled",
        _READOUT,
        "total_m[r] * rows.minus[r]",
        "total_m[r]",
        "hedgehog-64",
    ),
    _bug(
        "the denominator's queries are the numerator's on tensor cores",
        _READOUT,
        "load_queries<kDim>(p, lane_address(p.q_den, batch, head), p.q_den.row_stride",
        "load_queries<kDim>(p, lane_address(p.q, batch, head), p.q.row_stride",
        "identity-den or sliced-relu",
    ),
    # ---- multiply-add
    _bug(
        "features are read before the row is complete",
        _PLAIN,
        "    if (lane < (4 - count % 4) % 4) put_shared(to + (count + lane) * 4, 0.f);\n  }\n  arch::syncthreads();",
        "    if (lane < (4 - count % 4) % 4) put_shared(to + (count + lane) * 4, 0.f);\n  }",
        "fp32",
    ),
    _bug(
        "rows are overwritten by their products",
        _PLAIN,
        "  arch::syncthreads();\n  if (column < dim)",
        "  if (column < dim)",
        "fp32",
    ),
    _bug("tail features are not cleared", _PLAIN, "if (lane < (4 - count % 4) % 4)", "if (false)", "odd"),
    _bug(
        "padding counts", _PLAIN, "end - first < kTokens ? int(end - first) : kTokens", "kTokens", "kv-len-fp32 or fp32"
    ),
    _bug(
        "values of the first columns for all",
        _PLAIN,
        "+ first_column + column : 0",
        "+ column : 0",
        "hedgehog-192 or hedgehog-256",
    ),
    _bug(
        "features beyond the first 256 have no sums",
        _PLAIN,
        "      if (f >= count) continue;\n      for (int t",
        "      if (f >= 256) continue;\n      for (int t",
        "hedgehog-192 or hedgehog-256",
    ),
    _bug(
        "the denominator's queries are the numerator's",
        _PLAIN,
        "features<T>(p, p.q_den, batch",
        "features<T>(p, p.q, batch",
        "hedgehog-den or identity-den-fp32",
    ),
    _bug("zero denominators divide in fp32", _PLAIN, "total == 0.f ? 0.f : 1.f / total", "1.f / total", "no_key"),
]
