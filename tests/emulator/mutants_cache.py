"""Bugs for the feature cache's kernels: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str, file: str = "cache_kernel.h") -> Mutant:
    return Mutant("cache", f"cache: {name}", f"kernels/cache/{file}", old, new, "test_cache.py", select)


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
]  # fmt: skip
