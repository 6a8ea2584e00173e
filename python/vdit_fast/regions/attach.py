"""How regions come to stand in an accelerated transformer, and how they leave it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, set_processor
from vdit_fast.models.session import Session
from vdit_fast.models.text_kv import TextKVProcessor
from vdit_fast.positions.boxes import AnchoredBoxes
from vdit_fast.regions.regions import WHO, RegionRun, Regions

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["RegionTextProcessor", "attach", "detach", "set_regions"]


class RegionTextProcessor(ServedProcessor):
    """Cross-attention by the stock processor; while there are two prompts, once for the box and once for the rest."""

    attends = False

    @torch.compiler.disable(reason="vdit_fast regions: which prompt is read changes with steps; compile without them")
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        run, forward = self.session.regions, self.session.forward
        text = encoder_hidden_states if self.session.active else None
        rest = () if rotary_emb is None else (rotary_emb,)  # not every stock processor takes it
        if run is None or forward is None or text is None or not run.splits(forward):
            out: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, *rest)
            return out
        if attention_mask is not None:
            raise RuntimeError("regions: cross-attention comes with a mask, which says already what is read")
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise RuntimeError("regions: two prompts are for inference; use torch.no_grad(), or give none")
        # Not through the memory of keys: it knows one text per forward. Two prompts are 2 S rows beside N.
        stock = self.stock.stock if isinstance(self.stock, TextKVProcessor) else self.stock
        return run.cross(lambda rows, words: stock(attn, rows, words, None, *rest), hidden_states, text, forward)


def _cross_modules(module: nn.Module, adapter: ModelAdapter) -> list[nn.Module]:
    """The modules that read the text, whoever stands around their stock processors."""
    found = []
    for name, child in module.named_modules():
        stock = getattr(child, "processor", None)
        while isinstance(stock, RegionTextProcessor | TextKVProcessor):
            stock = stock.stock
        if adapter.reads_text(name, child, stock):
            found.append(child)
    return found


def attach(module: nn.Module, session: Session, adapter: ModelAdapter) -> None:
    """Put a session's regions around the cross-attention of its transformer, where they have prompts."""
    if session.regions is None or session.regions.regions.foreground is None:
        return
    for number, child in enumerate(_cross_modules(module, adapter)):
        set_processor(child, RegionTextProcessor(session, number, child.processor, weakref.ref(module)))


def detach(module: nn.Module, session: Session) -> None:
    """Undoes ``attach``."""
    for child in module.modules():
        processor = getattr(child, "processor", None)
        if isinstance(processor, RegionTextProcessor) and processor.session is session:
            set_processor(child, processor.stock)


def set_regions(handle: Handle, regions: Regions | None) -> None:
    """See ``Handle.regions``."""
    roots = [(root, module) for root in handle.roots if (module := root.module()) is not None]
    had = any(root.session.regions is not None for root, _ in roots)
    if regions is not None:
        for root, module in roots:
            _check(handle, root.session, root.adapter, module, regions)
    for root, module in roots:
        session = root.session
        detach(module, session)
        if session.regions is not None:
            del session.around_heads[WHO]
            session.regions = session.positions = None
            session.repositioned.clear()
        if regions is None:
            continue
        session.regions = RegionRun(regions, next(iter(root.adapter.text_inputs), None))
        session.around_heads[WHO] = session.regions
        if regions.position_steps:
            session.positions = AnchoredBoxes(regions.boxes, regions.position_steps)
        session.repositioned.clear()
        attach(module, session, root.adapter)
    if had or regions is not None:
        handle.reset()  # what caches and planners remember was computed with others


def _check(handle: Handle, session: Session, adapter: ModelAdapter, module: nn.Module, regions: Regions) -> None:
    if not handle.active:
        raise RuntimeError("regions: this handle was removed; call vdit_fast.accelerate on the model again")
    if session.regions is None and session.positions is not None:
        raise RuntimeError("regions: positions are set already; take them off by handle.positions(None)")
    if handle.config.subset is not None:
        raise RuntimeError("regions: a subset of the tokens is configured; set subset to null")
    if regions.position_steps and any(layer.own_linear for layer in session.layers):
        raise RuntimeError(
            f"regions: self-attention of family {adapter.family!r} is linear and knows no mask; set position_steps=0"
        )
    if regions.position_steps and not any(
        processor.takes_positions
        for processor in (getattr(child, "processor", None) for child in module.modules())
        if isinstance(processor, ServedProcessor)
    ):
        raise RuntimeError(
            f"regions: no served layer of family {adapter.family!r} takes rotary tables; set position_steps=0"
        )
    if regions.foreground is not None and not (adapter.text_inputs and _cross_modules(module, adapter)):
        raise RuntimeError(
            f"regions: family {adapter.family!r} has no cross-attention that reads the text alone; leave foreground "
            "and background out"
        )
