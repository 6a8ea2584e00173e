"""Fused forwards of transformer blocks: where they sit, and when the stock forward must run.

An adapter names the block classes it knows, each with a function that computes the same through fused operators. That
function becomes the ``forward`` of the block *object*: its class stays, so block caches, regional compilation and
offloading, which match blocks by their class, work as before.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.forwards import ForwardStandIn
from vdit_fast.models.kernels import missing_fused_kernel, under_autocast
from vdit_fast.reference.adaln import Rounding

if TYPE_CHECKING:
    from vdit_fast.models.forward import Forward
    from vdit_fast.models.session import Session

__all__ = [
    "BlockForward",
    "as_rows",
    "attach",
    "detach",
    "distinct_rows",
    "distinct_rows_of",
    "fused_rounding",
    "is_plain",
    "reclaim",
    "rounding_for",
    "stock_forward",
]

BlockForward = Callable[..., Any]
"""A function with the parameters of the block's own ``forward``, and its name: in a pickle it becomes the stock one."""

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)

LINK = "_vdit_fast_fused"
"""Name under which a block with a fused forward keeps its ``Link``."""


class Link:
    """Ties a block to the session of its transformer. In a copy of the whole it ties the copies, in a copy or pickle of
    a part it ties to nothing, and the stock forward runs."""

    def __init__(self, session: Session | None, root: Any, stock: Callable[..., Any] | None) -> None:
        self.session = session
        self._root = root  # weak reference to the transformer
        self.stock = stock
        """The forward of the block's class, kept: the compiler does not find it through a class that is allowed in its
        graphs as a whole."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        root = self._root() if self._root is not None else None
        if root is None or id(root) not in memo:
            return Link(None, None, self.stock)
        return Link(copy.deepcopy(self.session, memo), weakref.ref(memo[id(root)]), self.stock)

    def __reduce__(self) -> Any:
        return Link, (None, None, None)


def stock_forward(block: nn.Module) -> Callable[..., Any]:
    """The forward that a block with a fused one would have."""
    return functools.partial(getattr(block, LINK).stock, block)


def attach(root: nn.Module, session: Session, forwards: Mapping[str, BlockForward]) -> None:
    """Give every known block of a transformer its fused forward; the session notes which and why not."""
    for name, block in root.named_modules():
        fused = forwards.get(type(block).__name__)
        if fused is not None:
            reason = _refusal(block, fused)
        elif _is_served_block(block, session):
            reason = f"{type(block).__name__} has no fused forward"
        else:
            continue
        if reason is None and fused is not None:
            object.__setattr__(block, LINK, Link(session, weakref.ref(root), type(block).forward))
            object.__setattr__(block, "forward", types.MethodType(fused, block))
            session.fused[name] = type(block).__name__
        elif reason is not None:
            session.left[reason] += 1


def _is_served_block(module: nn.Module, session: Session) -> bool:
    """Whether attention of this session lies directly in the module."""
    processors = (getattr(child, "processor", None) for child in module.children())
    return any(getattr(processor, "session", None) is session for processor in processors)


def _refusal(block: nn.Module, fused: BlockForward) -> str | None:
    if "forward" in block.__dict__ and not _is_idle(block, fused):
        # A wrapper prepares the weights (offloading) or leaves the block out (caches): ours must lie inside it.
        return "the block's forward is wrapped already; call accelerate() before the block is cached or offloaded"
    stock, ours = _names(type(block).forward), _names(fused)
    newer = ours[len(stock) :]  # the last ones an older version may lack, where None leaves them out
    defaults = (fused.__defaults__ or ())[-len(newer) :] if newer else ()
    same = stock + newer == ours and defaults == (None,) * len(newer)
    return None if same else f"{type(block).__name__}.forward takes ({', '.join(stock[1:])})"


def _is_idle(block: nn.Module, fused: BlockForward) -> bool:
    """Whether the block's forward is ours of a removed acceleration: a wrapper that has gone since kept it."""
    forward, link = block.__dict__["forward"], block.__dict__.get(LINK)
    ours = isinstance(forward, types.MethodType) and forward.__func__ is fused and forward.__self__ is block
    return ours and link is not None and (link.session is None or not link.session.active)


def _names(function: Any) -> tuple[str, ...]:
    code = function.__code__
    return tuple(code.co_varnames[: code.co_argcount])


def detach(root: nn.Module, session: Session) -> None:
    """Give the blocks their own forward back; one that was wrapped since stays inside and passes calls through."""
    for block in fused_blocks(root, session):
        forward = block.__dict__.get("forward")
        if (isinstance(forward, types.MethodType) and forward.__self__ is block) or _owner(block) is not block:
            del block.__dict__["forward"]
            del block.__dict__[LINK]


def _owner(block: nn.Module) -> Any:
    """The block whose forward this one has: another one for a shallow copy, which took over all attributes."""
    forward = block.__dict__.get("forward")
    if isinstance(forward, ForwardStandIn):
        return forward.module
    owner = forward.__self__ if isinstance(forward, types.MethodType) else block
    return owner if type(owner) is type(block) else block


