#!/usr/bin/env bash
# Every GPU check, in sections; records as JSON lines in $OUT/gpu_check.jsonl (default: bench/gpu/out). A run that was
# cut off goes on from that file, or from --resume FILE.
#   scripts/gpu_check.sh [--sections a,b] [--seconds N] [--resume FILE] [--cuda-graph | --eager]   on a machine with a GPU
#   scripts/gpu_check.sh --dry-run                                         small and on this CPU, to test the script
# SGLang must be importable (on a machine without network: source the bundle's activate.sh first).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/gpu/out}
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}

if ! "$python" -c 'import importlib.metadata as m; m.version("sglang-er")' 2>/dev/null; then
  # No network and perhaps no CMake: the entry points are all that has to be visible, CPU kernels are not used there.
  "$python" setup.py -q egg_info --egg-base python
  export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" scripts/gpu_check.py --out "$out" "$@"
