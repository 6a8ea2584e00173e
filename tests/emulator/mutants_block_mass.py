"""Bugs for the search kernels over scores: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str) -> Mutant:
    path = "kernels/select/block_mass.cu"
    return Mutant("block_mass", f"block_mass: {name}", path, old, new, "test_block_mass.py", select)


MUTANTS = [
    # ---- hazards
    _bug(
        "a chunk is read before it has landed",
        "arch::cp_async_wait<kBuffers - 2>();",
        "arch::cp_async_wait<kBuffers - 1>();",
        "shape-300 or fold-8",
    ),
    _bug(
        "no barrier before a product", "arch::syncthreads();\n        load_next();", "load_next();", "shape-300 or dims"
    ),
    _bug(
        "sums are read before all warps have stored theirs",
        "  VD_METHOD void write_slots(const Args& a, const Place& at) {\n    arch::syncthreads();\n",
        "  VD_METHOD void write_slots(const Args& a, const Place& at) {\n",
        "blocks",
    ),
    _bug(
        "sums are overwritten while a warp reads them",
        "    slots = 0;\n    arch::syncthreads();\n",
        "    slots = 0;\n",
        "blocks",
    ),
    # ---- which rows
    _bug("queries in the order of keys", "p.fold + p.fold - 1 - chunk.slice", "p.fold + chunk.slice", "fold"),
    _bug("keys beyond kv_len are read", "row < at.keys);", "row < p.lk);", "kv-len"),
    _bug(
        "query rows beyond the end are read",
        "folded < at.end && row < at.queries",
        "folded < at.end",
        "fold-tails or fold-beyond",
    ),
    _bug("query heads take every second key head", "at.head / (p.heads / p.kv_heads)", "at.head % p.kv_heads", "gqa"),
    _bug("lengths of 64 bits read as 32", "lengths.bytes == 8 ?", "lengths.bytes == 9 ?", "kv-len-64 or wild"),
    _bug("wild lengths are believed", "n < 0 ? 0 : n < most ? int32_t(n) : most", "int32_t(n)", "wild"),
    _bug("blocks straddle CTAs", ": search::kRows / a.q_block * a.q_block;", ": search::kRows;", "blocks"),
    _bug(
        "queries beyond q_len are read",
        "at.queries = valid_rows(p.q_len, at.batch, p.lq);",
        "at.queries = p.lq;",
        "q-len",
    ),
    _bug("queries of no valid row count", "|| row * a.p.fold >= at.queries ?", "?", "q-len or beyond"),
    # ---- the product
    _bug(
        "half a step of columns is left out",
        "if (k * 16 >= columns) break;",
        "if (k * 16 + 8 >= columns) break;",
        "dim",
    ),
    _bug("the sign of the scale is lost", "q[m][i] ^= sign;", "q[m][i] ^= 0 * sign;", "scale-negative"),
    _bug("every chunk takes the first queries", "smem + c * kQueryBytes :", "smem :", "dim"),
    _bug("columns of the first piece for all", "piece = piece + 1 < a.pieces ? piece + 1 : 0;", "piece = 1;", "fold"),
    # ---- log-sum-exp
    _bug("missing keys count", "if (valid < kKeys && 8 * n + column >= valid)", "if (false)", "shape"),
    _bug("old sums are not rescaled", "sum[i] * arch::ex2(top[i] - base) + part", "sum[i] + part", "shape-300"),
    _bug("rows keep sums of a quarter of the keys", "      total += arch::shfl_xor_f(total, 2);\n", "", "shape-300"),
    _bug(
        "inf minus inf",
        "fminf(fmaxf(top[i], most * a.scale_log2), kLargest)",
        "fmaxf(top[i], most * a.scale_log2)",
        "infinite",
    ),
    # ---- mass
    _bug("rows of weight 0 count", "dead[i] ? 0.f : part[i]", "part[i]", "dead"),
    _bug("key blocks end with the stage", "border < last ? border : last", "last", "blocks"),
    _bug("values of lanes swapped", "return (odd ? y : x) +", "return (odd ? x : y) +", "blocks"),
    _bug("later passes replace the sums", "first_pass ? total : *to + total", "total", "blocks-200x7 or passes"),
    _bug("blocks beyond the valid keys are not written", "    if (!first_pass) return;\n", "    return;\n", "kv-len"),
    _bug(
        "sums of the block before stay",
        "    VD_UNROLL for (int i = 0; i < 4; ++i) sum[i] = 0.f;\n    ++slots;",
        "    ++slots;",
        "blocks",
    ),
]
