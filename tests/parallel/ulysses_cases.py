"""What the ranks of ``test_ulysses.py`` run: every case compares this process alone with the ranks together."""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import planner_settings
import pytest
import tiny
import torch
import torch.distributed as dist
from families.base import sharpen
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import FirstBlock, TaylorSeer, TeaCache
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.parallel import sequence_parallel
from vdit_fast.subset import RAS

Case = tuple[str, str, tuple[Any, ...]]
"""Name, function, arguments."""
TIMES = planner_settings.TIMES
FAMILIES = ("wan", "hunyuan_video")
PER_HEAD = {  # something of its own for every one of five heads: tables, and budgets by what the others recall
    "sparse_vdit": {
        "modes": "dmvsf", "block": 16, "sparsity": 0.6, "stripes": {"0.2": "0-3,7", "1.2": "5-9"}, "dense_steps": 1,
    },
    "window": {
        "sparsity": 0.6, "tile": [2, 3, 3], "heads": ["spatial", "temporal", "temporal", "spatial", "temporal"],
    },
    "adaspa": {"sparsity": 0.4, "block": 8, "search": [1, 3], "dense_steps": 1},
    "sliding_tile": {"tile": [2, 3, 3], "window": [[1, 1, 1], [3, 1, 1], [1, 3, 1], [1, 1, 3], [3, 3, 3]]},
}  # fmt: skip


