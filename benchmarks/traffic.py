"""Bytes that the memory-bound part of one transformer block moves, stock and accelerated.

    python benchmarks/traffic.py --out benchmarks/results/cpu/traffic.json

Blocks of the real widths with bf16 weights run on the meta device: nothing is computed or allocated. Every operator
counts the storage of its inputs and outputs; views are free, dimensions of stride 0 count once, matmuls and attention
do not count, ``F.rms_norm`` counts as one operator as on a GPU. The slope between two clip lengths is the traffic per
video token, given in u, the bytes of one bf16 row of the block's width.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vdit_fast
from vdit_fast.report.environment import environment

MATMULS = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}
VIEWS = {
    "alias", "arange", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


def nbytes(tensor: Tensor) -> int:
    """Of the elements that differ in storage: a dimension of stride 0 holds one."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


class Counter(TorchDispatchMode):
    """Sums the bytes of memory-bound operators while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.kernels = 0
        self.on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.on or name in VIEWS or name in MATMULS or "attention" in name:
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if name == "copy_":  # the destination is written, not read
            tensors = [args[0], args[1]]
        moved = sum(nbytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
        self.bytes += moved
        self.kernels += 1
        return out


@torch.library.custom_op("vdit_fast_traffic::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vdit_fast_traffic::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


_rms_norm.register_fake(lambda x, weight: torch.empty_like(x))
_attention.register_fake(lambda q, k, v: torch.empty_like(q))


@contextmanager
def single_operators() -> Iterator[None]:
    """``F.rms_norm`` and ``F.scaled_dot_product_attention`` as one operator each, as they are on a GPU."""
    stock = functional.rms_norm, functional.scaled_dot_product_attention
    functional.rms_norm = lambda x, shape, weight=None, eps=None: _rms_norm(x, weight)
    functional.scaled_dot_product_attention = lambda query, key, value, **_: _attention(query, key, value)
    try:
        yield
    finally:
        functional.rms_norm, functional.scaled_dot_product_attention = stock


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def keep_fp32(model: nn.Module) -> nn.Module:
    """Every parameter in bf16 but those that ``from_pretrained`` keeps in fp32."""
    names = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, parameter in model.named_parameters():
        kept = any(part in name.split(".") for part in names)
        parameter.data = parameter.data.to(torch.float32 if kept else torch.bfloat16)
    return model


Case = Callable[[int], tuple[nn.Module, dict[str, Any], nn.Module, int]]
"""frames -> (transformer, arguments, the block that is counted, its width); a frame has 256 tokens."""


def wan(heads: int, ffn: int, per_token: bool = False) -> Case:
    def make(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, num_layers=1, ffn_dim=ffn, text_dim=64, freq_dim=256
        )
        timestep = rand(1, frames * 256, dtype=torch.float32) if per_token else rand(1, dtype=torch.float32)
        inputs = {
            "hidden_states": rand(1, 16, frames, 32, 32),
            "timestep": timestep,
            "encoder_hidden_states": rand(1, 512, 64),
        }
        return keep_fp32(model), inputs, model.blocks[0], heads * 128

    return make


def hunyuan(single: bool) -> Case:
    def make(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
        from diffusers import HunyuanVideoTransformer3DModel

        model = HunyuanVideoTransformer3DModel(
            num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=64
        )
        inputs = {
            "hidden_states": rand(1, 16, frames, 32, 32),
            "timestep": rand(1),
            "encoder_hidden_states": rand(1, 256, 64),
            "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool),
            "pooled_projections": rand(1, 768),
            "guidance": rand(1),
        }
        block = model.single_transformer_blocks[0] if single else model.transformer_blocks[0]
        return keep_fp32(model), inputs, block, 3072

    return make


def cogvideox(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=48, num_layers=1, text_embed_dim=64, use_rotary_positional_embeddings=True
    )
    inputs = {
        "hidden_states": rand(1, frames, 16, 32, 32),
        "timestep": rand(1),
        "encoder_hidden_states": rand(1, 226, 64),
        "image_rotary_emb": (rand(frames * 256, 64, dtype=torch.float32), rand(frames * 256, 64, dtype=torch.float32)),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 3072


def hunyuan15(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        num_layers=1, num_refiner_layers=1, text_embed_dim=64, text_embed_2_dim=64, image_embed_dim=64
    )
    tokens, table = frames * 256, rand(frames * 256, 128, dtype=torch.float32)
    # The block alone: the whole forward looks at values.
    inputs = {
        "hidden_states": rand(1, tokens, 2048),
        "encoder_hidden_states": rand(1, 1985, 2048),
        "temb": rand(1, 2048),
        "attention_mask": torch.ones(1, 1985, dtype=torch.bool),
        "freqs_cis": (table, table),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 2048


def ltx_video(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(num_layers=1, caption_channels=64)
    inputs = {
        "hidden_states": rand(1, frames * 256, 128),
        "timestep": rand(1),
        "encoder_hidden_states": rand(1, 128, 64),
        "encoder_attention_mask": torch.ones(1, 128),
        "num_frames": frames,
        "height": 16,
        "width": 16,
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 2048


def ltx2(newer: bool, per_token: bool = False) -> Case:
    """Per video token: 126 audio tokens stay as the clip grows, what they read of the video does not."""

    def make(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
        from diffusers import LTX2VideoTransformer3DModel

        extra = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
        extra |= {"perturbed_attn": True}
        model = LTX2VideoTransformer3DModel(
            num_layers=1, caption_channels=64, rope_type="split", **(extra if newer else {})
        )
        tokens, audio, rows = frames * 256, 126, 9 if newer else 6
        between = 1 if newer or not per_token else tokens  # newer models go by the other stream's noise level

        def tables(count: int, channels: int) -> tuple[Tensor, Tensor]:
            return rand(1, 32, count, channels, dtype=torch.float32), rand(1, 32, count, channels, dtype=torch.float32)

        inputs = {  # of the block alone
            "hidden_states": rand(1, tokens, 4096),
            "audio_hidden_states": rand(1, audio, 2048),
            "encoder_hidden_states": rand(1, 1024, 4096),
            "audio_encoder_hidden_states": rand(1, 1024, 2048),
            "temb": rand(1, tokens if per_token else 1, rows * 4096),
            "temb_audio": rand(1, 1, rows * 2048),
            "temb_ca_scale_shift": rand(1, between, 4 * 4096),
            "temb_ca_audio_scale_shift": rand(1, 1, 4 * 2048),
            "temb_ca_gate": rand(1, between, 4096),
            "temb_ca_audio_gate": rand(1, 1, 2048),
            "temb_prompt": rand(1, 1, 2 * 4096) if newer else None,
            "temb_prompt_audio": rand(1, 1, 2 * 2048) if newer else None,
            "video_rotary_emb": tables(tokens, 64),
            "audio_rotary_emb": tables(audio, 32),
            "ca_video_rotary_emb": tables(tokens, 32),
            "ca_audio_rotary_emb": tables(audio, 32),
        }
        return keep_fp32(model), inputs, model.transformer_blocks[0], 4096

    return make


def latte(temporal: bool) -> Case:
    def make(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
        from diffusers import LatteTransformer3DModel

        model = LatteTransformer3DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=1152,
            attention_bias=True,
            sample_size=32,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=64,
            video_length=frames,
        )
        inputs = {
            "hidden_states": rand(1, 4, frames, 32, 32),
            "timestep": rand(1),
            "encoder_hidden_states": rand(1, 120, 64),
        }
        block = model.temporal_transformer_blocks[0] if temporal else model.transformer_blocks[0]
        return keep_fp32(model), inputs, block, 1152

    return make


def lumina_next(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import LuminaNextDiT2DModel

    model = LuminaNextDiT2DModel(num_layers=1, num_kv_heads=8)
    inputs = {  # of the block alone; a longer clip is a larger image here
        "hidden_states": rand(1, frames * 256, 2304),
        "attention_mask": torch.ones(1, frames * 256),
        "image_rotary_emb": torch.empty(1, frames * 256, 36, dtype=torch.complex64),
        "encoder_hidden_states": rand(1, 256, 2048),
        "encoder_mask": torch.ones(1, 256, dtype=torch.bool),
        "temb": rand(1, 1024),
        "cross_attention_kwargs": {},
    }
    return keep_fp32(model), inputs, model.layers[0], 2304


def mochi(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(num_layers=2, text_embed_dim=64)  # the last block ends the text stream
    table = rand(frames * 256, 24, 64, dtype=torch.float32)
    # The block alone, and a mask with values: the stock attention looks for the valid tokens.
    inputs = {
        "hidden_states": rand(1, frames * 256, 3072),
        "encoder_hidden_states": rand(1, 256, 1536),
        "temb": rand(1, 3072),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool, device="cpu"),
        "image_rotary_emb": (table, table),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 3072


def cosmos(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import CosmosTransformer3DModel

    model = CosmosTransformer3DModel(num_layers=1)
    table = rand(frames * 256, 128, dtype=torch.float32)
    inputs = {  # of the block alone
        "hidden_states": rand(1, frames * 256, 4096),
        "encoder_hidden_states": rand(1, 512, 1024),
        "embedded_timestep": rand(1, 4096),
        "temb": rand(1, 3 * 4096),
        "image_rotary_emb": (table, table),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 4096


def allegro(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import AllegroTransformer3DModel

    model = AllegroTransformer3DModel(num_layers=1, caption_channels=64)
    axis = (rand(4096, 32, dtype=torch.float32), rand(4096, 32, dtype=torch.float32))
    position = torch.zeros(1, frames * 256, dtype=torch.long)
    inputs = {
        "hidden_states": rand(1, 4, frames, 32, 32),
        "timestep": rand(1),
        "encoder_hidden_states": rand(1, 512, 64),
        "encoder_attention_mask": torch.ones(1, 512),
        "image_rotary_emb": ((axis, axis, axis), (position, position, position)),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 2304


def sana_video(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(num_layers=1, caption_channels=64, mlp_ratio=3.0)
    inputs = {
        "hidden_states": rand(1, 16, frames, 32, 32),
        "timestep": rand(1),
        "encoder_hidden_states": rand(1, 300, 64),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 2240


def easyanimate(frames: int) -> tuple[nn.Module, dict[str, Any], nn.Module, int]:
    from diffusers import EasyAnimateTransformer3DModel

    model = EasyAnimateTransformer3DModel(
        num_attention_heads=48,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        mmdit_layers=1,
        text_embed_dim=64,
        patch_size=2,
    )
    inputs = {
        "hidden_states": rand(1, 16, frames, 32, 32),
        "timestep": rand(1),
        "encoder_hidden_states": rand(1, 256, 64),
    }
    return keep_fp32(model), inputs, model.transformer_blocks[0], 3072


CASES: dict[str, Case] = {
    "Wan 2.1/2.2 14B": wan(40, 13824),
    "Wan 2.1 1.3B": wan(12, 8960),
    "Wan 2.2 TI2V-5B (timestep per token)": wan(24, 14336, per_token=True),
    "HunyuanVideo, dual block": hunyuan(single=False),
    "HunyuanVideo, single block": hunyuan(single=True),
    "HunyuanVideo-1.5": hunyuan15,
    "CogVideoX-5B": cogvideox,
    "LTX-Video 0.9": ltx_video,
    "LTX-2": ltx2(newer=False),
    "LTX-2 (timestep per token)": ltx2(newer=False, per_token=True),
    "LTX-2.3": ltx2(newer=True),
    "LTX-2.3 (timestep per token)": ltx2(newer=True, per_token=True),
    "Mochi": mochi,
    "Cosmos 1 7B": cosmos,
    "Allegro": allegro,
    "EasyAnimate 5.1": easyanimate,
    "Sana-Video 2B": sana_video,
    "Latte, spatial block": latte(temporal=False),
    "Latte, temporal block": latte(temporal=True),
    "Lumina-Next": lumina_next,
}


def measure(case: Case, frames: int, fuse: str | None) -> tuple[int, int, int]:
    """(bytes, operators, width) of the case's block; ``fuse`` None is the stock model."""
    with torch.device("meta"), single_operators(), torch.no_grad(), Counter() as counter:
        model, inputs, block, width = case(frames)
        model.eval()
        handle = vdit_fast.accelerate(model, {"fuse": fuse}) if fuse else None
        if fuse:
            inputs = {name: item.to("meta") if isinstance(item, Tensor) else item for name, item in inputs.items()}
        block.register_forward_pre_hook(lambda *_: setattr(counter, "on", True))
        block.register_forward_hook(lambda *_: setattr(counter, "on", False))
        (block if "temb" in inputs else model)(**inputs)
        if handle is not None:
            handle.remove()
    return counter.bytes, counter.kernels, width


def per_token(case: Case, fuse: str | None) -> tuple[float, int]:
    """(u per video token, operators)."""
    (first, _, width), (second, kernels, _) = (measure(case, frames, fuse) for frames in (4, 8))
    return (second - first) / (4 * 256) / (2 * width), kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the raw numbers to this JSON file")
    parser.add_argument("--only", help="cases whose name contains this text")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("vdit_fast").setLevel(logging.ERROR)
    rows = []
    for name, case in CASES.items():
        if options.only and options.only.lower() not in name.lower():
            continue
        (stock, before), (fused, after) = per_token(case, None), per_token(case, "fast")
        rows.append(
            {"block": name, "stock_u": stock, "stock_operators": before, "fused_u": fused, "fused_operators": after}
        )
        print(f"{name}: {stock:.1f} u in {before} operators -> {fused:.1f} u in {after}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
