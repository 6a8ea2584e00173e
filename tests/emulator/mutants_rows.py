"""Bugs for gather_rows and scatter_rows: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str) -> Mutant:
    return Mutant("rows", f"rows: {name}", "kernels/rows/rows.cu", old, new, "test_rows.py", select)


MUTANTS = [
    # ---- the list
    _bug(
        "the list is read before it is there",
        "uint32_t(row) : kNone);\n  }\n  arch::syncthreads();",
        "uint32_t(row) : kNone);\n  }",
        "rows_move",
    ),
    _bug("count is ignored", "slot < used && row >= 0", "row >= 0", "not_in_use"),
    _bug("one count serves all items", "p.count[at.batch * p.count_batch]", "p.count[0]", "rows_move"),
    _bug("one list serves all items", "at.batch * p.rows_batch + ", "", "rows_move"),
    _bug("the stride of the list is ignored", "slot * p.rows_slot", "slot", "rows_move"),
    _bug("negative rows leave the tensor", "row >= 0 && row < p.tokens", "row < p.tokens", "damaged"),
    _bug("large rows leave the tensor", "row >= 0 && row < p.tokens", "row >= 0", "damaged"),
    _bug(
        "slots beyond the last tile's end are worked on",
        "p.slots - at.slot < slots_per_cta ? p.slots - at.slot : slots_per_cta",
        "slots_per_cta",
        "rows_move",
    ),
    # ---- which tensor, which item
    _bug("the first tensor stands for all", "at.pair = blockIdx.x / tiles / p.batch;", "at.pair = 0;", "several"),
    _bug(
        "items and tensors are mixed up",
        "at.batch = blockIdx.x / tiles % p.batch;",
        "at.batch = blockIdx.x / tiles / p.batch;",
        "several or rows_move",
    ),
    _bug(
        "the batch stride of the full tensor is that of the part",
        "char* full = static_cast<char*>(t.full) + at.batch * t.full_batch;\n  char* part",
        "char* full = static_cast<char*>(t.full) + at.batch * t.part_batch;\n  char* part",
        "rows_move",
    ),
    # ---- moving
    _bug(
        "rows that do not count are written",
        "if (kGather || row != kNone) to[k]",
        "to[k]",
        "not_in_use or damaged",
    ),
    _bug(
        "rows that do not count are not cleared", "if (kGather || row != kNone) to[k]", "if (row != kNone) to[k]", "use"
    ),
    _bug(
        "the last pieces in flight are lost",
        "k < kBatch; ++k) {\n      if (to[k]",
        "k < kBatch - 1; ++k) {\n      if (to[k]",
        "move",
    ),
    _bug(
        "rows move in pieces wider than they are",
        "reinterpret_cast<uintptr_t>(t.part) | uint64_t(t.row_bytes);",
        "reinterpret_cast<uintptr_t>(t.part);",
        "rows_move",
    ),
    _bug("rows with odd strides count as aligned", "all |= uint64_t(t.full_row);", "all |= 0;", "rows_move"),
    _bug("parts with odd strides count as aligned", "all |= uint64_t(t.part_row);", "all |= 0;", "rows_move or gate"),
    _bug(
        "only the first tensor is looked at for alignment",
        "i < p.pairs; ++i) {\n    const RowPair& t",
        "i < 1; ++i) {\n    const RowPair& t",
        "several",
    ),
    # ---- gate and add
    _bug("add is ignored", "if (p.add != 0) load_floats<T>(to, x);", "", "gate_and_add"),
    _bug(
        "the gate is ignored",
        "if (p.gate.data != nullptr) {\n      load_gate",
        "if (p.gate.data == &p) {\n      load_gate",
        "gate",
    ),
    _bug(
        "the gate multiplies what is there, too",
        "x[e] += gate[e] * y[e];",
        "x[e] = gate[e] * (x[e] + y[e]);",
        "gate_and_add",
    ),
    _bug(
        "the gate of the first slot serves the tile",
        "at.slot + slot, int64_t(column) * W",
        "at.slot, int64_t(column) * W",
        "gate_and_add",
    ),
    _bug(
        "the gate of the first channels serves the row",
        "at.slot + slot, int64_t(column) * W",
        "at.slot + slot, 0",
        "gate_and_add",
    ),
    _bug("one gate serves all items", "batch * gate.batch + slot", "slot", "gate_and_add"),
    _bug(
        "a gate of floats is read as 16 bits",
        "const bool wide = gate.dtype == DType::f32;",
        "const bool wide = sizeof(T) == 4;",
        "gate_and_add",
    ),
    _bug(
        "gates with odd addresses count as aligned",
        "alignment(p) % 16 == 0 && gate_is_aligned(p)",
        "alignment(p) % 16 == 0",
        "not_aligned",
    ),
    _bug(
        "the halves of a word are swapped",
        "v[e], v[e + 1]);\n  } else {\n    float rest",
        "v[e + 1], v[e]);\n  } else {\n    float rest",
        "gate_and_add",
    ),
]
