"""What the compiler made of the CUDA kernels: registers, local memory and instructions of the built library.

    python tests/build/gpu_code.py --update     write the registers of this build to gpu_resources.json
    python tests/build/gpu_code.py              print them

Works on the library that is installed; nothing is compiled. Needs cuobjdump and nvdisasm: from a CUDA toolkit, or
``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("gpu_resources.json")
UPDATE = "python tests/build/gpu_code.py --update"
REGISTER_STEP = 8  # a change of up to this many registers is noise of the compiler
LOCAL = ("LDL", "STL")  # loads and stores of local memory
COUNTED = (*LOCAL, "HMMA", "LDSM", "LDGSTS", "HGMMA", "UTMALDG", "USETMAXREG", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR")


@dataclass
class Kernel:
    """One kernel for one architecture. ``counts`` is empty until its instructions were read."""

    arch: str
    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


def find_tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit: on PATH, beside nvcc, in CUDA_HOME, or from its PyPI package."""
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders = [Path(home) / "bin" for home in homes]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    folders.append(Path("/usr/local/cuda/bin"))
    for entry in sys.path:
        folders += sorted(Path(entry).glob("nvidia/*/bin"))
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
    return Path(found) if found else None


def cuobjdump(*arguments: str | Path) -> list[str]:
    """Lines of a cuobjdump call. Raises FileNotFoundError where a tool is missing."""
    tools = {name: find_tool(name) for name in ("cuobjdump", "nvdisasm")}
    for name, path in tools.items():
        if path is None:
            raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-{name}")
    path = os.pathsep.join([str(tools["nvdisasm"].parent), os.environ.get("PATH", "")])
    command = [str(tools["cuobjdump"]), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=True)
    return done.stdout.splitlines()


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names without arguments; the hash that names a file's anonymous namespace is left out."""
    if not names:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _without_arguments(line) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def _without_arguments(name: str) -> str:
    depth = 0
    for i in range(len(name) - 1, -1, -1) if name.endswith(")") else ():
        depth += (name[i] == ")") - (name[i] == "(")
        if depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ").replace("(anonymous namespace)", "{anonymous}")


def parse_resources(lines: list[str]) -> dict[tuple[str, str], Kernel]:
    """Kernels by (architecture, mangled name) from ``cuobjdump --dump-resource-usage``."""
    kernels, arch, name = {}, "", ""
    for line in lines:
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            kernels[arch, name] = Kernel(arch, name, number["REG"], number["STACK"], number["LOCAL"], number["SHARED"])
    for (_, mangled), kernel in kernels.items():
        kernel.name = mangled
    names = demangle(sorted({mangled for _, mangled in kernels}))
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
    return kernels


