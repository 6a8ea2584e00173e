"""Keys and values of cross-attention computed once per prompt instead of once per denoising step.

They depend on the text (and image) embeddings and on weights, never on the timestep, so they stay the same from step
to step. The stock processor still does the attention; it is handed a view of its module whose projections answer from
memory. An answer is remembered under

* the embeddings that enter the transformer: the same live memory with the same version counter, because what the
  blocks get is made anew in every forward;
* the weights on the way, by identity, address and version, and the state of LoRA layers (active, scale, merged).

Whatever else could change the result turns remembering off for that call, with a reason in the report. Writing through
``.data`` leaves no trace in the version counter and is not noticed; ``Handle.reset()`` forgets.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, set_processor
from vdit_fast.models.forward import Forward
from vdit_fast.models.session import Session
from vdit_fast.models.trace import HOOKS, Unknown, identity_of, trace_of

__all__ = ["TextKV", "TextKVProcessor", "attach", "detach"]

MAX_PROMPTS = 4
"""Prompts whose keys and values are held at a time: the branches of guidance, with room for two more."""

_KEY_SIDE = (
    ("to_k", "norm_k", "to_v", "to_kv"),
    ("add_k_proj", "norm_added_k", "add_v_proj", "to_added_kv"),
)
"""Of the text and of the image: key projection, key norm, value projection, both projections fused."""


@dataclass(eq=False)
class _Prompt:
    """What was computed from one set of embeddings."""

    identity: list[Any]
    trace: list[Any] | None = None
    """Of the text embedder, which lies between the embeddings and the blocks."""
    layers: dict[int, tuple[list[Any], dict[str, Tensor]]] = field(default_factory=dict)

    def alive(self) -> bool:
        return all(item is None or item[0].ref() is not None for item in self.identity)


class TextKV:
    """The remembered keys and values of one transformer.

    Args:
        inputs: the arguments of the transformer that alone (with weights) make its keys and values of cross-attention.
        embedders: paths of the modules between these arguments and what blocks get.
    """

    def __init__(self, inputs: tuple[str, ...], embedders: tuple[str, ...]) -> None:
        self.inputs = inputs
        self.embedders = embedders
        self.computed = 0
        self.reused = 0
        self.refused: Counter[str] = Counter()
        self._prompts: list[_Prompt] = []
        self._forward: Forward | None = None
        self._prompt: _Prompt | None = None
        self._reason = ""
        self._text: weakref.ref[Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (answers for prompt in self._prompts for _, answers in prompt.layers.values())
        return sum(tensor.nbytes for answers in held for tensor in answers.values())

    def clear(self) -> None:
        """Forget all keys and values."""
        self._prompts.clear()
        self.close()

    def note(self, forward: Forward | None, arguments: Mapping[str, Any]) -> None:
        """A forward begins with these arguments by name."""
        self.close()
        self._prompts = [prompt for prompt in self._prompts if prompt.alive()]
        self._forward = forward
        try:
            identity = [identity_of(arguments.get(name)) for name in self.inputs]
        except Unknown as unknown:
            self._reason = str(unknown)
            return
        self._prompt = next((prompt for prompt in self._prompts if prompt.identity == identity), None)
        if self._prompt is None:
            self._prompt = _Prompt(identity)
            self._prompts = [*self._prompts[1 - MAX_PROMPTS :], self._prompt]

    def close(self) -> None:
        """The forward is over: calls from outside of one are not answered."""
        self._forward, self._prompt, self._text, self._reason = None, None, None, ""

    def answers(self, processor: TextKVProcessor, attn: Any, text: Tensor) -> dict[str, Tensor] | None:
        """What to answer from in this call, empty when it must be computed first; None: nothing is remembered."""
        try:
            known = self._find(processor, attn, text)
        except Unknown as unknown:
            self.refused[str(unknown)] += 1
            return None
        if known:
            self.reused += 1
        else:
            self.computed += 1
        return known

    def _find(self, processor: TextKVProcessor, attn: Any, text: Tensor) -> dict[str, Tensor]:
        prompt = self._prompt
        if self._forward is None or self._forward is not processor.session.forward:
            raise Unknown("called outside a forward of its transformer")
        if prompt is None:
            raise Unknown(self._reason)
        if torch.is_grad_enabled() or attn.training:
            raise Unknown("training: gradients are recorded, or the module is in training mode")
        if torch.is_autocast_enabled(text.device.type):
            raise Unknown("autocast is enabled")
        if processor._parallel_config is not None:
            raise Unknown("context parallelism is enabled")
        if any(attn.__dict__.get(name) for name in HOOKS):
            raise Unknown("hooks act on the projections (offloading, casting)")
        if self._text is None:
            root = processor.root()
            trace = trace_of(root.get_submodule(path) for path in self.embedders if _has(root, path))
            if prompt.trace != trace:
                prompt.layers.clear()
                prompt.trace = trace
            self._text = weakref.ref(text)
        elif self._text() is not text:
            raise Unknown("the blocks of one forward get different text")
        trace = trace_of(getattr(attn, name, None) for names in _KEY_SIDE for name in names)
        before, answers = prompt.layers.get(processor.layer, (None, {}))
        if before != trace:
            answers = {}
            prompt.layers[processor.layer] = trace, answers
        return answers


class _Remembering:
    """An attention module as its stock processor sees it: projections of the text answer from ``answers``; what a
    first call computes is collected in ``_new``."""

    def __init__(self, attn: Any, answers: dict[str, Tensor]) -> None:
        self._attn = attn
        self._answers = answers
        self._known = bool(answers)
        self._new: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._attn, name)
        if name == "fused_projections" and self._known:
            return False
        for to_key, norm, to_value, fused in _KEY_SIDE:
            if real is None or name not in (to_key, norm, to_value, fused):
                continue
            last = norm if getattr(self._attn, norm, None) is not None else to_key
            if self._known:
                answer = self._answers[to_value if name == to_value else last]
                return lambda _: answer
            if name == fused:
                return lambda text: self._both(real(text), to_key if last == to_key else None, to_value)
            if name in (last, to_value):
                return lambda text: self._new.setdefault(name, real(text))
        return real

    def _both(self, projected: Tensor, to_key: str | None, to_value: str) -> Tensor:
        key, value = projected.chunk(2, dim=-1)
        self._new[to_value] = value.clone()  # not a view that holds both
        if to_key is not None:
            self._new[to_key] = key.clone()
        return projected


class TextKVProcessor(ServedProcessor):
    """Cross-attention by the stock processor, with keys and values from memory."""

    attends = False

    @property
    def layer(self) -> int:
        """Number of this module among those with remembered keys and values."""
        return self._layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        # A compiled block computes them: what is remembered is no part of a graph.
        memory = None if torch.compiler.is_compiling() or not self.session.active else self.session.text
        rest = () if rotary_emb is None else (rotary_emb,)  # not every stock processor takes it
        answers = None
        if memory is not None and encoder_hidden_states is not None:
            answers = memory.answers(self, attn, encoder_hidden_states)
        if answers is None:
            out: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, *rest)
            return out
        view = _Remembering(attn, answers)
        out = self.stock(view, hidden_states, encoder_hidden_states, attention_mask, *rest)
        answers.update(view._new)
        return out


class _AfterForward:
    """Forward hook of a transformer: its forward is over."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.session.text is not None and not torch.compiler.is_compiling():
            self.session.text.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> _AfterForward:
        return _AfterForward(copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return _idle_hook, ()


def attach(module: nn.Module, session: Session, adapter: ModelAdapter) -> None:
    """Remember the keys and values of a transformer's cross-attention, where its family says what makes them."""
    modules = [
        child
        for name, child in module.named_modules()
        if adapter.reads_text(name, child, getattr(child, "processor", None))
    ]
    if not modules or not adapter.text_inputs:
        return
    session.text = TextKV(adapter.text_inputs, adapter.text_embedders)
    for number, child in enumerate(modules):
        set_processor(child, TextKVProcessor(session, number, child.processor, weakref.ref(module)))
    module.register_forward_hook(_AfterForward(session))


def detach(module: nn.Module, session: Session) -> None:
    """Undoes ``attach``."""
    session.text = None
    for child in module.modules():
        processor = getattr(child, "processor", None)
        if isinstance(processor, TextKVProcessor) and processor.session is session:
            set_processor(child, processor.stock)
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _AfterForward) and hook.session is session:
            module._forward_hooks.pop(key)


def _has(root: nn.Module, path: str) -> bool:
    try:
        return root.get_submodule(path) is not None
    except AttributeError:  # also for a path whose end is None
        return False


def _idle(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    return None


def _idle_hook() -> Any:
    return _idle
