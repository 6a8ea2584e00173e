"""Bugs for the selection kernels and the compilation of block maps: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant

ROWS, SELECT = "kernels/select/select_rows.h", "kernels/select/select.cu"
RUNS, SUM = "kernels/plan/block_runs.h", "kernels/block_sum.h"


def _select(name: str, old: str, new: str, select: str, file: str = ROWS) -> Mutant:
    return Mutant("select", f"select: {name}", file, old, new, "test_select.py", select)


def _blocks(name: str, old: str, new: str, select: str, file: str = RUNS) -> Mutant:
    return Mutant("select", f"block map: {name}", file, old, new, "test_compile_blocks.py", select)


MUTANTS = [
    # ---- order of the entries
    _select("-0 below 0", "if (bits == 0x80000000u) return bits;", "", "short_rows and ties"),
    _select(
        "negative NaN is the smallest",
        "(bits & 0x7fffffffu) > 0x7f800000u",
        "bits > 0x7f800000u && bits < 0x80000000u",
        "short_rows and wild",
    ),
    _select(
        "negative numbers in the wrong order",
        "bits >> 31 ? ~bits :",
        "bits >> 31 ? bits ^ 0x80000000u :",
        "short_rows and normal",
    ),
    _select("one entry too many among ties", "tie && rank < ties", "tie && rank <= ties", "short_rows and ties"),
    _select(
        "ties of other warps not counted",
        "if (w < warp) rank += n;",
        "if (w < 0) rank += n;",
        "short_rows and ties or short_rows and constant",
    ),
    _select("a lane counts itself as a tie before it", "(1u << lane) - 1", "(2u << lane) - 1", "short_rows and ties"),
    # ---- hazards
    _select(
        "bins counted while another thread clears them",
        "row.clear();\n    arch::syncthreads();",
        "row.clear();",
        "short_rows and normal or long_rows",
    ),
    _select(
        "bins read while another thread counts",
        "row.add(key >> shift & (digits - 1), key);\n    });\n    arch::syncthreads();",
        "row.add(key >> shift & (digits - 1), key);\n    });",
        "short_rows and normal or long_rows",
    ),
    _select(
        "the found bin read before it is written",
        "    arch::syncthreads();\n    g.prefix |=",
        "    g.prefix |=",
        "short_rows and normal or long_rows",
    ),
    _select(
        "one buffer for the ties of a chunk",
        "chunk += kThreads, buffer ^= kThreads / 32",
        "chunk += kThreads",
        "ties or constant",
    ),
    # ---- digits and sums
    _select(
        "bins of the pass before are kept",
        "for (int i = 0; i < kHistogramBytes / 4 / kThreads; ++i)",
        "for (int i = 0; i < kHistogramBytes / 8 / kThreads; ++i)",
        "short_rows or long_rows",
    ),
    _select("higher digits ignored", "if ((key & fixed) == g.prefix) row.add", "row.add", "short_rows and normal"),
    _select("carry into the high word lost", "high += before + low < before;", "", "bits"),
    _select("high words lost", "if (high != 0)", "if (high > 0xffffffffu - 1)", "bits"),
    _select("mass above the group forgotten", "mass = g.mass_above + block", "mass = block", "top_p or long_rows"),
    _select(
        "share of the remaining mass",
        "limit = uint64_t(int64_t(double(int64_t(total)) * p.p));",
        "limit = uint64_t(int64_t(double(int64_t(total)) * p.p)) / 2;",
        "top_p",
    ),
    _select("entry at the border dropped", "mass <= limit); };", "mass < limit); };", "border"),
    _select("equal entries of a share miscounted", "/ mass_units(g.prefix) + 1;", "/ mass_units(g.prefix);", "top_p"),
    _select("mass above 256 not clipped", "x < 256.f ?", "x < 512.f ?", "bits or top_p"),
    _select("all entries stay only if there is one", "whole = stays(uint64_t(p.n), total);", "whole = false;", "top_p"),
    _select("no clamp of k", "k < 1 ? 1 : k < p.n ? k : p.n", "k < 1 ? 1 : k", "count or top_k"),
    _select("k of another width", "p.k_bytes == 8 ?", "p.k_bytes == 4 ?", "count"),
    _select(
        "warp sum of the first 16 lanes",
        "for (int step = 1; step < 32; step *= 2) {\n    const uint64_t",
        "for (int step = 1; step < 16; step *= 2) {\n    const uint64_t",
        "short_rows and normal",
        SUM,
    ),
    # ---- block maps
    _blocks(
        "an empty block ends a run", "read_before = before >= 0 ?", "read_before = lane > 0 ?", "densities or sizes"
    ),
    _blocks(
        "a run does not cross a chunk",
        "if (filled != 0) open =",
        "open = filled == 0 && open; if (false) open =",
        "sizes or chunk",
    ),
    _blocks("an open run is never closed", "if (open && lane == 0) body", "if (false) body", "sizes"),
    _blocks(
        "first key of a run from an earlier chunk lost",
        "if (last_start >= 0) open_begin = last_begin;",
        "open_begin = last_begin;",
        "chunk or sizes",
    ),
    _blocks(
        "keys of earlier chunks not counted",
        "position = arch::shfl(end, 31);",
        "position = arch::shfl(end, 30);",
        "sizes",
    ),
    _blocks(
        "lengths of the first group for all",
        "m.kv_groups == 1 ? 0 : row / m.nq * m.nk",
        "m.kv_groups == 1 ? 0 : 0",
        "own",
    ),
    _blocks("tiles of earlier groups not counted", "if (m.q_groups == 1) tile *= uint64_t(group);", "", "sizes"),
    _blocks("rows of earlier chunks forgotten", "row += row_totals[w];", "", "threads"),
    _blocks(
        "totals overwritten while they are read",
        "    arch::syncthreads();  // the totals have been read\n",
        "",
        "threads",
    ),
    _blocks("unused tiles left as they are", "if (group + 1 < m.groups) return;", "return;", "sizes"),
    _blocks(
        "tiles without rows before those without keys", ": -1;\n      first", ": 0;\n      first", "densities or own"
    ),
    _blocks(
        "unused runs left as they are", "unused < (t + 1) * share; unused += 32", "unused < 0; unused += 32", "sizes"
    ),
    _blocks("runs of tiles without rows counted", "if (source[2] > 0) count =", "count =", "own or sizes"),
    _blocks(
        "one buffer for the totals of a chunk",
        "chunk += kPlaceThreads, buffer ^= kPlaceThreads / 32",
        "chunk += kPlaceThreads",
        "threads",
    ),
    _blocks(
        "negative lengths of query blocks are added", "i < m.nq && q_len[i] > 0 ?", "i < m.nq ?", "negative_lengths"
    ),
    _blocks("sizes beyond 64 bits", "(rows - 1) / m.q_tile + 1", "(rows + m.q_tile - 1) / m.q_tile", "larger"),
]
