"""The compiled files: which symbols they need and define, and what they say about themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import vdit_fast

COMPILED = Path(vdit_fast._info.__file__)
LIBRARY = COMPILED.with_name("libvdit_ops.so")
ROOT = Path(__file__).parents[2]

needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="needs nm and readelf (binutils)"
)


def lines(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_binutils
def test_library_uses_only_the_stable_interface_of_torch() -> None:
    undefined = [line.split()[-1] for line in lines("nm", "-D", "-C", "--undefined-only", LIBRARY)]
    assert any(name.startswith("aoti_torch_") for name in undefined)  # the test sees torch's symbols at all
    forbidden = [name for name in undefined if re.match(r"(c10|at|torch|caffe2)::|typeinfo for (c10|at|torch)::", name)]
    assert forbidden == []


@needs_binutils
def test_library_needs_no_python_and_no_build_path() -> None:
    undefined = [line.split()[-1] for line in lines("nm", "-D", "--undefined-only", LIBRARY)]
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []
    dynamic = "\n".join(lines("readelf", "-d", LIBRARY))
    assert "libpython" not in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    # Nothing of libtorch.so is referenced, but it is what makes the weak CUDA stream symbol findable.
    assert "[libtorch.so]" in dynamic and "[libtorch_cpu.so]" in dynamic


@needs_binutils
def test_library_exports_nothing_by_name() -> None:
    exported = [line.split()[-1] for line in lines("nm", "-D", "-C", "--defined-only", LIBRARY)]
    own = [name for name in exported if re.match(r"vdit", name)]
    assert own == []


def isa_objects() -> list[Path]:
    return sorted(ROOT.glob("build/**/vdit_isa_*.dir/**/*.o"))


@needs_binutils
@pytest.mark.skipif(not isa_objects(), reason="needs the object files of a build in this checkout")
def test_isa_objects_define_only_their_own_namespace() -> None:
    """Shared inline code in an AVX-512 object could become the copy that runs on a CPU without AVX-512."""
    for path in isa_objects():
        isa = re.search(r"vdit_isa_(\w+)\.dir", str(path))[1]
        for line in lines("nm", "-C", "--defined-only", path):
            kind, name = line.split(maxsplit=2)[1:] if len(line.split()) > 2 else line.split(maxsplit=1)
            if kind.islower() and kind not in "uvw":
                continue  # local: the linker cannot merge it
            assert f"vdit_{isa}::" in name or name == "DW.ref.__gxx_personality_v0", f"{path} defines {kind} {name}"


def test_build_info() -> None:
    info = vdit_fast.build_info()
    assert set(info) == {
        "version",
        "build_type",
        "compiler",
        "torch_headers",
        "torch_target",
        "cpu_isas",
        "cuda",
        "cuda_targets",
    }
    assert f'version = "{info["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert info["torch_target"] == "2.10"
    assert "generic" in info["cpu_isas"]
    assert (info["cuda"] is None) == (info["cuda_targets"] == [])


def test_kernel_catalogue() -> None:
    import torch

    kernels = vdit_fast._info.kernel_catalogue()
    has_cuda = vdit_fast.build_info()["cuda"] is not None
    for kernel in kernels:
        assert hasattr(torch.ops.vdit_fast, kernel["op"])
        assert kernel["compiled"] == (kernel["device"] == "cpu" or has_cuda)
        assert (kernel["targets"] != []) == kernel["compiled"]
        assert kernel["dtypes"]
    assert len({(k["op"], k["device"], k["variant"]) for k in kernels}) == len(kernels)


def test_device_probe() -> None:
    import torch

    probe = vdit_fast._info.device_probe()
    assert probe["cpu_isa"] in vdit_fast.build_info()["cpu_isas"]
    assert probe["cpu_threads"] >= 0
    assert (probe["cuda_status"] == "ok") == (len(probe["cuda_devices"]) > 0)
    if torch.cuda.is_available():
        assert tuple(probe["cuda_devices"][0]["capability"]) == torch.cuda.get_device_capability(0)
