"""``vdit_fast.stream``: what the user sees, what the model is between two chunks and after them, what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from rollouts import SIZE, chunks_of, clip_of, model_of
from torch import nn

import vdit_fast
from vdit_fast import accelerate, stream
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.models.base import ServedProcessor
from vdit_fast.planners import Window
from vdit_fast.regions import Regions
from vdit_fast.streaming import KVCache, SelfForcing, causal_frames, checks
from vdit_fast.subset import RAS

SETTINGS = SelfForcing(cache_frames=6, timesteps=(1000, 500))


def plain(model: nn.Module, rest: dict[str, Any], frames: int = 4) -> torch.Tensor:
    """An ordinary forward of a whole clip."""
    x = torch.randn(1, 4, frames, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(hidden_states=x, timestep=torch.tensor([400.0]), **rest, return_dict=False)[0]


def test_chunks_as_they_are_ready() -> None:
    model, rest = model_of("wan_t2v")
    seen: list[torch.Tensor] = []

    def decode(latents: torch.Tensor) -> str:
        seen.append(latents)
        return f"chunk {len(seen)}"

    handle = accelerate(model)
    chunks = chunks_of(handle, SETTINGS, rest, 8, decode=decode)
    counts = []
    for chunk in chunks:
        counts.append((chunk.index, chunk.first_frame, chunk.latents.shape[2], chunk.frames))
        assert chunk.latents is seen[-1] and chunk.latents.isfinite().all()
        streamed = handle.stats()["streaming"]
        # the pass that writes keys and values is left to the next chunk: what is shown first is ready first
        assert streamed["denoise"] == 2 * len(counts) and streamed["write"] == len(counts) - 1
    assert counts == [(0, 0, 3, "chunk 1"), (1, 3, 3, "chunk 2"), (2, 6, 2, "chunk 3")]
    held = KVCache.bytes(layers=2, capacity=6, page=16, batch=1, heads=2, head_dim=16, dtype=torch.float32)
    assert handle.stats()["streaming"] == {"frames": 8, "chunks": 3, "denoise": 6, "write": 2, "nbytes": held}
    assert "streaming: 8 frames in 3 chunks, 6 forwards" in handle.report()


def test_without_end_and_stopped_early() -> None:
    """The acceleration made for the stream goes with it; the model is the stock one again, bit by bit."""
    model, rest = model_of("wan_t2v")
    stock = plain(model, rest)
    processors = [block.attn1.processor for block in model.blocks]
    chunks = chunks_of(model, SETTINGS, rest, None)
    first = [chunk.latents for chunk in itertools.islice(chunks, 5)]
    assert isinstance(model.blocks[0].attn1.processor, ServedProcessor)
    chunks.close()
    assert [block.attn1.processor for block in model.blocks] == processors
    assert torch.equal(plain(model, rest), stock)
    whole = clip_of(model, SETTINGS, rest, 15)
    assert torch.equal(torch.cat(first, 2), whole) and torch.equal(plain(model, rest), stock)
    assert next(chunks, None) is None


def test_the_model_serves_others_between_two_chunks() -> None:
    """Whole clips, with their own positions and planners; another stream, which goes on beside this one."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model, Config(attention=Window(tile=(1, 2, 2), dense_steps=0, dense_layers=0, min_tokens=0)))
    want, clip = plain(model, rest), clip_of(handle, SETTINGS, rest, 12)
    other = clip_of(handle, replace(SETTINGS, store="pre_rope"), rest, 12, seed=8)
    got: list[list[torch.Tensor]] = [[], []]
    for pair in zip(
        chunks_of(handle, SETTINGS, rest, 12),
        chunks_of(handle, replace(SETTINGS, store="pre_rope"), rest, 12, seed=8),
        strict=True,
    ):
        for found, chunk in zip(got, pair, strict=True):
            found.append(chunk.latents)
            assert torch.equal(plain(model, rest), want)
    assert torch.equal(torch.cat(got[0], 2), clip) and torch.equal(torch.cat(got[1], 2), other)
    session = handle.roots[0].session
    assert not session.around_heads and session.before_rotation is None and session.positions is None
    held = "streaming: every frame that is held is read"
    for layer in handle.stats()["layers"]:
        clips = layer["calls"] - layer["unasked"][held]
        assert clips == 9 == layer["sparse_calls"] and not layer["dense"]
    lines = handle.report().splitlines()
    assert lines[lines.index("without asking window, which keys are read is given (calls):") + 1].endswith(held)
    assert "kept dense by the planner (calls):" not in lines


