#!/bin/sh
# Builds the package with this machine's torch and nvcc, without network, and runs the GPU suite.
#
#   benchmarks/gpu/run_offline.sh SECONDS [OUT [options of python -m benchmarks.gpu]]
#
# SECONDS bounds everything, the build included. OUT (outputs/gpu) keeps the results for the next call; everything in it
# is also packed into $ARCHIVE (OUT.tar.gz). Needs torch >= 2.10, nvcc, cmake, ninja, scikit-build-core, pybind11, pytest.
set -eu
cd "$(dirname "$0")/../.."
start=$(date +%s)
seconds=${1:?usage: benchmarks/gpu/run_offline.sh SECONDS [OUT [options]]}
out=${2:-outputs/gpu}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
: "${ARCHIVE:=$out.tar.gz}"

[ ! -f "$ARCHIVE" ] || [ -d "$out" ] || { mkdir -p "$(dirname "$out")" && tar -xzf "$ARCHIVE" -C "$(dirname "$out")"; }

# Only this GPU's code, all cores: minutes less than a release build.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
VDIT_CUDA=ON VDIT_CUDA_ARCHS="$arch-real" SKBUILD_BUILD_DIR="build/gpu-$arch" \
  "$python" -m pip install -q --no-index --no-build-isolation --no-deps --no-cache-dir -e .
echo "built in $(($(date +%s) - start)) s"

code=0
"$python" -m benchmarks.gpu --budget $((seconds - $(date +%s) + start - 15)) --out "$out" "$@" || code=$?
tar -czf "$ARCHIVE" -C "$(dirname "$out")" "$(basename "$out")"
exit $code
