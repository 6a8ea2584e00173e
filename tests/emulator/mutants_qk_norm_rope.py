"""Bugs for QK norm and RoPE: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant

CHUNK, HEAD, ACROSS, HOST = "qk_chunk.h", "qk_norm_rope_head.h", "qk_norm_rope_across.h", "qk_norm_rope.cu"


def _bug(name: str, file: str, old: str, new: str, select: str = "cases") -> Mutant:
    path = f"kernels/fused/{file}"
    return Mutant("qk_norm_rope", f"qk_norm_rope: {name}", path, old, new, "test_qk_norm_rope.py", select)


MUTANTS = [
    # ---- hazards
    _bug(
        "partners are read before they are there",
        HEAD,
        "        arch::syncwarp();\n",
        "        if (h > 8) arch::syncwarp();\n",
    ),
    _bug("one exchange buffer for all heads", HEAD, "h % 2 * (kRows * kRow)", "0 * (kRows * kRow)"),
    _bug("rows of the exchange overlap", HEAD, "threadIdx.x / LANES * kRow;", "threadIdx.x / LANES * (kRow / 2);"),
    _bug(
        "sums are read before every warp has written",
        ACROSS,
        "arch::as_uint(squares));\n    arch::syncthreads();",
        "arch::as_uint(squares));",
    ),
    _bug(
        "partners are read before every thread has written",
        ACROSS,
        "at.chunk, v[j]);\n    }\n    arch::syncthreads();",
        "at.chunk, v[j]);\n    }",
    ),
    # ---- reductions and norms
    _bug("half a row is summed", HEAD, "int step = LANES / 2;", "int step = LANES / 4;"),
    _bug(
        "channels beyond the head count in the variance",
        HEAD,
        "e < channels ? v[h][e] - mean[h] : 0.0f",
        "v[h][e] - mean[h]",
    ),
    _bug("the mean is not subtracted", CHUNK, "(v[e] - mean) * scale", "v[e] * scale"),
    _bug("the norm across heads counts one head", ACROSS, "(float(s.heads) * float(p.dim))", "float(p.dim)"),
    _bug(
        "the weight of the first head serves all",
        ACROSS,
        "int64_t(at.head) * p.dim + at.column, at.channels, w[j]",
        "at.column, at.channels, w[j]",
    ),
    _bug("no relu", CHUNK, "p.relu != 0 && x < 0.0f ? 0.0f : x", "x"),
    _bug("a norm of the copied stream", ACROSS, "if (s.copy == 0) {", "if (s.copy >= 0) {"),
    # ---- rotation
    _bug(
        "both channels of a pair are turned the same way",
        CHUNK,
        "e += 2) a.sin[e] = -a.sin[e];",
        "e += 2) a.sin[e] = a.sin[e];",
    ),
    _bug(
        "halves are turned the wrong way",
        CHUNK,
        "a.sin[e] = first ? -a.sin[e] : a.sin[e];",
        "a.sin[e] = first ? a.sin[e] : -a.sin[e];",
    ),
    _bug("partner in the wrong axis", CHUNK, "    start += width;\n", ""),
    _bug(
        "an entry of the wrong axis",
        CHUNK,
        "{first ? channel + half : channel - half, start / 2 + ",
        "{first ? channel + half : channel - half, start + ",
    ),
    _bug(
        "tokens beyond the table are turned",
        CHUNK,
        "if (row < 0 || row >= rope.rows) return -1;",
        "if (row < 0) return -1;",
    ),
    _bug(
        "tokens before the table are turned",
        CHUNK,
        "if (row < 0 || row >= rope.rows) return -1;",
        "if (row >= rope.rows) return -1;",
    ),
    _bug("the range starts at token 0", CHUNK, "n - rope.start;", "n;"),
    _bug(
        "angles of the first head serve all",
        HEAD,
        "const bool shared_angles = s.rope.head_stride == 0 && s.rope.positions.head_stride == 0;",
        "const bool shared_angles = true;",
    ),
    _bug(
        "positions of the first head serve all",
        HEAD,
        "s.rope.head_stride == 0 && s.rope.positions.head_stride == 0",
        "s.rope.head_stride == 0",
    ),
    _bug("a batch item's table serves all", CHUNK, "return b * rope.batch_stride + row", "return row"),
    # ---- rounding
    _bug(
        "no rounding before the weight",
        CHUNK,
        "float x = (v[e] - mean) * scale;\n    if (before)",
        "float x = (v[e] - mean) * scale;\n    if (false)",
        "families",
    ),
    _bug("no rounding after the norm", CHUNK, "if (end) x =", "if (false) x =", "families"),
    _bug("products are not rounded", CHUNK, "    if (products) {", "    if (false) {", "families"),
    # ---- places
    _bug(
        "rows of the destination are not looked up",
        CHUNK,
        "s.rows.data != nullptr ? entry_of(s.rows, b, h, n) : n;",
        "n;",
    ),
    _bug(
        "heads of a group go to the first one's row",
        HEAD,
        "destination<E>(s, b, first + h, n) : nullptr",
        "destination<E>(s, b, first, n) : nullptr",
    ),
    _bug(
        "k is written with q's strides",
        HEAD,
        "const QkStream& s = p.stream[which];",
        "const QkStream& s = p.stream[which == 2 ? 1 : which];",
    ),
    _bug(
        "a group reads heads that are not there", HEAD, "s.heads - first < kHeads ? s.heads - first : kHeads", "kHeads"
    ),
    _bug(
        "the last head of a group is left out",
        HEAD,
        "for (int h = 0; h < kHeads; ++h) out[h] = h < heads ?",
        "for (int h = 0; h < kHeads; ++h) out[h] = h + 1 < heads ?",
    ),
    # ---- vector accesses
    _bug(
        "unaligned rows are moved in pieces of 16 bytes",
        HOST,
        "if (p.dim % kChunk != 0) return false;",
        "if (p.dim % kChunk == 0) return true;",
    ),
    _bug(
        "chunks that straddle two halves",
        HOST,
        "if (p.width[axis] % (2 * kChunk) != 0) return false;",
        "if (p.width[axis] % 2 != 0) return false;",
    ),
    _bug(
        "alignment of weights is forgotten",
        HOST,
        "if (!aligned(s.weight, 0) || !aligned(s.bias, 0)) return false;",
        "if (!aligned(s.bias, 0)) return false;",
        "beside_16",
    ),
    _bug(
        "alignment of biases is forgotten",
        HOST,
        "if (!aligned(s.weight, 0) || !aligned(s.bias, 0)) return false;",
        "if (!aligned(s.weight, 0)) return false;",
        "beside_16",
    ),
    _bug("alignment of cos is forgotten", HOST, "aligned(r.cos, table * entry) && ", "", "beside_16"),
    _bug("alignment of sin is forgotten", HOST, " && aligned(r.sin, table * entry)", "", "beside_16"),
    _bug("alignment of results is forgotten", HOST, " || !aligned(s.out, out * bytes)", "", "beside_16"),
]
