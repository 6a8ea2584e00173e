"""Sparse VideoGen2: queries and keys are clustered, and attention between clusters decides which pairs are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from . import _checks
from ._memory import layout, slot
from ._sampling import spread
from .base import Decision, Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan

SCRIPTS: dict[str, Any] = {"k_clusters": 1000, "top_p": 0.9, "min_keep_ratio": 0.1, "first_iterations": 50}
MODELS: dict[str, dict[str, Any]] = {
    "wan-t2v-14b-720p": {**SCRIPTS, "q_clusters": 300, "dense_steps": 0.2, "dense_layers": 1},
    "wan-i2v-14b-720p": {**SCRIPTS, "q_clusters": 300, "dense_steps": 0.35, "dense_layers": 1},
    "wan-i2v-14b-480p": {**SCRIPTS, "q_clusters": 200, "dense_steps": 0.2, "dense_layers": 1, "warm": True},
    "hunyuan-video-720p": {**SCRIPTS, "q_clusters": 400, "dense_steps": 0.1, "dense_layers": 1, "warm": True},
    "hunyuan-video-480p": {**SCRIPTS, "q_clusters": 200, "dense_steps": 0.04, "warm": True},
}
"""Settings of the scripts published with the paper."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Tokens start ... start + n of the joint sequence, cluster by cluster.

    order: int32 [B, H, n], positions from `start` on.     lengths: int32 [B, H, C], or C + 1 with the padding last.
    sizes: int32 [B, H, C], tokens per cluster.            centroids: fp32 [B, H, C, D], their means.
    """

    start: int
    order: Tensor
    lengths: Tensor
    centroids: Tensor

    @property
    def sizes(self) -> Tensor:
        return self.lengths[..., : self.centroids.shape[2]]


@dataclass(frozen=True, kw_only=True)
class SVG2(Planner):
    """Sparse VideoGen2 (Yang et al., arXiv 2505.18875): semantic-aware permutation.

    Per batch item and head, queries and keys of the video (after norm and RoPE) are clustered by k-means, each on its
    own. With centroids cq_i, ck_j and sizes |K_j|,
        p_ij  =  |K_j| exp(cq_i · ck_j / √D) / Σ_m |K_m| exp(cq_i · ck_m / √D)
    estimates the attention mass of key cluster j for the queries of cluster i; it is exact when all tokens equal their
    centroids. Query cluster i reads its largest key clusters, up to and including the one at which their mass exceeds
    `top_p`. Tokens are sorted by cluster, so that a cluster is one tile of rows and one run of keys.

    Centroids are kept per layer, guidance branch, expert and frame block, and begin anew with every generation. The
    first call runs `first_iterations` of k-means, later ones `iterations`. One costs (q_clusters + k_clusters) / (2 N)
    of dense attention's multiplications.

    Text and sink frames are not clustered: they are read by everyone, and text reads everything. Tokens from `kv_len`
    on are sorted last and take no part in clustering, so that padding changes no bit of a real row.

    Different from the paper's code: centroids begin at tokens spread evenly by the golden ratio instead of drawn at
    random (the same inputs always give the same plan); they stay fp32 and belong to one guidance branch and one
    generation; the mass is added up exactly instead of in bf16; there is no early stop, which would wait for the GPU;
    the first call runs 10 iterations, not 50 (see `for_model` for the published settings).

    Knobs besides those of `Planner`:
        q_clusters, k_clusters: clusters of queries and of keys, at most one per token (more are reduced to that).
            None: √N and 4 √N of the N video tokens (275 and 1,100 at 75,600, 78 and 314 at 6,144).
        top_p: share of the estimated mass on the clustered keys (neither text nor sinks) to keep, in [0, 1]; 1 keeps
            everything.
        min_keep_ratio: share of the key clusters that stay for every query cluster in any case, in [0, 1].
        sparsity: None, or a fraction of the video-to-video pairs outside of the sinks to drop, in [0, 1), in place of
            `top_p` and `min_keep_ratio`: every query cluster then reads its largest key clusters (by mass) as long as
            the middle of the next one lies within 1 − sparsity of the keys, and at least one.
        first_iterations, iterations: of k-means at the first call of a generation, and at later ones; at least 1.
        warm: run k-means in calls that `dense_steps` keeps dense, too, so that the first sparse step begins with
            centroids that have followed the steps.
        compensate: read the mean key and value of every dropped cluster in place of its tokens (`StandIns`), as
            SVG-EAR (arXiv 2603.08982) does. One more key per dropped pair of clusters; errors are of second order.

    Raises:
        ValueError, TypeError: a bad knob; in `plan`, sinks that leave no frame to cluster (`decide` reports it as a
            reason for dense).
    """

    name: ClassVar[str] = "svg2"

    q_clusters: int | None = None
    k_clusters: int | None = None
    top_p: float = 0.9
    min_keep_ratio: float = 0.1
    sparsity: float | None = None
    first_iterations: int = 10
    iterations: int = 2
    warm: bool = False
    compensate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob in ("q_clusters", "k_clusters"):
            if getattr(self, knob) is not None:
                self._set(knob, _checks.count(knob, getattr(self, knob), least=1))
        for knob in ("top_p", "min_keep_ratio"):
            self._set(knob, _checks.number(knob, getattr(self, knob), least=0, most=1))
        if self.sparsity is not None:
            self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        for knob in ("first_iterations", "iterations"):
            self._set(knob, _checks.count(knob, getattr(self, knob), least=1))
        for knob in ("warm", "compensate"):
            self._set(knob, _checks.switch(knob, getattr(self, knob)))

    @classmethod
    def for_model(cls, model: str, **knobs: Any) -> SVG2:
        """The settings of the authors' script for `model` (a key of `MODELS`), with `knobs` in place of some of them.

        Raises:
            ValueError: no script is known for the model.
        """
        if model not in MODELS:
            raise ValueError(f"no published settings for {model!r}; known: {', '.join(MODELS)}")
        return cls(**{**MODELS[model], **knobs})

    # ------------------------------------------------------------------ dense or sparse
    def decide(self, ctx: LayerContext) -> str | None:
        return super().decide(ctx) or self._misfit(ctx)

    def _misfit(self, ctx: LayerContext) -> str | None:
        frames = ctx.grid[0]
        return f"sinks {self.sinks} cover all {frames} frames" if self.sinks >= frames else None

    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        reason = self.decide(ctx)
        if reason is None:
            return Decision(self.plan(q, k, ctx))
        if self.warm and not (self._dense_layer(ctx) or self._dense_size(ctx) or self._misfit(ctx)):
            self.check_inputs(q, k, ctx)
            self.clusters(q, k, ctx)
        return Decision(reason=reason)

    # ------------------------------------------------------------------ plan
    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        self.check_inputs(q, k, ctx)
        if misfit := self._misfit(ctx):
            raise ValueError(f"{misfit}; use fewer sinks")
        rows, columns = self.clusters(q, k, ctx)
        chosen = self.select(masses(rows, columns), columns.sizes)
        q_order, q_lengths, q_inside = _whole(rows, ctx, 1)
        kv_order, kv_lengths, kv_inside = _whole(columns, ctx, q.shape[2] // k.shape[2])
        keep = chosen.new_ones(*chosen.shape[:2], q_lengths.shape[2], kv_lengths.shape[2])
        keep[:, :, q_inside, kv_inside] = chosen
        if ctx.kv_len is not None:
            keep[..., kv_inside.stop] = False  # the padding
        return AttentionPlan.from_clusters(keep, q_lengths, kv_lengths, q_order, kv_order, compensate=self.compensate)

    def select(self, mass: Tensor, sizes: Tensor) -> Tensor:
        """Which key clusters a query cluster reads; at least one, and every NaN.

        Args:
            mass: fp32 [B, H, Cq, Ck] of `masses`.     sizes: int32 [B, Hkv, Ck].
        Returns:
            bool [B, H, Cq, Ck].
        """
        if self.sparsity is None:
            return ops.select_top_p(mass, self.top_p, int(self.min_keep_ratio * mass.shape[-1]))
        size = sizes.repeat_interleave(mass.shape[1] // sizes.shape[1], 1)[:, :, None].expand(mass.shape)
        order = mass.sort(dim=-1, descending=True, stable=True).indices
        ordered = size.gather(-1, order).double()
        end = ordered.cumsum(-1)
        inside = end - ordered / 2 <= (1 - self.sparsity) * end[..., -1:]
        inside[..., 0] = True
        return torch.zeros_like(inside).scatter_(-1, order, inside) | mass.isnan()

    @property
    def remembers(self) -> bool:
        return True

    # ------------------------------------------------------------------ clusters
    def clusters(self, q: Tensor, k: Tensor, ctx: LayerContext) -> tuple[Clusters, Clusters]:
        """Clusters of the video's queries, and of its keys outside of the sink frames; the centroids are kept."""
        first = ctx.text if ctx.text_first else 0
        sinks = self.sinks * ctx.grid[1] * ctx.grid[2]
        key, same = slot("svg2 centroids", self, ctx), (layout(q, ctx), k.shape[2:])
        known = ctx.state.get(key)
        if known is None or known[0] != same:
            known = (same, None, None)
        iterations = self.first_iterations if known[1] is None else self.iterations
        q_clusters, k_clusters = self.counts(ctx)
        found = [
            _cluster(x, first + skip, ctx.n_video - skip, count, centroids, iterations, ctx.kv_len)
            for x, skip, count, centroids in ((q, 0, q_clusters, known[1]), (k, sinks, k_clusters, known[2]))
        ]
        ctx.state[key] = (same, found[0].centroids, found[1].centroids)
        return found[0], found[1]

    def counts(self, ctx: LayerContext) -> tuple[int, int]:
        """Clusters of queries and of keys for this video."""
        n = ctx.n_video
        wanted = (self.q_clusters or round(math.sqrt(n)), self.k_clusters or round(4 * math.sqrt(n)))
        return min(wanted[0], n), min(wanted[1], n - self.sinks * ctx.grid[1] * ctx.grid[2])


