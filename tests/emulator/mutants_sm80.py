"""Bugs for the portable forward kernel, its schedule and its merge: each must make the tests named here fail.

Rows are (name, file in csrc/kernels/attention, old text, new text, ``pytest -k`` expression in test_forward_sm80.py).
"""

from __future__ import annotations

KERNEL = "forward_sm80.h"
KEYS = "forward_sm80_keys.h"
SCHEDULE = "schedule.h"
COMBINE = "combine.h"
WORK = "work.h"
HOST = "forward.cu"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    # ---- hazards of the pipeline
    (
        "K is read before it has landed",
        KERNEL,
        "arch::cp_async_wait<2>();\n      arch::syncthreads();\n      if (j + 1 < last) load_keys",
        "arch::cp_async_wait<3>();\n      arch::syncthreads();\n      if (j + 1 < last) load_keys",
        "plan-dense or blocks-64",
    ),
    (
        "V is read before it has landed",
        KERNEL,
        "arch::cp_async_wait<2>();\n      arch::syncthreads();\n      if (j + 2 < last) load_keys",
        "arch::cp_async_wait<3>();\n      arch::syncthreads();\n      if (j + 2 < last) load_keys",
        "plan-dense or blocks-64",
    ),
    (
        "no barrier before S = Q K",
        KERNEL,
        "arch::syncthreads();\n      if (j + 1 < last) load_keys",
        "if (j + 1 < last) load_keys",
        "plan-dense or blocks-64",
    ),
    (
        "no barrier before P V",
        KERNEL,
        "arch::syncthreads();\n      if (j + 2 < last) load_keys",
        "if (j + 2 < last) load_keys",
        "plan-dense or blocks-64",
    ),
    (
        "K overwrites Q before all warps have read it",
        KERNEL,
        "load_q(k, q[k]);\n      arch::syncthreads();",
        "load_q(k, q[k]);",
        "plan-dense or blocks-64 or clusters",
    ),
    (
        "one copy of the addresses for both buffers",
        KEYS,
        "base + kPointers + (j & 1) * 16 * kKeys",
        "base + kPointers",
        "blocks-64 or clusters",
    ),
    (
        "the header of stage j is overwritten by that of stage j + 2",
        KEYS,
        "base + kHeaders + (j & 3) * 16",
        "base + kHeaders + (j & 1) * 16",
        "plan-dense or blocks-64 or runs",
    ),
    # ---- arithmetic of the kernel
    (
        "row maximum misses half of the columns",
        KERNEL,
        "    top = fmaxf(top, arch::shfl_xor_f(top, 2));\n",
        "",
        "plan-dense or huge-scores",
    ),
    (
        "P registers swapped",
        KERNEL,
        "arch::pack<T>(s[2 * k][2], s[2 * k][3]),\n",
        "arch::pack<T>(s[2 * k][3], s[2 * k][2]),\n",
        "plan-dense",
    ),
    (
        "V read without transposing",
        KERNEL,
        "arch::ldsm4t(v_tile",
        "arch::ldsm4(v_tile",
        "plan-dense",
    ),
    (
        "K rows swizzled by another row",
        KERNEL,
        "chunk_offset<kChunks>(row, 2 * k + lane / 8 % 2)",
        "chunk_offset<kChunks>(row ^ 8, 2 * k + lane / 8 % 2)",
        "plan-dense",
    ),
    (
        "NaN where the first stage holds no key of a row",
        KERNEL,
        "const float base = top == -INFINITY ? 0.f : top;",
        "const float base = top;",
        "mask",
    ),
    (
        "accumulator not rescaled",
        KERNEL,
        "      o[n][2 * r] *= shrink;\n",
        "",
        "plan-dense or blocks-64",
    ),
    (
        "sign of the scale ignored",
        KERNEL,
        "scale < 0.f ? 0x80008000u : 0u",
        "0u",
        "scale-negative",
    ),
    (
        "row_scale ignored",
        KERNEL,
        "!empty && p.row_scale != nullptr",
        "!empty && false",
        "row-scale",
    ),
    # ---- which keys
    (
        "slots without a key are not masked",
        KERNEL,
        "(header.x & header.y) != ~0u || header.z != 0",
        "header.z != 0",
        "plan-dense",
    ),
    (
        "slots without a key keep what lay there",
        KERNEL,
        "arch::cp_async16(tile + c.offset, inside ? from + c.chunk * 16 : p.q.data, inside);\n  }\n}\n\n"
        "template <int kDim>\nVD_DEV void load_queries",
        "if (inside) arch::cp_async16(tile + c.offset, from + c.chunk * 16, true);\n  }\n}\n\n"
        "template <int kDim>\nVD_DEV void load_queries",
        "nan or plan-dense or segments",
    ),
    (
        "slots without a key hold query 0",
        KERNEL,
        "inside ? from + c.chunk * 16 : p.q.data, inside);\n  }\n}\n\ntemplate <int kDim>\nVD_DEV void load_queries",
        "inside ? from + c.chunk * 16 : p.q.data, true);\n  }\n}\n\ntemplate <int kDim>\nVD_DEV void load_queries",
        "nan_query",
    ),
    (
        "kv_len by position instead of original index",
        KEYS,
        "original[i] >= 0 && original[i] < list.limit",
        "original[i] >= 0",
        "kv-len-ordered",
    ),
    (
        "kv_len ignored",
        KEYS,
        "list.limit = key_limit(p, item.batch);",
        "list.limit = p.lk;",
        "kv-len",
    ),
    (
        "owner of a slot is one run too early",
        KEYS,
        "if (end <= number) owner += step;",
        "if (end < number) owner += step;",
        "runs or clusters",
    ),
    (
        "runs behind the first window are lost",
        KEYS,
        "    window.load(p, list);\n  }\n  return count",
        "    break;\n  }\n  return count",
        "runs-short or blocks-tiny",
    ),
    (
        "bits of a run that begins inside a stage are shifted",
        KEYS,
        "(bit % 32) << 16",
        "0 << 16",
        "mask",
    ),
    (
        "bits across a word boundary are lost",
        KEYS,
        "shift + n > 32 && at + 1",
        "false && at + 1",
        "mask",
    ),
    (
        "mask rows counted from the item instead of the tile",
        KERNEL,
        "item.first + warp * 16 + lane % 16;",
        "warp * 16 + lane % 16;",
        "mask-tall or mask-heads",
    ),
    (
        "segments of batch item 0 for everybody",
        KEYS,
        "row_pointer(p.segment[s].k, item.batch,",
        "row_pointer(p.segment[s].k, 0,",
        "segments",
    ),
    (
        "key head by remainder",
        KEYS,
        "item.head / (p.heads / p.kv_heads)",
        "item.head % p.kv_heads",
        "gqa",
    ),
    # ---- work list, fill, merge
    (
        "items of a thread written at the end of its range",
        SCHEDULE,
        "uint64_t at = end - count;",
        "uint64_t at = end;",
        "blocks or clusters",
    ),
    (
        "uncovered rows believed covered",
        SCHEDULE,
        "header[1] = all_covered ==",
        "header[1] = all_covered <=",
        "runs or no-tiles",
    ),
    (
        "one replica for all heads",
        WORK,
        "replica % head_replicas",
        "0",
        "blocks-all-heads or blocks-one-plan",
    ),
    (
        "batch items of a shared plan mixed up",
        WORK,
        "replica / head_replicas",
        "0 * head_replicas",
        "blocks-one-plan or clusters-one-plan",
    ),
    (
        "tile numbers not clamped",
        WORK,
        "t.bh < 0 || t.bh >= plan.batch * plan.heads || ",
        "",
        "damaged",
    ),
    (
        "parts that read nothing are added with weight 0",
        COMBINE,
        "if (lse == -INFINITY || !inside) continue;",
        "if (!inside) continue;",
        "split",
    ),
    (
        "parts merged without the common maximum",
        COMBINE,
        "mine - (top == -INFINITY ? 0.f : top)",
        "mine",
        "split-huge-scores or split-mask",
    ),
    (
        "uncovered rows do not read the segments",
        HOST,
        "if (p.num_segments > 0) {",
        "if (p.num_segments > 8) {",
        "segments-uncovered or segments-no-tiles",
    ),
]
