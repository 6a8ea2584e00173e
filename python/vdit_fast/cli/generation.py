"""Running any local diffusers video pipeline, accelerated: the core of ``vdit-fast generate``."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vdit_fast.config import Config

_NAMES = {
    "steps": "num_inference_steps",
    "frames": "num_frames",
    "guidance": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
}
Progress = Callable[[int, int, str], None]


@dataclass
class Request:
    """What to draw; None leaves the pipeline's own default.

    Attributes:
        seed: of the noise, drawn on the CPU so that every device starts from the same.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """The keyword arguments for ``pipe``.

        Raises:
            ValueError: an option was given that this pipeline does not have.
        """
        known = inspect.signature(pipe.__call__).parameters
        found: dict[str, Any] = {"prompt": self.prompt}
        for option, name in _NAMES.items():
            value = getattr(self, option)
            if value is None:
                continue
            if name not in known:
                raise ValueError(f"{option}: {type(pipe).__name__} has no argument {name!r}; leave the option out")
            found[name] = value
        if "prompt" not in known:
            raise ValueError(f"model: {type(pipe).__name__} takes no text prompt")
        if "generator" in known:
            found["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        if "output_type" in known:
            found["output_type"] = "np"
        return found


@dataclass
class Drawn:
    """A finished run: the clip, its seconds, and the handle's report and numbers (empty for the stock model)."""

    clip: torch.Tensor
    seconds: float
    report: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def load_pipeline(folder: str | Path, dtype: str = "auto", device: str = "cpu") -> Any:
    """Load a pipeline from a local folder, without any download.

    Args:
        folder: as written by ``save_pretrained``: it holds ``model_index.json``.
        dtype: ``auto`` (a GPU: bf16 with the VAE in fp32; a CPU: fp32), fp32, bf16 or fp16.

    Raises:
        FileNotFoundError, ValueError: the folder is not a diffusers pipeline.
        ImportError: diffusers is missing, or a package that the pipeline needs.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"model: {str(folder)!r} is not a folder; nothing is downloaded here: give a folder that save_pretrained "
            "wrote, or that 'hf download NAME --local-dir FOLDER' made"
        )
    if not (path / "model_index.json").is_file():
        raise ValueError(f"model: {str(folder)!r} has no model_index.json; give the folder that save_pretrained wrote")
    try:
        from diffusers import DiffusionPipeline, __version__
    except ImportError as error:
        raise ImportError(f"generate needs diffusers ({error}): pip install 'vdit-fast[diffusers]'") from error
    name = (
        "torch_dtype" if __version__.startswith("0.") else "dtype"
    )  # renamed; before 1.0 both ways or the old one only
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(str(path), local_files_only=True, **{name: _dtypes(dtype, device)})
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(f"model: {type(pipe).__name__} has no transformer; only diffusion transformers are supported")
    return pipe.to(device)


def takes_seed(pipe: Any) -> bool:
    """Whether a pipeline takes the generator of its noise."""
    return "generator" in inspect.signature(pipe.__call__).parameters


def watched(
    pipe: Any, request: Request, arguments: dict[str, Any], progress: Progress | None, what: str
) -> dict[str, Any]:
    """The arguments with a callback that reports every step, in place of the pipeline's own progress bar."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    if progress is None or "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        return arguments

    def tick(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        total = getattr(pipe, "num_timesteps", None) or request.steps or step + 1
        progress(step + 1, total, what)
        return values

    return arguments | {"callback_on_step_end": tick}


def draw(pipe: Any, request: Request, config: Config | None, progress: Progress | None = None) -> Drawn:
    """Run the pipeline, accelerated with ``config`` or stock with None, and restore it.

    Raises:
        ValueError: an option that the pipeline does not have, or a result that is not a video.
    """
    from vdit_fast import report
    from vdit_fast.accelerate import accelerate

    arguments = request.arguments(pipe)
    what = "stock" if config is None else "accelerated"
    arguments = watched(pipe, request, arguments, progress, what)
    handle = None if config is None else accelerate(pipe, config)
    try:
        start = time.perf_counter()
        result = pipe(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        told = ("", {}) if handle is None else (handle.report(), handle.stats())
    finally:
        if handle is not None:
            handle.remove()
    if not hasattr(result, "frames"):
        raise ValueError(f"model: {type(pipe).__name__} returned no frames; only video pipelines are supported")
    clip = report.to_clip(result.frames[0])
    if not torch.as_tensor(clip).float().isfinite().all():
        raise RuntimeError("the clip has values that are not finite; try --dtype fp32 or --config exact")
    settings = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str))}
    return Drawn(clip, seconds, *told, settings | {"seed": request.seed})


def _dtypes(name: str, device: str) -> torch.dtype | dict[str, Any]:
    from vdit_fast.cli.devices import resolve_dtype

    if name == "auto" and torch.device(device).type != "cpu":
        return {"default": torch.bfloat16, "vae": torch.float32}  # Wan's VAE shows banding in bf16
    return resolve_dtype(name, device)
