"""DyDiT's routers: which heads and hidden groups a timestep needs, which tokens take the MLP.

Dynamic Diffusion Transformer (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803). The width depends on the timestep
embedding alone, so a whole schedule can be decided before it begins; which tokens are selected depends on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TokenRouter", "WidthRouter", "width_masks"]

Masks = list[tuple[bool, ...]]
"""One mask per router: which units are on; the first always is."""


class WidthRouter(nn.Module):
    """Units that are on at a timestep: ``sigmoid(linear(embedding)) > 0.5``, and always the first one.

    Parameters are named as in DyDiT: ``router.weight`` [units - 1, C], ``router.bias``.
    """

    def __init__(self, dim: int, units: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(dim, units - 1, device=device, dtype=dtype)

    def forward(self, embedding: Tensor) -> Tensor:
        """bool ``[B, units]`` from timestep embeddings ``[B, C]``; no host read."""
        return torch.stack([_width_mask(self.router.weight, self.router.bias, row) for row in embedding])


class TokenRouter(nn.Module):
    """Tokens that take the MLP: ``sigmoid(linear(relu(linear(x)))) > 0.5``, C -> C / 16 -> 1.

    Parameters are named as in DyDiT: ``mlp_head.0`` and ``mlp_head.2``.
    """

    def __init__(self, dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.mlp_head = nn.Sequential(
            nn.Linear(dim, dim // 16, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(dim // 16, 1, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        """bool ``[..., N]`` of tokens ``[..., N, C]``."""
        selected: Tensor = self.mlp_head(x)[..., 0].float().sigmoid() > 0.5
        return selected


def _width_mask(weight: Tensor, bias: Tensor | None, embedding: Tensor) -> Tensor:
    # One product of one shape, whatever the batch: the same bits for one timestep, alone or among others.
    logits = torch.mv(weight.float(), embedding.float())
    if bias is not None:
        logits = logits + bias.float()
    return torch.cat([logits.new_ones(1, dtype=torch.bool), logits.sigmoid() > 0.5])


@torch.no_grad()
def width_masks(routers: Sequence[tuple[Tensor, Tensor | None]], embedding: Tensor) -> list[Masks]:
    """The masks of all routers of a model for each embedding, on the host: one host read for all of them.

    Args:
        routers: (weight [units - 1, C], bias [units - 1] or None) of each.
        embedding: timestep embeddings ``[S, C]``: of the batch items of one step, or of a whole schedule.

    Returns:
        For every embedding one mask per router.
    """
    if embedding.dim() != 2:
        raise ValueError(
            f"width_masks: embedding has shape {list(embedding.shape)}; expected [items, C]: the width follows one "
            "timestep per item, not one per token"
        )
    if not routers:
        return [[] for _ in embedding]
    rows = [torch.cat([_width_mask(weight, bias, row) for weight, bias in routers]) for row in embedding]
    sizes = [len(weight) + 1 for weight, _ in routers]
    found = []
    for row in torch.stack(rows).tolist():
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        found.append([tuple(row[start : start + size]) for start, size in zip(starts, sizes, strict=True)])
    return found
