"""Bugs for the gradient kernels and what surrounds them: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant

DQ, DKV = "backward_dq.h", "backward_dkv.h"
QUERIES, TILE, PREPARE, HOST = "backward_queries.h", "backward_tile.h", "backward_prepare.h", "backward.cu"


def _bug(name: str, file: str, old: str, new: str, select: str) -> Mutant:
    path = f"kernels/attention/{file}"
    return Mutant("attention_backward", f"backward: {name}", path, old, new, "test_backward.py", select)


MUTANTS = [
    # ---- dq: hazards
    _bug(
        "dq reads K and V before they have landed",
        DQ,
        "arch::cp_async_wait<0>();\n      arch::syncthreads();\n      if (j + 1 < stages)",
        "arch::cp_async_wait<1>();\n      arch::syncthreads();\n      if (j + 1 < stages)",
        "plan-dense or blocks-64",
    ),
    _bug(
        "V is overwritten while a warp reads it",
        DQ,
        "arch::syncthreads();\n      if (j + 1 < stages) sm80::load_keys<kDim, kKeys>(p, smem + C::kV",
        "if (j + 1 < stages) sm80::load_keys<kDim, kKeys>(p, smem + C::kV",
        "plan-dense or blocks-64 or dense-300x300",
    ),
    # ---- dq: arithmetic
    _bug("both rows of a thread get one delta", DQ, "-delta[c / 2]", "-delta[0]", "plan-dense"),
    _bug("row_scale missing in dS", DQ, "fmaf(row_scale[c / 2], dp", "fmaf(1.f, dp", "row-scale"),
    _bug("dq not scaled", DQ, "store_rows<T, kDim>(dq, p.scale,", "store_rows<T, kDim>(dq, 1.f,", "plan-dense"),
    _bug("mask bits of the stage before", DQ, "      bits = next_bits;\n", "", "mask"),
    # ---- dk, dv: hazards
    _bug(
        "queries overwritten while a warp reads them",
        DKV,
        "arch::cp_async_wait<0>();\n    arch::syncthreads();\n    more",
        "arch::cp_async_wait<0>();\n    more",
        "plan-dense or blocks-64 or dense-300x300",
    ),
    _bug(
        "queries read before they have landed",
        DKV,
        "arch::cp_async_wait<0>();\n    arch::syncthreads();\n    more",
        "arch::cp_async_wait<1>();\n    arch::syncthreads();\n    more",
        "plan-dense or blocks-64",
    ),
    _bug(
        "one copy of the mask bits for both buffers",
        DKV,
        "mask_keys<kQueries>(s, dp, smem + C::kBits + buffer * C::kBitBytes)",
        "mask_keys<kQueries>(s, dp, smem + C::kBits)",
        "mask or runs",
    ),
    _bug(
        "results stored over keys that are still landing",
        DKV,
        "arch::cp_async_wait<0>();\n  arch::syncthreads();",
        "arch::syncthreads();",
        "runs or no-tiles or blocks",
    ),
    # ---- dk, dv: arithmetic
    _bug("blocks read in part are not masked", DKV, "if (!full) mask_keys", "if (false) mask_keys", "runs or clusters"),
    _bug("second key of a thread masked as another", DKV, "key + c / 2 * 8", "key + c / 2 * 4", "mask"),
    _bug("unread NaN reaches dk", DKV, "        dp[n][c] = 0.f;\n", "", "nan-blocks or nan-clusters or nan-runs"),
    _bug("dv without row_scale", DKV, "s[n][r] = weight * row_scale;", "s[n][r] = weight;", "row-scale"),
    _bug("sign of the scale ignored", HOST, "p.scale < 0.f ? 0x80008000u : 0u", "0u", "scale-negative"),
    _bug(
        "keys at or above kv_len get gradients",
        TILE,
        "arch::lds32(to.row_ids + row * 4)) >= to.limit;",
        "arch::lds32(to.row_ids + row * 4)) < -1;",
        "kv-len",
    ),
    # ---- which queries
    _bug("a run that ends inside the block is full", QUERIES, "run_end >= last && ", "", "runs or clusters"),
    _bug(
        "tiles beyond the first look are lost",
        QUERIES,
        "tile_end : tile + kThreads",
        "tile_end : tile_end",
        "many or more_tiles",
    ),
    _bug("tiles found by other warps overwritten", QUERIES, "if (w == warp) before = count;", "", "more_tiles"),
    _bug("bits across a word boundary are lost", QUERIES, "shift + (to - from) > 32 &&", "false &&", "mask"),
    _bug(
        "mask rows counted from the block",
        DKV,
        "readable_keys(p, q, q.first + row,",
        "readable_keys(p, q, row,",
        "mask",
    ),
    _bug("a shared segment takes one batch item", QUERIES, "batch == 1 ? p.batch : 1", "1", "segment"),
    _bug("heads with orders of their own summed as one", HOST, "l.parts > 0 ? 1 :", "l.parts < 0 ? 1 :", "gqa"),
    _bug("only one head of a group", PREPARE, "g < group;", "g < 1;", "gqa"),
    # ---- rows and lists
    _bug("gradient of the lse ignored", PREPARE, "delta -= a.in.dlse[row]", "delta -= 0.f", "plan-dense or blocks"),
    _bug("half of a row in delta", PREPARE, "step = kRecordLanes / 2; step", "step = kRecordLanes / 4; step", "dim"),
    _bug("weights of empty rows", PREPARE, "empty ? INFINITY : lse * kLog2e", "lse * kLog2e", "mask-sparse"),
    _bug("lists of heads shifted", PREPARE, "tile.bh < index", "tile.bh <= index", "blocks or clusters"),
    _bug(
        "uncovered rows do not read the segments",
        HOST,
        "if (p.num_segments > 0) {",
        "if (false) {",
        "segments-uncovered",
    ),
]
