"""Video Diffusion Models: A Survey (arXiv 2405.03150).

A taxonomy computes nothing; it asks of a library which of its architectures are served. docs/coverage.md answers, and
here it is held to that: the classes exist, accelerate() does what the page says, and every paper has its test.
"""

from __future__ import annotations

import ast
import copy
import re
from typing import Any

import pytest
import tiny
import torch
from coverage_page import ROOT, classes, table

import vdit_fast

diffusers = pytest.importorskip("diffusers")

ARCHITECTURES = {name: row[-1] for row in table("By architecture") for name in classes(row[2])}
PAPERS = table("By paper")
GROUPS = {"L0", "L1a", "L1b", "L1c", *(f"L{i}" for i in range(2, 11))}


def tiny_2d_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip


def tiny_3d_unet() -> Any:
    return diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip


def tiny_image_dit() -> Any:
    return diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)


@pytest.mark.skipif(diffusers.__version__.startswith("0.35."), reason="the page names classes of newer versions too")
def test_every_class_exists():
    assert len(ARCHITECTURES) >= 10
    for name in ARCHITECTURES:
        assert hasattr(diffusers, name) or hasattr(vdit_fast, name), f"docs/coverage.md names {name}, which is nowhere"
    for name in (name for row in table("By architecture") for cell in row for name in classes(cell)):
        assert hasattr(diffusers, name) or hasattr(vdit_fast, name), f"docs/coverage.md names {name}, which is nowhere"


def test_served_architectures_are_those_that_the_other_tests_serve():
    """The tiny models of tests/accelerate are all that is proven to be served."""
    proven = {type(build()[0]).__name__ for build in tiny.BUILDERS.values()}
    told = {name for name, served in ARCHITECTURES.items() if served == "`accelerate`"}
    assert told == proven & set(ARCHITECTURES), "docs/coverage.md: By architecture"
    assert not proven - set(ARCHITECTURES), "docs/coverage.md has no row for these served classes"


def forward(model: Any) -> torch.Tensor:
    """One forward on random inputs of 4 frames where there are frames."""
    size = (2, 4, 4, 8, 8) if "3D" in type(model).__name__ else (2, 4, 8, 8)
    torch.manual_seed(3)
    latents, text = torch.randn(size), torch.randn(2, 5, 16)
    with torch.no_grad():
        if isinstance(model, diffusers.DiTTransformer2DModel):
            return model(latents, timestep=torch.tensor([3, 3]), class_labels=torch.tensor([1, 2]))[0]
        return model(latents, torch.tensor(3), text)[0]


@pytest.mark.parametrize("build", [tiny_2d_unet, tiny_3d_unet, tiny_image_dit])
def test_architectures_without_an_adapter(build):
    """accelerate() leaves them as they are and says so; patch_sdpa serves all of their attention, as the page says."""
    model = build().eval()
    assert ARCHITECTURES[type(model).__name__] == "`patch_sdpa`"
    stock, weights = forward(model), copy.deepcopy(model.state_dict())
    before = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    with pytest.raises(vdit_fast.NothingServed) as caught:
        vdit_fast.accelerate(model)
    assert caught.value.components == {"": type(model).__name__}
    assert {item.name for item in caught.value.skipped} == set(before) and all(x.reason for x in caught.value.skipped)
    assert all(model.get_submodule(name).processor is processor for name, processor in before.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(forward(model), stock)
    with vdit_fast.patch_sdpa(model) as handle:
        assert tiny.relative(forward(model), stock) < 1e-5
        assert sum(handle.stats()["served"].values()) == len(before) and not handle.stats()["passed"]


def test_every_paper_has_a_row():
    assert sorted(int(row[0]) for row in PAPERS) == list(range(1, 50))
    for _, _, needs, test in PAPERS:
        group = re.fullmatch(r"not yet: (\w+)", test)
        assert group is None or (group[1] in GROUPS and needs.startswith(group[1])), test


def test_every_test_exists_and_names_its_paper():
    named = {}
    for number, paper, _, test in PAPERS:
        if test.startswith("not yet"):
            continue
        found = re.fullmatch(r"`(tests/papers/test_\w+\.py)`", test)
        assert found, f"paper {number}: {test!r} is neither a test file nor 'not yet: GROUP'"
        path = ROOT / found[1]
        assert path.is_file(), f"paper {number}: {found[1]} does not exist"
        tree = ast.parse(path.read_text())
        told = " ".join((ast.get_docstring(tree) or "").split()).lower()
        names = [part.strip(" ()").lower() for part in paper.split(" (")]
        assert any(name in told for name in names), f"paper {number}: {found[1]} does not name {paper!r}"
        assert any(isinstance(x, ast.FunctionDef) and x.name.startswith("test_") for x in tree.body), found[1]
        named[found[1]] = number
    here = {f"tests/papers/{path.name}" for path in (ROOT / "tests" / "papers").glob("test_*.py")}
    assert not here - set(named), "docs/coverage.md, By paper, does not name these tests"
