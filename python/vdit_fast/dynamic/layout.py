"""Where models of diffusers have what DyDiT works on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "Layout"]


@dataclass(frozen=True)
class Layout:
    """Where a model has what DyDiT works on. Paths are relative to the model or to the block."""

    blocks: tuple[str, ...]
    """Lists of blocks."""
    embedder: str
    """The module whose output is the timestep embedding ``[B, C]``, before anything is added to it."""
    projection: str
    """The module that makes the embedder's input of timesteps ``[B]``."""
    mlp: str
    norm: str
    """In a block: the norm before the MLP; its input is what the token router reads."""
    attention: str = "attn1"


_ADALN_SINGLE = {"embedder": "adaln_single.emb.timestep_embedder", "projection": "adaln_single.emb.time_proj"}
LAYOUTS = {
    "AllegroTransformer3DModel": Layout(("transformer_blocks",), mlp="ff", norm="norm2", **_ADALN_SINGLE),
    "LatteTransformer3DModel": Layout(
        ("transformer_blocks", "temporal_transformer_blocks"), mlp="ff", norm="norm2", **_ADALN_SINGLE
    ),
    "WanTransformer3DModel": Layout(
        ("blocks",), "condition_embedder.time_embedder", "condition_embedder.timesteps_proj", mlp="ffn", norm="norm3"
    ),
}
"""Model classes that ``apply_dydit`` knows."""
