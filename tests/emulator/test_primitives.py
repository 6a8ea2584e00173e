"""Every wrapper of csrc/arch in its emulated form against plain indexing, under every schedule."""

from __future__ import annotations

import itertools
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulator import LAZY_FORWARD, ROOT, Policy, run_case, stats

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def words(*shape: int, seed: int = 0) -> Tensor:
    """Random int32, the bits of which stand for anything."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()


def test_generated_wrappers_are_up_to_date() -> None:
    folder = ROOT / "csrc" / "arch"
    generator = runpy.run_path(str(folder / "generate_wgmma.py"))
    assert (folder / "wgmma_ptx.h").read_text() == generator["generate"]()


PROBE = """
#include "emulator/selftest/primitives.h"
using namespace vdit::selftest;
#define WGMMA(type, n, a, b, r) \\
  template __global__ void vdit::selftest::warpgroup_mma<arch::type, n, a, b, r>(const __grid_constant__ Io);
WGMMA(BF16, 8, 0, 0, true) WGMMA(F16, 96, 1, 1, false) WGMMA(BF16, 176, 0, 1, true) WGMMA(BF16, 256, 0, 1, false)
template __global__ void vdit::selftest::warp_mma<arch::BF16>(const __grid_constant__ Io);
template __global__ void vdit::selftest::warp_mma<arch::F16>(const __grid_constant__ Io);
"""


@pytest.mark.slow
def test_ptx_bodies_assemble(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "probe.cu"
    source.write_text(PROBE)
    command = [nvcc, "-std=c++17", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"), "-Xptxas", "-v"]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", "-c", str(source), "-o", str(tmp_path / "probe.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in report, report
    assert "C75" not in report and report.count("0 bytes spill stores") == report.count("spill stores"), report


def test_numbers() -> None:
    x = torch.cat([random(500) * 40, torch.tensor([0.0, -0.0, -126.0, -127.0, -200.0, 130.0, -torch.inf, torch.inf])])
    x = torch.cat([x, torch.tensor([torch.nan, 65519.0, 65520.0, 3.4e38, 1.00390625, 1.01171875])])
    y = torch.cat([random(len(x) - 3, seed=1), torch.tensor([torch.nan, 0.0, 1e-40])])
    powers, halves, back = torch.zeros(2, len(x)), torch.zeros(2, len(x), dtype=torch.int32), torch.zeros(len(x), 4)
    run_case("numbers", [x, y], [powers, halves, back], [len(x)])
    wanted = torch.exp2(x.double())
    wanted[wanted < torch.finfo(torch.float32).tiny] = 0  # .ftz
    torch.testing.assert_close(powers[0], wanted.float(), rtol=3e-7, atol=0, equal_nan=True)
    flushed = torch.where(y.abs() < torch.finfo(torch.float32).tiny, 0.0, y)
    torch.testing.assert_close(powers[1], torch.log2(flushed.double()).float(), rtol=3e-7, atol=3e-7, equal_nan=True)
    for i, dtype in enumerate(TYPES.values()):
        pairs = torch.stack([x, y], 1).to(dtype)
        got = halves[i].view(dtype).view(-1, 2)
        torch.testing.assert_close(got, pairs, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back[:, 2 * i : 2 * i + 2], pairs.float(), rtol=0, atol=0, equal_nan=True)


def test_e4m3() -> None:
    """Against torch's conversions: every code, halfway cases, magnitudes up to 448, NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    finite = numbers[:127]
    halfway = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([finite, halfway, halfway.nextafter(torch.zeros(126)), halfway.nextafter(torch.full((126,), 448.0))])
    x = torch.cat([x, random(800).exp2(), torch.tensor([torch.nan, 1e-40, 2.0**-10, 448.0, 447.99])])
    x = torch.cat([x.clamp_max(448), -x.clamp_max(448)])
    again = codes.repeat(-(-len(x) // 256))[: len(x)].contiguous()
    out, back = torch.zeros(len(x), dtype=torch.uint8), torch.zeros(len(x))
    run_case("e4m3", [x, again], [out, back], [len(x)])
    wanted = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(out, wanted.where(~x.isnan(), 0x7F))
    torch.testing.assert_close(back, again.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(back)[:128], torch.signbit(numbers)[:128])


def test_global_widths() -> None:
    data, out = words(64 * 6), torch.zeros(64 * 6, dtype=torch.int32)
    run_case("global_widths", [data], [out])
    assert torch.equal(out.view(64, 6), data.view(64, 6).flip(0))


def test_bits() -> None:
    data = torch.cat(
        [torch.tensor([0, 1, -1, -(2**31)], dtype=torch.int32), words(60) >> (torch.arange(60) % 31).int()]
    )
    out = torch.zeros(2, len(data), dtype=torch.int32)
    run_case("bits", [data], [out], [len(data)])
    unsigned = [int(x) % 2**32 for x in data]
    assert out.tolist() == [[x.bit_count() for x in unsigned], [x.bit_length() - 1 for x in unsigned]]


@pytest.mark.parametrize("store, load", list(itertools.product((2, 4, 8, 16), repeat=2)))
def test_shared_memory_widths(store: int, load: int) -> None:
    data, out = words(64, 8), torch.zeros(64, 8, dtype=torch.int32)
    run_case("shared_widths", [data], [out], [store, load])
    assert torch.equal(out, data.flip(0))


@pytest.mark.parametrize("lane_mask, lane", [(1, 0), (2, 31), (16, 7), (31, 12)])
def test_collectives(policy: Policy, lane_mask: int, lane: int) -> None:
    data = words(3, 32).abs()
    out, total = torch.zeros(3, 32, 5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run_case("collectives", [data], [out, total], [lane_mask, lane], policy)
    index = torch.arange(32)
    assert torch.equal(out[..., 0], data[:, index ^ lane_mask])
    assert torch.equal(out[..., 1], data[:, [lane] * 32])
    ballot = ((data % 3 == 0).long() << index).sum(1)
    assert torch.equal(out[..., 2].long() & 0xFFFFFFFF, ballot[:, None].expand(3, 32))
    assert torch.equal(out[..., 3].sum(1), torch.ones(3, dtype=torch.long))
    same = (data[:, :, None] % 5 == data[:, None] % 5).long()
    assert torch.equal(out[..., 4].long() & 0xFFFFFFFF, (same << index).sum(-1))
    assert int(total) & 0xFFFFFFFF == int(data.long().sum()) & 0xFFFFFFFF


def test_shared_counters(policy: Policy) -> None:
    data = words(96)
    found, totals = torch.zeros(96, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    run_case("shared_counters", [data], [found, totals], policy=policy)
    wrap = 2**32
    for slot in range(8):
        mine = (data % 8 == slot).nonzero().flatten()
        # In whatever order the threads came: each found the sum of those before it.
        steps = sorted((int(found[i]) % wrap, int(data[i]) % wrap) for i in mine)
        chain = {before: value for before, value in steps}
        at = 0
        for _ in steps:
            at = (at + chain[at]) % wrap
        assert at == int(totals[slot]) % wrap == sum(value for _, value in steps) % wrap


def test_named_barriers(policy: Policy) -> None:
    data, out = words(5, 32).abs() % 1000, torch.zeros(3, 32, dtype=torch.int32)
    run_case("named_barriers", [data], [out], [5], policy)
    wanted = torch.zeros(32, dtype=torch.int64)
    for row in data:
        wanted = wanted * 31 + row
    assert torch.equal(out[1].long(), wanted) and torch.equal(out[2].long(), wanted) and not out[0].any()


def test_asynchronous_copies(policy: Policy) -> None:
    data = words(96, 4)
    sizes = torch.randint(0, 17, (96,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    sizes[32:64] = torch.where(sizes[32:64] > 8, 16, 0)
    out = torch.zeros(3, 32, 4, dtype=torch.int32)
    run_case("copies", [data, sizes], [out], policy=policy)
    wanted = data.view(torch.uint8).view(96, 16).clone()
    wanted[torch.arange(16) >= sizes[:, None]] = 0
    assert torch.equal(out.view(torch.uint8).view(96, 16), wanted)


@pytest.mark.parametrize("load, store", list(itertools.product((0, 1), repeat=2)))
def test_matrix_loads_and_stores(policy: Policy, load: int, store: int) -> None:
    data = words(32, 4).view(torch.int16).view(4, 8, 8)  # 4 matrices of 8 rows
    registers, back = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 4, dtype=torch.int32)
    run_case("matrices", [data], [registers, back], [load, store], policy)
    seen = data.mT if load else data
    lane = torch.arange(32)
    for m in range(4):
        pair = seen[m, lane // 4][lane[:, None], (2 * (lane % 4))[:, None] + torch.arange(2)]
        assert torch.equal(registers[:, m].contiguous().view(torch.int16).view(32, 2), pair)
    stored = data if load == store else data.mT
    assert torch.equal(back.view(torch.int16).view(4, 8, 8), stored)


def a_fragment(a: Tensor) -> Tensor:
    """[16, 16] to the registers of a warp, [32, 4] pairs: PTX ISA, fragments of mma.m16n8k16."""
    lane, i = torch.arange(32)[:, None], torch.arange(4)
    row, k = lane // 4 + 8 * (i & 1), 2 * (lane % 4) + 8 * (i >> 1)
    return torch.stack([a[row, k], a[row, k + 1]], -1)


@pytest.mark.parametrize("name", TYPES)
def test_warp_matrix_product(policy: Policy, name: str) -> None:
    dtype = TYPES[name]
    a, b, c = random(16, 16, dtype=dtype), random(8, 16, dtype=dtype, seed=1), random(16, 8, seed=2)
    lane = torch.arange(32)[:, None]
    i2, i4 = torch.arange(2), torch.arange(4)
    k = 2 * (lane % 4) + 8 * i2
    b_registers = torch.stack([b[lane // 4, k], b[lane // 4, k + 1]], -1)
    row, column = lane // 4 + 8 * (i4 >> 1), 2 * (lane % 4) + (i4 & 1)
    out = torch.zeros(32, 4)
    run_case(f"mma_{name}", [a_fragment(a).contiguous(), b_registers, c[row, column]], [out], policy=policy)
    wanted = a.double() @ b.double().T + c
    torch.testing.assert_close(out.double(), wanted[row, column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_copy", (0, 1))
def test_ring_of_stages(policy: Policy, by_copy: int) -> None:
    rounds = 7
    data, out = words(rounds, 32, 4), torch.zeros(2, rounds, 32, 4, dtype=torch.int32)
    run_case("ring", [data], [out], [rounds, by_copy], policy)
    assert torch.equal(out, data.flip(1).expand(2, -1, -1, -1))


def swizzled(address: Tensor, span: int) -> Tensor:
    """PTX ISA, shared memory swizzling modes: bits 4.. of an address are xored with bits 7.. ."""
    return address ^ ((address >> 7 & (span // 16 - 1)) << 4) if span else address


@pytest.mark.parametrize("corner", [(0, 0, 0, 0), (8, 3, 1, 1), (-8, -2, -1, 0), (56, 17, 2, 1), (-200, 0, 0, 0)])
@pytest.mark.parametrize("rank, elem, span", [(2, 2, 128), (3, 2, 64), (4, 2, 128), (4, 2, 32), (4, 4, 128), (3, 4, 0)])
def test_tma(policy: Policy, rank: int, elem: int, span: int, corner: tuple[int, ...]) -> None:
    dim, box = [72, 20, 3, 2][:rank], [max(span or 48, 16) // elem, 12, 2, 1][:rank]
    dtype = torch.int16 if elem == 2 else torch.int32
    count = 72 * 20 * 3 * 2
    data = (torch.arange(count) + 1).to(dtype)
    sizes = dim + [1] * (4 - rank)
    strides = [72 * elem, 72 * 20 * elem, 72 * 20 * 3 * elem]
    numbers = torch.tensor([*sizes, *strides, *box, *[1] * (4 - rank)])
    total = elem * int(torch.tensor(box).prod())
    out, stored = torch.zeros(total, dtype=torch.uint8), torch.zeros(count, dtype=dtype)
    to = (-4, 5, 0, 1)
    swizzle = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    arguments = [rank, total, *corner, *to, swizzle, elem]
    run_case("tma", [data, numbers], [out, stored], arguments, policy)

    full = data.view(2, 3, 20, 72)[tuple([0] * (4 - rank))]
    reversed_box = box[::-1]
    wanted = torch.zeros(reversed_box, dtype=dtype)
    written = torch.zeros_like(full)
    for position in itertools.product(*(range(n) for n in reversed_box)):
        source = [p + c for p, c in zip(position, corner[:rank][::-1], strict=True)]
        if all(0 <= x < n for x, n in zip(source, full.shape, strict=True)):
            wanted[position] = full[tuple(source)]
    place = swizzled(torch.arange(total // elem) * elem, span) // elem
    got = out.view(dtype)[place].view(reversed_box)
    assert torch.equal(got, wanted)
    if rank < 4:
        return
    bumped = (wanted.contiguous().view(torch.int32) + 1).view(dtype)  # the kernel adds 1 to every 32-bit word
    for position in itertools.product(*(range(n) for n in reversed_box)):
        target = [p + c for p, c in zip(position, to[::-1], strict=True)]
        if all(0 <= x < n for x, n in zip(target, full.shape, strict=True)):
            written[tuple(target)] = bumped[position]
    assert torch.equal(stored.view(full.shape), written)


K = 32


def k_major(matrix: Tensor) -> tuple[Tensor, int, int, int]:
    """[rows, 32] as rows of 64 bytes swizzled in their 64-byte span: bytes, lbo, sbo, step per k16."""
    rows = len(matrix)
    byte = torch.arange(rows)[:, None] * 64 + torch.arange(K) * 2
    out = torch.zeros(rows * K, dtype=matrix.dtype)
    out[swizzled(byte, 64).flatten() // 2] = matrix.flatten()
    return out, 16, 512, 32


def mn_major(matrix: Tensor) -> tuple[Tensor, int, int, int]:
    """[rows, 32] with 8 rows to a 16-byte chunk, unswizzled: chunks of 8 k side by side."""
    rows = len(matrix)
    row, k = torch.arange(rows)[:, None], torch.arange(K)
    chunk = (row // 8) * (K // 8) + k // 8  # 128 bytes: 8 k of 8 rows each
    out = torch.zeros(rows * K, dtype=matrix.dtype)
    out[(chunk * 64 + k % 8 * 8 + row % 8).flatten()] = matrix.flatten()
    return out, 128, 128 * (K // 8), 256


SHAPES = [("bf16", n) for n in (8, 64, 96, 128, 176, 256)] + [("f16", 64), ("f16", 128)]


@pytest.mark.parametrize("form", ["00", "01", "11", "r0", "r1"])
@pytest.mark.parametrize("name, columns", SHAPES)
def test_warpgroup_matrix_product(policy: Policy, name: str, columns: int, form: str) -> None:
    dtype = TYPES[name]
    a, b, c = random(64, K, dtype=dtype), random(columns, K, dtype=dtype, seed=1), random(64, columns, seed=2)
    lay_a, lay_b = (mn_major if flag == "1" else k_major for flag in form)
    bytes_a, lbo_a, sbo_a, step_a = lay_a(a)
    bytes_b, lbo_b, sbo_b, step_b = lay_b(b)
    offset = 8192
    shared = torch.zeros(offset // 2 + len(bytes_b), dtype=dtype)
    shared[: len(bytes_a)], shared[offset // 2 :] = bytes_a, bytes_b
    swizzles = [0 if flag == "1" else 2 for flag in form]
    t, i = torch.arange(128)[:, None], torch.arange(columns // 2)
    row, column = 16 * (t // 32) + t % 32 // 4 + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * (t % 4) + (i & 1)
    # [4 warps, 2 k steps, 32 lanes, 4 registers] to [128 threads, 8 registers]
    fragments = torch.stack([torch.stack([a_fragment(a[16 * w : 16 * w + 16, 16 * s : 16 * s + 16]) for s in range(2)])
                             for w in range(4)])  # fmt: skip
    registers = fragments.transpose(1, 2).contiguous()
    for accumulate in (0, 1):
        out = torch.zeros(128, columns // 2)
        numbers = [offset, lbo_a, sbo_a, step_a, lbo_b, sbo_b, step_b, *swizzles, 2 * len(shared), accumulate]
        run_case(f"wgmma_{name}_{columns}_{form}", [shared, registers, c[row, column]], [out], numbers, policy)
        wanted = a.double() @ b.double().T + accumulate * c
        torch.testing.assert_close(out.double(), wanted[row, column], rtol=1e-5, atol=2e-5)


def test_register_pool(policy: Policy) -> None:
    out = torch.zeros(384, dtype=torch.int32)
    run_case("registers", [], [out], policy=policy)
    assert torch.equal(out, torch.arange(384).int() // 128)


def test_counters() -> None:
    stats("selftest")
    test_warp_matrix_product(LAZY_FORWARD, "bf16")
    counted = stats("selftest")
    assert counted.blocks == 1 and counted.mma == 1 and "mma 1" in str(counted)
