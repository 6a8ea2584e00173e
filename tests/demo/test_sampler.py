"""The demo's sampler against closed forms: a straight line from noise to clip, guidance, conventions."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.demo import prompts
from vdit_fast.demo.architecture import FRAMES, HEIGHT, SHIFT, WIDTH
from vdit_fast.demo.sampler import DemoPipeline, sample

pytest.importorskip("diffusers")
SIZE = {"frames": 5, "height": 6, "width": 7}
PROMPT = "red circle right"


class Oracle(torch.nn.Module):
    """Answers ``target + pull * (text is there)`` and writes down how it was called."""

    def __init__(self, target: torch.Tensor, pull: float = 0.0) -> None:
        super().__init__()
        self.target, self.pull = target, pull
        self.seen: list[tuple[torch.Tensor, float, bool]] = []

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_dict: bool) -> tuple:
        assert timestep.shape == (1,) and text.shape == (1, prompts.TEXT_TOKENS, prompts.TEXT_DIM)
        self.seen.append((x.clone(), timestep.item(), bool(text.any())))
        return (self.target + self.pull * float(text.any()),)


def target(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 5, 6, 7, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


@pytest.mark.parametrize("steps", [1, 2, 7, 100])  # 100: the last sigma is below SIGMA_FLOOR
def test_a_perfect_network_gives_its_clip(steps: int) -> None:
    x0 = target(steps)
    drawn = sample(Oracle(x0), PROMPT, steps=steps, **SIZE)
    torch.testing.assert_close(drawn.clip, ((x0[0] + 1) / 2).movedim(1, 0), rtol=0, atol=1e-6)
    assert drawn.clip.shape == (5, 3, 6, 7) and len(drawn.step_seconds) == len(drawn.sigmas) == steps
    assert drawn.latents == []


def test_states_lie_on_the_line_from_noise_to_clip() -> None:
    x0, model = target(1), Oracle(target(1))
    drawn = sample(model, PROMPT, steps=8, seed=3, guidance=1.0, keep_latents=True, **SIZE)
    noise = model.seen[0][0]
    assert torch.equal(noise, torch.randn(noise.shape, generator=torch.Generator().manual_seed(3)))
    for (x, t, _), sigma in zip(model.seen, drawn.sigmas, strict=True):
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise, rtol=0, atol=2e-6)
        assert t == pytest.approx(1000 * sigma, rel=1e-6)
    for latent, sigma in zip(drawn.latents, [*drawn.sigmas[1:], 0.0], strict=True):
        torch.testing.assert_close(latent, ((1 - sigma) * x0 + sigma * noise)[0], rtol=0, atol=2e-6)


def test_noise_levels_are_shifted_like_the_training() -> None:
    drawn = sample(Oracle(target(0)), PROMPT, steps=4, **SIZE)
    line = [1.0, 0.75, 0.5, 0.25]
    assert drawn.sigmas == pytest.approx([SHIFT * u / (1 + (SHIFT - 1) * u) for u in line], rel=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 2.0, 3.5])
def test_guidance_is_combined_in_x0_space(guidance: float) -> None:
    model = Oracle(torch.full((1, 3, 5, 6, 7), -0.5), pull=0.1)
    drawn = sample(model, PROMPT, steps=3, guidance=guidance, **SIZE)
    expected = (-0.5 + guidance * 0.1 + 1) / 2
    torch.testing.assert_close(drawn.clip, torch.full_like(drawn.clip, expected), rtol=0, atol=1e-6)
    assert [text for _, _, text in model.seen] == [True, False] * 3  # cond, then uncond, at the same timestep
    times = [t for _, t, _ in model.seen]
    assert times[0::2] == times[1::2] and times == sorted(times, reverse=True)


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"prompt": ""}])
def test_one_call_per_step_without_guidance(options: dict) -> None:
    model = Oracle(target(0))
    sample(model, **({"prompt": PROMPT, "steps": 3} | options), **SIZE)
    assert len(model.seen) == 3


def test_the_seed_decides() -> None:
    class Echo(Oracle):
        def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> tuple:
            return (x.tanh() / 2,)

    def draw(seed: int) -> torch.Tensor:
        return sample(Echo(target(0)), PROMPT, steps=3, seed=seed, **SIZE).clip

    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))


def test_progress_is_told_every_step() -> None:
    seen: list[tuple[int, int]] = []
    sample(Oracle(target(0)), PROMPT, steps=3, progress=lambda *a: seen.append(a), **SIZE)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_pipeline_can_be_called_again() -> None:
    pipe = DemoPipeline(Oracle(target(0)))
    first = pipe(PROMPT, steps=3, **SIZE).clip
    assert torch.equal(pipe(PROMPT, steps=3, **SIZE).clip, first)
    assert set(pipe.components) == {"transformer", "scheduler"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"guidance": float("nan")}, "guidance"),
        ({"height": 0}, "height: 0"),
        ({"prompt": "red circel right"}, "did you mean 'circle'"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample(Oracle(target(0)), **({"prompt": PROMPT} | SIZE | options))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("red", "not 'colour shape direction'"),
        ("circle red right", "not 'colour shape direction'"),
        ("", "0 objects"),
        ("red circle up, blue ring up, green square up", "3 objects"),
        ("mauve circle up", "unknown word 'mauve'"),
    ],
)
def test_prompts_that_make_no_sense(prompt: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prompts.parse(prompt)


def test_prompts_read_like_sentences_and_embed_by_slot() -> None:
    spoken = "A red circle moving right in front of a blue square going up."
    assert prompts.parse(spoken) == [("red", "circle", "right"), ("blue", "square", "up")]
    assert torch.equal(prompts.embed(spoken), prompts.embed("red circle right, blue square up"))
    assert not torch.equal(prompts.embed(spoken), prompts.embed("blue square up, red circle right"))
    assert not prompts.embed(" ").any()
    assert FRAMES * HEIGHT * WIDTH // 16 == 6144
