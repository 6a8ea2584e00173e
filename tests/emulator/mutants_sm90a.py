"""Bugs planted in the Hopper forward kernel, and the test that must fail for each.

A mutant is (name, file under csrc/kernels/attention, old text, new text, pytest -k expression in
test_forward_sm90a.py). The old text occurs exactly once in the file.
"""

from __future__ import annotations

KERNEL = "forward_sm90a.h"
STAGE = "forward_sm90a_stage.h"
GATHER = "forward_sm90a_producer.h"
BOXES = "forward_sm90a_tma.h"
CONSUMER = "forward_sm90a_consumer.h"

_BLOCKS = "blocks-ragged or long-dense"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    # ---- barriers of the rings
    (
        "keys are not waited for",
        CONSUMER,
        "  arch::mbar_wait(bars.k_full(stage), (j / kStages) & 1);\n",
        "",
        _BLOCKS,
    ),
    ("consumer parity inverted", CONSUMER, "(j / kStages) & 1);\n  const", "~(j / kStages) & 1);\n  const", _BLOCKS),
    (
        "values are not waited for",
        CONSUMER,
        "  arch::mbar_wait(bars.v_full(j % kStages), (j / kStages) & 1);\n",
        "",
        _BLOCKS,
    ),
    (
        "Q is not waited for",
        CONSUMER,
        "  arch::mbar_wait(bars.q_full, 0);\n",
        "",
        _BLOCKS,
    ),
    (
        "gather overwrites K that is in use",
        GATHER,
        "    arch::mbar_wait(bars.k_empty(stage), phase ^ 1);\n",
        "",
        "long-clusters or long-mask",
    ),
    (
        "gather overwrites V that is in use",
        GATHER,
        "    arch::mbar_wait(bars.v_empty(stage), phase ^ 1);\n",
        "",
        "long-clusters or long-mask",
    ),
    (
        "boxes overwrite V that is in use",
        BOXES,
        "    arch::mbar_wait(bars.v_empty(stage), phase ^ 1);\n",
        "",
        "long-dense or long-runs",
    ),
    (
        "producer parity inverted",
        GATHER,
        "arch::mbar_wait(bars.k_empty(stage), phase ^ 1)",
        "arch::mbar_wait(bars.k_empty(stage), phase)",
        "clusters",
    ),
    (
        "K stage freed before its products are done",
        CONSUMER,
        "      arch::wgmma_wait<1>();\n      arch::fence_regs(s);\n      finish_scores",
        "      if (lane == 0) arch::mbar_arrive(bars.k_empty(j % kStages));\n      arch::wgmma_wait<1>();\n"
        "      arch::fence_regs(s);\n      finish_scores",
        "long",
    ),
    (
        "V stage freed before its products are done",
        CONSUMER,
        "      arch::wgmma_wait<0>();\n      arch::fence_regs(o);\n"
        "      if (lane == 0) arch::mbar_arrive(bars.v_empty(last % kStages));\n",
        "      if (lane == 0) arch::mbar_arrive(bars.v_empty(last % kStages));\n"
        "      arch::wgmma_wait<0>();\n      arch::fence_regs(o);\n",
        "long",
    ),
    (
        "stage freed by one warp too few",
        KERNEL,
        "alternate ? 4 : 8;",
        "alternate ? 4 : 7;",
        "long-dense or long-runs",
    ),
    ("alternating items wait for both warpgroups", KERNEL, "alternate ? 4 : 8;", "8;", "long-short"),
    (
        "barrier initialisation not fenced",
        KERNEL,
        "    arch::fence_mbar_init();\n",
        "",
        _BLOCKS,
    ),
    ("no barrier after the initialisation", KERNEL, "  arch::syncthreads();\n", "", _BLOCKS),
    (
        "record released by a warp that has not written it",
        KERNEL,
        "kProducer == Producer::gather ? 4 : 1",
        "kProducer == Producer::gather ? 1 : 1",
        "clusters",
    ),
    ("V barrier does not count the boxes", KERNEL, "Producer::gather ? 0 : 1", "Producer::gather ? 0 : 0", _BLOCKS),
    (
        "arrival without the copies",
        GATHER,
        "    arch::cp_async_mbar_arrive_noinc(bars.k_full(stage));\n    if (end) {",
        "    arch::mbar_arrive(bars.k_full(stage));\n    if (end) {",
        "clusters",
    ),
    (
        "half of the expected bytes",
        BOXES,
        "all.box_rows * 128 * S::kPanels",
        "all.box_rows * 64 * S::kPanels",
        _BLOCKS,
    ),
    ("bytes of one panel", BOXES, "all.box_rows * 128 * S::kPanels", "all.box_rows * 128", "long-dense"),
    # ---- proxies, wgmma
    (
        "copied keys without a proxy fence",
        CONSUMER,
        "  if (view.flags & kGeneric) arch::fence_proxy_async();\n  return view;",
        "  return view;",
        "clusters",
    ),
    (
        "copied values without a proxy fence",
        CONSUMER,
        "  if (flags & ~next & kGeneric) arch::fence_proxy_async();\n",
        "",
        "runs or blocks-ragged",
    ),
    (
        "rows of a run's end not flagged as copied",
        BOXES,
        "      all.generic = true;\n",
        "      all.generic = filled == 0;\n",
        "runs or blocks-ragged",
    ),
    (
        "K descriptor: 512 bytes between groups of 8 rows",
        CONSUMER,
        "arch::wgmma_desc(k + at, 16, 1024, arch::SW_128)",
        "arch::wgmma_desc(k + at, 16, 512, arch::SW_128)",
        _BLOCKS,
    ),
    (
        "V descriptor: leading and stride offset exchanged",
        CONSUMER,
        "arch::wgmma_desc(v + i * 2048, Smem<kDim>::kPanelBytes, 1024, arch::SW_128)",
        "arch::wgmma_desc(v + i * 2048, 1024, Smem<kDim>::kPanelBytes, arch::SW_128)",
        "long-dense",
    ),
    ("64-byte swizzle", CONSUMER, "q + at, 16, 1024, arch::SW_128", "q + at, 16, 1024, arch::SW_64", _BLOCKS),
    ("second K panel forgotten", CONSUMER, "(i / 4) * S::kPanelBytes + (i", "(i", "long-dense"),
    (
        "S read before its product is done",
        CONSUMER,
        "      arch::wgmma_wait<1>();\n",
        "",
        _BLOCKS,
    ),
    (
        "O rescaled while its product is in flight",
        CONSUMER,
        "      arch::wgmma_wait<0>();\n      arch::fence_regs(o);\n      if (lane == 0)",
        "      rescale(o, f);\n      arch::wgmma_wait<0>();\n      arch::fence_regs(o);\n      if (lane == 0)",
        _BLOCKS,
    ),
    (
        "P overwritten while its product is in flight",
        CONSUMER,
        "      softmax_step(s, f, kp.scale_log2);\n      arch::wgmma_wait<0>();",
        "      softmax_step(s, f, kp.scale_log2);\n      to_weights<T>(s, p);\n      arch::wgmma_wait<0>();",
        _BLOCKS,
    ),
    ("a turn is not passed on", CONSUMER, "    arch::bar_arrive<2, 256>();\n", "    (void)0;\n", "long-dense"),
    (
        "the last turn stays half arrived",
        CONSUMER,
        "  if (!alternate && group == 0) arch::bar_sync<1, 256>();",
        "  if (false) arch::bar_sync<1, 256>();",
        _BLOCKS,
    ),
    (
        "the first turn is nobody's",
        CONSUMER,
        "  if (!alternate && group == 0) arch::bar_arrive<1, 256>();",
        "  if (false) arch::bar_arrive<1, 256>();",
        _BLOCKS,
    ),
    # ---- copies
    ("swizzle of copied rows off", GATHER, "((chunk ^ r) % 8) * 16", "((chunk ^ (r + 1)) % 8) * 16", "clusters"),
    (
        "rows of a run's end without swizzle",
        BOXES,
        "((chunk ^ r) % 8) * 16",
        "(chunk % 8) * 16",
        "blocks-ragged or runs",
    ),
    (
        "columns beyond the head dim not zeroed",
        GATHER,
        "source != nullptr && chunk * 8 < p.dim",
        "source != nullptr",
        "partition or sliced or long-runs",
    ),
    (
        "neighbours of a run's end are read",
        BOXES,
        "r < keys && chunk * 8 < p.dim",
        "chunk * 8 < p.dim",
        "nan or segments",
    ),
    (
        "a box reaches beyond kv_len",
        BOXES,
        "walk.position + n == p.lk)",
        "walk.position + n == walk.limit)",
        "nan-kv-len",
    ),
    (
        "slots without a key are not filled",
        BOXES,
        "    if (box >= 0) all.box_rows += slots;\n",
        "    if (n == 0 && walk.lane == all.count) all.box = 0, all.slot = all.slots = 0;\n"
        "    if (box >= 0) all.box_rows += slots;\n",
        _BLOCKS,
    ),
    ("zero boxes come from row 0", BOXES, "n == 0 ? p.lk : walk.position", "n == 0 ? 0 : walk.position", "nan"),
    (
        "box at the neighbouring row",
        BOXES,
        "64 * i, all.position, kv_head",
        "64 * i, all.position + 1, kv_head",
        _BLOCKS,
    ),
    ("kv head of the query head", BOXES, "item.head / (p.heads / p.kv_heads)", "item.head", "gqa"),
    (
        "values from the keys of a segment",
        BOXES,
        "value ? p.segment[segment].v : p.segment[segment].k",
        "p.segment[segment].k",
        "segments",
    ),
    # ---- the walk over the keys
    ("kv_len off by one", GATHER, "at >= 0 && at < walk.limit", "at >= 0 && at <= walk.limit", "kv-len"),
    (
        "kv_len ignored by runs",
        GATHER,
        "p.plan.kv_order.data == nullptr ? limit : p.lk",
        "p.lk",
        "kv-len",
    ),
    ("first segment skipped", GATHER, "    segment = -1;\n", "    segment = 0;\n", "segments"),
    ("segments before the runs", GATHER, "    while (run < run_end) {", "    while (false) {", "segments or blocks"),
    ("more than 32 runs", GATHER, "if (run - batch >= 32) {", "if (run - batch >= 33) {", "runs or blocks-tiny"),
    ("bits of a run that continues start anew", GATHER, "    bit += keys;\n", "", "mask"),
    ("mask row of the item, not of the tile", GATHER, "item.first + slot)", "slot)", "long-mask or mask"),
    (
        "second word of the bits forgotten",
        GATHER,
        "if (from % 32 + hi - lo > 32 &&",
        "if (false &&",
        "mask",
    ),
    (
        "blocked slots off by one",
        GATHER,
        "return slots & ~(read << (lo - 32 * word));",
        "return slots & ~(read << (lo - 32 * word + 1));",
        "mask",
    ),
    (
        "splits read the same stages",
        KERNEL,
        "a.params, item, split, splits, smem, bars);\n    } else",
        "a.params, item, 0, splits, smem, bars);\n    } else",
        "split-clusters or split-mask",
    ),
    # ---- scores and results
    ("masked slots are kept", CONSUMER, " || (flags & kBlocks); }", "; }", "mask"),
    (
        "second row masked like the first",
        CONSUMER,
        "blocked + (row + 8 * r) * 16",
        "blocked + row * 16",
        "mask",
    ),
    ("slots without a key count", CONSUMER, "view.masked()", "(view.flags & kBlocks)", _BLOCKS),
    (
        "maximum of half the quad",
        CONSUMER,
        "    top = fmaxf(top, arch::shfl_xor_f(top, 2));\n",
        "",
        "huge-scores or blocks",
    ),
    ("sum of half the quad", CONSUMER, "    f.sum[r] += arch::shfl_xor_f(f.sum[r], 2);\n", "", "blocks"),
    ("sum not rescaled", CONSUMER, "float sum = f.sum[r] * f.shrink[r];", "float sum = f.sum[r];", "long"),
    (
        "empty row so far gives NaN",
        CONSUMER,
        "top == -INFINITY ? 0.f : top * scale_log2;  //",
        "top * scale_log2;  //",
        "long-band or finite_score",
    ),
    ("negative scale keeps the sign", KERNEL, "p.scale < 0 ? -1.f : 0.f", "p.scale < 0 ? 1.f : 0.f", "scale-negative"),
    (
        "lse in base 2",
        CONSUMER,
        "(f.top[r] * scale_log2 + arch::lg2(f.sum[r])) * kLn2",
        "(f.top[r] * scale_log2 + arch::lg2(f.sum[r]))",
        "blocks",
    ),
    (
        "results in the order of the plan",
        CONSUMER,
        "    if (order != nullptr) target = order[target];\n",
        "",
        "clusters",
    ),
    ("row_scale forgotten", CONSUMER, "scale[r] *= p.row_scale[stat + to];", "(void)0;", "row-scale"),
    (
        "rows behind the item are written",
        CONSUMER,
        "lane < 16 && first + lane < item.rows",
        "lane < 16",
        "dense or blocks",
    ),
    (
        "halves of an alternating item not merged",
        CONSUMER,
        "o[4 * i + e] * f.shrink[r] + other[e] * shrink1[r]",
        "o[4 * i + e] * f.shrink[r]",
        "long-short",
    ),
    (
        "no barrier before the halves meet",
        CONSUMER,
        "  arch::bar_sync<5, 256>();\n",
        "  if (group == 1) arch::bar_arrive<5, 256>();\n  if (group == 0) (void)0;\n",
        "long-short",
    ),
]
