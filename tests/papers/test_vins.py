"""VINs: Generating, Fast and Slow: Scalable Parallel Video Generation with Video Interface Networks
(arXiv 2503.17539).

512 interface tokens Z of the whole noisy clip; the DiT runs over chunks side by side, each of which reads its own
tokens and Z; where chunks overlap they are fused in early steps (check V1, and M1c of segments).
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.planners import SVG2
from vdit_fast.segments import Chunks, InterfaceTokens, denoise_chunks, fusion_weights

pytest.importorskip("diffusers")

TIMES = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
CHUNKS = Chunks(frames=12, length=4, overlap=2)  # five chunks
Z = 19


# ---------------------------------------------------------------------- one segment for all chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [512, Z])
def test_a_segment_of_stride_0_is_a_copied_one(tokens: int, dtype: torch.dtype) -> None:
    """Z of [1, tokens], expanded over the chunks without a copy, or copied: the same bits, out and LSE."""
    q, k, v = (x.to(dtype) for x in torch.randn(3, 5, 48, 2, 16).unbind(0))
    z = tuple(torch.randn(1, tokens, 2, 16).to(dtype) for _ in range(2))
    plan = vdit_fast.AttentionPlan.from_block_mask(torch.rand(5, 2, 3, 3) < 0.6, 16, 16)
    for use in (None, plan):
        forms = [z, tuple(x.expand(5, -1, -1, -1) for x in z), tuple(x.repeat(5, 1, 1, 1) for x in z)]
        assert forms[1][0].stride(0) == 0 and forms[2][0].stride(0) > 0
        found = [vdit_fast.attention(q, k, v, use, segments=[form], return_lse=True) for form in forms]
        for out, lse in found[1:]:
            assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


def test_gradients_of_a_shared_segment_are_summed_over_the_chunks() -> None:
    q, k, v = torch.randn(3, 3, 20, 2, 16).unbind(0)
    shared = [torch.randn(1, Z, 2, 16, requires_grad=True) for _ in range(2)]
    dout = torch.randn(3, 20, 2, 16)
    got = torch.autograd.grad(vdit_fast.attention(q, k, v, segments=[tuple(shared)]), shared, dout)
    copies = [x.detach().repeat(3, 1, 1, 1).requires_grad_() for x in shared]
    want = torch.autograd.grad(vdit_fast.attention(q, k, v, segments=[tuple(copies)]), copies, dout)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.sum(0, keepdim=True))


def test_masked_interface_tokens_are_a_plain_chunk() -> None:
    """M1c; and at the model: without Z the chunks of a batch are what each of them is alone."""
    q, k, v = torch.randn(3, 3, 48, 2, 16).unbind(0)
    z = torch.randn(2, 3, Z, 2, 16).unbind(0)
    joined = (torch.cat(pair, dim=1) for pair in zip((k, v), z, strict=True))
    masked = vdit_fast.attention(q, *joined, kv_len=torch.full((3,), 48))
    torch.testing.assert_close(masked, vdit_fast.attention(q, k, v))

    model, inputs = tiny.wan()
    handle = accelerate(model)
    x = torch.randn(1, 4, 12, 8, 8)
    parts = CHUNKS.cut(x)
    call = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].expand(5, -1, -1)}
    handle.memory(torch.randn(Z, 32))
    call |= {"hidden_states": parts, "timestep": TIMES[:1].expand(5)}
    joint = tiny.run(model, call)
    handle.memory(None)
    plain = tiny.run(model, call)
    for i, start in enumerate(CHUNKS.starts):
        alone = tiny.run(model, {**inputs, "hidden_states": x[:, :, start : start + 4], "timestep": TIMES[:1]})
        assert tiny.relative(plain[i : i + 1], alone) < 1e-5
        assert tiny.relative(joint[i : i + 1], alone) > 1e-3


# ---------------------------------------------------------------------- fusion (V1)
@pytest.mark.parametrize("overlap", [1, 2, 8, 12])
def test_v1_fusion_weights_are_a_partition_of_unity(overlap: int) -> None:
    ending, beginning = fusion_weights(overlap)
    i = torch.arange(overlap)
    torch.testing.assert_close(ending, (overlap - i) / overlap)
    torch.testing.assert_close(beginning, i / overlap)
    torch.testing.assert_close(ending + beginning, torch.ones(overlap))


@pytest.mark.parametrize(("frames", "length", "overlap"), [(12, 4, 2), (20, 20, 8), (44, 20, 8), (9, 3, 0), (10, 4, 1)])
def test_chunks_cut_fuse_and_join(frames: int, length: int, overlap: int) -> None:
    chunks = Chunks(frames, length, overlap)
    x = torch.randn(2, 3, frames, 2, 2)
    parts = chunks.cut(x)
    assert parts.shape == (2 * chunks.count, 3, length, 2, 2)
    torch.testing.assert_close(chunks.join(parts), x)
    torch.testing.assert_close(chunks.fuse(parts), parts)  # of one clip, there is nothing to fuse
    parts = torch.randn_like(parts)
    fused = chunks.fuse(parts)
    torch.testing.assert_close(chunks.join(fused), chunks.join(parts))
    torch.testing.assert_close(chunks.cut(chunks.join(parts)), fused)
    if chunks.count > 1 and overlap:
        a, b = parts[:2, :, length - overlap :], parts[2:4, :, :overlap]
        for i in range(overlap):
            want = (overlap - i) / overlap * a[:, :, i] + i / overlap * b[:, :, i]
            torch.testing.assert_close(fused[:2, :, length - overlap + i], want)
            torch.testing.assert_close(fused[2:4, :, i], want)


@pytest.mark.parametrize(("sizes", "match"), [
    ((12, 4, 3), "half of a chunk"), ((13, 4, 2), "take 12 or 14"), ((3, 4, 2), "take 4 or"), ((12, 0, 0), "half"),
])  # fmt: skip
def test_bad_chunks(sizes: tuple[int, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Chunks(*sizes)
    with pytest.raises(ValueError, match="a clip of 12"):
        CHUNKS.cut(torch.randn(1, 4, 11, 2, 2))
    with pytest.raises(ValueError, match="chunks are"):
        CHUNKS.join(torch.randn(4, 4, 4, 2, 2))


# ---------------------------------------------------------------------- the whole: a tiny Wan over a long clip
def interface(**kw: Any) -> InterfaceTokens:
    made = InterfaceTokens(4, 32, 16, tokens=Z, width=64, heads=4, layers=2, every=3, **kw)
    return made.eval().requires_grad_(False)


def run(module: InterfaceTokens | None, config: Config | None = None, batch: int = 1, **kw: Any) -> tuple[Tensor, Any]:
    model, inputs = tiny.wan()
    handle = accelerate(model, config)
    text = torch.randn(batch, 512, 16)
    x = torch.randn(batch, 4, 12, 8, 8)
    seen: dict[str, Any] = {"timesteps": [], "z": []}

    def predict(parts: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.shape == (5 * batch,) and timestep.stride(0) == 0
        seen["timesteps"].append(float(timestep[0]))
        call = {"hidden_states": parts, "timestep": timestep, "return_dict": False}
        given = tiny.run(model, call | {"encoder_hidden_states": text.repeat(5, 1, 1)})
        free = tiny.run(model, call | {"encoder_hidden_states": torch.zeros(5 * batch, 512, 16)})
        return free + 3.0 * (given - free)

    def update(prediction: Tensor, timestep: Tensor, parts: Tensor) -> Tensor:
        return parts - 0.2 * prediction

    def make(latents: Tensor) -> Tensor:
        assert module is not None and latents.shape == (batch, 4, 12, 8, 8)
        seen["z"].append(module(latents, text))
        return seen["z"][-1]

    with torch.no_grad():
        clip = denoise_chunks(handle, x, TIMES, predict, update, CHUNKS, make if module is not None else None, **kw)
    seen |= {"handle": handle, "model": model, "inputs": {**inputs, "encoder_hidden_states": text}, "noise": x}
    return clip, seen


def test_a_long_clip_in_chunks() -> None:
    """The same as chunks that run one by one, fused by hand in the first three of five steps."""
    module = interface()
    clip, seen = run(module)
    assert clip.shape == (1, 4, 12, 8, 8) and clip.isfinite().all()
    assert seen["timesteps"] == pytest.approx(TIMES.tolist())
    model, inputs, handle = seen["model"], seen["inputs"], seen["handle"]
    assert handle.stats()["memory"] is None  # handed back as it was
    text, parts = inputs["encoder_hidden_states"], CHUNKS.cut(seen["noise"])
    for step, t in enumerate(TIMES):
        handle.memory(module(CHUNKS.join(parts), text))
        pieces = []
        for part in parts.chunk(5):
            call = {**inputs, "hidden_states": part, "timestep": t[None]}
            given = tiny.run(model, call)
            free = tiny.run(model, call | {"encoder_hidden_states": torch.zeros_like(text)})
            pieces.append(part - 0.2 * (free + 3.0 * (given - free)))
        parts = torch.cat(pieces)
        if step < 3:
            parts = CHUNKS.cut(CHUNKS.join(parts))
    assert tiny.relative(clip, CHUNKS.join(parts)) < 1e-4
    torch.manual_seed(0)
    interface()  # the same random numbers after it
    without, _ = run(None)
    assert tiny.relative(without, clip) > 1e-3


def test_z_is_one_segment_for_chunks_and_guidance_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()

    def noted(q: Tensor, *args: Any, segments: Any, **kw: Any) -> Any:
        shapes.add((q.shape[0], *segments[0][0].shape))
        return vdit_fast.attention(q, *args, segments=segments, **kw)

    counts: list[dict[str, Any]] = []
    monkeypatch.setattr("vdit_fast.models.heads.attention", noted)

    module = interface()
    original = Handle.memory

    def memory(self: Any, rows: Any) -> Any:
        if rows is None:
            counts.append(self.stats()["memory"])
        return original(self, rows)

    monkeypatch.setattr("vdit_fast.handle.Handle.memory", memory)
    run(module)
    assert shapes == {(5, 1, Z, 2, 16)}
    assert [(c["computed"], c["shared"]) for c in counts] == [(2 * 5, 2 * 5)]  # layers x steps, and the second branch


def test_z_of_several_clips_is_each_chunks_own() -> None:
    module = interface()
    torch.manual_seed(3)
    both, seen = run(module, batch=2)
    model, inputs, handle = seen["model"], seen["inputs"], seen["handle"]
    for i in range(2):
        text = inputs["encoder_hidden_states"][i : i + 1]

        def predict(parts: Tensor, timestep: Tensor, text: Tensor = text) -> Tensor:
            call = {"hidden_states": parts, "timestep": timestep, "return_dict": False}
            given = tiny.run(model, call | {"encoder_hidden_states": text.expand(5, -1, -1)})
            free = tiny.run(model, call | {"encoder_hidden_states": torch.zeros(5, 512, 16)})
            return free + 3.0 * (given - free)

        alone = denoise_chunks(
            handle, seen["noise"][i : i + 1], TIMES, predict, lambda p, t, x: x - 0.2 * p, CHUNKS,
            lambda x, text=text: module(x, text),
        )  # fmt: skip
        assert tiny.relative(both[i : i + 1], alone) < 1e-4


def test_a_sparse_planner_leaves_z_alone() -> None:
    module = interface()
    torch.manual_seed(3)
    want, _ = run(module)
    torch.manual_seed(3)
    got, seen = run(module, Config(attention=SVG2(top_p=1.0, q_clusters=4, k_clusters=4)))
    assert tiny.relative(got, want) < 1e-4
    assert seen["handle"].stats()["layers"][0]["sparse_calls"] == 10


def test_z_goes_with_the_steps_and_caches_forecast_over_it() -> None:
    """Rows that a function makes are a condition like any other: their change is no new generation."""
    policy = TaylorSeer(granularity="block", first_full=1, last_full=0, interval=2, min_steps=1)
    clip, seen = run(interface(), Config(cache=policy))
    stats = seen["handle"].stats()
    assert clip.isfinite().all() and stats["cache"]["forecast"] == {1: 2, 3: 2}


@pytest.mark.parametrize("fused", [0, 0.0, 5, 1.0, 2])
def test_overlaps_are_fused_in_early_steps_only(fused: float) -> None:
    """Chunks that are never fused part; fused in every step they agree wherever they overlap."""
    parts_seen: list[Tensor] = []

    def predict(parts: Tensor, timestep: Tensor) -> Tensor:
        parts_seen.append(parts)
        return parts * torch.arange(1, 6).view(5, 1, 1, 1, 1)  # every chunk wants something else

    handle = accelerate(model := tiny.wan()[0])
    x = torch.randn(1, 4, 12, 2, 2)
    clip = denoise_chunks(handle, x, TIMES, predict, lambda p, t, x: x - 0.1 * p, CHUNKS, fused=fused)
    agree = [torch.allclose(CHUNKS.cut(CHUNKS.join(parts)), parts, atol=1e-5) for parts in parts_seen]
    until = int(fused * 5) if isinstance(fused, float) else fused
    assert agree == [True] + [step < until for step in range(4)] and clip.shape == x.shape and model is not None


@pytest.mark.parametrize(("kw", "match"), [
    ({"fused": 1.5}, "fraction"), ({"fused": -1}, "fused"), ({"fused": True}, "fused"),
])  # fmt: skip
def test_bad_runs(kw: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run(None, **kw)


def test_refusals() -> None:
    model, _ = tiny.wan()
    handle = accelerate(model).memory(torch.randn(3, 32))
    nothing: Any = None
    with pytest.raises(RuntimeError, match="the handle has some"):
        denoise_chunks(handle, torch.randn(1, 4, 12, 8, 8), TIMES, nothing, nothing, CHUNKS, lambda x: x)
    assert handle.stats()["memory"]["tokens"] == 3
    handle.memory(None)
    with pytest.raises(ValueError, match="interface tokens are"):
        denoise_chunks(handle, torch.randn(1, 4, 12, 8, 8), TIMES, nothing, nothing, CHUNKS, lambda x: x)
    assert handle.stats()["memory"] is None
    with pytest.raises(ValueError, match="multiple of heads"):
        InterfaceTokens(4, 32, 16, width=64, heads=5)
    with pytest.raises(ValueError, match="every"):
        InterfaceTokens(4, 32, 16, width=64, heads=4, every=0)


# ---------------------------------------------------------------------- the module
def test_interface_tokens_read_key_frames_and_text() -> None:
    module = interface()
    x, text = torch.randn(2, 4, 8, 6, 10), torch.randn(2, 7, 16)
    z = module(x, text)
    assert z.shape == (2, Z, 32) and module.key_frames(8) == [0, 3, 6]
    for frame in range(8):
        other = x.clone()
        other[:, :, frame] = torch.randn(2, 4, 6, 10)
        assert torch.equal(module(other, text), z) == (frame not in (0, 3, 6))
    moved = x.clone()
    moved[:, :, 0], moved[:, :, 3] = x[:, :, 3], x[:, :, 0]
    assert not torch.allclose(module(moved, text), z, atol=1e-4)  # the order of the frames matters
    assert not torch.allclose(module(x, torch.randn(2, 7, 16)), z, atol=1e-4)
    torch.testing.assert_close(module(x[:1], text[:1]), z[:1], atol=1e-5, rtol=1e-4)
    assert module.to(torch.bfloat16)(x.to(torch.bfloat16), text.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_papers_sizes() -> None:
    with torch.device("meta"):
        module = InterfaceTokens(16, 1536, 4096)
        assert module(torch.empty(1, 16, 60, 24, 40), torch.empty(1, 226, 4096)).shape == (1, 512, 1536)
    assert len(module.blocks) == 4 and module.read.heads == 32


def test_the_module_is_trained_end_to_end() -> None:
    """Coupled to the model on the denoising objective: gradients reach the tokens through every chunk."""
    model, inputs = tiny.wan(batch=5)
    module = interface().requires_grad_(True)
    handle = accelerate(model)
    x = torch.randn(1, 4, 12, 8, 8)
    handle.memory(lambda step: module(x, inputs["encoder_hidden_states"][:1]))
    model(**{**inputs, "hidden_states": CHUNKS.cut(x)})[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert float(module.tokens.grad.abs().max()) > 0