@pytest.mark.parametrize("first", [0, 1])
def test_two_streams_of_a_model_that_nobody_accelerated(first: int) -> None:
    """Whichever ends first leaves the acceleration to the other one, which takes it off."""
    model, rest = model_of("wan_t2v")
    want, stock = clip_of(model, SETTINGS, rest, 9, seed=8), plain(model, rest)
    streams = [chunks_of(model, SETTINGS, rest, 9, seed=8) for _ in range(2)]
    got = [[next(chunks).latents] for chunks in streams]
    streams[first].close()
    got[1 - first] += [chunk.latents for chunk in streams[1 - first]]
    assert torch.equal(torch.cat(got[1 - first], 2), want)
    assert torch.equal(plain(model, rest), stock)
    assert not isinstance(model.blocks[0].attn1.processor, ServedProcessor)


def test_what_is_handed_out_may_be_written_over() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    want = clip_of(handle, SETTINGS, rest, 9)
    got = []
    for chunk in chunks_of(handle, SETTINGS, rest, 9, decode=lambda latents: latents.clone()):
        got.append(chunk.frames)
        chunk.latents.zero_()
    assert torch.equal(torch.cat(got, 2), want)


def test_captures_and_streams_exclude_each_other() -> None:
    """The keys of a call are rows of the ring: a capture that begins between two chunks would take those of others."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    chunks = chunks_of(handle, SETTINGS, rest, 9)
    next(chunks)
    captured = handle.capture()
    with pytest.raises(RuntimeError, match="capture: CachedAttention stands around attention"):
        next(chunks)
    assert not captured.keys
    captured.stop()
    remove = causal_frames(handle)
    with pytest.raises(RuntimeError, match="capture: _CausalHeads stands around attention"):
        handle.capture()
    remove()
    handle.capture().stop()


def test_an_error_inside_a_forward_leaves_nothing_behind() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    want = plain(model, rest)
    frame = KVCache.bytes(layers=2, capacity=1, page=16, batch=1, heads=2, head_dim=16, dtype=torch.float32)
    short = (
        rf"max_bytes is {5 * frame:,}, but keys and values of 6 frames take {6 * frame:,} bytes.*; cache_frames=5 fits"
    )
    with pytest.raises(ValueError, match=short):
        next(chunks_of(handle, replace(SETTINGS, max_bytes=5 * frame), rest, 3))
    session = handle.roots[0].session
    assert not session.around_heads and session.before_rotation is None and session.positions is None
    assert torch.equal(plain(model, rest), want)


def test_text_keys_are_computed_once_for_all_chunks() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model, Config(text_kv=True))
    free = torch.randn(1, 9, 16)
    clip_of(handle, replace(SETTINGS, guidance=2.0), rest, 12, negative_prompt_embeds=free)
    text, layers = handle.stats()["text_kv"], 2
    assert text["computed"] == 2 * layers and not text["refused"]
    assert text["reused"] == 2 * layers * (4 * 3 - 1) - text["computed"]


def test_every_forward_is_a_named_step() -> None:
    """Chunks begin with more noise than the last one ended with, and are one generation all the same."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    seen = []

    def note(step: Any, place: Any, rows: Any) -> None:
        seen.append((step.frame_block, step.step, step.branch, step.num_steps, round(step.timestep)))

    with handle.hook("block_output", note, layers=0):
        clip_of(handle, replace(SETTINGS, guidance=2.0, shift=1), rest, 6, negative_prompt_embeds=torch.randn(1, 9, 16))
    steps = [(0, 2, 1000), (1, 2, 500)]
    want = [(block, step, branch, count, t) for block in (0, 1) for step, count, t in steps for branch in (0, 1)]
    want[4:4] = [(0, -1, branch, None, 0) for branch in (0, 1)]
    assert seen == want and handle.stats()["generations"] == 1


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_compiled_blocks(store: str) -> None:
    """Graphs of aot autograd: post_rope in one graph per block, pre_rope with a break before attention."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    settings = SelfForcing(cache_frames=6, timesteps=(1000,), store=store)
    want = clip_of(handle, settings, rest, 12)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=store == "post_rope", dynamic=False)
    got = clip_of(handle, settings, rest, 12)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    clip_of(handle, settings, rest, 12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted  # no graph per rollout


class Whole:
    """Stands where sequence parallelism does, and hands whole sequences on."""

    def __call__(self, call: Any, proceed: Any) -> Any:
        call.q, call.k, call.v = call.q.clone(), call.k.clone(), call.v.clone()
        return proceed()

    def fresh(self) -> Whole:
        return self


def test_inside_of_sequence_parallelism() -> None:
    """Keys come to the cache as attention would get them, and not by the fused pass."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    want = clip_of(handle, SETTINGS, rest, 12)
    handle.roots[0].session.around_heads["sequence"] = Whole()
    torch.testing.assert_close(clip_of(handle, SETTINGS, rest, 12), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="turns whole sequences"):
        next(chunks_of(handle, replace(SETTINGS, store="pre_rope"), rest, 3))


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_some_chunks_in_inference_mode(store: str) -> None:
    """What outlives a forward is no inference tensor."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model, Config(text_kv=True))
    settings = replace(SETTINGS, store=store)
    want = clip_of(handle, settings, rest, 15)
    chunks, got = chunks_of(handle, settings, rest, 15), []
    for number in range(5):
        with torch.inference_mode(number % 2 == 0):
            got.append(next(chunks).latents.clone())
    torch.testing.assert_close(torch.cat(got, 2), want, atol=1e-5, rtol=1e-5)


def test_a_removed_handle() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    chunks = chunks_of(handle, SETTINGS, rest, 9)
    next(chunks)
    handle.remove()
    with pytest.raises(RuntimeError, match="the acceleration was removed"):
        next(chunks)
    with pytest.raises(RuntimeError, match="this handle was removed"):
        next(chunks_of(handle, SETTINGS, rest, 9))


def test_a_layer_that_does_not_come_by_is_an_error() -> None:
    """Its past would be missing without a word."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    chunks = chunks_of(handle, SETTINGS, rest, 9)
    next(chunks)
    model.blocks[1].attn1.set_processor(model.blocks[1].attn1.processor.stock)
    with pytest.raises(RuntimeError, match=r"blocks.1.attn1 and 0 more layers did not run"):
        next(chunks)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (Config(cache=TaylorSeer()), "cache is set in the configuration"),
        (Config(subset=RAS()), "subset is set in the configuration"),
    ],
)
def test_configurations_that_exclude_it(config: Config, match: str) -> None:
    model, rest = model_of("wan_t2v")
    with pytest.raises(RuntimeError, match=match):
        next(chunks_of(accelerate(model, config), SETTINGS, rest, 3))


