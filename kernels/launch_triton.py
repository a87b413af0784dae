"""What the launchers of rollout kernels share: types, the device's capability, and arguments made of the options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cell_gated_triton import GatedForm, gated_form
from .cell_triton import CellForm, cell_form
from .place_triton import CleanRows, rows_of
from .rollout import RolloutOptions
from .tiles import approximates, takes_plain_difference

OPERAND_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
INTERPRETED_CAPABILITY = 90


class Weights(NamedTuple):
    """Matrices of the network in operand type, contiguous."""

    recurrent: Any
    """W_hh, (hidden, hidden)."""
    readout: Any
    """W_o, (outputs, hidden), or None."""


def capability(device: torch.device) -> int:
    """Return the compute capability as 10 major + minor."""
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def stored_dtype(options: RolloutOptions) -> torch.dtype:
    """Return the type of a stored delta_a and of the last delta_h."""
    return torch.float32 if OPERAND_DTYPES[options.precision] is torch.float32 else torch.bfloat16


def state_scale(options: RolloutOptions) -> float:
    """Return what a deviation of the state is divided by where it is an operand: float16 has too few exponents."""
    return options.sigma if options.precision == "fp16" else 1.0


def weights_in(weight_hh: Tensor, readout: Tensor | None, options: RolloutOptions) -> Weights:
    """Return W_hh, (H, H), and the readout, (O, H) or None, as operands."""
    operand = OPERAND_DTYPES[options.precision]
    return Weights(weight_hh.to(operand).contiguous(), None if readout is None else readout.to(operand).contiguous())


def start_in(delta_h0: Tensor | None, options: RolloutOptions) -> Tensor | None:
    """Return the first delta_h, (B, P, H), as an operand."""
    if delta_h0 is None:
        return None
    return (delta_h0 / state_scale(options)).to(OPERAND_DTYPES[options.precision]).contiguous()


def cell_of(options: RolloutOptions) -> CellForm:
    """Return the cell's form on this backend.

    Raises:
        ValueError: it has none.
    """
    return cell_form(options.cell.on("triton"))


def gated_cell_of(options: RolloutOptions) -> GatedForm:
    """Return the gated cell's form on this backend.

    Raises:
        ValueError: it has none.
    """
    return gated_form(options.cell.on("triton"))


def check_cell(options: RolloutOptions) -> None:
    """Raise ValueError where the cell has no form on this backend."""
    if options.cell.noise_in_state:
        gated_cell_of(options)
    else:
        cell_of(options)


def clean_of(preact: Tensor, hidden: Tensor, options: RolloutOptions, *, quotient: bool = False) -> CleanRows:
    """Return what of the clean run, a and h, (T, B, H), the cell takes; see `cell_triton.CellForm`."""
    wide = takes_plain_difference(options.precision, options.sigma)
    first, second = cell_of(options).clean_rows(preact, hidden, wide, quotient and not wide)
    return CleanRows(rows_of(first), rows_of(second))


def constexprs(options: RolloutOptions) -> dict[str, Any]:
    """Return the constexpr arguments that follow from the options alone."""
    return {**flags(options), "CELL": cell_of(options).deviation}


def flags(options: RolloutOptions) -> dict[str, Any]:
    """Return those of them that every cell has."""
    return {
        "NOISE": options.noise,
        "PRECISION": options.precision,
        "FAST": approximates(options.precision),
        "WIDE": takes_plain_difference(options.precision, options.sigma),
    }
