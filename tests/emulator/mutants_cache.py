"""Bugs for the feature cache's kernels: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str, file: str = "cache_kernel.h") -> Mutant:
    return Mutant("cache", f"cache: {name}", f"kernels/cache/{file}", old, new, "test_cache.py", select)


def _e4m3(name: str, old: str, new: str, select: str, file: str = "cache/update_e4m3.h") -> Mutant:
    return Mutant("cache", f"cache, e4m3: {name}", f"kernels/{file}", old, new, "test_cache_e4m3.py", select)


KERNEL, ENTRY, CODES = "cache/cache_kernel.h", "cache/cache.cu", "fused/e4m3.h"

MUTANTS = [
    # ---- who holds what
    _bug("threads beyond the pieces go on",
         "if (item >= a.items) return;\n  const Place at(a, item);\n  const Raw x",
         "const Place at(a, item);\n  const Raw x", "forecasts or cut"),
    _bug("the last row is never cut", "end = left < a.p.dim ? int(left) : a.p.dim;", "end = a.p.dim;", "cut"),
    _bug("a cut piece is written as a whole", "a.aligned != 0 && piece * kPiece + kPiece <= end", "a.aligned != 0",
         "cut or updates"),
    _bug("batch items share the first one's tokens", "a.p.batch == 1 ? 0 :", "a.p.batch >= 1 ? 0 :", "forecasts"),
    _bug("factors of a module overlap",
         "i * p.factor_stride + row, wide);\n    old", "0 * p.factor_stride + row, wide);\n    old", "updates"),
    _bug("every module reads the first one's factors", "const ForecastModule& module = p.module[j];",
         "const ForecastModule& module = p.module[0];", "forecasts"),
    _bug("a factor more is read than is known", "if (i >= p.last) continue;", "if (i > p.last) continue;",
         "every_byte"),
    _bug("a factor too few is written", "if (i > p.last) continue;", "if (i >= p.last) continue;", "updates"),
    _bug("more factors are summed than are known",
         "if (i >= p.factors) continue;\n      float f", "float f", "forecasts"),
    _bug("out steps as x does not", "at.b * p.out_batch_stride + at.n", "at.b * p.out_batch_stride * 2 + at.n",
         "forecasts"),
    _bug("alignment of minus is forgotten", "&& aligned(p, p.minus)", "", "misaligned", "cache.cu"),
    _bug("alignment between factors is forgotten",
         "p.last > 0 ? p.factor_stride : 0", "0", "misaligned or updates", "cache.cu"),
    _bug("alignment between a module's factors is forgotten", "p.factors > 1 ? m.factor_stride : 0", "0",
         "misaligned or cut", "cache.cu"),
    _bug("alignment of gates is forgotten", "|| !aligned(p, m.gate)", "", "misaligned", "cache.cu"),
    _bug("alignment of out is forgotten",
         "&& aligned(p, AdaLNRows{p.out, p.out_batch_stride, p.out_token_stride, p.out_dtype})", "", "misaligned",
         "cache.cu"),
    _bug("width decides nothing about alignment", "whole && (p.dim % kPiece == 0 || rows == 1)", "whole", "narrower",
         "cache.cu"),
    _bug("five factors by the kernel for two", "if (args.p.factors <= 2)", "if (args.p.factors <= 5)", "forecasts",
         "cache.cu"),
    # ---- arithmetic
    _bug("nothing is subtracted", "v[e] -= t[e];", "v[e] -= 0.f * t[e];", "updates"),
    _bug("differences are not divided", "(v[e] - t[e]) / p.distance", "v[e] - t[e]", "updates"),
    _bug("differences of the wrong sign", "(v[e] - t[e])", "(t[e] - v[e])", "updates"),
    _bug("the first weight is 1", "v[e] *= p.weight[0];", "v[e] *= 1.f;", "alone or forecasts"),
    _bug("weights are off by one", "p.weight[i] * f[e]", "p.weight[i - 1] * f[e]", "forecasts"),
    _bug("the gate is left out", "v[e] *= t[e];", "v[e] *= 1.f;", "forecasts"),
    _bug("only the last module counts", "total[e] += v[e];", "total[e] = v[e];", "forecasts"),
    # ---- roundings of eager mode
    _bug("the forecast is not rounded", "round_to<H>(v, p.round);", "", "roundings"),
    _bug("the product with the gate is not rounded", "round_to<H>(v, p.round && module.gate.round);", "", "roundings"),
    _bug("the product with a wide gate is rounded", "p.round && module.gate.round", "p.round", "roundings"),
    _bug("sums between modules are not rounded", "round_to<H>(total, p.round);", "", "roundings"),
    # ---- e4m3: who holds what
    _e4m3("rows beyond the last are taken", "row < a.rows ? a.pieces : 0", "a.pieces", "updates"),
    _e4m3("batch items share the first one's tokens", "b = row / uint32_t(p.tokens)", "b = 0 * row", "larger"),
    _e4m3("every row is the CTA's first", "a.threads) + threadIdx.x / a.threads;", "a.threads);", "updates"),
    _e4m3("a factor more is read than is known", "if (i >= p.last) continue;\n      old[k]",
          "if (i > p.last) continue;\n      old[k]", "every_byte"),
    _e4m3("a scale more is read than is known", "if (i < p.last && pieces > 0)", "if (i <= p.last && pieces > 0)",
          "every_byte"),
    _e4m3("a factor too few is written", "if (i > p.last) continue;\n    f(i, v);",
          "if (i >= p.last) continue;\n    f(i, v);", "updates"),
    _e4m3("all factors have the first one's scale", "p.scales + i * p.scale_stride + row, arch::as_uint",
          "p.scales + row, arch::as_uint", "updates"),
    _e4m3("old factors are under the first one's scale", "arch::ldg32(p.scales + i * p.scale_stride + row)",
          "arch::ldg32(p.scales + row)", "updates"),
    _e4m3("every thread writes the scale", "if (i > p.last || own != 0 || pieces == 0)",
          "if (i > p.last || pieces == 0)", "every_byte"),
    _e4m3("a cut piece is whole", "piece * kPiece + kPiece <= p.dim;\n    VD_UNROLL", "true;\n    VD_UNROLL",
          "updates or pieces"),
    _e4m3("alignment of codes is forgotten", "gpu::e4m3::aligned(factors, stride)", "true", "misaligned", ENTRY),
    _e4m3("alignment between factors is forgotten", "&& stride % kPiece == 0", "", "updates or misaligned", CODES),
    _e4m3("the last pieces have no thread", "each < 4 && each * kThreads < args.pieces",
          "each < 2 && each * kThreads < args.pieces", "pieces", ENTRY),
    _e4m3("half a group for a row", "while (args.threads < args.pieces)", "while (2 * args.threads < args.pieces)",
          "updates", ENTRY),
    _e4m3("rows are as long as one likes", "|| p.dim > kMaxScaledRow", "", "too_much", ENTRY),
    _e4m3("five factors by the kernel for two", "if (args.p.last <= 1)", "if (args.p.last <= 5)", "updates", ENTRY),
    _e4m3("e4m3 by the other kernel", "if (p.scales != nullptr) return run_e4m3", "if (false) return run_e4m3",
          "updates", ENTRY),
    _e4m3("every module has the first one's scales", "arch::ldg32(m.scales + i * m.scale_stride + at.row)",
          "arch::ldg32(m.scales + i * m.scale_stride)", "forecasts", KERNEL),
    _e4m3("all of a module's factors have one scale", "arch::ldg32(m.scales + i * m.scale_stride + at.row)",
          "arch::ldg32(m.scales + at.row)", "forecasts", KERNEL),
    # ---- e4m3: arithmetic
    _e4m3("the group is looked at by half", "for (int step = 1; step < lanes; step *= 2)",
          "for (int step = 2; step < lanes; step *= 2)", "updates"),
    _e4m3("neighbouring groups share a scale", "a.threads < 32 ? a.threads : 32", "32", "updates"),
    _e4m3("warps do not meet", "if (a.threads <= 32) return;", "return;", "pieces"),
    _e4m3("the first warp decides", "w < int(blockDim.x) / 32", "w < 1", "pieces or edges"),
    _e4m3("nobody waits for the other warps", "arch::syncthreads();", "", "pieces or updates"),
    _e4m3("factors share a slot", "tops[i * kMaxRowWarps + warp]", "tops[warp]", "pieces or updates"),
    _e4m3("only the last piece counts", "top[i] = e4m3::largest(factor, top[i]);", "top[i] = e4m3::largest(factor, 0);",
          "pieces"),
    _e4m3("the range ends in infinity", "if (exponent[i] == kTopExponent) keep_in_range(v);", "", "edges"),
    _e4m3("infinity is kept in range", "magnitude > kTopBits && magnitude < 0x7f800000", "magnitude > kTopBits",
          "edges"),
    _e4m3("the range has no sign", "(bits & 0x80000000) | kTopBits", "kTopBits", "edges"),
    _e4m3("nothing is subtracted", "kept[k][e] -= t[e];", "kept[k][e] -= 0.f * t[e];", "updates"),
    _e4m3("differences are not divided", "(v[e] - t[e]) / p.distance", "v[e] - t[e]", "updates"),
    _e4m3("old codes stand for themselves", "e4m3::decode(old[i], arch::as_float(scale[i]), t);",
          "e4m3::decode(old[i], 1.f, t);", "updates"),
    _e4m3("one code of two has no scale", "v[e + 1] *= scale;", "", "updates or forecasts", CODES),
    _e4m3("the power is too small by one", "(magnitude >> 23) - 8 +", "(magnitude >> 23) - 9 +", "updates", CODES),
    _e4m3("the tail of a row is read from beyond it",
          "if (first + e < dim) word[e / 4] |= uint32_t(from[e])", "word[e / 4] |= uint32_t(from[e])",
          "updates or forecasts", CODES),
]  # fmt: skip
