"""DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation (arXiv 2504.06803; DyDiT, arXiv 2410.03456).

The width of attention and MLP follows from the timestep, the tokens that take the MLP from a router. What is off is not
computed; the released code computes it and multiplies by 0, which is what the fp64 block below does.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from paper_checks import distance
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear

from vdit_fast.dynamic import BlockWidth, DyDiTBlock, TokenSubset, Units, WidthRouter, apply_dydit, width_masks

B, N, C, HEADS = 2, 40, 64, 4
STEPS = torch.linspace(1000, 1, 50)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(28)
    with torch.no_grad():
        yield


def embedding(timesteps):
    angles = timesteps[..., None] * torch.exp(-torch.arange(C // 2) / 6.0)
    return 2 * torch.cat((angles.cos(), angles.sin()), dim=-1)


def block():
    new = DyDiTBlock(C, HEADS)
    for name, parameter in new.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "rate" in name else C**-0.5)
    new.token_selection.mlp_head[2].weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))  # about half of the tokens
    return new


def masked(block, x, condition, t):
    """The released forward: everything is computed, then multiplied by the masks. fp64, but for the choices."""
    masks = [
        torch.cat([torch.ones(len(t), 1), (linear(t, r.router.weight, r.router.bias).sigmoid() > 0.5).float()], 1)
        for r in (block.attn_rate, block.mlp_rate)
    ]
    state = {name: p.double() for name, p in block.named_parameters()}

    def layer(name, y):
        return linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    x = x.double()
    rows = layer("adaLN_modulation.1", torch.nn.functional.silu(condition.double())).unsqueeze(1).chunk(6, -1)
    h = layer_norm(x, (C,), eps=1e-6) * (1 + rows[1]) + rows[0]
    q, k, v = layer("attn.qkv", h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    heads = ((q @ k.mT / (C // HEADS) ** 0.5).softmax(-1) @ v) * masks[0][:, :, None, None]
    x = x + rows[2] * layer("attn.proj", heads.transpose(1, 2).flatten(2))
    selected = block.token_selection(x.float())
    hidden = layer("mlp.fc1", layer_norm(x, (C,), eps=1e-6) * (1 + rows[4]) + rows[3])
    hidden = gelu((hidden.unflatten(-1, (HEADS, -1)) * masks[1][:, None, :, None]).flatten(-2), approximate="tanh")
    return x + selected[..., None] * rows[5] * layer("mlp.fc2", hidden), selected, masks


def test_skipping_is_masking():
    """B2, for heads, hidden groups and tokens at once, with batch items of equal and of different timesteps."""
    seen = set()
    for t in (torch.tensor([900.0, 900.0]), torch.tensor([420.0, 420.0]), torch.tensor([900.0, 60.0])):
        one, x, condition = block(), torch.randn(B, N, C), torch.randn(B, C)
        want, selected, masks = masked(one, x, condition, embedding(t))
        width = one.width(embedding(t))
        assert distance(one(x, condition, width), want) < 2e-6
        assert 0 < selected.float().mean() < 1
        seen |= {tuple(row.tolist()) for mask in masks for row in mask}
        assert (width.heads.items is None) == torch.equal(masks[0][0], masks[0][1])
    assert len(seen) > 3 and all(mask[0] for mask in seen) and not all(all(mask) for mask in seen)


def test_all_on_is_the_dense_block():
    one, x, condition = block(), torch.randn(B, N, C), torch.randn(B, C)
    for router in (one.attn_rate.router, one.mlp_rate.router, one.token_selection.mlp_head[2]):
        router.weight.zero_()
        router.bias.fill_(1)
    width = one.width(embedding(torch.tensor([700.0, 300.0])))
    assert width.heads.all_on and width.groups.all_on
    assert torch.equal(one(x, condition, width), one(x, condition))
    assert TokenSubset.of(torch.ones(B, N, dtype=torch.bool)) is None


def test_without_tokens_the_mlp_is_the_residual():
    one, x, condition = block(), torch.randn(B, N, C), torch.randn(B, C)
    one.token_selection.mlp_head[2].weight.zero_()
    one.token_selection.mlp_head[2].bias.fill_(-1)
    width = one.width(embedding(torch.tensor([420.0, 420.0])))
    got = one(x, condition, width)
    one.mlp.fc2.weight.fill_(torch.nan)  # nobody reads it
    assert torch.equal(one(x, condition, width), got)
    one.token_selection.mlp_head[2].bias.fill_(1)
    assert one(x, condition, width).isnan().all()
    one.adaLN_modulation[1].bias[2 * C : 3 * C] = 0  # and without attention the block is the identity
    one.adaLN_modulation[1].weight[2 * C : 3 * C] = 0
    one.token_selection.mlp_head[2].bias.fill_(-1)
    assert torch.equal(one(x, condition, width), x)


def test_masks_of_a_schedule():
    """Decided for 50 steps at once, or step by step: the same, and by no other input than the timestep."""
    routers = [WidthRouter(C, HEADS) for _ in range(12)]
    pairs = [(r.router.weight, r.router.bias) for r in routers]
    table = embedding(STEPS)
    at_once = width_masks(pairs, table)
    assert at_once == [width_masks(pairs, row[None])[0] for row in table]
    assert at_once[7] == width_masks(pairs, table[7:9].flip(0))[1]  # beside another one in a batch
    for i, router in enumerate(routers):
        assert router(table).tolist() == [list(step[i]) for step in at_once]
    assert all(mask[0] for step in at_once for mask in step) and len({mask for step in at_once for mask in step}) > 4


def draw_routers(model, family):
    """Random routers for every block of a tiny model, half of the units and tokens on."""
    random, found = torch.Generator().manual_seed(5), {}
    heads = 2
    lists = {"wan": ["blocks"], "allegro": ["transformer_blocks"]}
    lists["latte"] = ["transformer_blocks", "temporal_transformer_blocks"]
    for name in lists[family]:
        for i, inner in enumerate(getattr(model, name)):
            mlp = inner.ffn if family == "wan" else inner.ff
            dim = mlp.net[2].out_features
            shapes = {"attn_rate.router": (heads - 1, dim), "mlp_rate.router": (3, dim)}
            shapes |= {"token_selection.mlp_head.0": (dim // 16 or 1, dim)}
            shapes |= {"token_selection.mlp_head.2": (1, dim // 16 or 1)}
            for part, shape in shapes.items():
                found[f"{name}.{i}.{part}.weight"] = 3 * torch.randn(shape, generator=random)
                found[f"{name}.{i}.{part}.bias"] = torch.randn(shape[0], generator=random)
    return found


@pytest.mark.parametrize("family", ["wan", "allegro", "latte"])
def test_on_models_of_diffusers(family):
    model, inputs = tiny.build({"wan": "wan_t2v"}.get(family, family))
    stock = tiny.run(model, inputs)
    routers = draw_routers(model, family)
    with apply_dydit(model, routers) as handle:
        on_the_fly = []
        for t in STEPS[::7]:
            on_the_fly.append(tiny.run(model, inputs | {"timestep": torch.full_like(inputs["timestep"], int(t))}))
        assert 0 < handle.report()["flop"] < 0.9 * handle.report()["dense_flop"]
        handle.precompute(torch.tensor([int(t) for t in STEPS[::7]]).to(inputs["timestep"].dtype))
        for t, want in zip(STEPS[::7], on_the_fly, strict=True):
            got = tiny.run(model, inputs | {"timestep": torch.full_like(inputs["timestep"], int(t))})
            assert torch.equal(got, want)
    assert torch.equal(tiny.run(model, inputs), stock)
    always = {name: torch.zeros_like(x) + 9 * ("bias" in name) for name, x in routers.items()}
    with apply_dydit(model, always) as handle:
        assert torch.equal(tiny.run(model, inputs), stock)
        report = handle.report()
        routed = sum(x.numel() for name, x in routers.items() if "token" in name and "weight" in name)
        assert report["dense_flop"] <= report["flop"] < 1.3 * report["dense_flop"] and routed


def test_per_item_units_are_computed_once():
    units = Units.of([(True, False, True, False), (True, True, False, False)], torch.device("cpu"))
    assert units.on == (True, True, True, False) and units.count == 3
    assert units.items.tolist() == [[True, False, True], [True, True, False]]
    assert Units.of([(True, False)] * 3, torch.device("cpu")).items is None
    assert BlockWidth(units, units).heads is units
