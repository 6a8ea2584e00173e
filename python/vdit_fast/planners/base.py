"""The planner base: common knobs, the dense-or-sparse decision, and the registry by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import methods
from . import _checks

if TYPE_CHECKING:
    from ..context import LayerContext, StepContext
    from ..plan import AttentionPlan

REGISTRY: dict[str, type[Planner]] = {}
"""Every planner class by its `name`; a subclass with a name enters it when it is defined."""

SIGMA_SLACK = 1e-6
"""Noise levels come from fp32 timesteps: 1 − 0.8 is 0.19999999 there, and counts as 0.2."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What one attention call does: ``out = attention(q, k, v, plan, row_scale=row_scale) + residual``.

    Attributes:
        plan: which keys are read; None: all of them.
        reason: why the call is dense, one line for the report; None for a sparse call.
        row_scale: fp32 ``[B, H, N]`` factors of the output's rows, or None.
        residual: ``[B, N, H, D]`` added to the output, or None.
        observe: called with the output ``[B, N, H, D]`` (before ``residual``) and its log-sum-exp fp32 ``[B, H, N]``,
            without gradient: for methods that learn from a call what the next ones need.
    """

    plan: AttentionPlan | None = None
    reason: str | None = None
    row_scale: Tensor | None = None
    residual: Tensor | None = None
    observe: Callable[[Tensor, Tensor], None] | None = None

    @property
    def corrected(self) -> bool:
        """Whether a row scale, a residual or stand-ins make up for what the plan does not read."""
        if self.plan is None:
            return False
        return any(extra is not None for extra in (self.row_scale, self.residual, self.plan.stand_ins))


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of (self, q, ...) whose scores stay fp32 under autocast."""

    @functools.wraps(method)
    def call(self: Planner, q: Tensor, *rest: Any, **options: Any) -> Any:
        device = q.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # meta has none
            return method(self, q, *rest, **options)
        with torch.autocast(device, enabled=False):
            return method(self, q, *rest, **options)

    return call


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Decides, per layer and step, which keys each query reads; subclasses override `plan`, or `decision`, or both.

    A planner is an immutable bag of settings. What it must remember between calls lives in `ctx.state`, and what
    follows from its settings and the geometry alone in `ctx.static`, so that one planner may serve several models at
    once.

    Common knobs (the same name and meaning in every planner):
        dense_steps: an int n keeps the first n denoising steps dense; a float in [0, 1) keeps the first
            floor(dense_steps · num_steps) dense. When the step index or the number of steps is unknown, the noise
            level decides: dense while 1 − sigma < fraction. When that is unknown too, the step is dense.
        dense_layers: an int n keeps the first n layers dense; a tuple lists layer indices, negative ones count from
            the end.
        min_tokens: sequences of fewer tokens (video + text) stay dense.
        text: "dense": every text token reads everything and is read by everyone.
        sinks: the first `sinks` latent frames, rounded up to whole tiles, are read by every query; 0 by default,
            except where a method was published with one.

    Raises:
        TypeError, ValueError: a knob has a wrong type or value; the message names it.
    """

    name: ClassVar[str] = ""

    dense_steps: int | float = 0.0
    dense_layers: int | tuple[int, ...] = 0
    min_tokens: int = 0
    text: str = "dense"
    sinks: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overridden = cls.plan is not Planner.plan or cls.decision is not Planner.decision
        if cls.__dict__.get("name") and not overridden:
            raise TypeError(f"planner {cls.__qualname__} must override plan(q, k, ctx) or decision(q, k, v, ctx)")
        for name in ("plan", "decision"):
            if name in cls.__dict__:
                setattr(cls, name, _without_autocast(cls.__dict__[name]))
        methods.enter(REGISTRY, cls, "planner")

    def __post_init__(self) -> None:
        if isinstance(self.dense_steps, float):
            if not (math.isfinite(self.dense_steps) and 0 <= self.dense_steps < 1):
                raise ValueError(
                    "dense_steps must be an int (number of steps) or a float in [0, 1) (fraction of the steps), "
                    f"got {self.dense_steps!r}"
                )
        else:
            self._set("dense_steps", _checks.count("dense_steps", self.dense_steps))
        if isinstance(self.dense_layers, list | tuple):
            self._set(
                "dense_layers", tuple(_checks.count("dense_layers", i, least=-(1 << 31)) for i in self.dense_layers)
            )
        else:
            self._set("dense_layers", _checks.count("dense_layers", self.dense_layers))
        self._set("min_tokens", _checks.count("min_tokens", self.min_tokens))
        self._set("sinks", _checks.count("sinks", self.sinks))
        _checks.choice("text", self.text, ("dense",))

    def _set(self, knob: str, value: Any) -> None:
        object.__setattr__(self, knob, value)  # normalised value of a frozen field, only during construction

    # ------------------------------------------------------------------ dense or sparse
    def decide(self, ctx: LayerContext) -> str | None:
        """None when this call runs sparse, else the reason why it stays dense (one line for the report)."""
        return self._dense_layer(ctx) or self._dense_step(ctx) or self._dense_size(ctx)

    def _dense_layer(self, ctx: LayerContext) -> str | None:
        layers = self.dense_layers
        if isinstance(layers, int):
            return f"layer {ctx.layer} < dense_layers {layers}" if ctx.layer < layers else None
        wanted = {i + ctx.num_layers if i < 0 else i for i in layers}
        return f"layer {ctx.layer} in dense_layers {layers}" if ctx.layer in wanted else None

    def _dense_step(self, ctx: LayerContext) -> str | None:
        knob, step = self.dense_steps, ctx.step
        if knob == 0:
            return None
        total = step.num_steps
        if step.step >= 0 and (isinstance(knob, int) or total is not None):
            # 1e-9: 0.29 · 100 is 28.999999999999996 in binary
            first = knob if isinstance(knob, int) else math.floor(knob * (total or 0) + 1e-9)
            if step.step >= first:
                return None
            shown = f"dense_steps {knob}" if isinstance(knob, int) else f"dense_steps {first} ({knob:g} of {total})"
            return f"step {step.step} < {shown}"
        part = knob if isinstance(knob, float) else (knob / total if total else None)
        if step.sigma is not None and part is not None:
            done = 1.0 - step.sigma
            return f"1 - sigma {done:.3f} < dense_steps {part:g}" if done < part - SIGMA_SLACK else None
        return f"dense_steps {knob} is set but the denoising step is unknown"

    def _dense_size(self, ctx: LayerContext) -> str | None:
        tokens = ctx.n_video + ctx.text
        return f"{tokens:,} tokens < min_tokens {self.min_tokens:,}" if tokens < self.min_tokens else None

    def observes(self, step: StepContext) -> str | None:
        """Why the calls of this step must happen, or None: later ones rely on what they see. Feature caches compute
        such steps. The answer depends on the step and the knobs alone."""
        return None

    @property
    def remembers(self) -> bool:
        """Whether a call depends on what an earlier step of the generation left in `ctx.state`. A run cannot be taken
        up in its middle then."""
        return False

    # ------------------------------------------------------------------ planning
    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        """What this call does: ``plan`` unless ``decide`` keeps it dense. This is what a session calls.

        Methods that need more than a plan (a search in a dense call, an output scale, a residual, the values) override
        it. Arguments as in ``plan``, and v ``[B, N, Hkv, D]``; called without gradient.
        """
        reason = self.decide(ctx)
        return Decision(reason=reason) if reason is not None else Decision(self.plan(q, k, ctx))

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        """The plan for one attention call, dense layers and steps left aside.

        Args:
            q: [B, N, H, D] after norm and RoPE, the whole joint sequence, any strides, fp32/bf16/fp16.
            k: [B, N, Hkv, D], H a multiple of Hkv.
            ctx: where and when the call happens.
        Returns:
            a plan of N × N tokens; the same inputs always give the same plan. No gradient flows through it.
        Raises:
            ValueError: q, k and ctx do not fit together or the knobs do not fit the grid.
            TypeError: the method needs the values and only has ``decision``.
        """
        raise TypeError(f"{self.name or type(self).__name__} plans with the values: call decision(q, k, v, ctx)")

    def check_inputs(self, q: Tensor, k: Tensor, ctx: LayerContext) -> None:
        """Raise ValueError when q, k and the context disagree."""
        frames, height, width = ctx.grid
        if frames * height * width != ctx.n_video:
            raise ValueError(
                f"grid {tuple(ctx.grid)} has {frames * height * width:,} tokens but n_video is {ctx.n_video:,}"
            )
        tokens = ctx.n_video + ctx.text
        for label, x in (("q", q), ("k", k)):
            if x.dim() != 4:
                raise ValueError(f"{label} must be [B, N, H, D], got shape {tuple(x.shape)}")
            if x.shape[1] != tokens:
                raise ValueError(
                    f"{label} has {x.shape[1]:,} tokens but the context has {tokens:,} "
                    f"(grid {tuple(ctx.grid)} + {ctx.text} of text)"
                )
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
            raise ValueError(
                f"q {tuple(q.shape)} and k {tuple(k.shape)} must share B and D, and q's heads be a multiple of k's"
            )

    # ------------------------------------------------------------------ dict form
    def to_dict(self) -> dict[str, Any]:
        """{"method": name, knob: value, ...} in plain JSON/YAML types; `from_dict` reads it back."""
        return methods.to_mapping(self)


def from_dict(data: Mapping[str, Any]) -> Planner:
    """Build a planner from {"method": name, knob: value, ...}.

    Raises:
        ValueError: no "method", or an unknown method or knob (the message names the nearest one), or a bad value.
        TypeError: `data` is not a mapping, or a knob has the wrong type.
    """
    return methods.build(REGISTRY, data, "planner", '{"method": "draft", "sparsity": 0.75}')
