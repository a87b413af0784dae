"""The rate of the special-function unit: chains of dependent tanh.approx in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
PROGRAMS = 16
"""Programs on each multiprocessor, of four warps each: enough to hide the latency of tanh.approx."""


@triton.jit
def tanh_chain_kernel(
    result_ptr,  # (programs, BLOCK), float32
    steps,
    BLOCK: tl.constexpr,
):
    """Each program applies tanh `steps` times to BLOCK values."""
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = where.to(tl.float32) * 1e-6
    for _ in range(steps):
        value = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(result_ptr + where, value)


def tanh_chain(device: torch.device, steps: int) -> int:
    """Launch the chain on every multiprocessor and return how many values of tanh it computes."""
    programs = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    result = torch.empty((programs, BLOCK), device=device)
    tanh_chain_kernel[(programs,)](result, steps, BLOCK=BLOCK, num_warps=4)
    return steps * result.numel()