def built(family: str, heads: int = 5, grid: tuple[int, int, int] = (5, 7, 9)) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of a family with this many heads: odd numbers of heads and of rows."""
    model, inputs = planner_settings.build(family, grid)
    config: Any = {**model.config, "num_attention_heads": heads}  # type: ignore[dict-item]
    torch.manual_seed(1)
    return sharpen(type(model).from_config(config)), inputs  # type: ignore[attr-defined]


def generate(model: nn.Module, inputs: dict[str, Any], times: Iterable[float] = TIMES) -> list[Tensor]:
    return [tiny.run(model, tiny.at(inputs, t)) for t in times]


def far(got: list[Tensor], want: list[Tensor]) -> float:
    return max(tiny.relative(a, b) for a, b in zip(got, want, strict=True))


def densities(handle: Handle, heads: range) -> list[list[float]]:
    """Of these heads of every layer."""
    found = [layer["head_density"] for layer in handle.stats()["layers"]]
    return [each * len(heads) if len(each) == 1 else [each[head] for head in heads] for each in found]


def planner(name: str, family: str, knobs: dict[str, Any] | None = None, heads: int = 5) -> dict[str, Any]:
    """A generation alone and together: the answers, and what every head read."""
    model, inputs = built(family, heads)
    rows = {"modes": ("dm" * heads)[:heads]} if name == "sparse_vdit" else {}  # one letter per head
    config = planner_settings.config(name, **rows)
    if knobs is not None:
        config = Config.from_dict({"attention": {"method": name, **knobs}, "on_unsupported": "error"})
    handle = planner_settings.plugged(model, config)
    want = generate(model, inputs)
    whole = densities(handle, range(heads))
    with sequence_parallel(handle) as parallel:
        ulysses: Any = handle.roots[0].session.around_heads["sequence"]
        first = max(heads, parallel.ranks) * parallel.rank // parallel.ranks if heads >= parallel.ranks else 0
        last = heads * (parallel.rank + 1) // parallel.ranks if heads >= parallel.ranks else 0
        handle.reset()
        got = generate(model, inputs)
        before = [each[first:last] for each in whole]
        after = densities(handle, range(last - first)) if last > first else []
        fallbacks = [layer["fallbacks"] for layer in handle.stats()["layers"] if layer["fallbacks"]]
        calls = ulysses.calls
    return {
        "far": far(got, want),
        "same reads": before == after or not after,
        "sparse": min(map(min, whole)) < 0.95,
        "fallbacks": fallbacks,
        "calls": calls,
    }


def everything_back() -> dict[str, Any]:
    """The end of a run with several ranks, in every way it may end."""
    model, inputs = built("wan")
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    end = sequence_parallel(handle)
    together = tiny.run(model, inputs)
    report = handle.report()
    numbers = handle.stats()["parallel"]["sequence"]
    twin = copy.deepcopy(model)
    copied = tiny.run(twin, inputs)
    end()
    end()
    ended = tiny.run(model, inputs)
    quiet = handle.stats()["parallel"]
    sequence_parallel(handle)
    handle.remove()
    return {
        "far": far([together, copied, ended], [want] * 3),
        "stock": torch.equal(tiny.run(model, inputs), stock) and not tiny.served(model),
        "report": f"sequence parallelism: rank {dist.get_rank()} of {dist.get_world_size()}, 2 attention calls"
        in report,
        "bytes": numbers["bytes"],
        "quiet": quiet is None,
    }


def memory() -> dict[str, Any]:
    """Memory rows belong to the whole sequence: once per rank would be a bias of log P."""
    model, inputs = built("wan")
    handle = accelerate(model)
    dense = tiny.run(model, inputs)
    handle.memory(torch.randn(1, 7, model.config.num_attention_heads * 16, generator=torch.Generator().manual_seed(3)))
    want = tiny.run(model, inputs)
    with sequence_parallel(handle):
        got = tiny.run(model, inputs)
    return {"far": far([got], [want]), "changes": tiny.relative(want, dense)}


def hooks() -> dict[str, Any]:
    """Hooks behind the softmax see all rows of the own heads; at other places they are refused."""
    model, inputs = built("hunyuan_video", heads=3)
    handle = planner_settings.plugged(model, planner_settings.config("draft"))
    seen = []

    def fn(step: Any, place: Any, rows: Any) -> Tensor:
        seen.append((rows.video.shape[1], rows.context.shape[1]))
        dense: Tensor = rows.attend(None).video
        return rows.video + 0.5 * (dense - rows.video)

    handle.hook("attention_heads", fn)
    want = generate(model, inputs)
    with sequence_parallel(handle):
        handle.reset()
        got = generate(model, inputs)
        with handle.hook("attention_output", lambda *_: None):
            message = refused(lambda: tiny.run(model, inputs))
    return {"far": far(got, want), "seen": set(seen), "message": message}


def refused(fn: Callable[[], Any], kind: type[Exception] = RuntimeError) -> str:
    try:
        fn()
    except kind as error:
        return str(error)
    return ""


def linear() -> dict[str, Any]:
    """Layers of linear attention take the maps of the own heads."""
    from linear_models import save_random_maps

    model, inputs = built("wan", heads=3)
    with tempfile.TemporaryDirectory() as folder:
        maps = save_random_maps(Path(folder) / "maps.safetensors", model, [0], inputs=inputs)
        handle = accelerate(model, Config(linear=maps))
        want = tiny.run(model, inputs)
        with sequence_parallel(handle):
            got = tiny.run(model, inputs)
    return {"far": far([got], [want])}


def cached(kind: str) -> dict[str, Any]:
    """Caches around blocks hold the own rows, and all ranks leave out the same blocks."""
    policies = {
        "taylorseer": TaylorSeer(first_full=1, interval=2, order=1, granularity="block", last_full=0),
        "module": TaylorSeer(first_full=1, interval=2, order=1, granularity="module", last_full=0),
        "model": TaylorSeer(first_full=1, interval=2, order=1, last_full=0),
        "teacache": TeaCache(threshold=0.3, coefficients=(1.0, 0.0), first_full=1, last_full=0),
        "first_block": FirstBlock(threshold=0.2, first_full=1, last_full=0),
    }
    model, inputs = built("wan_ti2v")
    handle = planner_settings.plugged(model, Config(cache=policies[kind]))
    want = generate(model, inputs)
    alone = handle.stats()["cache"]["forecast"]
    with sequence_parallel(handle):
        handle.reset()
        got = generate(model, inputs)
        both = handle.stats()["cache"]["forecast"]
    return {"far": far(got, want), "same steps": both == {step: 2 * n for step, n in alone.items()}, "forecast": alone}


def gradients(family: str, checkpointing: bool) -> dict[str, Any]:
    """The mean over the ranks is the gradient of one process."""
    model, inputs = built(family, heads=3)
    model.train().requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    handle = accelerate(model, Config(attention=tiny.Band()))
    runs = [tiny.at(inputs, t) for t in TIMES[: 1 if checkpointing else 2]]
    want = tiny.gradients(model, runs)
    with sequence_parallel(handle):
        handle.reset()
        got = tiny.gradients(model, runs)
    error = 0.0
    for name, grad in want.items():
        mine = got.get(name, torch.zeros_like(grad))
        dist.all_reduce(mine)
        mine /= dist.get_world_size()
        error = max(error, float((mine - grad).norm()) / (float(grad.norm()) + 1e-6))
    return {"far": error, "names": set(got) == set(want)}


def precision() -> dict[str, Any]:
    """16 bits, and autocast."""
    model, inputs = built("wan")
    model, low = model.to(torch.bfloat16), tiny.cast(inputs, torch.bfloat16)
    handle = accelerate(model)
    want = tiny.run(model, low)
    with sequence_parallel(handle):
        got = tiny.run(model, low)
    return {"far": far([got], [want])}


def positions(family: str) -> dict[str, Any]:
    """Functions of positions get the tables of all rows."""
    model, inputs = built(family, heads=3)
    handle = accelerate(model)
    stock = tiny.run(model, inputs)
    seen = set()

    def turned(step: Any, geometry: Any, tables: Any) -> Any:
        seen.add(geometry.n_video in tables[0].shape)
        dim = list(tables[0].shape).index(geometry.n_video)
        return tuple(table.flip(dim) for table in tables)

    handle.positions(turned)
    want = tiny.run(model, inputs)
    with sequence_parallel(handle):
        got = tiny.run(model, inputs)
        handle.positions(None)
        back = tiny.run(model, inputs)
    return {"far": far([got, back], [want, stock]), "whole": seen == {True}, "changes": tiny.relative(want, stock)}


def compiled(family: str) -> dict[str, Any]:
    """Compiled blocks; compiled under several ranks and before."""
    model, inputs = built(family, heads=3)
    handle = planner_settings.plugged(model, planner_settings.config("draft"))
    want = generate(model, inputs)
    blocks = [block for name in ("blocks", "transformer_blocks") for block in getattr(model, name, [])]
    for block in blocks:
        block.compile(backend="aot_eager")
    with sequence_parallel(handle):
        handle.reset()
        got = generate(model, inputs)
    handle.reset()
    return {"far": far(got + generate(model, inputs), want * 2)}


def streaming() -> dict[str, Any]:
    """A rollout of chunks: every rank keeps the past keys of its own heads."""
    from rollouts import clip_of, model_of

    from vdit_fast.streaming import SelfForcing

    model, rest = model_of("wan")
    handle = accelerate(model)
    settings = SelfForcing(chunk_frames=3, cache_frames=7, sinks=1, timesteps=(1000.0, 500.0), guidance=2.0)
    text = {"negative_prompt_embeds": -rest["encoder_hidden_states"]}
    want = clip_of(handle, settings, rest, frames=11, **text)
    with sequence_parallel(handle):
        got = clip_of(handle, settings, rest, frames=11, **text)
        old = SelfForcing(chunk_frames=3, cache_frames=6, timesteps=(1000.0,), store="pre_rope")
        message = refused(lambda: clip_of(handle, old, rest, frames=6))
    return {"far": far([got], [want]), "message": message}


def refusals() -> dict[str, str]:
    """What cannot be shared says so on all ranks, before anything is exchanged."""
    found = {}
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(subset=RAS()))
    found["subset"] = refused(lambda: sequence_parallel(handle))
    handle.remove()
    handle = accelerate(model)
    with sequence_parallel(handle):
        found["twice"] = refused(lambda: sequence_parallel(handle))
        short = {**inputs, "hidden_states": torch.randn(1, 4, 1, 2, 2)}
        found["short"] = refused(lambda: tiny.run(model, short))
    found["removed"] = refused(lambda: (handle.remove(), sequence_parallel(handle)))
    for family in ("wan_vace", "wan_animate", "ltx2", "latte"):
        model, _ = maybe(family)
        if model is None:  # the test asks for none of it
            continue
        found[family] = refused(lambda model=model: sequence_parallel(accelerate(model)))  # type: ignore[misc]
    model, inputs = tiny.build("allegro")
    sequence_parallel(accelerate(model))
    hidden = {**inputs, "attention_mask": torch.ones(1, 3, 8, 8).index_fill(3, torch.tensor([7]), 0)}
    found["masked"] = refused(lambda: tiny.run(model, hidden))
    return found


def maybe(family: str) -> Any:
    """A tiny model and its inputs; (None, None) where this diffusers has no such family."""
    try:
        return tiny.build(family)
    except pytest.skip.Exception:
        return None, None


def families(names: tuple[str, ...]) -> dict[str, Any]:
    """Every family whose blocks work row by row."""
    found = {}
    for name in names:
        model, inputs = maybe(name)
        if model is None:
            continue
        handle = accelerate(model)
        want = tiny.run(model, inputs)
        with sequence_parallel(handle):
            found[name] = far([tiny.run(model, inputs)], [want])
    return found


def run(cases: list[Case], functions: dict[str, Any] | None = None) -> dict[str, Any]:
    """The results by name; what went wrong as text."""
    functions = globals() if functions is None else functions
    found: dict[str, Any] = {}
    for name, fn, args in cases:
        try:
            found[name] = functions[fn](*args)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def results(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Of all ranks."""
    for rank, each in enumerate(found):
        if isinstance(each[name], str):
            pytest.fail(f"rank {rank}:\n{each[name]}")
    return [each[name] for each in found]
