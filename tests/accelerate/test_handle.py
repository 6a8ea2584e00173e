"""The handle: reports, numbers, reuse, errors, lifetime, copies."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import Band
from torch import nn

from vdit_fast.accelerate import NothingServed, accelerate
from vdit_fast.config import Config
from vdit_fast.models import kernels


def test_same_configuration_returns_the_same_handle() -> None:
    model, _ = tiny.wan()
    handle = accelerate(model)
    assert accelerate(model) is handle and accelerate(model, Config()) is handle
    with pytest.raises(RuntimeError, match=r"already accelerated.*reconfigure"):
        accelerate(model, Config(attention=Band()))
    assert handle.reconfigure({"attention": {"method": "test_band"}}) is handle
    assert accelerate(model, Config(attention=Band())) is handle
    handle.remove()
    assert accelerate(model) is not handle


def test_reconfigure_changes_what_runs() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    tiny.run(model, inputs)
    handle.reconfigure(Config(attention=Band(width=2)))
    assert tiny.relative(tiny.run(model, inputs), stock) > 1e-3
    assert handle.stats()["layers"][0]["sparse_calls"] == 1
    handle.reconfigure("exact")
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    layer = handle.stats()["layers"][0]
    assert (layer["calls"], layer["sparse_calls"], layer["mean_density"]) == (1, 0, 1.0)  # not a mix of the two
    handle.remove()
    with pytest.raises(RuntimeError, match="handle was removed"):
        handle.reconfigure("exact")


def test_parts_and_wholes_do_not_mix() -> None:
    first, second = tiny.wan()[0], tiny.wan()[0]
    handle = accelerate(first)
    pair = SimpleNamespace(transformer=first, transformer_2=second)
    with pytest.raises(RuntimeError, match="accelerated separately"):
        accelerate(pair)
    handle.remove()
    handle = accelerate(pair)
    assert accelerate(first) is handle and accelerate(second) is handle and accelerate(pair) is handle
    assert accelerate(first.blocks[0]) is handle
    assert set(map(id, handle.modules)) == {id(first), id(second)}


def test_context_manager_removes_also_after_an_error() -> None:
    model, _ = tiny.wan()
    before = tiny.processors(model)
    with pytest.raises(ZeroDivisionError), accelerate(model) as handle:
        assert handle.active and tiny.served(model)
        raise ZeroDivisionError
    assert not handle.active and all(tiny.processors(model)[name] is before[name] for name in before)


def test_nothing_to_serve_is_an_error_that_lists_what_was_found() -> None:
    from diffusers import HunyuanVideoTransformer3DModel

    model: Any = tiny.hunyuan()[0]
    assert isinstance(model, HunyuanVideoTransformer3DModel)
    with pytest.raises(RuntimeError, match=r"1 x AttnProcessor2_0.*Known families: .*wan"):
        accelerate(model.context_embedder)
    with pytest.raises(RuntimeError, match="no attention modules with a processor"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="int"):
        accelerate(3)
    assert not any(hasattr(module, "_vdit_fast_root") for module in model.modules())


def test_the_error_of_nothing_to_serve_can_be_read_by_programs() -> None:
    model: Any = tiny.hunyuan()[0]
    refiner = model.context_embedder
    pipe = SimpleNamespace(refiner=refiner, vae=nn.Linear(2, 2))
    with pytest.raises(NothingServed) as caught:
        accelerate(pipe)
    error = caught.value
    assert error.components == {"refiner": type(refiner).__name__, "vae": "Linear"}
    (found,) = error.skipped
    assert found.name == "refiner.token_refiner.refiner_blocks.0.attn" and found.processor == "AttnProcessor2_0"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.components, again.skipped) == (str(error), error.components, error.skipped)


class ThirdParty:
    """Somebody else's processor."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class WanAttnProcessor:
    """The right name with another signature."""

    def __call__(self, attn: Any, hidden_states: Any, something_else: Any = None) -> Any:
        return hidden_states


