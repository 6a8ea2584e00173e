"""text_kv: keys and values of cross-attention computed once per prompt, with the same bits, or not at all."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import diffusers
import pytest
import tiny
import torch
from families.skyreels_v2 import skyreels
from families.wan import animate, chronoedit, vace
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.models.text_kv import MAX_PROMPTS, TextKVProcessor

KINDS = {
    "chronoedit": chronoedit,
    "skyreels_i2v": lambda: skyreels(image=True),
    "wan_animate": animate,
    "wan_i2v": lambda: tiny.wan(image=True),
    "wan_t2v": tiny.wan,
    "wan_vace": vace,
}
LAYERS = 2
ON = Config(text_kv=True)
TIMES = (900.0, 600.0, 300.0)


def other(inputs: dict[str, Any], factor: float = -0.5) -> dict[str, Any]:
    return {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * factor}


def generate(model: nn.Module, *branches: dict[str, Any]) -> list[Tensor]:
    return [tiny.run(model, tiny.at(inputs, t)) for t in TIMES for inputs in branches]


def counts(handle: Handle) -> tuple[int, int]:
    text = handle.stats()["text_kv"]
    assert not text["refused"], text
    return text["computed"], text["reused"]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_and_computed_once_per_prompt(kind: str) -> None:
    model, inputs = KINDS[kind]()
    before, weights = tiny.processors(model), list(model.state_dict())
    branches = inputs, other(inputs)
    plain = accelerate(model)
    expected = generate(model, *branches)
    plain.remove()
    handle = accelerate(model, ON)
    calls = LAYERS * len(branches)
    for generation in (1, 2):
        assert same(generate(model, *branches), expected)
        assert counts(handle) == (generation * calls, generation * 2 * calls)
    stats = handle.stats()
    rows = 512 + (257 if "encoder_hidden_states_image" in inputs else 0)
    assert stats["text_kv"]["nbytes"] == len(branches) * LAYERS * 2 * rows * 32 * 4
    assert "text keys and values: 16 of 24 calls reused" in handle.report()
    assert list(model.state_dict()) == weights
    assert len(stats["layers"]) == LAYERS and "note:" not in handle.report(), "they are no layers of attention"
    handle.remove()
    after = tiny.processors(model)
    assert all(after[name] is before[name] for name in before) and not model._forward_hooks
    assert handle.stats()["text_kv"] is None


def test_bf16_and_fused_projections_keep_the_bits() -> None:
    model, inputs = tiny.wan(image=True)
    model, inputs = model.to(torch.bfloat16), tiny.cast(inputs, torch.bfloat16)
    for block in model.blocks:
        block.attn2.fuse_projections()
    plain = accelerate(model)
    expected = generate(model, inputs)
    plain.remove()
    handle = accelerate(model, ON)
    assert same(generate(model, inputs), expected)
    assert counts(handle) == (2, 4)
    assert handle.stats()["text_kv"]["nbytes"] == LAYERS * 2 * (512 + 257) * 32 * 2, "no hidden fused buffer is held"
    model.blocks[0].attn2.unfuse_projections()  # another projection: computed anew
    tiny.run(model, tiny.at(inputs, 200))
    assert counts(handle) == (3, 5)


def test_a_prompt_changed_in_place_is_computed_anew() -> None:
    for name in ("encoder_hidden_states", "encoder_hidden_states_image"):
        model, inputs = tiny.wan(image=True)
        handle = accelerate(model, ON)
        generate(model, inputs)
        inputs[name].mul_(-0.5)
        got = tiny.run(model, tiny.at(inputs, 200))
        assert counts(handle) == (4, 4)
        handle.remove()
        accelerate(model)
        assert torch.equal(got, tiny.run(model, tiny.at(inputs, 200)))


def test_another_tensor_at_the_same_address_is_another_prompt() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, ON)
    memory = torch.randn(1, 512, 16)
    for step, t in enumerate(TIMES):
        text = torch.from_numpy(memory.numpy())  # the same memory and version 0, but each step a tensor of its own
        memory.mul_(-0.5)  # of which the other tensor knows nothing
        tiny.run(model, tiny.at({**inputs, "encoder_hidden_states": text}, t))
        del text
        assert counts(handle) == (2 * (step + 1), 0)
    assert handle.stats()["text_kv"]["nbytes"] <= 2 * LAYERS * 512 * 32 * 4, "of dead prompts nothing is held"


def test_views_of_a_living_tensor_are_recognised() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, ON)
    both = torch.cat((inputs["encoder_hidden_states"], inputs["encoder_hidden_states"] * 0.5))
    for t in TIMES:
        for row in range(2):
            tiny.run(model, tiny.at({**inputs, "encoder_hidden_states": both[row : row + 1]}, t))
    assert counts(handle) == (4, 8)


def test_batched_guidance() -> None:
    model, inputs = tiny.wan(batch=2)
    plain = accelerate(model)
    expected = generate(model, inputs)
    plain.remove()
    handle = accelerate(model, ON)
    assert same(generate(model, inputs), expected) and counts(handle) == (2, 4)


def test_more_prompts_than_are_held() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, ON)
    prompts = [other(inputs, 1 + number) for number in range(MAX_PROMPTS + 1)]
    for prompt in prompts:
        tiny.run(model, prompt)
    assert handle.stats()["text_kv"]["nbytes"] == MAX_PROMPTS * LAYERS * 2 * 512 * 32 * 4
    tiny.run(model, prompts[1])
    assert counts(handle) == (2 * len(prompts), 2)
    tiny.run(model, prompts[0])
    assert counts(handle) == (2 * len(prompts) + 2, 2)


def test_cleared_at_a_new_generation_and_by_reset() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, ON)
    generate(model, inputs)
    tiny.run(model, tiny.at(inputs, 900))  # higher than the last one: a new generation
    assert counts(handle) == (4, 4)
    handle.reset()
    tiny.run(model, tiny.at(inputs, 800))
    assert counts(handle) == (6, 4)


def _weight(model: Any) -> None:
    model.blocks[1].attn2.to_k.weight.mul_(1.1)


def _embedder(model: Any) -> None:
    model.condition_embedder.text_embedder.linear_1.weight.mul_(1.1)


def _replaced(model: Any) -> None:
    model.blocks[0].attn2.norm_k.weight = nn.Parameter(model.blocks[0].attn2.norm_k.weight * 2, requires_grad=False)


def _same_place(model: Any) -> None:
    model.blocks[0].attn2.to_v.weight = nn.Parameter(model.blocks[0].attn2.to_v.weight.data, requires_grad=False)


def _loaded(model: Any) -> None:
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})


@pytest.mark.parametrize(
    ("change", "anew"), [(_weight, 1), (_embedder, 2), (_replaced, 1), (_same_place, 1), (_loaded, 2)]
)
def test_changed_weights_are_noticed(change: Any, anew: int) -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, ON)
    generate(model, inputs)
    with torch.no_grad():
        change(model)
    got = tiny.run(model, tiny.at(inputs, 200))
    assert counts(handle) == (2 + anew, 4 + 2 - anew)
    handle.remove()
    accelerate(model)
    assert torch.equal(got, tiny.run(model, tiny.at(inputs, 200)))


def test_lora_switched_between_steps() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.wan()
    for name in ("one", "two"):
        lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False)
        model.add_adapter(lora, adapter_name=name)
    model.eval()
    changes: list[Any] = [
        lambda: model.set_adapter("one"),
        lambda: model.set_adapter("two"),
        lambda: model.disable_adapters(),
        lambda: model.enable_adapters(),
        lambda: model.set_adapters(["one", "two"], [0.5, 0.25]),
        lambda: model.fuse_lora(),
        lambda: model.delete_adapters("one"),
    ]
    handle = accelerate(model, ON)
    twin = copy.deepcopy(model)
    accelerate(twin, ON).reconfigure("exact")
    seen: list[Tensor] = []
    for step, change in enumerate(changes):
        change()
        got = [tiny.run(model, tiny.at(inputs, 900 - 10 * step)) for _ in range(2)]
        assert counts(handle) == (2 * (step + 1), 2 * (step + 1)), step
        model_, model = model, twin
        change()
        want = tiny.run(model, tiny.at(inputs, 900 - 10 * step))
        model = model_
        assert torch.equal(got[0], want) and torch.equal(got[1], want), step
        seen.append(want)
    assert not torch.equal(seen[0], seen[1])


def test_lora_scale_of_one_call() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.wan()
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_k"], init_lora_weights=False))
    model.eval()
    stock = tiny.run(copy.deepcopy(model), {**inputs, "attention_kwargs": {"scale": 0.25}})
    handle = accelerate(model, ON)
    tiny.run(model, inputs)
    got = tiny.run(model, {**inputs, "attention_kwargs": {"scale": 0.25}})
    assert counts(handle) == (4, 0) and tiny.relative(got, stock) < 2e-6


@pytest.mark.parametrize("how", ["offload", "casting", "training", "autocast", "grad", "inference"])
def test_refused_with_a_reason(how: str) -> None:
    model, inputs = tiny.wan()
    reason = {"offload": "hooks", "casting": "hooks", "inference": "version counter", "autocast": "autocast"}
    dtype = torch.float32
    if how == "casting":
        dtype = torch.bfloat16
        model.to(dtype).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if how == "inference":
        with torch.inference_mode():
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] * 1
    handle = accelerate(model, ON)
    if how == "offload":
        pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "training":
        model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for t in TIMES:
            if how == "grad":
                model(**tiny.at(inputs, t))
            else:
                tiny.run(model, tiny.cast(tiny.at(inputs, t), dtype))
    text = handle.stats()["text_kv"]
    assert (text["computed"], text["reused"], text["nbytes"]) == (0, 0, 0)
    ((said, number),) = text["refused"].items()
    assert reason.get(how, "training") in said and number == LAYERS * len(TIMES)
    assert f"{number} x {said}" in handle.report()


def test_gradients_are_the_stock_ones() -> None:
    model, inputs = tiny.wan()
    model.requires_grad_(True).train()
    stock = tiny.gradients(model, [inputs])
    accelerate(model, ON)
    tiny.same_gradients(tiny.gradients(model, [inputs]), stock)


def test_calls_from_outside_of_a_forward_are_computed() -> None:
    model, inputs = tiny.wan()
    handle = accelerate(model, ON)
    tiny.run(model, inputs)
    hidden, text = torch.randn(1, 48, 32), torch.randn(1, 512, 32)
    attn = model.blocks[0].attn2
    with torch.no_grad():
        assert torch.equal(attn(hidden, text), attn.processor.stock(attn, hidden, text))
    assert list(handle.stats()["text_kv"]["refused"]) == ["called outside a forward of its transformer"]


def test_blocks_with_text_of_their_own_are_computed() -> None:
    model, inputs = tiny.wan()
    plain = accelerate(model)
    shift = model.blocks[1].register_forward_pre_hook(lambda block, args: (args[0], args[1] + 1, *args[2:]))
    expected = generate(model, inputs)
    plain.remove()
    handle = accelerate(model, ON)
    assert same(generate(model, inputs), expected)
    text = handle.stats()["text_kv"]
    assert (text["computed"], text["reused"]) == (1, 2)
    assert text["refused"] == {"the blocks of one forward get different text": 3}
    shift.remove()


def test_an_interrupted_first_call_leaves_nothing_half_known() -> None:
    model, inputs = tiny.wan()
    plain = accelerate(model)
    expected = tiny.run(model, inputs)
    plain.remove()
    handle = accelerate(model, ON)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    stop = model.blocks[0].attn2.to_out[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(model, inputs)
    stop.remove()
    assert torch.equal(tiny.run(model, inputs), expected) and handle.stats()["text_kv"]["reused"] == 0


def test_two_pipelines_and_both_experts_keep_their_own() -> None:
    first, inputs = tiny.wan()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.blocks[0].attn2.to_k.weight.mul_(-1)
    handles = [accelerate(first), accelerate(second)]
    expected = [tiny.run(model, tiny.at(inputs, t)) for t in TIMES for model in (first, second)]
    for handle in handles:
        handle.remove()
    handles = [accelerate(first, ON), accelerate(second, ON)]
    got = [tiny.run(model, tiny.at(inputs, t)) for t in TIMES for model in (first, second)]
    assert same(got, expected) and [counts(handle) for handle in handles] == [(2, 4), (2, 4)]


def test_copies_pickles_and_reconfigure() -> None:
    model, inputs = tiny.wan()
    stock_types = {name: type(value) for name, value in tiny.processors(model).items()}
    handle = accelerate(model, ON)
    expected = generate(model, inputs)
    twin = copy.deepcopy(model)
    other_handle = accelerate(twin, ON)
    assert other_handle is not handle and same(generate(twin, inputs), expected)
    assert counts(other_handle) == (2, 4) and counts(handle) == (2, 4)
    loaded = pickle.loads(pickle.dumps(model))
    assert {name: type(value) for name, value in tiny.processors(loaded).items()} == stock_types
    tiny.run(loaded, inputs)
    handle.reconfigure("exact")
    assert not any(isinstance(value, TextKVProcessor) for value in tiny.served(model).values())
    assert handle.stats()["text_kv"] is None and same(generate(model, inputs), expected)
    handle.reconfigure(ON)
    assert same(generate(model, inputs), expected) and counts(handle) == (2, 4)
    gone = weakref.ref(twin)
    other_handle.remove()
    del twin
    gc.collect()
    assert gone() is None


def test_compiled_blocks_compute_them_in_one_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = tiny.wan(layers=10)
    handle = accelerate(model, ON)
    eager = generate(model, inputs)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for got, want in zip(generate(model, other(inputs, 1.0)), eager, strict=True):
        assert tiny.relative(got, want) < 1e-5
    first = diffusers.__version__.startswith("0.35.")  # whose first block gets a transposed view
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + first
    assert counts(handle) == (10, 20)
    torch._dynamo.reset()


def test_families_without_such_keys_say_so() -> None:
    model, inputs = tiny.hunyuan()
    handle = accelerate(model, ON)
    tiny.run(model, inputs)
    assert handle.stats()["text_kv"] is None and "note: 2 layers: text_kv: no cross-attention" in handle.report()
    with pytest.raises(TypeError, match="text_kv must be true or false"):
        Config(text_kv=1)  # type: ignore[arg-type]
