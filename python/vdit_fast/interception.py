"""``patch_sdpa``: dense attention of this package inside one module that no adapter knows."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vdit_fast.models.kernels import missing_kernel
from vdit_fast.ops.attention import attention
from vdit_fast.ops.short_attention import MAX_SHORT_KEYS, short_attention

__all__ = ["PatchedAttention", "patch_sdpa"]

logger = logging.getLogger("vdit_fast")
_SDPA = torch.nn.functional.scaled_dot_product_attention


def patch_sdpa(module: nn.Module, *, right_padded: bool = False) -> PatchedAttention:
    """Serve the ``scaled_dot_product_attention`` calls inside a module's forward through this package's kernels.

    For models that ``accelerate`` does not know. Attention stays dense; nothing outside the forwards of this module
    changes, and nothing global is replaced. Served: q, k, v of three or four dimensions, ``attn_mask`` None or a bool
    mask per key whose readable keys come first, ``scale``, ``enable_gqa``, gradients, autocast. Everything else runs as
    before and is counted in ``report()`` with its reason: other masks, ``is_causal``, ``dropout_p``, dtypes and devices
    without a kernel, compiled graphs.

    Args:
        module: any module; calls in its submodules count as its own.
        right_padded: promise that bool masks per key are False only behind the readable keys. Without it that is looked
            at on a CPU, and calls with a mask on a GPU pass through, where looking would wait for the device.

    Returns:
        The handle: ``report()``, ``stats()``, ``remove()``; a context manager that removes itself. A second call for
        the same module returns the same handle.

    Raises:
        TypeError: ``module`` is not an nn.Module.
        RuntimeError: the module is patched with another ``right_padded``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an nn.Module, got {type(module).__name__}; pass a pipeline's transformer or unet"
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Enter) and hook.handle.active:
            if hook.handle.right_padded != right_padded:
                raise RuntimeError(
                    f"this module is already patched with right_padded={hook.handle.right_padded}; call remove() on "
                    "its handle first"
                )
            return hook.handle
    handle = PatchedAttention(right_padded)
    handle._hooks = [
        module.register_forward_pre_hook(_Enter(handle), prepend=True),
        module.register_forward_hook(_Leave(handle), always_call=True),
    ]
    return handle


class PatchedAttention:
    """What ``patch_sdpa`` did to a module, and the way back."""

    def __init__(self, right_padded: bool) -> None:
        self.right_padded = right_padded
        self.compiled = False
        """Whether a compiled graph took a call, in which torch's own attention runs."""
        self.served: Counter[str] = Counter()
        """Served calls by operator."""
        self.passed: Counter[str] = Counter()
        """Calls left to torch, by reason."""
        self.active = True
        """False after ``remove``."""
        self._hooks: list[Any] = []
        self._open: dict[int, list[_Mode]] = {}  # by thread, innermost last

    def remove(self) -> None:
        """The module as it was. Safe to call again, and inside the forward, which then ends with torch's attention."""
        self.active = False
        if not any(self._open.values()):  # else the last forward that runs takes the hooks off
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def stats(self) -> dict[str, Any]:
        """JSON-ready: ``served`` (operator -> calls), ``passed`` (reason -> calls), ``compiled``, ``active``."""
        return {
            "served": dict(self.served),
            "passed": dict(self.passed),
            "compiled": self.compiled,
            "active": self.active,
        }

    def report(self) -> str:
        """Plain text: how many calls were served, by which operator, and why others were not."""
        served, passed = sum(self.served.values()), sum(self.passed.values())
        state = "active" if self.active else "removed"
        lines = [f"vdit_fast.patch_sdpa, {state}: {served} attention calls served, {passed} left to torch"]
        lines += [f"  {number:6d} x served by {name}" for name, number in self.served.most_common()]
        lines += [f"  {number:6d} x left to torch: {reason}" for reason, number in self.passed.most_common()]
        if self.compiled:
            lines.append("  compiled graphs hold torch's own attention: patching acts on eager calls only")
        if served + passed == 0 and not self.compiled:
            lines.append("  no scaled_dot_product_attention call was seen")
        return "\n".join(lines)

    def _pass(self, reason: str) -> None:
        if reason not in self.passed:
            logger.warning("vdit_fast: patch_sdpa leaves a call to torch: %s (said once, counted in report())", reason)
        self.passed[reason] += 1

    def __enter__(self) -> PatchedAttention:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedAttention:
        raise TypeError("a handle is not copied")  # the hooks of a copied module are idle: see _Hook


def _idle(*call: Any) -> None:
    return None


def _idle_hook() -> Callable[..., None]:
    return _idle


