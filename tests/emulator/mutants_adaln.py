"""Bugs for the adaptive norms: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str, file: str = "adaln_kernel.h") -> Mutant:
    return Mutant("adaln", f"adaln: {name}", f"kernels/fused/{file}", old, new, "test_adaln.py", select)


def _shared(name: str, old: str, new: str, select: str) -> Mutant:
    return _bug(name, old, new, select, "pieces.h")


MUTANTS = [
    # ---- hazards
    _bug("sums share one row of shared memory", "turn ^= 1;", "turn ^= 0;", "mixtures or neighbouring or widths"),
    _bug("sums are read before they are written",
         "slot[warp] = v;\n  arch::syncthreads();", "slot[warp] = v;", "mixtures"),
    _bug("a warp hands over twice its sum",
         "if (lane == 0) slot[warp] = v;", "if (lane == 7) slot[warp] = v * 2;", "mixtures"),
    _bug("a warp adds up half of itself", "int step = 16; step > 0", "int step = 8; step > 0", "mixtures"),
    # ---- who holds what
    _bug("rows of the tables are never loaded again", "at == first || new_scale != scale_row || new_shift != shift_row",
         "at == first", "neighbouring"),
    _bug("a block forgets its last row", "first + a.rows_per_cta < all ? first + a.rows_per_cta : all",
         "first + a.rows_per_cta < all ? first + a.rows_per_cta : all - 1", "mixtures"),
    _bug("pieces of a thread are held twice",
         "int(threadIdx.x) + k * int(blockDim.x)", "int(threadIdx.x) + k * int(blockDim.x) / 2", "mixtures"),
    _bug("pieces beyond the row are loaded", "r[k] = has(k) ? load", "r[k] = true ? load", "mixtures"),
    _shared("batch items share the first one's rows", "b * t.batch_stride + row", "0 * t.batch_stride + row",
            "mixtures"),
    _shared("batch items share the first one's index", "b * p.index_batch_stride + n", "0 * p.index_batch_stride + n",
         "neighbouring"),
    _shared("an index from the device is trusted", "row = row >= 0 && row < t.rows ? row : t.rows - 1;", "", "outside"),
    _shared("a negative index is trusted", "row >= 0 && row < t.rows", "row < t.rows", "outside"),
    _shared("alignment of the base is forgotten", "aligned(t.base, p.base_dtype)", "true", "misaligned"),
    _bug("alignment of weights is forgotten", "aligned(n.weight, n.dtype)", "true", "misaligned", "adaln.cu"),
    _bug("alignment of biases is forgotten", "aligned(n.bias, n.dtype)", "true", "misaligned", "adaln.cu"),
    _bug("alignment of y is forgotten", "&& aligned(p, p.y)", "", "misaligned", "adaln.cu"),
    _bug("width decides nothing about alignment", "p.dim % kPiece == 0 &&", "", "single_row", "adaln.cu"),
    _shared("16-bit stores take the wrong half",
         "e % 2 * 16));\n  }\n}", "(e + 1) % 2 * 16));\n  }\n}", "mixtures and 13"),
    # ---- arithmetic
    _bug("variance counts the padding", "piece(k) * kPiece + e < a.p.dim ? v[k][e] - mean : 0.f", "v[k][e] - mean",
         "mixtures and 13"),
    _bug("mean over one element more", "sum, totals, turn) / dim;\n      sum = 0.f", "sum, totals, turn) / (dim + 1);\n"
         "      sum = 0.f", "mixtures"),
    _bug("eps inside the mean", "/ dim + norm.eps", "/ (dim + norm.eps)", "mixtures"),
    _bug("scale without its 1", "s[e] += 1.f;", "s[e] += 0.f;", "mixtures"),
    _bug("tanh of nothing", "v[e] = tanhf(v[e]);", "v[e] = v[e];", "mixtures"),
    _bug("the bias is scaled", "v[e] += t[e];\n    }\n  }", "v[e] *= t[e];\n    }\n  }", "mixtures"),
    _bug("the base is left out", "v[e] += base[e];", "v[e] += 0.f * base[e];", "mixtures"),
    # ---- roundings of eager mode
    _bug("base + row is not rounded", "v[e] += base[e];\n    round_to<H>(v, t.round);", "v[e] += base[e];", "mixtures"),
    _bug("1 + scale is not rounded", "round_to<H>(s, a.p.scale.round);", "", "mixtures"),
    _bug("tanh is not rounded", "round_to<H>(v, a.p.gate.round);", "", "mixtures"),
    _bug("the product with the gate is not rounded", "round_to<H>(y[k], p.round_gated);", "", "mixtures"),
    _bug("the normed branch is not rounded", "round_to<H>(y[k], p.round_post);", "", "mixtures"),
    _bug("the sum is normed before it is rounded", "round_to<H>(v[k], p.round_new);", "", "mixtures"),
    _bug("the normed row is not rounded", "round_to<H>(v[k], p.round_chain || p.norm.round);", "", "mixtures"),
    _bug("the modulated row is not rounded", "round_to<H>(v[k], p.round_chain);", "", "mixtures"),
    _bug("the row is not rounded before its weight", "round_to<H>(v, norm.round);", "", "mixtures"),
]  # fmt: skip
