"""Bugs for pack_slices and unpack_slices: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, file: str, old: str, new: str, select: str = "") -> Mutant:
    return Mutant("pack", f"pack: {name}", file, old, new, "test_pack.py", select)


PARAMS, MOVE, COMPRESS, ENTRY = (f"kernels/pack/{name}" for name in ("pack.h", "move.h", "compress.h", "pack.cu"))
CODES = "kernels/fused/e4m3.h"

MUTANTS = [
    # ---- where a slice is
    _bug("heads are cut where rows are", PARAMS, "first * (p.cut_heads != 0 ? t.head : t.row)", "first * t.row"),
    _bug("a slice has all rows", PARAMS, "p.cut_heads != 0 ? t.rows : count,", "t.rows,"),
    _bug("a slice has all heads", PARAMS, "p.cut_heads != 0 ? count : t.heads}", "t.heads}"),
    _bug("slices begin at the first one", PARAMS, "t.offset[slice],", "t.offset[0],"),
    _bug("slices have one length", PARAMS, "t.start[slice + 1] - first", "t.start[1] - t.start[0]"),
    _bug("bytes between the ends are not counted", PARAMS, "(bytes + kPackAlign - 1) /", "bytes /", "e4m3"),
    # ---- moving
    _bug(
        "the first tensor stands for all",
        MOVE,
        "move_slices(const VD_GRID_CONST PackParams p) {\n  const int32_t tensor = blockIdx.y % p.tensors;",
        "move_slices(const VD_GRID_CONST PackParams p) {\n  const int32_t tensor = 0;",
        "moves",
    ),
    _bug("heads lie as in a contiguous tensor", MOVE, "head * t.head;", "head * int64_t(t.dim) * 2;", "moves"),
    _bug(
        "rows and items are mixed up",
        MOVE,
        "line % s.rows, batch = line / s.rows",
        "line / s.rows, batch = line % s.rows",
        "moves",
    ),
    _bug("items lie one row apart", MOVE, "batch * t.batch +", "batch * t.row +", "moves"),
    _bug("channels lie side by side", MOVE, ": t.channel;", ": int64_t(sizeof(Piece));", "moves"),
    _bug(
        "the last pieces in flight are lost",
        MOVE,
        "k < kBatch; ++k) {\n      if (to",
        "k < kBatch - 1; ++k) {\n      if (to",
        "moves",
    ),
    _bug("pieces beyond the slice are moved", MOVE, "if (i >= total) continue;", "", "moves"),
    _bug("rows with odd strides count as aligned", ENTRY, "all |= uint64_t(t.row);", "all |= 0;", "odd"),
    _bug("heads with odd strides count as aligned", ENTRY, "all |= uint64_t(t.head);", "all |= 0;", "odd"),
    _bug("items with odd strides count as aligned", ENTRY, "all |= uint64_t(t.batch);", "all |= 0;", "odd"),
    _bug(
        "tensors with odd addresses count as aligned", ENTRY, "all |= reinterpret_cast<uintptr_t>(t.data);", "", "odd"
    ),
    _bug(
        "buffers with odd addresses count as aligned",
        ENTRY,
        "all = reinterpret_cast<uintptr_t>(p.buffer);",
        "all = 0;",
        "not_aligned",
    ),
    _bug(
        "heads of odd length count as aligned",
        ENTRY,
        "dim % pieces::kPiece != 0) aligned = 0;",
        "dim % pieces::kPiece != 0) aligned &= 1;",
        "e4m3 or bf16",
    ),
    _bug(
        "the grid is that of the first slice",
        ENTRY,
        "most = count > most ? count : most;",
        "most = most == 0 ? count : most;",
        "moves or e4m3",
    ),
    _bug(
        "slices that are too long are begun", ENTRY, "if (most > INT32_MAX - per_cta) return kInvalid;", "", "too_much"
    ),
    # ---- e4m3
    _bug("448 needs the next power", CODES, "> 0x600000 ? 1 : 0", ">= 0x600000 ? 1 : 0", "e4m3"),
    _bug("the power is too small by one", CODES, "(magnitude >> 23) - 8 +", "(magnitude >> 23) - 9 +", "e4m3"),
    _bug("powers of blocks of tiny numbers wrap", CODES, "return e < 1 ? 1 : e;", "return e;", "e4m3"),
    _bug("infinity makes the power", CODES, "magnitude < 0x7f800000 && magnitude > top", "magnitude > top", "e4m3"),
    _bug(
        "signs take part in the largest",
        CODES,
        "arch::as_uint(v[e]) & 0x7fffffff;\n    if",
        "arch::as_uint(v[e]);\n    if",
        "e4m3",
    ),
    _bug(
        "half of a block is looked at",
        COMPRESS,
        "lane < blocks.lanes; lane *= 2",
        "lane < blocks.lanes / 2; lane *= 2",
        "e4m3",
    ),
    _bug(
        "blocks take the largest of their neighbours",
        COMPRESS,
        "lane < blocks.lanes; lane *= 2",
        "lane <= blocks.lanes; lane *= 2",
        "e4m3",
    ),
    _bug(
        "infinity is the largest code",
        CODES,
        "const bool finite = (arch::as_uint(v[e]) & 0x7fffffff) < 0x7f800000;",
        "const bool finite = (arch::as_uint(v[e]) & 0x7fffffff) <= 0x7f800000;",
        "e4m3",
    ),
    _bug(
        "the ends are not cleared", COMPRESS, "if (kE4m3 && blockIdx.x == 0) clear_ends(p, t, s, blocks);", "", "e4m3"
    ),
    _bug(
        "scales of the first block serve all",
        COMPRESS,
        "uint8_t(s.packed[pack_aligned(all) + at.group])",
        "uint8_t(s.packed[pack_aligned(all)])",
        "e4m3",
    ),
    _bug(
        "large codes overflow",
        COMPRESS,
        "v[e] = v[e] > limit ? limit : v[e] < -limit ? -limit : v[e];",
        "v[e] += 0.f;",
        "ends",
    ),
    _bug(
        "NaN becomes the largest",
        COMPRESS,
        "v[e] = v[e] > limit ? limit : v[e] < -limit ? -limit : v[e];",
        "v[e] = v[e] <= limit ? v[e] : limit;",
        "e4m3",
    ),
    _bug(
        "half of the rounds",
        COMPRESS,
        "return (blockIdx.x * kRounds + round)",
        "return (blockIdx.x * 2 + round)",
        "e4m3",
    ),
    _bug(
        "the tail of a block is taken for whole",
        COMPRESS,
        "at.whole = aligned && at.any;",
        "at.whole = at.any;",
        "e4m3 or bf16",
    ),
    _bug("channels beyond the row are written", CODES, "if (first + e < dim) to[e] =", "to[e] =", "e4m3"),
    _bug("subnormal codes are not rounded", "arch/arch.h", "if (magnitude < 0x3c800000)", "if (magnitude < 0)", "e4m3"),
    _bug("halves go up", "arch/arch.h", "magnitude + 0x7ffff + (magnitude >> 20 & 1)", "magnitude + 0x80000", "e4m3"),
    _bug(
        "subnormal codes are 0",
        "arch/arch.h",
        "as_float((code & 0x7f) << 20)",
        "as_float((code & 0x78) == 0 ? 0 : (code & 0x7f) << 20)",
        "e4m3",
    ),
    # ---- bf16
    _bug(
        "bf16 is written where codes would be",
        COMPRESS,
        "char* const to = s.packed + int64_t(at.vector) * t.dim * 2;",
        "char* const to = s.packed + int64_t(at.vector) * t.dim;",
        "bf16",
    ),
]
