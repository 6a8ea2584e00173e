"""Builders from block maps, cluster maps, classes and explicit masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .args import Blocks, as_order, block_lengths, block_map, check_lengths, cut, equal_lengths, positive, same_device
from .bits import block_words, trim_words
from .plan import AttentionPlan
from .runs import INT32_MAX, compile_blocks
from .stand_ins import StandIns


def dense(
    lq: int,
    lk: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
    q_tile: int = 128,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Every query reads every key; ``lk`` defaults to ``lq``. Tiles have ``q_tile`` rows, the last one maybe fewer."""
    lk = lq if lk is None else lk
    for name, value in (("lq", lq), ("lk", lk), ("batch", batch), ("heads", heads), ("q_tile", q_tile)):
        positive(name, value)
    groups = batch * heads
    keep = torch.ones(groups, 1, 1, dtype=torch.bool)
    tensors = compile_blocks(keep, torch.tensor([[lq]]), torch.tensor([[lk]]), lq=lq, q_tile=q_tile)
    plan = AttentionPlan(batch, heads, lq, lk, *tensors)
    return plan if device is None else plan.to(device)


def from_block_mask(
    mask: Tensor,
    q_block: Blocks,
    kv_block: Blocks,
    *,
    lq: int | None = None,
    lk: int | None = None,
    q_order: Tensor | None = None,
    kv_order: Tensor | None = None,
    compensate: bool = False,
) -> AttentionPlan:
    """Plan from a boolean block map; one tile per query block.

    Args:
        mask: bool ``[nq, nk]``, ``[H, nq, nk]`` or ``[B, H, nq, nk]``; True: the query block reads the key block.
        q_block, kv_block: one block length for all (the last block may be shorter, see ``lq``), or the 1-D lengths of
            the blocks along the permuted sequence, zero allowed.
        lq, lk: sequence lengths. Default: number of blocks times block length, the sum of the lengths, or the order's
            length. Needed when the lengths are a tensor on a GPU, which is not read back.
        q_order, kv_order: integer ``[L]`` or ``[1|B, 1|H, L]``: original token at each permuted position.
        compensate: where the mask is False, read the block's mean key and value instead (see ``StandIns``).
    """
    mask = block_map(mask, "mask")
    q_order, kv_order = as_order("q_order", q_order, mask.device), as_order("kv_order", kv_order, mask.device)
    q_len, lq = block_lengths("q_block", q_block, mask.shape[2], "lq", lq, q_order, mask.device)
    kv_len, lk = block_lengths("kv_block", kv_block, mask.shape[3], "lk", lk, kv_order, mask.device)
    return compile_map(mask, q_len, kv_len, lq, lk, q_order, kv_order, compensate=compensate)


def from_clusters(
    map: Tensor,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    q_order: Tensor,
    kv_order: Tensor,
    *,
    compensate: bool = False,
) -> AttentionPlan:
    """Plan from a map over clusters of any size, per batch item and head (arXiv 2505.18875); one tile per cluster.

    Args:
        map: bool ``[B, H, Cq, Ck]``; True: queries of the cluster read all keys of the cluster.
        q_sizes, kv_sizes: integer ``[B, H, Cq]`` and ``[B, H, Ck]``, zero allowed, summing to the sequence lengths.
        q_order, kv_order: integer ``[1|B, 1|H, lq]`` and ``[1|B, 1|H, lk]``, original tokens cluster by cluster.
        compensate: where the map is False, read the cluster's mean key and value instead (see ``StandIns``).

    On a GPU the values of sizes and orders are not looked at (that would stall the stream); ``validate()`` does.
    """
    if map.dim() != 4:
        raise ValueError(f"map must be bool [batch, heads, q clusters, kv clusters], got shape {list(map.shape)}")
    map = block_map(map, "map")
    order_q, order_k = as_order("q_order", q_order, map.device), as_order("kv_order", kv_order, map.device)
    if order_q is None or order_k is None:
        raise ValueError("from_clusters needs q_order and kv_order; for blocks in original order use from_block_mask")
    batch, heads = map.shape[:2]
    lq, lk = order_q.shape[-1], order_k.shape[-1]
    sizes = []
    for name, value, count, total in (("q_sizes", q_sizes, map.shape[2], lq), ("kv_sizes", kv_sizes, map.shape[3], lk)):
        if value.dim() != 3 or value.dtype == torch.bool or value.is_floating_point() or value.shape[2] != count:
            kind = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"{name} must be integer [{batch}, {heads}, {count}], got {kind}")
        if value.shape[0] not in (1, batch) or value.shape[1] not in (1, heads):
            raise ValueError(f"{name} has shape {list(value.shape)} but map has batch {batch} and heads {heads}")
        value = same_device(name, value, map.device).long().expand(batch, heads, count).reshape(batch * heads, count)
        if value.device.type == "cpu":
            check_lengths(name, value, total)
        sizes.append(value)
    return compile_map(map, sizes[0], sizes[1], lq, lk, order_q, order_k, compensate=compensate)


