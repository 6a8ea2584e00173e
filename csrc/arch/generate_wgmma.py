"""Writes wgmma_ptx.h, the wgmma.mma_async wrappers: one per element type, operand form and number of columns.

python csrc/arch/generate_wgmma.py
"""

from pathlib import Path

COLUMNS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
TYPES = {"BF16": "bf16", "F16": "f16"}
TARGET = Path(__file__).with_name("wgmma_ptx.h")

HEAD = """\
// Written by generate_wgmma.py; do not edit.
// PTX ISA "wgmma.mma_async": D (m64, N columns, fp32, N / 2 registers per thread) (+)= A * B with k16.
// ss: A and B in shared memory; rs: A in registers. A transpose flag of 1 means MN-major. accumulate 0: D = A * B.
// clang-format off
#pragma once

namespace arch {

template <class T, int TransposeA, int TransposeB, int R>
struct WgmmaSs;
template <class T, int TransposeB, int R>
struct WgmmaRs;
"""

TAIL = """
template <class T, int TransposeA, int TransposeB, int R>
VD_DEV void wgmma_ss(float (&d)[R], uint64_t desc_a, uint64_t desc_b, int accumulate) {
  WgmmaSs<T, TransposeA, TransposeB, R>::run(d, desc_a, desc_b, accumulate);
}
template <class T, int TransposeB, int R>
VD_DEV void wgmma_rs(float (&d)[R], const uint32_t* a, uint64_t desc_b, int accumulate) {
  WgmmaRs<T, TransposeB, R>::run(d, a, desc_b, accumulate);
}

}  // namespace arch
"""


def wrapped(items: list[str], indent: str) -> str:
    """Comma-separated items, 16 on a line."""
    lines = [", ".join(items[i : i + 16]) for i in range(0, len(items), 16)]
    return f",\n{indent}".join(lines)


def registers(count: int) -> str:
    """The operand list {%0, ...} as adjacent string literals."""
    names = [f"%{i}" for i in range(count)]
    lines = [",".join(names[i : i + 32]) for i in range(0, count, 32)]
    return ',"\n        "'.join(lines)


def instruction(tag: str, name: str, columns: int, from_registers: bool) -> str:
    """One specialisation."""
    count = columns // 2
    outputs = wrapped([f'"+f"(d[{i}])' for i in range(count)], " " * 10)
    op = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{name}.{name}"
    if from_registers:
        a_text = "{" + ",".join(f"%{count + i}" for i in range(4)) + "}"
        flag, last = count + 5, f"%{count + 6}"
        head = f"template <int TransposeB>\nstruct WgmmaRs<{tag}, TransposeB, {count}> {{"
        a_type, a_name, a_inputs = "const uint32_t*", "a", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])'
        b_text, flags = f"%{count + 4}", '"n"(TransposeB)'
    else:
        a_text, b_text = f"%{count}", f"%{count + 1}"
        flag, last = count + 2, f"%{count + 3}, %{count + 4}"
        head = f"template <int TransposeA, int TransposeB>\nstruct WgmmaSs<{tag}, TransposeA, TransposeB, {count}> {{"
        a_type, a_name, a_inputs = "uint64_t", "desc_a", '"l"(desc_a)'
        flags = '"n"(TransposeA), "n"(TransposeB)'
    return f"""
{head}
  VD_STATIC_METHOD void run(float (&d)[{count}], {a_type} {a_name}, uint64_t desc_b, int accumulate) {{
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{flag}, 0; {op} {{"
        "{registers(count)}"
        "}}, {a_text}, {b_text}, p, 1, 1, {last}; }}"
        : {outputs}
        : {a_inputs}, "l"(desc_b), "r"(accumulate), {flags});
  }}
}};
"""


def generate() -> str:
    """The whole header."""
    parts = [HEAD]
    for tag, name in TYPES.items():
        for columns in COLUMNS:
            parts += [instruction(tag, name, columns, from_registers) for from_registers in (False, True)]
    return "".join(parts) + TAIL


if __name__ == "__main__":
    TARGET.write_text(generate())