def reclaim(root: nn.Module, session: Session) -> None:
    """Make shallow copies of blocks compute with their own weights, as the blocks of a transformer that runs now.

    A copy gets a fused forward of its own. Replicas of ``DataParallel`` run in threads that share the session, so they
    get their stock forward, and so does a copy of a block that somebody else stands around.
    """
    for name in session.fused:
        block = _submodule(root, name)
        link = block.__dict__.get(LINK) if block is not None else None
        if block is None or link is None or link.session is not session or _owner(block) is block:
            continue
        forward = block.__dict__["forward"]
        if isinstance(forward, types.MethodType) and not getattr(block, "_is_replica", False):
            object.__setattr__(block, "forward", types.MethodType(forward.__func__, block))
        else:
            del block.__dict__["forward"], block.__dict__[LINK]


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    module: Any = root
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module if isinstance(module, nn.Module) else None


def fused_blocks(root: nn.Module, session: Session) -> Iterator[nn.Module]:
    """The blocks that carry this session's fused forward."""
    for block in root.modules():
        link = block.__dict__.get(LINK)
        if link is not None and link.session is session:
            yield block


def fused_rounding(
    block: Any,
    x: Tensor,
    norms: Sequence[nn.Module],
    classes: Container[str],
    *weights: Tensor,
    reason: str | None = None,
) -> Rounding | None:
    """``"fast"`` or ``"eager"`` when the fused operators may run on x, None when the stock forward must.

    The reason is counted in the report, except inside a compiled block.

    Args:
        block: a block with a fused forward.
        x: its tokens [B, N, C].
        norms: sub-modules whose calls are left out, as are those of the norms inside them.
        classes: names of the classes that they may have; a wrapper, or another norm in their place, computes something
            else.
        weights: parameters of the block itself that it reads.
        reason: why this call cannot be fused, where the block itself knows one.
    """
    inside = [getattr(norm, "norm", None) for norm in norms]
    norms = [*norms, *(norm for norm in inside if norm is not None)]
    strange = next((type(norm).__name__ for norm in norms if type(norm).__name__ not in classes), None)
    if reason is None and strange is not None:
        reason = f"a norm is a {strange}, which the fused forward of {type(block).__name__} does not know"
    return rounding_for(getattr(block, LINK).session, x, norms, *weights, reason=reason)


def rounding_for(
    session: Session | None, x: Tensor, norms: Iterable[nn.Module] = (), *weights: Tensor, reason: str | None = None
) -> Rounding | None:
    """``fused_rounding`` where the session is at hand, and the classes are known."""
    if session is None or not session.active or session.config.fuse == "off":
        return None
    reason = reason or _obstacle(x, norms, weights)
    if reason is None:
        return session.config.fuse
    if not torch.compiler.is_compiling():
        session.unfused[reason] += 1
    return None


def _obstacle(x: Tensor, norms: Iterable[nn.Module], weights: Iterable[Tensor]) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if under_autocast(x):
        return "autocast chooses the dtypes"
    missing = missing_fused_kernel(x)
    if missing is not None:
        return missing
    if not all(is_plain(norm, x) for norm in norms):
        return "a norm is hooked, or its weights lie elsewhere"
    if any(weight.device != x.device for weight in weights):
        return "weights of the block lie elsewhere"
    return None


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether a norm's weights may be read and its call left out: they lie on x's device, and nobody hooks the call."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    weights = (getattr(module, name, None) for name in ("weight", "bias"))
    return all(w is None or (w.device == x.device and w.ndim == 1 and w.dtype in _WEIGHTS) for w in weights)


def as_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the fused operators need it; a first block may get a transposed view."""
    return x if x.stride(-1) == 1 else x.contiguous()


def distinct_rows(block: Any, temb: Tensor, rows_dim: int) -> tuple[Tensor, Tensor | None]:
    """Modulation per token as a table of its distinct rows and an index: clips have few distinct timesteps.

    Args:
        temb: ``[B, 6, D]``, or per token ``[B, N, 6, D]`` with ``rows_dim`` -2, or ``[B, 6, N, D]`` with 1.

    Returns:
        ``temb`` and None, or ``[1, K, 6, D]`` (``[1, 6, K, D]``) and int32 ``[B, N]``.
    """
    return distinct_rows_of(getattr(block, LINK).session.forward, temb, rows_dim)


def distinct_rows_of(forward: Forward | None, temb: Tensor, rows_dim: int) -> tuple[Tensor, Tensor | None]:
    """``distinct_rows`` in a forward of the transformer."""
    if temb.ndim == 3 or torch.compiler.is_compiling():
        return temb, None
    tokens = 1 if rows_dim == -2 else 2
    found = forward.distinct(temb.shape[0], temb.shape[tokens]) if forward is not None else None
    if found is None:
        return temb, None
    batch, token, index = found
    rows = temb[batch, token] if tokens == 1 else temb[batch, :, token].transpose(0, 1)
    return rows[None], index
