"""Loading and saving the demo model's weights (safetensors, bf16, the architecture in the header)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vdit_fast.demo.architecture import TRANSFORMER_CONFIG

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

WEIGHTS = Path(__file__).with_name("demo_model.safetensors")
CAUSAL_WEIGHTS = Path(__file__).with_name("causal_model.safetensors")
"""For ``load_demo_model(path=...)``: the demo model after ``examples/causal/train.py``, which can stream clips."""
MAX_BYTES = 16 * 2**20


def load_demo_model(dtype: torch.dtype = torch.float32, *, path: str | Path | None = None) -> WanTransformer3DModel:
    """Load the demo transformer in eval mode, without gradients, on the CPU.

    Args:
        dtype: of the matrices; what diffusers keeps in fp32 (norms, time embedding, RoPE tables) stays fp32.
        path: a weight file other than the packaged one; its header may name another architecture.

    Raises:
        ImportError: diffusers or safetensors is missing (extra ``diffusers``).
        FileNotFoundError: there is no weight file.
        ValueError: the file is not a demo model.
    """
    file = WEIGHTS if path is None else Path(path)
    if not file.is_file():
        remedy = (
            "this installation has no demo weights: install the wheel, or train them with examples/demo_model/train.py"
            if path is None
            else "give the path of a file written by vdit_fast.demo.model.save_demo_model"
        )
        raise FileNotFoundError(f"demo model: {file} does not exist; {remedy}")
    transformer_class, safe_open = _imports()
    try:
        with safe_open(str(file), framework="pt") as handle:
            header = handle.metadata() or {}
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise ValueError(f"demo model: {file} is not a readable safetensors file ({error})") from error
    if "architecture" not in header:
        raise ValueError(f"demo model: {file} has no 'architecture' in its header; it is not a demo model")
    model: Any = transformer_class(**json.loads(header["architecture"]))
    try:
        model.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise ValueError(f"demo model: the tensors of {file} do not fit its header: {error}") from error
    return _cast(model, dtype).eval().requires_grad_(False)


def demo_metadata(path: str | Path | None = None) -> dict[str, str]:
    """Return the header of a weight file: architecture, training facts, licence."""
    _, safe_open = _imports()
    with safe_open(str(WEIGHTS if path is None else path), framework="pt") as handle:
        return dict(handle.metadata() or {})


def save_demo_model(
    state: Mapping[str, torch.Tensor],
    path: str | Path = WEIGHTS,
    *,
    architecture: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a state dict as the demo model's weight file: bf16, at most 16 MB, the architecture in the header.

    Raises:
        ValueError: the weights are not finite or the file would be larger than 16 MB.
    """
    from safetensors.torch import save_file

    half = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    for name, value in half.items():
        if not value.isfinite().all():
            raise ValueError(f"state: {name!r} has values that are not finite")
    size = sum(value.numel() * 2 for value in half.values())
    if size > MAX_BYTES:
        raise ValueError(f"state: {size / 2**20:.1f} MB in bf16; the demo model may have at most {MAX_BYTES >> 20} MB")
    config = dict(TRANSFORMER_CONFIG if architecture is None else architecture)
    header = {"format": "pt", "architecture": json.dumps(config, sort_keys=True), **(metadata or {})}
    save_file(half, str(path), metadata=header)
    return Path(path)


def _imports() -> tuple[type[WanTransformer3DModel], Any]:
    try:
        from diffusers import WanTransformer3DModel
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"the demo model needs diffusers ({error}): pip install 'vdit-fast[diffusers]'") from error
    return WanTransformer3DModel, safe_open


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast as ``from_pretrained(torch_dtype=...)`` does; ``.to(dtype)`` would also round the RoPE tables."""
    keep = tuple(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model
