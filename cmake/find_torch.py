"""Print the folder of the torch package of this interpreter, without importing torch; nothing if there is none."""

import importlib.util
import os
import site
import sys
import sysconfig


def candidates():
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield os.path.dirname(spec.origin)
    for key in ("platlib", "purelib"):
        yield os.path.join(sysconfig.get_path(key), "torch")
    config = os.path.join(sys.prefix, "pyvenv.cfg")
    if os.path.exists(config):
        with open(config) as file:
            shares_system = "include-system-site-packages = true" in file.read().lower()
        if shares_system:
            for folder in site.getsitepackages([sys.base_prefix]):
                yield os.path.join(folder, "torch")


for folder in candidates():
    if os.path.exists(os.path.join(folder, "include", "torch", "csrc", "stable", "library.h")):
        print(folder)
        break