class HunyuanVideoAttnProcessor2_0(nn.Module):
    """The right name, but with trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_foreign_processors_are_left_alone_and_reported() -> None:
    model, _ = tiny.wan(layers=3)
    attention = [block.attn1 for block in model.blocks]
    foreign, odd = ThirdParty(attention[0].processor), WanAttnProcessor()
    attention[0].set_processor(foreign)
    attention[1].set_processor(odd)
    handle = accelerate(model)
    assert attention[0].processor is foreign and attention[1].processor is odd
    skipped = handle.stats()["skipped"]
    assert skipped["processor ThirdParty is not of a known family"] == ["blocks.0.attn1"]
    (odd_reason,) = [reason for reason in skipped if "something_else" in reason]
    assert skipped[odd_reason] == ["blocks.1.attn1"] and odd_reason in handle.report()
    assert [layer["name"] for layer in handle.stats()["layers"]] == ["blocks.2.attn1"]


def test_processors_with_weights_are_left_alone() -> None:
    model, _ = tiny.hunyuan()
    trained = HunyuanVideoAttnProcessor2_0()
    model.transformer_blocks[0].attn.set_processor(trained)
    handle = accelerate(model)
    assert model.transformer_blocks[0].attn.processor is trained
    assert "the processor holds trained weights of its own" in handle.stats()["skipped"]


def test_sparse_planner_sees_the_right_place(family: str) -> None:
    if family in tiny.WITHOUT_GRID:
        pytest.skip("factorised attention has no video grid: test_factorised.py checks that nothing is planned")
    if family in tiny.LINEAR:
        pytest.skip("linear attention has no softmax: test_sana.py checks that nothing is planned")
    model, inputs = tiny.build(family)
    handle = accelerate(model, Config(attention=Band(dense_steps=1, dense_layers=(-1,))))
    stock_like = []
    for t in (900, 600, 300):
        for _ in range(2):
            stock_like.append(tiny.run(model, tiny.at(inputs, t)))
    root = handle.roots[0]
    assert root.session.state["seen"] == [(0, step, branch, "transformer") for step in (1, 2) for branch in (0, 1)]
    stats = handle.stats()
    first, *others = stats["layers"]
    assert first["calls"] == 6 and first["sparse_calls"] == 4 and first["dense"] == {"step 0 < dense_steps 1": 2}
    for other in others:  # dense by configuration, or because no planner may see it
        assert other["sparse_calls"] == 0 and sum(other["dense"].values()) == 6 and other["density"] == [1.0] * 3
    assert first["density"][0] == 1.0 and 0 < first["density"][1] <= first["density"][2] < 1.0
    assert others and stats["steps"] == 3 and stats["forwards"] == 6
    assert json.loads(json.dumps(stats)) == stats
    report = handle.report()
    assert "test_band" in report and "step 0 < dense_steps 1" in report and "fallback" not in report
    tiny.run(model, tiny.at(inputs, 900))
    assert "seen" not in root.session.state  # a new generation starts with an empty state


def test_sparse_attention_equals_the_masked_formula() -> None:
    from vdit_fast import reference
    from vdit_fast.models import heads

    model, inputs = tiny.hunyuan()
    accelerate(model, Config(attention=Band(width=4)))
    got = tiny.run(model, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "attention", reference.attention)
        assert tiny.relative(got, tiny.run(model, tiny.at(inputs, 501))) > 0
        accelerate(model, Config(attention=Band(width=4))).reset()
        assert tiny.relative(got, tiny.run(model, inputs)) < 1e-5


def test_unknown_geometry_runs_dense_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model, Config(attention=Band(width=1)))
    with caplog.at_level(logging.WARNING, logger="vdit_fast"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(handle.roots[0].adapter), "geometry", lambda *_: None)
        for _ in range(3):
            assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    said = [record.message for record in caplog.records if "no known video grid" in record.message]
    assert len(said) == 1
    (reason,) = handle.stats()["layers"][0]["fallbacks"]
    assert handle.stats()["layers"][0]["fallbacks"][reason] == 3 and reason in handle.report()


def test_a_lone_block_is_served_without_a_place() -> None:
    model, inputs = tiny.wan()
    calls: list[tuple[Any, ...]] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: calls.append(args))
    tiny.run(model, inputs)
    block, args = model.blocks[1], calls[0]
    with torch.no_grad():
        stock = block(*args)
        handle = accelerate(block)
        assert tiny.relative(block(*args), stock) < 1e-5
        handle.reconfigure(Config(attention=Band(width=1)))
        assert tiny.relative(block(*args), stock) < 1e-5
    assert "called outside a forward" in handle.report()


def test_device_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model, Config(fuse="off"))
    reason = "device 'cpu' has no attention kernel in this build"
    from vdit_fast.models import session

    monkeypatch.setattr(session, "missing_kernel", lambda q: reason)
    assert torch.equal(tiny.run(model, inputs), stock)
    assert handle.stats()["layers"][0]["fallbacks"] == {reason: 1}
    handle.remove()
    monkeypatch.setitem(accelerate.__globals__, "missing_device_kernel", lambda kind: reason)
    with pytest.raises(RuntimeError, match=f"no attention module can be served.*{reason}"):
        accelerate(model)
    with pytest.raises(RuntimeError, match=f"cannot be served: {reason}"):
        accelerate(model, {"on_unsupported": "error"})
    assert not tiny.served(model)


def test_missing_kernels_are_named() -> None:
    assert kernels.missing_kernel(torch.empty(1, 2, 1, 8)) is None
    assert "float64" in str(kernels.missing_kernel(torch.empty(1, 2, 1, 8, dtype=torch.float64)))
    assert "257" in str(kernels.missing_kernel(torch.empty(1, 2, 1, 257)))
    assert kernels.cuda_limit(torch.bfloat16, 40) is None
    assert "bfloat16" in str(kernels.cuda_limit(torch.float32, 64))
    assert "multiple of 8" in str(kernels.cuda_limit(torch.float16, 20))
    assert "'mps'" in str(kernels.missing_device_kernel("mps"))


def test_a_dropped_model_is_freed() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    tiny.run(model, inputs)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and handle.modules == []
    handle.report()
    handle.remove()


def test_a_dropped_handle_keeps_working() -> None:
    model, inputs = tiny.wan()
    accelerate(model, Config(attention=Band(width=2)))
    gc.collect()
    tiny.run(model, inputs)
    assert accelerate(model, Config(attention=Band(width=2))).stats()["layers"][0]["sparse_calls"] == 1


def test_a_deep_copy_works_on_its_own(family: str) -> None:
    model, inputs = tiny.build(family)
    before, stock = tiny.processors(model), tiny.run(model, inputs)
    config = Config(attention=Band(width=2))
    handle = accelerate(model, config)
    sparse = tiny.run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.run(twin, inputs), sparse)
    other = accelerate(twin, config)
    assert other is not handle and other.modules == [twin] and handle.modules == [model]
    assert other.stats()["forwards"] == 1 and handle.stats()["forwards"] == 1
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock) and torch.equal(tiny.run(twin, inputs), sparse)
    other.remove()
    assert torch.equal(tiny.run(twin, inputs), stock)
    assert all(type(value) is type(before[name]) for name, value in tiny.processors(twin).items())


def test_copies_of_parts_and_pickles_are_stock() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    accelerate(model)
    block = copy.deepcopy(model.blocks[0])
    assert not tiny.served(block) and type(block.attn1.processor).__name__ == "WanAttnProcessor"
    loaded = pickle.loads(pickle.dumps(model))
    assert not tiny.served(loaded) and torch.equal(tiny.run(loaded, inputs), stock)
    accelerate(loaded).remove()


def test_a_processor_set_again_after_remove_is_the_stock_one() -> None:
    model, inputs = tiny.wan()
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    mine = model.blocks[0].attn1.processor
    handle.remove()
    model.blocks[0].attn1.set_processor(mine)  # what diffusers' unfuse functions may do
    assert torch.equal(tiny.run(model, inputs), stock)


def test_a_replaced_processor_is_reported_and_kept() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model)
    foreign = ThirdParty(model.blocks[0].attn1.processor.stock)
    model.blocks[0].attn1.set_processor(foreign)
    tiny.run(model, inputs)
    assert "1 layers: the processor was replaced" in handle.report()
    handle.remove()
    assert model.blocks[0].attn1.processor is foreign


def test_settings_made_while_accelerated_survive() -> None:
    model, inputs = tiny.wan()
    stock = model.blocks[0].attn1.processor
    reference = tiny.run(model, inputs)
    handle = accelerate(model)
    mine = model.blocks[0].attn1.processor
    assert hasattr(type(mine), "_attention_backend") and hasattr(type(mine), "_parallel_config")
    if hasattr(model, "set_attention_backend"):
        model.set_attention_backend("native")
        assert stock._attention_backend is not None
        assert "an attention backend is set" in handle.report()
    mine._parallel_config = "something"
    assert stock._parallel_config == "something" and mine.stands_aside()
    assert "context parallelism is enabled" in handle.report()
    mine._parallel_config = None
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), reference)
