#!/usr/bin/env bash
# When does which kernel run, and what does the GPU wait for? A timeline of a few warm updates under Nsight Systems.
#
#   profiling/nsys.sh [NAME] [arguments of trace.py, such as --case 200,32,128,512 --way backward]
#
# Writes NAME.nsys-rep (default: anpgpu) to open in Nsight Systems, and prints time by range and by kernel.
# PYTHON= names the interpreter.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

name=anpgpu
if [[ $# -gt 0 && $1 != -* ]]; then
    name=$1
    shift
fi
command -v nsys >/dev/null || {
    echo "nsys.sh: Nsight Systems (nsys) is not on PATH" >&2
    exit 1
}

# A replayed graph is one launch: its nodes are traced one by one, so that the kernels of --graph are seen.
nsys profile \
    --trace=cuda,nvtx \
    --capture-range=cudaProfilerApi \
    --capture-range-end=stop \
    --cuda-graph-trace=node \
    --force-overwrite=true \
    --output="$name" \
    "${PYTHON:-python}" "$here/trace.py" --capture "$@"
nsys stats --force-export=true --report nvtx_pushpop_sum,nvtx_kern_sum,cuda_gpu_kern_sum,cuda_api_sum "$name.nsys-rep"