def masses(rows: Clusters, columns: Clusters) -> Tensor:
    """Estimated attention mass of every key cluster for every query cluster, without text: fp32 [B, H, Cq, Ck].

    Rows sum to 1; an empty key cluster has mass 0. NaN where all key clusters are empty.
    """
    batch, heads, count, dim = rows.centroids.shape
    kv_heads = columns.centroids.shape[1]
    folded = rows.centroids.reshape(batch, kv_heads, -1, dim) * dim**-0.5  # query heads of a key head side by side
    scores = (folded @ columns.centroids.mT).view(batch, heads, count, -1)
    sizes = columns.sizes.repeat_interleave(heads // kv_heads, 1)[:, :, None]
    return (scores + sizes.log()).masked_fill(sizes == 0, -math.inf).softmax(-1)


def _cluster(
    x: Tensor, start: int, length: int, count: int, centroids: Tensor | None, iterations: int, kv_len: Tensor | None
) -> Clusters:
    """`count` clusters of the tokens from `start` on, from `centroids` or else from tokens spread over them."""
    part = x.narrow(1, start, length)
    valid = None if kv_len is None else (kv_len.to(x.device) - start).clamp(0, length)[:, None]
    if centroids is None:
        # in token order: clusters with near numbers are then alike, read together, and merge to longer runs
        if valid is None:
            seeds = part.index_select(1, spread(count, length, x.device).sort().values)
        else:
            places = spread(count, valid, x.device).sort(-1).values
            seeds = part.take_along_dim(places[:, :, None, None], 1)
        centroids = seeds.transpose(1, 2).float().contiguous()
    if valid is None:
        return Clusters(start, *ops.kmeans(part, centroids, iterations))
    padding = (torch.arange(length, device=x.device) >= valid)[:, None]
    for _ in range(iterations):
        labels = ops.kmeans_assign(part, centroids).masked_fill(padding, count)
        order, lengths = ops.counting_sort(labels, count + 1)
        means, _ = ops.block_mean(part, lengths, order)
        centroids = torch.where(lengths[..., :count, None] > 0, means[:, :, :count], centroids)
    return Clusters(start, order, lengths, centroids)


def _whole(part: Clusters, ctx: LayerContext, group: int) -> tuple[Tensor, Tensor, slice]:
    """Order [B, H, N] and block lengths [B, H, blocks] of the joint sequence, and which blocks are the clusters.

    The tokens before and after the clustered ones are one block each; `group` repeats every head.
    """
    batch, heads, count = part.order.shape
    end = part.start + count

    def block(begin: int, end: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(begin, end, dtype=torch.int32, device=part.order.device)
        return tokens.expand(batch, heads, -1), part.lengths.new_full((1, 1, 1), end - begin).expand(batch, heads, 1)

    blocks = [(part.order + part.start, part.lengths)]
    if part.start:
        blocks.insert(0, block(0, part.start))
    if end < ctx.num_tokens:
        blocks.append(block(end, ctx.num_tokens))
    order, lengths = (torch.cat(parts, -1).repeat_interleave(group, 1) for parts in zip(*blocks, strict=True))
    first = 1 if part.start else 0
    return order, lengths, slice(first, first + part.centroids.shape[2])
