"""``vdit-fast generate`` on a whole Wan pipeline of random weights, written to disk by the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast.report import read_video

pytest.importorskip("av")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = ["--steps", 3, "--height", 32, "--width", 48, "--frames", 9]  # latents 3 x 4 x 6, 18 tokens
WORDS = ["a", "red", "blue", "circle", "square", "moves", "right", "up", "blurry"]


def write_pipeline(folder: Path) -> Path:
    """A WanPipeline whose every part is real and tiny."""
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    text = transformers.UMT5Config(
        vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(text).eval(),
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )
    pipe.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_a_clip_a_report_and_a_comparison(model: Path, run_json: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    sparse = [
        "--set",
        "attention.min_tokens=0",
        "--set",
        "attention.dense_steps=1",
        "--set",
        "attention.pool=[2,2]",
        "--set",
        "cache.min_steps=0",
    ]
    arguments = ["generate", "--model", model, "--prompt", "a red circle", "--negative-prompt", "blurry", "--out", out]
    document = run_json(*arguments, *SMALL, *sparse, "--baseline")
    film = read_video(out)
    assert film.shape == (9, 3, 32, 48) and document["clip"] == [9, 3, 32, 48]
    assert document["pipeline"] == "WanPipeline" and document["settings"]["num_inference_steps"] == 3
    layers = document["report"]["layers"]
    assert document["report"]["cache"]["forecast"] == {"1": 2}  # of 3 steps the second, in two guidance branches
    assert len(layers) == 2 and all(layer["calls"] == 4 for layer in layers)
    assert [layer["sparse_calls"] for layer in layers] == [0, 2]  # layer 0 and step 0 stay dense
    assert not any(layer["fallbacks"] for layer in layers)
    assert document["seconds"] > 0 and document["stock_seconds"] > 0
    assert float(document["quality"]["psnr"]) > 15  # another plan than dense, but the same clip


def test_the_exact_config_draws_the_stock_clip(model: Path, run_json: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "clip.mkv"
    arguments = ["generate", "--model", model, "--prompt", "a red circle", "--out", out, "--config", "exact", *SMALL]
    document = run_json(*arguments, "--baseline", "--seed", 4)
    assert float(document["quality"]["psnr"]) > 60
    other = run_json(*arguments, "--seed", 5)
    assert "quality" not in other and other["settings"]["seed"] == 5


def test_the_report_is_shown(model: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    result = run("generate", "-m", model, "-p", "a blue square", "-o", out, "--steps", 1, *SMALL[2:])
    assert result.exit_code == 0, result.output
    assert "transformer (wan)" in result.stdout and "9 frames of 48 x 32" in result.stdout
    assert "Traceback" not in result.output and out.is_file()


def test_folders_that_cannot_serve(model: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("generate", "-m", tmp_path, "-p", "x")
    assert result.exit_code == 2 and "model_index.json" in result.stderr
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    result = run("generate", "-m", tmp_path, "-p", "x")
    assert result.exit_code in (1, 2) and "NoSuchPipeline" in result.stderr and "Traceback" not in result.output
    result = run("generate", "-m", model, "-p", "x", "--dtype", "int8")
    assert result.exit_code == 2 and "int8" in result.stderr


def test_options_that_the_pipeline_lacks() -> None:
    from vdit_fast.cli.generation import Request

    class Still:
        def __call__(self, prompt: str, height: int = 8) -> None: ...

    assert Request("x", height=16).arguments(Still()) == {"prompt": "x", "height": 16}
    with pytest.raises(ValueError, match="frames: Still has no argument 'num_frames'"):
        Request("x", frames=9).arguments(Still())


def test_profile_of_a_pipeline(model: Path, run_json: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    knobs = ["--method", "window", "--set", "attention.tile=[1,2,2]", "--set", "attention.dense_steps=1"]
    document = run_json("profile", "-m", model, "-p", "a red circle", "--out", tmp_path, *knobs, *SMALL)
    assert document["tokens"]["grid"] == [3, 2, 3] and document["steps"] == 3 and document["forwards"] == 6
    assert document["calls"] == 12 and document["sparse_calls"] == 8 and document["cost"]["density"] < 1
    assert (tmp_path / "plan.png").stat().st_size > 500
