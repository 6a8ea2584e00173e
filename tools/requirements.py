"""Print the requirements in pyproject.toml of the groups `build`, `core` or any extra: `requirements.py cli dev`.

Lets ./run install an extra's packages without building the project first.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def recent_cmake() -> bool:
    """Whether the system has a CMake that is new enough."""
    program = shutil.which("cmake")
    if program is None:
        return False
    found = re.search(r"(\d+)\.(\d+)", subprocess.run([program, "--version"], capture_output=True, text=True).stdout)
    return found is not None and (int(found[1]), int(found[2])) >= (3, 24)


def requirements(name: str, data: dict) -> list[str]:
    """The requirement strings of one group, with references to the project's own extras expanded."""
    project = data["project"]
    if name == "build":
        return [*data["build-system"]["requires"], "ninja>=1.11", *([] if recent_cmake() else ["cmake>=3.24"])]
    if name == "core":
        return project["dependencies"]
    result = []
    for requirement in project["optional-dependencies"][name]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        extras = own[1].split(",") if own else []
        result += [line for extra in extras for line in requirements(extra.strip(), data)] if own else [requirement]
    return result


if __name__ == "__main__":
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    lines = [line for name in sys.argv[1:] for line in requirements(name, pyproject)]
    print("\n".join(dict.fromkeys(lines)))