def from_classes(
    allow: Tensor, q_labels: Tensor, kv_labels: Tensor | None = None, *, q_tile: int = 128
) -> AttentionPlan:
    """Plan from one class label per token: query ``i`` reads key ``j`` when ``allow[q_labels[i], kv_labels[j]]``.

    Args:
        allow: bool ``[Cq, Ck]``.
        q_labels, kv_labels: integer ``[L]`` or ``[B, L]``; ``kv_labels`` defaults to ``q_labels``.
        q_tile: most rows per tile.

    A label outside ``allow`` is a ValueError on a CPU. On a GPU labels are not read back: there such a token reads no
    key and is read by no query.
    """
    if allow.dtype != torch.bool or allow.dim() != 2 or 0 in allow.shape:
        raise ValueError(f"allow must be bool [q classes, kv classes], got {allow.dtype} {list(allow.shape)}")
    positive("q_tile", q_tile)
    kv_labels = q_labels if kv_labels is None else kv_labels
    allow = allow.to(q_labels.device)
    outside = q_labels.device.type != "cpu"
    if outside:
        allow = torch.nn.functional.pad(allow, (0, 1, 0, 1))
    orders, sizes = [], []
    for name, labels, classes in (("q_labels", q_labels, allow.shape[0]), ("kv_labels", kv_labels, allow.shape[1])):
        whole = labels.dtype != torch.bool and not labels.is_floating_point()
        if labels.dim() not in (1, 2) or not whole or labels.numel() == 0:
            raise ValueError(f"{name} must be integer [L] or [batch, L], got {labels.dtype} {list(labels.shape)}")
        labels = same_device(name, labels, allow.device).long().reshape(-1, labels.shape[-1])
        if outside:
            unknown = (labels < 0) | (labels >= classes)
            labels = labels.masked_fill(unknown, classes - 1)
        elif int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(
                f"{name} range from {int(labels.min())} to {int(labels.max())}, but allow has {classes} classes there; "
                "give every label a row and a column"
            )
        count = torch.zeros(labels.shape[0], classes, dtype=torch.int64, device=labels.device)
        sizes.append(count.scatter_add_(1, labels, torch.ones_like(labels)))
        orders.append(labels.argsort(dim=-1, stable=True).to(torch.int32)[:, None, :])
    batch = max(orders[0].shape[0], orders[1].shape[0])
    for name, order in zip(("q_labels", "kv_labels"), orders, strict=True):
        if order.shape[0] not in (1, batch):
            raise ValueError(f"{name} has batch {order.shape[0]} but the other labels have batch {batch}")
    keep = allow.expand(batch, 1, *allow.shape)
    q_len, kv_len = (s.expand(batch, s.shape[1]) for s in sizes)
    return compile_map(keep, q_len, kv_len, orders[0].shape[2], orders[1].shape[2], orders[0], orders[1], q_tile=q_tile)


