"""What the ranks of tests do whose sequence or guidance is shared while one of them fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_wan
import torch
import torch.distributed as dist
from long_video import SHAPE, prompt, tiny_wan
from torch import Tensor

import vdit_fast
from vdit_fast.parallel import guidance_parallel, sequence_parallel

assert diffusers  # imported here, so that forked ranks have it

LONG = 45.0
"""Seconds that nobody may wait."""


def call(model: Any, t: float = 500.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, SHAPE[0], 5, *SHAPE[1:], generator=generator)
    with torch.no_grad():
        out: Tensor = model(latents, torch.tensor([t]), **prompt(1), return_dict=False)[0]
    return out


def _fail_in(model: Any) -> None:
    """The third block of this rank raises, after its attention."""

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a bug of this rank")

    model.blocks[2].ffn.register_forward_pre_hook(broken)


def sequence(folder: Path, how: str, victim: int, patience: float = 10.0) -> None:
    """One forward together; in the second one the victim does what ``how`` says."""
    model = tiny_wan()
    want = call(model)
    handle = vdit_fast.accelerate(model, "exact")
    mine = dist.get_rank() == victim
    parallel = sequence_parallel(handle, patience=patience)
    assert (call(model) - want).abs().max() < 1e-5
    if mine and how == "raises":
        _fail_in(model)
        try:
            call(model)
        except ZeroDivisionError:
            time.sleep(LONG)  # its process lives on, and its connections with it
        raise AssertionError("it did not fail")
    if mine and how == "leaves":
        parallel()
        time.sleep(LONG)
    if mine and how == "ends":
        return
    if mine and how == "errs outside":
        with parallel:
            raise MemoryError("the caller's own")
    if how == "sleeps":  # in the caller's code, and in a forward
        if mine:
            time.sleep(2 * patience)
            model.blocks[1].ffn.register_forward_pre_hook(lambda *args: time.sleep(2 * patience))
        assert (call(model) - want).abs().max() < 1e-5
        return
    began = time.monotonic()
    (folder / f"waits{dist.get_rank()}").touch()
    if mine:
        time.sleep(LONG)  # until it is killed
    try:
        call(model)
    finally:
        print(f"waited {time.monotonic() - began:.2f}", flush=True)


def guidance(folder: Path) -> None:
    """The second rank raises in its branch."""
    model = tiny_wan()
    handle = vdit_fast.accelerate(model, "exact")
    guidance_parallel(handle)
    for t in (900.0, 500.0):
        if t == 500.0 and dist.get_rank() == 1:
            _fail_in(model)
        first, second = (call(model, t) for _ in range(2))
        (first + second).sum().item()
