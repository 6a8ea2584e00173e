"""Bugs for combine_rows: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str) -> Mutant:
    file = "kernels/fused/combine_rows.cu"
    return Mutant("combine_rows", f"combine_rows: {name}", file, old, new, "test_combine_rows.py", select)


MUTANTS = [
    # ---- who holds what
    _bug("a warp beyond the rows writes", "if (at >= p.rows) return;", "", "rows_of_a_block"),
    _bug("a block has one warp less", "(p.rows + kWarps - 1) / kWarps", "p.rows / kWarps", "rows_of_a_block"),
    _bug("pieces of other lanes are skipped", "piece += 32", "piece += 33", "mixtures and 520"),
    _bug("elements of other lanes are skipped", "column += 32", "column += 33", "misaligned"),
    _bug("slots of the row before", "p.slots[row * p.slots_per_row + j]", "p.slots[row / 2 * p.slots_per_row + j]",
         "mixtures"),
    _bug("weights of the first slot", "p.weights[row * p.slots_per_row + j]", "p.weights[row * p.slots_per_row]",
         "mixtures"),
    _bug("the last slot is forgotten", "if (j >= p.slots_per_row) continue;",
         "if (j + (kSlots > 1) >= p.slots_per_row) continue;", "mixtures"),
    _bug("a negative slot is trusted", "slot < 0 || slot >= p.sources", "slot >= p.sources", "outside"),
    _bug("a slot beyond the rows is trusted", "slot < 0 || slot >= p.sources", "slot < 0", "outside"),
    _bug("every row has the first gate", "row / p.rows_per_gate * p.gate_stride", "0 * p.gate_stride", "mixtures"),
    _bug("every row has a gate of its own", "row / p.rows_per_gate *", "row *", "mixtures"),
    _bug("rows of base are packed", "row * p.base_stride", "row * p.dim", "misaligned"),
    # ---- alignment
    _bug("width decides nothing about alignment", "uint64_t(p.dim * bytes) |", "", "single_row"),
    _bug("alignment of rows is forgotten", "  add(p.source, p.source_stride, p.sources > 1);\n", "", "misaligned"),
    _bug("alignment of base is forgotten", "  add(p.base, p.base_stride, p.rows > 1);\n", "", "misaligned"),
    _bug("alignment of residual is forgotten", "  add(p.residual, p.residual_stride, p.rows > 1);\n", "", "misaligned"),
    _bug("alignment of gate is forgotten", "  add(p.gate, p.gate_stride, p.rows > p.rows_per_gate);\n", "",
         "misaligned"),
    # ---- arithmetic
    _bug("pieces without their weight", "sum[e] += row.weight[j] * v[e];", "sum[e] += v[e];", "mixtures"),
    _bug("elements without their weight", "sum += row.weight[j] * Type", "sum += Type", "mixtures and 13"),
    _bug("the base is gated twice", "      Type::widen(raw_base, sum);",
         "      Type::widen(row.gate != nullptr ? raw_gate : raw_base, sum);", "mixtures"),
    _bug("pieces without a gate", "sum[e] *= v[e];", "sum[e] *= 1.f;", "mixtures"),
    _bug("the residual is gated", "sum[e] *= v[e];\n      }", "sum[e] *= v[e];\n        if (row.residual != nullptr)\n"
         "          VD_UNROLL for (int e = 0; e < kPiece; ++e) sum[e] += 0.25f;\n      }", "mixtures"),
    _bug("an empty branch is added", "if (row.any) {", "if (true) {", "without_anything and 48"),
    _bug("an empty branch is added, element by element", "if (!row.any) {", "if (false) {", "without_anything and 13"),
    _bug("nothing is not 0", "residual[column] : Bits{};", "residual[column] : Bits{1};", "without_anything and 13"),
    _bug("halves of a word are exchanged",
         "arch::unpack<E>(bits.y, v[2], v[3]);", "arch::unpack<E>(bits.y, v[3], v[2]);", "mixtures"),
]  # fmt: skip