def count_instructions(lines: list[str], kernels: dict[tuple[str, str], Kernel]) -> None:
    """Fill the counts of ``kernels`` from ``cuobjdump -sass``; ``gsb0`` counts HGMMA that end a batch."""
    arch, counts = "", Counter[str]()
    for line in lines:
        if match := re.match(r"\s*code for (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = kernels[arch, match[1]].counts
            counts["functions"] += 1
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            for name in COUNTED:
                if match[1] == name or match[1].startswith(name + "."):
                    counts[name] += 1
            if match[1].startswith("HGMMA") and "gsb0" in line:
                counts["gsb0"] += 1


def read_kernels(library: Path, sass: tuple[str, ...] = (), name: str = "") -> list[Kernel]:
    """Every kernel of a library or object file.

    Args:
        sass: architectures whose instructions are counted, which takes a second per large kernel.
        name: of these, only kernels whose name contains this.
    """
    kernels = parse_resources(cuobjdump("--dump-resource-usage", library))
    for arch in sass:
        functions = [mangled for (a, mangled), k in kernels.items() if a == arch and name in k.name]
        if functions:
            count_instructions(cuobjdump("-sass", "-arch", arch, "-fun", ",".join(functions), library), kernels)
    return sorted(kernels.values(), key=lambda k: (k.arch, k.name))


# ---- the rules; each returns what breaks it


def local_memory(kernels: list[Kernel]) -> list[str]:
    """Spills and stack frames."""
    bad = [k for k in kernels if k.stack or k.local or any(k.counts[name] for name in LOCAL)]
    return [
        f"{k}: stack frame {k.stack}, local {k.local} bytes, {k.counts['LDL'] + k.counts['STL']} local accesses"
        for k in bad
    ]


def is_attention(kernel: Kernel) -> bool:
    return re.search(r"::(forward|key_gradients|query_gradients)<", kernel.name) is not None


def portable_instructions(kernels: list[Kernel]) -> list[str]:
    """The portable attention kernels run on the tensor cores, fed by ldmatrix and cp.async."""
    bad = []
    for k in kernels:
        missing = [name for name in ("HMMA", "LDSM", "LDGSTS") if not k.counts[name]]
        if missing:
            bad.append(f"{k}: no {', '.join(missing)}")
    return bad


def hopper_instructions(kernels: list[Kernel]) -> list[str]:
    """wgmma in batches that stay in flight, fed by TMA or cp.async, with registers traded between warpgroups."""
    bad = []
    for k in kernels:
        c = k.counts
        missing = [name for name in ("HGMMA", "USETMAXREG") if not c[name]]
        if not c["UTMALDG"] and not c["LDGSTS"]:
            missing.append("UTMALDG or LDGSTS")
        if missing:
            bad.append(f"{k}: no {', '.join(missing)}")
        # A product over 64 columns has 4 instructions; serialised code ends a batch after each.
        if c["HGMMA"] < 4 * c["gsb0"]:
            bad.append(f"{k}: {c['gsb0']} batches for {c['HGMMA']} HGMMA, so wgmma is serialised")
        if c["WARPGROUP.DEPBAR"] > c["gsb0"]:
            bad.append(f"{k}: {c['WARPGROUP.DEPBAR']} waits for {c['gsb0']} batches, so waits were injected")
    return bad


def compiler_messages(texts: dict[str, str]) -> list[str]:
    """ptxas's C75xx: wgmma serialised, waits or fences injected. ``texts``: what nvcc printed, by object."""
    return [f"{name}: {line.strip()}" for name, text in texts.items() for line in text.splitlines() if "(C75" in line]


def register_changes(kernels: list[Kernel], recorded: dict[str, dict[str, int]]) -> list[str]:
    """Kernels that are new, gone, or moved by more than REGISTER_STEP registers, among the architectures built."""
    changes = []
    for arch in sorted({k.arch for k in kernels}):
        now = {k.name: k.registers for k in kernels if k.arch == arch}
        before = recorded.get(arch, {})
        for name in sorted(now.keys() | before.keys()):
            if name not in before:
                changes.append(f"{arch} {name}: new, {now[name]} registers")
            elif name not in now:
                changes.append(f"{arch} {name}: gone")
            elif abs(now[name] - before[name]) > REGISTER_STEP:
                changes.append(f"{arch} {name}: {before[name]} -> {now[name]} registers")
    return changes


# ---- this build


def library() -> Path:
    import vdit_fast

    return Path(vdit_fast._info.__file__).with_name("libvdit_ops.so")


def compiler_output() -> dict[str, str]:
    """What nvcc printed for each object of the installed library; empty if it was not built in this checkout."""
    found = {}
    for built in ROOT.glob("build/*/libvdit_ops.so"):
        if filecmp.cmp(built, library(), shallow=False):
            for log in sorted(built.parent.glob("CMakeFiles/vdit_gpu*.dir/**/*.cu.o.log")):
                found[log.name.removesuffix(".o.log")] = log.read_text()
    return found


def main() -> None:
    import vdit_fast

    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--update", action="store_true", help=f"write {RECORD.name}")
    args = ap.parse_args()
    kernels = read_kernels(library())
    if not args.update:
        for k in kernels:
            print(f"{k.arch:8} {k.registers:4} registers  {k.shared:6} B shared  {k.stack:4} B stack  {k.name}")
        return
    document: dict[str, object] = {"nvcc": ".".join(vdit_fast.build_info()["cuda"].split(".")[:2]), "registers": {}}
    for arch in sorted({k.arch for k in kernels}):
        document["registers"][arch] = {k.name: k.registers for k in kernels if k.arch == arch}
    RECORD.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(kernels)} kernels in {RECORD.name}")


if __name__ == "__main__":
    main()
