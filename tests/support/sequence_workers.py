"""What the ranks of tests do whose sequence or guidance is shared while one of them fails."""

from __future__ import annotations

import json
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

CASES = ("raises", "raises in its branch", "errs outside", "leaves", "removes", "removes its branch", "is slow")
ENDS = ("leaves", "removes", "removes its branch")
VICTIM = 1


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


def several(folder: Path) -> None:
    """One case after the other, each in a group of its own: a rank that has failed lives on, no connection breaks."""
    found = {how: _case(how, dist.new_group([0, 1])) for how in CASES}
    (folder / f"found{dist.get_rank()}.json").write_text(json.dumps(found))


def _case(how: str, group: Any) -> dict[str, Any]:
    """How the second forward ended, and after how many seconds."""
    model, mine = tiny_wan(), dist.get_rank() == VICTIM
    want = call(model)
    handle = vdit_fast.accelerate(model, "exact")
    if how.endswith("branch"):
        guidance_parallel(handle, group)
        calls = 2
    else:
        parallel = sequence_parallel(handle, group, patience=1.0)
        calls = 1
    first = [call(model, 900.0) for _ in range(calls)]
    assert all(each.isfinite().all() for each in first)
    began, error, far = time.monotonic(), "", 0.0
    try:
        if mine and how.startswith("raises"):
            _fail_in(model)
        if mine and how == "errs outside":
            with parallel:
                raise MemoryError("the caller's own")
        if mine and how in ENDS:
            parallel() if how == "leaves" else handle.remove()
            return {"error": "", "waited": 0.0, "far": 0.0}
        if mine and how == "is slow":  # twice the patience in the caller's code, and again in the forward
            time.sleep(2)
            model.blocks[1].ffn.register_forward_pre_hook(lambda *args: time.sleep(2))
        got = [call(model) for _ in range(calls)]
        far = max(float((each - want).abs().max()) for each in got)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "waited": time.monotonic() - began, "far": far}


def killed(folder: Path, victim: int) -> None:
    """The victim sits in its own code until it is killed; the others wait for it in an exchange."""
    model = tiny_wan()
    handle = vdit_fast.accelerate(model, "exact")
    sequence_parallel(handle, patience=2.0)
    call(model)
    (folder / f"ready{dist.get_rank()}").touch()
    if dist.get_rank() == victim:
        time.sleep(50)
    call(model)
