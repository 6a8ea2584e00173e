"""A compiled part that is missing, broken, doubled or meets an old torch: an ImportError that helps, never a crash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vdit_fast
from vdit_fast._load import LIBRARY_NAME, _load_library, load

PACKAGE = Path(vdit_fast.__file__).parent
COMPILED = Path(vdit_fast._info.__file__)
LIBRARY = COMPILED.with_name(LIBRARY_NAME)


def install_copy(folder: Path) -> Path:
    """A second installation in `folder`: the loader and the compiled files."""
    package = folder / "vdit_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from ._load import load\nload()\n")
    for file in (PACKAGE / "_load.py", COMPILED, LIBRARY):
        shutil.copy(file, package)
    return package


def import_in_turn(*folders: Path) -> list[str]:
    """Import the package from each folder, one after the other in one new process; "ok" or the ImportError's text."""
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # an editable install's finder
for folder in sys.argv[1:]:
    for name in [m for m in sys.modules if m.startswith("vdit_fast")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    try:
        import vdit_fast
        assert vdit_fast.__file__.startswith(folder)
        print("ok")
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"ended with {result.returncode}: {result.stderr}"
    return result.stdout.splitlines()


def test_one_process_meets_broken_good_and_doubled_installations(tmp_path: Path) -> None:
    broken, good, other = (tmp_path / name for name in ("broken", "good", "other"))
    for folder in (broken, good, other):
        install_copy(folder)
    (broken / "vdit_fast" / LIBRARY.name).write_bytes(b"not a library")
    link = tmp_path / "link"
    link.symlink_to(good, target_is_directory=True)

    first, second, third, fourth, fifth = import_in_turn(broken, good, other, good, link)
    assert "does not load with torch" in first and "pip install" in first
    assert second == "ok"
    # A second copy would register every operator twice, which ends the process if it is not stopped before.
    assert "another copy" in third and str(good) in third and str(other) in third
    assert (fourth, fifth) == ("ok", "ok")


def test_missing_module(tmp_path: Path) -> None:
    (install_copy(tmp_path) / COMPILED.name).unlink()
    (text,) = import_in_turn(tmp_path)
    assert "_info is missing or was built for another Python" in text and "pip install" in text


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"operator library is missing: .*libvdit_ops\.so; reinstall it: pip install"):
        _load_library(tmp_path / LIBRARY_NAME)


@pytest.mark.parametrize("version", ["2.9.1+cu130", "1.13.0", "2.0.0a0+git", "unknown"])
def test_old_torch(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, found .*: pip install 'torch>=2\.10'"):
        load()


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git12"])
def test_new_torch(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    load()


def test_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, and importing torch failed .*: pip install torch"):
        load()


def test_loading_again_does_nothing() -> None:
    before = set(torch.ops.loaded_libraries)
    assert load() is vdit_fast._info
    assert torch.ops.loaded_libraries == before
