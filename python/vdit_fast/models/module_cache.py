"""Granularity "module": the outputs of a block's sub-modules before their gates, which a forecast step adds again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vdit_fast.caching import budget
from vdit_fast.caching.engine import FeatureCache, Run
from vdit_fast.caching.features import Features
from vdit_fast.models.block_modules import BlockModules, Forecast
from vdit_fast.reference.adaln import Rounding

if TYPE_CHECKING:
    from vdit_fast.models.blocks import BlockCall
    from vdit_fast.models.session import Session

__all__ = ["ModuleFeatures", "attach", "detach", "unknown_block"]


class ModuleFeatures(Features):
    """The outputs of the sub-modules of every block.

    Args:
        known: block class -> what is known of it.
        parts: of every block, in order.
    """

    def __init__(
        self,
        cache: FeatureCache,
        known: Mapping[str, BlockModules],
        parts: Sequence[Mapping[str, tuple[int, ...]]],
        rounding: Rounding,
    ) -> None:
        super().__init__(cache)
        self.known, self.parts, self.rounding = known, parts, rounding
        self.outputs: dict[str, list[Any]] | None = None
        """Of the block that runs now, None outside of one."""

    def of(self, cache: FeatureCache) -> ModuleFeatures:
        return ModuleFeatures(cache, self.known, self.parts, self.rounding)

    def missing(self, run: Run) -> str | None:
        return None if run.stream.factors else "nothing to forecast from yet"

    def compute(self, run: Run, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        inputs, index = call.inputs, call.block.index
        self._afford_modules(run, call)
        self.outputs = {}
        try:
            output = proceed()
        finally:
            outputs, self.outputs = self.outputs, None
        block = self.known[type(call.module).__name__]
        try:
            features = block.features(call.module, outputs)
        except (KeyError, IndexError) as error:
            raise RuntimeError(
                f"{call.block.name} ran without its {error.args[0]!r}, which the cache keeps, being seen; call "
                "torch.compiler.reset() where the block was compiled before, or set granularity to 'block'"
            ) from error
        x = inputs[0]
        assert x is not None
        for name, streams in self.parts[index].items():
            tokens = sum(part.shape[1] for stream in streams if (part := inputs[stream]) is not None)
            if features[name].shape[1] != tokens:
                raise RuntimeError(
                    f"{name} of {call.block.name} ran for {features[name].shape[1]} tokens of {tokens}: the cache "
                    "cannot keep modules that run for some of their rows only; set granularity to 'block'"
                )
            self.cache.factors(run, (index, name), features[name], x.dtype).update(run.step, features[name])
        return output

    def forecast(self, run: Run, call: BlockCall) -> Any | None:
        index, stored = call.block.index, run.stream.factors
        factors = {name: stored[index, name] for name in self.parts[index] if (index, name) in stored}
        if len(factors) < len(self.parts[index]) or not all(item.known for item in factors.values()):
            return None
        weights = self.cache.weights(run, next(iter(factors.values())))
        block = self.known[type(call.module).__name__]
        found = Forecast(factors, weights, self.rounding, self.cache.forward)
        return block.forecast(call.module, call.arguments, found)

    def _afford_modules(self, run: Run, call: BlockCall) -> None:
        first, end = run.span

        def size(streams: Iterable[int], times: int = 1) -> budget.Size:
            return budget.size_of((x for stream in streams if (x := call.inputs[stream]) is not None), times)

        kept = [stream for parts in self.parts[first:end] for streams in parts.values() for stream in streams]
        changed = {stream for parts in self.parts for streams in parts.values() for stream in streams}
        x = call.inputs[0]
        assert x is not None
        sizes = {"module": size(kept), "block": size(changed, end - first), "span": size(changed)}
        self.cache.afford(run, sizes, x.dtype, len(x))


class _Capture:
    """Forward hook of a sub-module: hands its output to the cache while its block is computed."""

    def __init__(self, session: Session | None, name: str, root: Any) -> None:
        self.session, self.name = session, name
        self._root = root  # weak reference to the transformer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        features = self.session.cache.features if self.session is not None else None
        if isinstance(features, ModuleFeatures) and features.outputs is not None:
            features.outputs.setdefault(self.name, []).append(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Capture:
        root = self._root() if self._root is not None else None
        if root is None or id(root) not in memo:  # a part is copied
            return _Capture(None, self.name, None)
        return _Capture(copy.deepcopy(self.session, memo), self.name, weakref.ref(memo[id(root)]))

    def __reduce__(self) -> Any:
        return _Capture, (None, self.name, None)  # a pickled model is the stock one


def unknown_block(blocks: Sequence[nn.Module], known: Mapping[str, BlockModules]) -> str | None:
    """The class of a block that nobody has described, None where all are."""
    return next((type(block).__name__ for block in blocks if type(block).__name__ not in known), None)


def _submodules(blocks: Sequence[nn.Module], known: Mapping[str, BlockModules]) -> Iterator[tuple[str, nn.Module]]:
    for block in blocks:
        for name in known[type(block).__name__].hooked:
            module: Any = block
            for part in name.split("."):
                module = getattr(module, part, None)
            if isinstance(module, nn.Module):
                yield name, module


def attach(root: nn.Module, blocks: Sequence[nn.Module], known: Mapping[str, BlockModules], session: Session) -> int:
    """Hook the sub-modules of all blocks; returns their number."""
    detach(blocks, known, session)
    count = 0
    for name, module in _submodules(blocks, known):
        module.register_forward_hook(_Capture(session, name, weakref.ref(root)))
        count += 1
    return count


def detach(blocks: Sequence[nn.Module], known: Mapping[str, BlockModules], session: Session) -> None:
    """Take this session's hooks off."""
    for _, module in _submodules([block for block in blocks if type(block).__name__ in known], known):
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Capture) and hook.session is session:
                module._forward_hooks.pop(key)
