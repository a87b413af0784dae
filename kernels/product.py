"""The recurrent product of a step, with the operands rounded as a GPU's matrix units round them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class RecurrentProduct:
    """delta_a += delta_h W_hh^T with rounded operands.

    Args:
        weight_hh: W_hh, (H, H), or with more rows.
        rows: number of rows of delta_h.
        precision: what operands are rounded to: "bf16", "fp16", "tf32", "fp32" or "fp64".
        sigma: standard deviation of the noise, which scales delta_h where it is rounded to fp16.
    """

    def __init__(self, weight_hh: Tensor, rows: int, *, precision: str, sigma: float) -> None:
        self.precision = precision
        self.scale = sigma if precision == "fp16" else 1.0
        self.weight = self._rounded(weight_hh).t()
        units = weight_hh.shape[0]
        # Torch gives smaller products to a library that does not round.
        large = units >= 64 and rows * units**2 >= 1 << 18
        self.on_tiles = precision == "bf16" and large and _has_bf16_tiles(weight_hh)

    def _rounded(self, operand: Tensor) -> Tensor:
        if self.precision == "bf16":
            return operand.bfloat16().to(operand.dtype)
        if self.precision == "fp16":
            return operand.half().to(operand.dtype)
        if self.precision == "tf32":
            # Round to nearest at the 10th mantissa bit.
            bits = operand.contiguous().view(torch.int32)
            return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return operand

    def add_to(self, delta_a: Tensor, delta_h: Tensor, *, keep: float = 1.0) -> None:
        """Add to `keep` times delta_a, (B, P, H), in place; 0 overwrites what is there, NaN too."""
        rows = delta_a.view(-1, delta_a.shape[-1])
        operand = delta_h.reshape(-1, delta_h.shape[-1])
        if self.on_tiles:
            with _bf16_products():
                rows.addmm_(operand, self.weight, beta=keep)
            return
        if self.scale != 1.0:
            operand = operand / self.scale
        rows.addmm_(self._rounded(operand), self.weight, beta=keep, alpha=self.scale)


def _has_bf16_tiles(operand: Tensor) -> bool:
    """Say whether the processor multiplies bfloat16 matrices itself (AMX)."""
    on_cpu = operand.device.type == "cpu" and operand.dtype == torch.float32
    return on_cpu and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Let products of float32 matrices on the CPU round their operands to bfloat16; they accumulate in float32."""
    control = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = control.fp32_precision
    control.fp32_precision = "bf16"
    try:
        yield
    finally:
        control.fp32_precision = before
