"""What a stage of a video transformer costs: operations, bytes sent, bytes kept. Counted, not measured.

A multiplication and an addition are two operations. Left out: norms, RoPE, softmax, the text encoder and the VAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vdit_fast.parallel.schedule import split_layers
from vdit_fast.parallel.simulator import Link, Pipeline

__all__ = ["WAN_1_3B", "WAN_14B", "Clip", "Transformer", "dual_paral", "memory_per_rank", "ulysses_seconds"]


@dataclass(frozen=True)
class Transformer:
    """A Wan-class transformer: self-attention, cross-attention to text, feed-forward; modulation of the whole clip."""

    layers: int
    width: int
    hidden: int  # of the feed-forward
    channels: int = 16  # of the latents
    patch: int = 4  # latent pixels per token
    text: int = 512  # text tokens
    text_width: int = 4096

    def layer_operations(self, rows: float, keys: float) -> float:
        """Of one layer and one guidance branch: ``rows`` tokens whose self-attention reads ``keys``. Keys and values of
        text are not counted: they are computed once per prompt."""
        c = self.width
        dense = rows * (8 * c * c + 4 * c * c + 4 * c * self.hidden)
        return dense + 4 * rows * (keys + self.text) * c

    def layer_weights(self) -> int:
        c = self.width
        attention = 2 * (4 * c * c + 4 * c + 2 * c)
        return attention + 2 * c * self.hidden + self.hidden + c + 6 * c + 2 * c

    def embedding_weights(self) -> int:
        """Patches, text and time."""
        c = self.width
        return self.channels * self.patch * c + c + self.text_width * c + c * c + 2 * c + 256 * c + 7 * c * c + 8 * c

    def head_weights(self) -> int:
        return self.width * self.channels * self.patch + self.channels * self.patch + 2 * self.width


WAN_1_3B = Transformer(layers=30, width=1536, hidden=8960)
WAN_14B = Transformer(layers=40, width=5120, hidden=13824)


@dataclass(frozen=True)
class Clip:
    """A long clip in DualParal's blocks (sheet section 5).

    Args:
        frames: pixel frames, 4 k + 1.
        tokens: per latent frame: 1,560 at 480 x 832, 3,600 at 720 x 1280.
        per_block: new latent frames of a block.
        context: latent frames that a block shares with each neighbour; the first block is longer by as many.
        steps: denoising steps.
        branches: of guidance, in one batch.
    """

    frames: int
    tokens: int
    per_block: int = 8
    context: int = 8
    steps: int = 50
    branches: int = 2

    @property
    def latents(self) -> int:
        return (self.frames + 3) // 4

    @property
    def blocks(self) -> int:
        return 1 + max(0, math.ceil((self.latents - self.context - self.per_block) / self.per_block))

    @property
    def rows(self) -> int:
        """Tokens of a forward and a branch: the block and what it repeats of its cleaner neighbour."""
        return (self.per_block + self.context) * self.tokens

    @property
    def keys(self) -> int:
        """Keys that they read: also the first frames of the noisier neighbour."""
        return self.rows + self.context * self.tokens


def dual_paral(model: Transformer, clip: Clip, ranks: int, flops: float, link: Link, width: float = 2) -> Pipeline:
    """The pipeline of a model and a clip at ``flops`` operations per second and rank; ``width``: bytes of a number that
    is sent. Embeddings, head and scheduler are taken as free. Results come back in fp32."""
    layer = clip.branches * model.layer_operations(clip.rows, clip.keys) / flops
    alone = model.layer_operations(clip.rows, clip.rows) / model.layer_operations(clip.rows, clip.keys)
    frame = clip.tokens * model.patch * model.channels * 4  # results are fp32
    return Pipeline(
        steps=clip.steps,
        blocks=clip.blocks,
        stage=[len(own) * layer for own in split_layers(model.layers, ranks)],
        hop_bytes=clip.branches * clip.rows * model.width * width,
        return_bytes=clip.per_block * frame,
        first_return_bytes=(clip.per_block + clip.context) * frame,
        link=link,
        newest=alone,
    )


def memory_per_rank(model: Transformer, clip: Clip, ranks: int, width: float = 2) -> list[dict[str, float]]:
    """Bytes by what they are for, of each rank: ``weights``; ``neighbour``: keys and values of the noisier neighbour's
    first frames, per layer and branch; ``queue``: latents of the queued blocks with two previous predictions of a
    multistep scheduler in fp32, on rank 0; ``messages``: one received and one to send."""
    found = []
    layers = [len(own) for own in split_layers(model.layers, ranks)]
    hop = clip.branches * clip.rows * model.width * width if ranks > 1 else 0
    for rank, count in enumerate(layers):
        weights = count * model.layer_weights()
        weights += model.embedding_weights() if rank == 0 else 0
        weights += model.head_weights() if rank == ranks - 1 else 0
        cache = count * clip.branches * 2 * clip.context * clip.tokens * model.width
        latents = min(clip.steps, clip.blocks) * clip.per_block * clip.tokens * model.patch * model.channels
        found.append({
            "weights": weights * width,
            "neighbour": cache * width,
            "queue": 3 * 4.0 * latents if rank == 0 else 0.0,
            "messages": 2.0 * hop,
        })  # fmt: skip
    return found


def ulysses_seconds(model: Transformer, clip: Clip, ranks: int, flops: float, link: Link, width: float = 2) -> float:
    """Seconds of the whole clip as one sequence, full attention, heads and rows exchanged between ranks in four
    all-to-alls per layer that nothing overlaps (sheet section 5). Links of a rank to the others share its bandwidth."""
    rows = clip.latents * clip.tokens
    compute = model.layers * model.layer_operations(rows, rows) / ranks / flops
    exchange = 4 * link.seconds(rows * model.width * width / ranks * (ranks - 1) / ranks) + 4 * link.latency
    return clip.steps * clip.branches * (compute + model.layers * exchange * (ranks > 1))
