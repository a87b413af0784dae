#!/usr/bin/env bash
# Which unit binds a kernel? The kernels of one op under Nsight Compute.
#
#   profiling/ncu.sh OP [arguments of trace.py, such as --case 200,32,128,128]
#
# OP is a range of anpgpu/ranges.py: rollout, rollout_adjoint, adjoint, returns, clean_run, ...
# Writes anpgpu-OP.ncu-rep to open in Nsight Compute, and prints the sections.
#
# LAUNCHES=4   kernels to profile: the stepwise form launches one per time step, and every one is replayed many times
# CLOCKS=none  base locks the clocks for the time of a kernel, which repeats better and needs the right to do so
# PYTHON=      the interpreter
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

op=${1:?name a range: rollout, adjoint, ...}
shift
command -v ncu >/dev/null || {
    echo "ncu.sh: Nsight Compute (ncu) is not on PATH" >&2
    exit 1
}

# The slash says that ranges are pushed and popped. Without --graph: kernels of a replayed graph are in no range.
ncu \
    --nvtx --nvtx-include "anpgpu@$op/" \
    --profile-from-start off \
    --clock-control "${CLOCKS:-none}" \
    --launch-count "${LAUNCHES:-4}" \
    --section SpeedOfLight \
    --section SpeedOfLight_RooflineChart \
    --section ComputeWorkloadAnalysis \
    --section MemoryWorkloadAnalysis \
    --section SchedulerStats \
    --section WarpStateStats \
    --section InstructionStats \
    --section Occupancy \
    --section LaunchStats \
    --force-overwrite --export "anpgpu-$op" \
    "${PYTHON:-python}" "$here/trace.py" --capture --updates 1 "$@"
ncu --import "anpgpu-$op.ncu-rep" --page details
