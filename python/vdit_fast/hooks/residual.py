"""Features of another branch added behind blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from vdit_fast.context import StepContext
from vdit_fast.models.hooks import HookPlace, HookRows

__all__ = ["ResidualFeatures"]

Features = Tensor | Callable[[StepContext, HookPlace, HookRows], Tensor | None]


class ResidualFeatures(nn.Module):
    """Adds features to the video's rows behind chosen blocks: adaptors of coded latents (GNVC-VD, arXiv 2512.05016),
    garment and background branches (VITON-DiT; GenCompositor, arXiv 2509.02460).

    Args:
        features: block index -> features [B or 1, N, C'] in the order of the token grid, or a function of
            (step, place, rows) that makes them, or None to add nothing. May be exchanged between steps
            (``hook.features[3] = new``).
        projections: block index -> module from C' to C, for example a linear layer that begins at zero; None: none.
        scale: multiplies what is added.

    Blocks that ``features`` does not name are left alone, so the hook may be put behind all of them.
    """

    where: ClassVar[str] = "block_output"

    def __init__(
        self,
        features: Mapping[int, Features],
        projections: Mapping[int, nn.Module] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.features = dict(features)
        self.projections = nn.ModuleDict({str(index): module for index, module in (projections or {}).items()})
        self.scale = scale

    def forward(self, step: StepContext, place: HookPlace, rows: HookRows) -> Tensor | None:
        found = self.features.get(place.index)
        added = found if found is None or isinstance(found, Tensor) else found(step, place, rows)
        if added is None:
            return None
        key = str(place.index)
        if key in self.projections:
            added = self.projections[key](added)
        video = rows.video
        if added.ndim != 3 or added.shape[0] not in (1, video.shape[0]) or added.shape[1:] != video.shape[1:]:
            raise ValueError(
                f"ResidualFeatures: what is added behind {place.name} is {list(added.shape)}, "
                f"expected [{video.shape[0]} or 1, {video.shape[1]}, {video.shape[2]}]"
            )
        return video + self.scale * added.to(video.dtype)