@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_memory_rows_are_read_beside_the_frames_held(store: str) -> None:
    """Every query reads them once: the first chunk is a clip of its own, as the model draws it with memory."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model).memory(torch.randn(5, 32))
    settings = replace(SETTINGS, store=store, timesteps=(1000,))
    clip = clip_of(handle, settings, rest, 6)
    x = torch.randn(1, 4, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        velocity = model(hidden_states=x, timestep=torch.tensor([1000.0]), **rest, return_dict=False)[0]
    torch.testing.assert_close(clip[:, :, :3], x - velocity, atol=1e-5, rtol=1e-5)
    handle.memory(None)
    assert not torch.allclose(clip_of(handle, settings, rest, 6), clip, atol=0.05)
    captured = handle.capture()
    with pytest.raises(RuntimeError, match="captured for another model"):
        next(chunks_of(handle, settings, rest, 3))
    captured.stop()
    next(chunks_of(handle, settings, rest, 3))


def test_positions_of_the_user() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model).positions(lambda step, geometry, tables: None)
    with pytest.raises(RuntimeError, match="exchanged by something else"):
        next(chunks_of(handle, SETTINGS, rest, 3))
    handle.positions(None).regions(Regions([(0, 0, 2, 2)] * 3, position_steps=0))
    with pytest.raises(RuntimeError, match="exchanged by something else"):
        next(chunks_of(handle, SETTINGS, rest, 3))
    handle.regions(None)
    next(chunks_of(handle, SETTINGS, rest, 3))


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("hunyuan_video", "text and video attend to each other"),
        ("cogvideox_5b", "text and video attend to each other"),
        ("mochi", "text and video attend to each other"),
        ("wan_vace", "must be cut into chunks too"),
        ("ltx_video", "tables of positions"),
        ("cosmos", "tables of positions"),
        ("svd", "one at a time"),
    ],
)
def test_models_that_cannot_be_streamed(family: str, match: str) -> None:
    import tiny

    name = next((known for known in sorted(tiny.BUILDERS) if known.startswith(family)), None)
    assert name is not None, sorted(tiny.BUILDERS)
    model, _ = tiny.build(name)
    with pytest.raises(NotImplementedError, match=match):
        next(stream(model, SETTINGS, prompt_embeds=torch.randn(1, 9, 16), latent_size=SIZE, frames=3))
    assert not any(isinstance(getattr(m, "processor", None), ServedProcessor) for m in model.modules())


def test_two_transformers() -> None:
    (high, rest), (low, _) = model_of("wan_t2v"), model_of("wan_t2v")
    pipe = type("Pipe", (), {})()
    pipe.components = {"transformer": high, "transformer_2": low}
    with pytest.raises(NotImplementedError, match="here are transformer, transformer_2"):
        next(chunks_of(pipe, SETTINGS, rest, 3))
    assert clip_of(low, SETTINGS, rest, 3).shape == (1, 4, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"frames": 0}, ValueError, "frames must be an integer of at least 1"),
        ({"frames": True}, ValueError, "frames must be an integer of at least 1"),
        ({"latent_size": (8, 7)}, ValueError, r"latent_size .* multiples of the patch \(2, 2\)"),
        ({"latent_size": (8,)}, ValueError, "latent_size must be"),
        ({"latent_size": 32}, ValueError, r"latent_size must be \(height, width\), two positive integers, got 32"),
        ({"latent_size": (8, 8.0)}, ValueError, r"two positive integers, got \(8, 8.0\)"),
        ({"latent_size": (4, 8, 8)}, ValueError, "two positive integers"),
        ({"latent_size": (8, 130)}, ValueError, "at most 64 of them"),
        ({"initial_latents": torch.randn(1, 4, 3, 8, 6)}, ValueError, r"must be \[1, 4, frames, 8, 8\]"),
        ({"initial_latents": torch.randn(1, 4, 0, 8, 8)}, ValueError, r"must be \[1, 4, frames, 8, 8\]"),
        ({"prompt_embeds": torch.randn(9, 16)}, ValueError, r"prompt_embeds must be \[batch, tokens, channels\]"),
        ({"prompt_embeds": "a cat"}, ValueError, "got str"),
        ({"prompt_embeds": torch.randn(1, 0, 16)}, ValueError, r"and not empty, got \[1, 0, 16\]"),
        ({"prompt_embeds": torch.randn(1, 9, 15)}, ValueError, r"prompt_embeds is \[1, 9, 15\].*text of 16 channels"),
        (
            {"settings": replace(SETTINGS, guidance=2.0), "negative_prompt_embeds": torch.randn(1, 3, 32)},
            ValueError,
            r"negative_prompt_embeds is \[1, 3, 32\], but WanTransformer3DModel takes text of 16 channels \(text_dim\)",
        ),
        (
            {"settings": replace(SETTINGS, guidance=2.0), "negative_prompt_embeds": torch.randn(3, 16)},
            ValueError,
            r"negative_prompt_embeds must be \[batch, tokens, channels\]",
        ),
        ({"initial_latents": [1.0]}, TypeError, "initial_latents must be a tensor or None, got list"),
        ({"settings": {"chunk_frames": 3}}, TypeError, "settings must be a SelfForcing"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model, rest = model_of("wan_t2v")
    given = {"prompt_embeds": rest["encoder_hidden_states"], "latent_size": SIZE, "frames": 3, "settings": SETTINGS}
    with pytest.raises(error, match=match):
        next(stream(model, **(given | options)))


def test_more_frames_than_there_are_positions() -> None:
    """Known before the first forward; the table has 64 frames."""
    model, rest = model_of("wan_t2v")
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *args: runs.append(1))
    image = torch.randn(1, 4, 2, *SIZE)
    for options, match in (
        ({"frames": 65}, "frames is 65, but the model's table has 64 positions.*use at most 64, or .*pre_rope"),
        ({"frames": 63, "initial_latents": image}, "frames is 63 behind 2 initial_latents, .*use at most 62, or"),
    ):
        with pytest.raises(ValueError, match=match):
            next(chunks_of(model, SETTINGS, rest, **options))
    assert not runs
    one = replace(SETTINGS, timesteps=(1000,), chunk_frames=4)
    assert clip_of(model, one, rest, 64).shape[2] == 64
    assert clip_of(model, replace(one, store="pre_rope"), rest, 68).shape[2] == 68


def test_a_cache_that_no_machine_holds() -> None:
    model, rest = model_of("wan_t2v")
    frame = KVCache.bytes(layers=2, capacity=1, page=16, batch=1, heads=2, head_dim=16, dtype=torch.float32)
    match = rf"cpu has [\d,]+ bytes of memory altogether, but keys and values of {10**9} frames take {10**9 * frame:,} "
    with pytest.raises(ValueError, match=match + r"bytes, .*; cache_frames=\d+ fits"):
        next(chunks_of(model, replace(SETTINGS, cache_frames=10**9), rest, 3))
    with pytest.raises(ValueError, match=r"altogether, but keys and values of .*; capacity=\d+ fits"):
        KVCache(layers=2, capacity=10**9, page=16, batch=1, heads=2, head_dim=16)


def test_guided_caches_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rest = model_of("wan_t2v")
    frame = KVCache.bytes(layers=2, capacity=1, page=16, batch=1, heads=2, head_dim=16, dtype=torch.float32)
    monkeypatch.setattr(checks, "_device_bytes", lambda device: 20 * frame)
    guided = replace(SETTINGS, guidance=2.0, cache_frames=11)
    free = torch.randn_like(rest["encoder_hidden_states"])
    with pytest.raises(ValueError, match=r"altogether for 2 branches of guidance, but .*; cache_frames=10 fits"):
        next(chunks_of(model, guided, rest, 3, negative_prompt_embeds=free))
    next(chunks_of(model, replace(guided, cache_frames=10), rest, 3, negative_prompt_embeds=free))


def test_a_model_that_is_causal_by_its_configuration() -> None:
    model, rest = model_of("skyreels_ar")
    for options, match in (
        ({"frames": 8}, "frames is 8"),
        ({"settings": replace(SETTINGS, chunk_frames=2)}, "chunk_fra"),
    ):
        settings = options.pop("settings", SETTINGS)
        with pytest.raises(ValueError, match=f"{match}.*num_frame_per_block"):
            clip_of(model, settings, rest, options.get("frames", 6))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"chunk_frames": 0}, "chunk_frames must be at least 1"),
        ({"chunk_frames": 5, "cache_frames": 4}, "a chunk of 5 and 0 sinks must fit"),
        ({"sinks": 19}, "a chunk of 3 and 19 sinks must fit"),
        ({"timesteps": ()}, "timesteps must be falling"),
        ({"timesteps": (500, 500)}, "timesteps must be falling"),
        ({"timesteps": (1000, 0)}, "timesteps must be falling"),
        ({"timesteps": (float("nan"),)}, "timesteps must be falling"),
        ({"shift": float("inf")}, "shift must be a finite number"),
        ({"context_noise": -1}, "context_noise must be"),
        ({"store": "both"}, "store is 'both'"),
        ({"prediction": "noise"}, "prediction is 'noise'"),
        ({"max_bytes": "much"}, "max_bytes is 'much'"),
    ],
)
def test_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SelfForcing(**settings)


def test_the_published_schedule() -> None:
    """Timesteps 1000, 750, 500, 250 of a schedule shifted by 5, and 32,760 tokens of 480p are 21 frames of 1,560."""
    settings = SelfForcing()
    assert settings.sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625)) and settings.cache_frames * 1560 == 32760
    assert vdit_fast.stream is stream
