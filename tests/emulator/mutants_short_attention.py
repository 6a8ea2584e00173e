"""Bugs for the short-attention kernels: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant

TILE, MATRIX, ENTRY = (f"kernels/short/{name}" for name in ("tile.h", "matrix.h", "short_attention.cu"))


def _short(name: str, old: str, new: str, select: str, file: str) -> Mutant:
    return Mutant("short_attention", f"short: {name}", file, old, new, "test_short_attention.py", select)


MUTANTS = [
    # ---- which keys a row reads
    _short("causal limit one key early", "row + 1 + a.p.lk", "row + a.p.lk", "as_exact and causal", TILE),
    _short("causal limit from the first key", "+ a.p.lk - a.p.lq;", ";", "as_exact and causal", TILE),
    _short("int64 counts read as int32", "p.kv_len_bytes == 8 ?", "p.kv_len_bytes == 9 ?", "own_number", TILE),
    _short(
        "unread values staged",
        "stage<T>(a, item, a.p.v, 0, item.keys, staged_keys, slice",
        "stage<T>(a, item, a.p.v, 0, a.p.lk, staged_keys, slice",
        "own_number",
        ENTRY,
    ),
    _short("scores of padding read", "x = 8 * n + c < reads ?", "x = 8 * n + c < reads + 64 ?", "as_exact", MATRIX),
    _short(
        "a causal row reads a later NaN",
        "plain = any_not_finite",
        "plain = false && any_not_finite",
        "not_finite",
        ENTRY,
    ),
    _short("infinity is not looked for in odd columns", "|| bits >> 16 == exponent >> 16", "", "not_finite", MATRIX),
    _short("plain rows multiply unread keys", "if (key >= reads[r]) continue;", "", "not_finite", TILE),
    # ---- what is computed
    _short(
        "weights of the other row",
        "p[n][2 * half + 1] = arch::pack<T>(x[2], x[3]);",
        "p[n][2 * half + 1] = arch::pack<T>(x[0], x[1]);",
        "as_exact",
        MATRIX,
    ),
    _short("row sum of half a row", "    sum += arch::shfl_xor_f(sum, 2);\n", "", "as_exact", MATRIX),
    _short(
        "second half of the keys weighs nothing",
        "arch::shfl_f(key < 32 ? p[r][0] : p[r][1], key % 32)",
        "arch::shfl_f(key < 32 ? p[r][0] : 0.f, key % 32)",
        "as_exact",
        TILE,
    ),
    _short(
        "chunks from 32 on forgotten",
        "for (int base = 0; base < a.chunks; base += 32)",
        "for (int base = 0; base < 32; base += 32)",
        "as_exact and float32",
        TILE,
    ),
    _short(
        "one key follows the first row",
        "keys_of_row(a, item, item.first + i) > 0 ? value : uint4",
        "item.keys > 0 ? value : uint4",
        "one_key",
        ENTRY,
    ),
    # ---- where things lie
    _short(
        "second block of queries starts at the first", "int(block) * kRowsPerItem", "int(block) * 0", "as_exact", TILE
    ),
    _short("rows behind the last are written", "row < count;) {", "row < 16;) {", "as_exact", MATRIX),
    _short("rows of a multiple of 128 bytes", "a.chunks + 1 - a.chunks % 2", "a.chunks", "tensor_cores", ENTRY),
    _short(
        "columns behind the dim are staged",
        "row < valid && chunk * C::kElements < a.p.dim;",
        "row < valid;",
        "as_exact or random",
        TILE,
    ),
    _short("strided columns as 16 bytes", "(x.stride[4] == 1 || p.dim == 1)", "true", "strides", ENTRY),
    # ---- hazards
    _short(
        "values read before they landed",
        "  arch::cp_async_wait<0>();\n  arch::syncwarp();  // the values",
        "  arch::syncwarp();  // the values",
        "schedule or as_exact",
        MATRIX,
    ),
    _short("output read before it is written", "  arch::syncwarp();\n  char* out", "  char* out", "schedule", MATRIX),
]