def from_mask(mask: Tensor, *, block: tuple[int, int] = (64, 64)) -> AttentionPlan:
    """Exact plan of any boolean mask: full blocks where it is all True, bits where it is mixed, nothing elsewhere.

    Args:
        mask: bool ``[lq, lk]``, ``[H, lq, lk]`` or ``[B, H, lq, lk]``, True where a query may read a key.
        block: query and key block length. A key length that is a multiple of 32 packs without padding.
    """
    return mask_plan(block_map(mask, "mask"), block, None, None)


def mask_plan(mask: Tensor, block: tuple[int, int], q_order: Tensor | None, kv_order: Tensor | None) -> AttentionPlan:
    """``from_mask`` of a 4-D mask over permuted positions."""
    if len(block) != 2:
        raise ValueError(f"block must be (query length, key length), got {block!r}")
    positive("block[0]", block[0])
    positive("block[1]", block[1])
    batch, heads, lq, lk = mask.shape
    groups = batch * heads
    q_len, kv_len = cut(lq, block[0]), cut(lk, block[1])
    rows, cols = equal_lengths(lq, block[0], mask.device), equal_lengths(lk, block[1], mask.device)
    flat = mask.reshape(groups, lq, lk)
    padded = torch.nn.functional.pad(flat, (0, -lk % block[1], 0, -lq % block[0]))
    count = padded.view(groups, len(q_len), block[0], len(kv_len), block[1]).sum((2, 4))
    full = count == rows[:, None] * cols[None, :]
    partial = (count > 0) & ~full
    words, offsets = block_words(flat, rows, cols, kv_len)
    mask_bits: Tensor | None = words
    if mask.device.type == "cpu":
        words, offsets = trim_words(words, offsets, partial, q_len, kv_len)
        mask_bits = words if len(words) else None
    if len(words) > INT32_MAX:
        raise ValueError(f"mask needs {len(words)} words of bits, more than int32 can index; build one plan per head")
    tensors = compile_blocks(full, rows[None], cols[None], lq=lq, partial=partial, offsets=offsets)
    return AttentionPlan(batch, heads, lq, lk, *tensors, mask_bits, q_order, kv_order)


def compile_map(
    mask: Tensor,
    q_len: Tensor,
    kv_len: Tensor,
    lq: int,
    lk: int,
    q_order: Tensor | None = None,
    kv_order: Tensor | None = None,
    *,
    q_tile: int | None = None,
    compensate: bool = False,
) -> AttentionPlan:
    """End of the block builders: ``mask`` bool ``[B, H, nq, nk]``, lengths int64 ``[1|B*H, n]``, orders int32 3-D."""
    batch, heads = mask.shape[:2]
    for name, order in (("q_order", q_order), ("kv_order", kv_order)):
        if order is None:
            continue
        for axis, have in ((0, batch), (1, heads)):
            if order.shape[axis] != 1 and have not in (1, order.shape[axis]):
                shape = list(order.shape)
                raise ValueError(f"{name} has shape {shape}, but the mask has batch {batch} and heads {heads}")
        batch, heads = max(batch, order.shape[0]), max(heads, order.shape[1])
    keep = mask.expand(batch, heads, *mask.shape[2:]).reshape(batch * heads, *mask.shape[2:])
    tensors = compile_blocks(keep, q_len, kv_len, lq=lq, q_tile=q_tile)
    stand_ins: StandIns | None = None
    if compensate:
        blocks = mask.shape[3]
        one = torch.ones(1, blocks, dtype=torch.int64, device=mask.device)
        reads = compile_blocks(~keep & (kv_len > 0)[:, None], q_len, one, lq=lq, q_tile=q_tile)
        lengths = kv_len.view(batch, heads, blocks) if kv_len.shape[0] > 1 else kv_len[None]
        stand_ins = StandIns(AttentionPlan(batch, heads, lq, blocks, *reads, None, q_order), lengths, kv_order)
    return AttentionPlan(batch, heads, lq, lk, *tensors, None, q_order, kv_order, stand_ins=stand_ins)
