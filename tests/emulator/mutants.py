"""Planted bugs, and the tests that must fail for each: the tests of the tests.

A mutant is a textual patch of one file of csrc; nothing in the kernels knows of it. This file has those of the
emulator and of the wrappers. Those of a kernel are in ``mutants_<kernel>.py``: tuples (name, path under csrc or file
in csrc/kernels/attention, old text, new text, pytest -k expression in test_forward_<kernel>.py). run_mutants.py plants
them one after another.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    group: str  # the library it is built into: "selftest", "attention"
    name: str
    file: str  # relative to csrc
    old: str  # occurs exactly once
    new: str
    tests: str  # file in this folder
    select: str = ""  # pytest -k expression

    def apply(self, csrc: Path) -> str:
        """Patch the file under ``csrc``; returns its old contents."""
        path = csrc / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"mutant {self.name!r}: {text.count(self.old)} places in {self.file}, expected one")
        path.write_text(text.replace(self.old, self.new))
        return text


def _emulator(name: str, file: str, old: str, new: str, select: str, tests: str = "test_primitives.py") -> Mutant:
    return Mutant("selftest", name, file, old, new, tests, select)


ALARMS = "test_emulator_alarms.py"
AMPERE, MEMORY, WARP, TMA = (f"emulator/{name}.cpp" for name in ("ampere", "memory", "warp", "tma"))
MBARRIER, WGMMA, KERNELS = "emulator/mbarrier.cpp", "emulator/wgmma.cpp", "emulator/selftest/primitives.h"

EMULATOR = [
    # ---- what an instruction computes
    _emulator(
        "ldmatrix.trans takes the plain element",
        AMPERE,
        "row[2 * pair] + 2 * group, 2);\n        memcpy(&hi",
        "row[group] + 4 * pair, 2);\n        memcpy(&hi",
        "matrix_loads",
    ),
    _emulator(
        "stmatrix.trans swaps the rows of a pair",
        AMPERE,
        "memcpy(row(m, 2 * pair) +",
        "memcpy(row(m, 2 * pair + 1) +",
        "matrix_loads",
    ),
    _emulator(
        "A registers 1 and 2 of mma swapped",
        AMPERE,
        "group + 8 * (i & 1), k = 2 * pair + 8 * (i >> 1)",
        "group + 8 * (i >> 1), k = 2 * pair + 8 * (i & 1)",
        "warp_matrix",
    ),
    _emulator(
        "fp16 read as bf16",
        "emulator/internal.h",
        "return type == DT::BF16 ? from_bf16(h) : from_f16(h);",
        "return (void)type, from_bf16(h);",
        "warp_matrix",
    ),
    _emulator(
        "match.any also takes other values",
        WARP,
        "->value == own->value) own->result",
        "->value >= own->value) own->result",
        "collectives",
    ),
    _emulator(
        "cp.async does not zero-fill",
        AMPERE,
        "memset(dst + op.src_bytes, 0, op.bytes - op.src_bytes);",
        "",
        "asynchronous_copies",
    ),
    _emulator(
        "cp.async.wait_group waits for one group less",
        AMPERE,
        "copy_groups.size()) > groups",
        "copy_groups.size()) > groups + 1",
        "asynchronous_copies",
    ),
    _emulator("shfl ignores bit 4 of the mask", WARP, "return lane ^ a;", "return lane ^ (a & 15);", "collectives"),
    _emulator(
        "ballot forgets lane 0",
        WARP,
        "for (int i = 0; i < 32; ++i)\n      if ((m >> i & 1) && static_cast",
        "for (int i = 1; i < 32; ++i)\n      if ((m >> i & 1) && static_cast",
        "collectives",
    ),
    _emulator(
        "64-byte swizzle of one bit",
        "emulator/internal.h",
        "(address >> 7 & 3) << 4",
        "(address >> 7 & 1) << 4",
        "tma or warpgroup",
    ),
    _emulator(
        "TMA reads rows before the tensor", TMA, "inside = inside && x >= 0 && x <", "inside = inside && x <", "tma"
    ),
    _emulator(
        "TMA stores columns before the tensor",
        TMA,
        "if (x < 0 || x >= int64_t(map.dim[0])) continue;",
        "if (x >= int64_t(map.dim[0])) continue;",
        "tma",
    ),
    _emulator(
        "TMA takes the box as rows of another length",
        TMA,
        "fn(smem + r * map.box[0] * map.elem",
        "fn(smem + r * 128",
        "tma",
    ),
    _emulator("wgmma always accumulates", WGMMA, "if (!op.accumulate)", "if (false)", "warpgroup"),
    _emulator(
        "MN-major strides swapped",
        WGMMA,
        "chunk * d.stride + k / 8 * d.leading",
        "chunk * d.leading + k / 8 * d.stride",
        "warpgroup",
    ),
    _emulator(
        "wgmma's A rows all those of warp 0",
        WGMMA,
        "const uint32_t row0 = 16 * warp_in_group;",
        "const uint32_t row0 = 0 * warp_in_group;",
        "warpgroup",
    ),
    _emulator(
        "accumulator rows swapped", WGMMA, "8 * (i >> 1 & 1)) * columns", "8 * (~i >> 1 & 1)) * columns", "warpgroup"
    ),
    _emulator(
        "descriptor offsets swapped",
        "arch/arch.h",
        "uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32",
        "uint64_t(sbo >> 4) << 16 | uint64_t(lbo >> 4) << 32",
        "warpgroup",
    ),
    _emulator("ex2 keeps subnormal results", "arch/arch_emu.h", "flush(exp2f(flush(x)))", "exp2f(x)", "numbers"),
    _emulator(
        "halves of a pair swapped",
        "arch/arch_emu.h",
        "emu::to_bf16(lo) | uint32_t(emu::to_bf16(hi)) << 16",
        "emu::to_bf16(hi) | uint32_t(emu::to_bf16(lo)) << 16",
        "numbers",
    ),
    _emulator(
        "phase completes before the bytes came",
        MBARRIER,
        "if (m.pending || m.tx) {",
        "if (m.pending) {",
        "tma or right",
        ALARMS,
    ),
    _emulator(
        "arrival by cp.async before it landed",
        TMA,
        "land_copies(blk->threads[arrival.thread], arrival.copies);\n",
        "",
        "ring",
    ),
    # ---- what is an alarm
    _emulator(
        "a divergent collective is let through", WARP, "c != nullptr && (c->mask", "false && (c->mask", "alarms", ALARMS
    ),
    _emulator(
        "half a warp at a barrier is let through",
        WARP,
        "if (live && b.per_warp[w] % live)",
        "if (live && false)",
        "alarms",
        ALARMS,
    ),
    _emulator(
        "registers without end",
        WARP,
        "if (more <= 0 || more > free_registers()) continue;",
        "if (more <= 0) continue;",
        "register_pool",
        ALARMS,
    ),
    _emulator("stores need no proxy fence", MEMORY, "    if (writer)\n", "    if (false)\n", "broken", ALARMS),
    _emulator(
        "cp.async needs no proxy fence", MEMORY, "if (writer == kByCopy) fail", "if (false) fail", "wgmma", ALARMS
    ),
    _emulator(
        "accumulators may be written in flight",
        WGMMA,
        "if (policy.poison && bits != kPoison)",
        "if (false && bits)",
        "wgmma",
        ALARMS,
    ),
    _emulator("A registers may change in flight", WGMMA, "if (policy.check_areg &&", "if (false &&", "wgmma", ALARMS),
    _emulator("no wgmma fence needed", WGMMA, "if (!warp.fenced) fail", "if (false) fail", "wgmma", ALARMS),
    _emulator(
        "loads may be left in flight", WARP, "if (!blk->loads.empty()) return", "if (false) return", "pipelines", ALARMS
    ),
    _emulator(
        "copies leave no poison",
        AMPERE,
        "else if (policy.poison)\n    memset(blk->smem + dst, 0xff, bytes);",
        "else if (policy.poison)\n    memset(blk->smem + dst, 0xff, 0 * bytes);",
        "missing_waits",
        ALARMS,
    ),
    _emulator(
        "inputs may be written",
        "emulator/guarded.cpp",
        "mapped_ - 2 * kPage, PROT_READ);",
        "mapped_ - 2 * kPage, PROT_READ | PROT_WRITE);",
        "alarms",
        ALARMS,
    ),
    # ---- kernels written with the wrappers
    _emulator(
        "writer does not wait for the readers",
        KERNELS,
        "if (r > 0) arch::bar_sync<3, 96>();  // both readers are done\n",
        "",
        "named_barriers",
    ),
    _emulator(
        "ring overwrites a stage that is being read",
        KERNELS,
        "arch::mbar_wait(empty + 8 * s, (r / 2 & 1) ^ 1);\n",
        "",
        "ring",
    ),
    _emulator(
        "ring frees a stage before it is read",
        KERNELS,
        "const uint4 v = arch::lds128(stage + 512 * s + 16 * (31 - lane));\n    arch::syncwarp();\n"
        "    if (lane == 0) arch::mbar_arrive(empty + 8 * s);",
        "if (lane == 0) arch::mbar_arrive(empty + 8 * s);\n    arch::syncwarp();\n"
        "    const uint4 v = arch::lds128(stage + 512 * s + 16 * (31 - lane));",
        "ring",
    ),
    _emulator(
        "box changed before every thread has read it",
        KERNELS,
        "if (rank != 4) return;\n  arch::syncthreads();",
        "if (rank != 4) return;",
        "tma",
    ),
    _emulator(
        "product without a proxy fence",
        KERNELS,
        "arch::fence_proxy_async();\n  arch::syncthreads();\n  arch::fence_regs",
        "arch::syncthreads();\n  arch::fence_regs",
        "warpgroup",
    ),
    _emulator("product is not committed", KERNELS, "  arch::wgmma_commit();\n", "", "warpgroup"),
]


def _of_kernel(path: Path) -> list[Mutant]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = path.stem.removeprefix("mutants_")
    tests = f"test_forward_{kernel}.py"
    found = []
    for row in module.MUTANTS:
        if isinstance(row, Mutant):
            found.append(row)
        else:
            name, file, old, new, select = row
            path_in_csrc = file if "/" in file else f"kernels/attention/{file}"
            found.append(Mutant("attention", f"{kernel}: {name}", path_in_csrc, old, new, tests, select))
    return found


def all_mutants() -> list[Mutant]:
    """The emulator's own and those of every kernel."""
    return EMULATOR + [mutant for path in sorted(FOLDER.glob("mutants_*.py")) for mutant in _of_kernel(path)]