class _Hook:
    """Base of the two hooks. Copies and pickles of a patched module are not patched."""

    def __init__(self, handle: PatchedAttention) -> None:
        self.handle = handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _idle

    def __reduce__(self) -> Any:
        return _idle_hook, ()


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.handle.compiled = True
            return
        mode = _Mode(self.handle)
        mode.__enter__()
        self.handle._open.setdefault(threading.get_ident(), []).append(mode)


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        opened = self.handle._open.get(threading.get_ident())
        if opened:  # none when a hook before _Enter raised
            opened.pop().__exit__(None, None, None)
        if not self.handle.active:
            self.handle.remove()


class _Mode(TorchFunctionMode):
    """Sees every torch function of one thread while it is entered, and takes the attention calls."""

    def __init__(self, handle: PatchedAttention) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA or not self.handle.active:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            self.handle.compiled = True
            return func(*args, **kwargs)
        return _attend(self.handle, args, kwargs)


def _attend(handle: PatchedAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    reason = "the arguments do not fit scaled_dot_product_attention"
    call = None
    with contextlib.suppress(TypeError):  # torch says what is wrong with them
        call = _Call(*args, **kwargs)
    if call is not None:
        reason = call.reason(handle.right_padded) or ""
    if call is None or reason:
        handle._pass(reason)
        return _SDPA(*args, **kwargs)
    name, out = call.run()
    handle.served[name] += 1
    return out


class _Call:
    """The arguments of one call, under the names that torch gives them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.qkv = (query, key, value)
        self.mask, self.dropout, self.causal = attn_mask, dropout_p, is_causal
        self.scale, self.grouped = scale, enable_gqa

    def reason(self, right_padded: bool) -> str | None:
        """Why torch must run this call, or None."""
        odd = next((x for x in self.qkv if type(x) not in (Tensor, nn.Parameter)), None)
        if odd is not None:
            return f"the inputs are {type(odd).__name__}, not plain tensors"
        if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside a trace or a function transform"
        q, k, v = self.qkv
        if q.layout != torch.strided or q.ndim not in (3, 4) or k.ndim != q.ndim or v.ndim != q.ndim:
            return f"the inputs have {q.ndim}, {k.ndim} and {v.ndim} dimensions"
        if k.shape != v.shape or k.shape[-1] != q.shape[-1] or k.shape[0] != q.shape[0]:
            return "shapes of q, k and v differ in batch, length or head dimension"
        heads, kv_heads = (q.shape[1], k.shape[1]) if q.ndim == 4 else (1, 1)
        if heads != kv_heads and not (self.grouped and kv_heads and heads % kv_heads == 0):
            return f"{heads} query heads and {kv_heads} key heads without enable_gqa"
        if k.dtype != q.dtype or v.dtype != q.dtype or k.device != q.device or v.device != q.device:
            return "dtypes or devices of q, k and v differ"
        if self.dropout:
            return "dropout_p is not 0"
        if self.causal:
            return "is_causal"
        short = _is_short(q, k)
        missing = missing_kernel(_autocast(q), short)
        return missing or (None if self.mask is None else _mask_reason(self.mask, q, k, right_padded))

    def run(self) -> tuple[str, Tensor]:
        """(operator, result) of a call without a reason against it."""
        q, k, v = (_autocast(x) for x in self.qkv)
        flat = q.ndim == 3
        q, k, v = (x.unsqueeze(2) if flat else x.transpose(1, 2) for x in (q, k, v))
        kv_len = None
        if self.mask is not None:
            counts = self.mask.reshape(-1, k.shape[1]).sum(-1, dtype=torch.int32)
            kv_len = counts.expand(q.shape[0]).contiguous()
        if _is_short(*self.qkv[:2]):
            name, out = "short_attention", short_attention(q, k, v, scale=self.scale, kv_len=kv_len)
        else:
            name, out = "attention", attention(q, k, v, scale=self.scale, kv_len=kv_len)  # type: ignore[assignment]
        return name, out.squeeze(2) if flat else out.transpose(1, 2)


def _is_short(q: Tensor, k: Tensor) -> bool:
    same_heads = q.ndim == 3 or q.shape[1] == k.shape[1]
    return same_heads and max(q.shape[-2], k.shape[-2]) <= MAX_SHORT_KEYS


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _mask_reason(mask: Tensor, q: Tensor, k: Tensor, right_padded: bool) -> str | None:
    """Why a mask is not one number of readable keys per batch item, or None when it is."""
    if mask.dtype != torch.bool:
        return f"attn_mask is {str(mask.dtype).removeprefix('torch.')}, not bool"
    batched = mask.ndim == q.ndim and mask.shape[0] in (1, q.shape[0])
    others = mask.shape[1:-1] if batched else mask.shape[:-1]
    if not 2 <= mask.ndim <= q.ndim or any(size != 1 for size in others) or mask.shape[-1] != k.shape[-2]:
        return "attn_mask differs between heads or queries"
    if right_padded:
        return None
    if mask.device.type != "cpu":
        return "attn_mask on a GPU: whether readable keys come first is not looked at (right_padded=True promises it)"
    if bool((mask[..., 1:] & ~mask[..., :-1]).any()):
        return "attn_mask hides keys before readable ones"
    return None
