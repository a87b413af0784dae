"""Every tolerance of the tests, with its reason: the same on every machine.

    relative_error = ||actual - expected|| / ||expected||        norm-wise over the whole tensor, in float64

Bounds are on that error unless the reason says otherwise. Statistical bounds state how often correct code would miss
them; the seeds are fixed, so that a test which passes once passes always.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    bound: float
    reason: str


TOLERANCES = {
    "exact": Tolerance(0.0, "bitwise: the same operations in the same order"),
    "float64": Tolerance(1e-12, "float64 rounding over some hundred dependent operations"),
    "float32": Tolerance(2e-6, "float32 rounding over some dozen dependent operations"),
    "float32_long": Tolerance(2e-5, "float32 rounding over sums of some thousand terms, or a recurrence of 50 steps"),
    "two_runs": Tolerance(1e-7, "the oracle subtracts two float64 runs: 1e-16 / 1e-6, and a recurrence amplifies it"),
    "unridged": Tolerance(1e-5, "float64 least squares without a ridge: singular Gram matrices, 1e-16 over its floor"),
    "deviation_float32": Tolerance(1e-4, "promised of loss differences at sigma 1e-6, against a float64 run"),
    "subtraction_float32": Tolerance(1e-2, "a lower bound: subtracting two float32 runs at sigma 1e-6 errs by more"),
    "bfloat16": Tolerance(2e-2, "bfloat16 rounding, up to 4e-3 of each state, over some few dependent steps"),
    "least_squares": Tolerance(1e-4, "sigma 1e-7 and ridge 1e-10, times the condition of a square-ish Gram matrix"),
    "bf16_adjoint": Tolerance(1e-2, "promised with bfloat16 operands; their rounding is 4e-3, averaged over units"),
    "fp32_adjoint": Tolerance(1e-5, "promised with float32 operands over 50 steps"),
    "weight_gradients": Tolerance(1e-3, "promised of TF32 operands, each rounded by 3e-4 of its size at the root mean"),
    "gaussian": Tolerance(2e-6, "absolute, in units of sigma: float32 logarithm, cosine and angle; sigma reaches 6.6"),
    "z": Tolerance(4.3, "|z| of one combined statistic: correct code misses it once in 60,000 (two-sided normal)"),
    "z_many": Tolerance(6.5, "largest |z| of at most 100,000 statistics: correct code misses it once in 100,000"),
    "p_value": Tolerance(1e-6, "a lower bound on p-values: correct code misses it once in 1,000,000"),
    "slope": Tolerance(0.15, "absolute, log-log slope of an error over a factor 16 to 64, averaged over 32 runs"),
    "memory": Tolerance(1.25, "promised ratio of a measured peak to max_memory; the rest is the allocator's slack"),
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||; 0 where both are 0, nan where either is not finite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = torch.linalg.vector_norm(actual - expected)
    return 0.0 if error == 0 else float(error / torch.linalg.vector_norm(expected))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """The relative error is within the tolerance of that name."""
    error = relative_error(actual, expected)
    bound, reason = TOLERANCES[name]
    assert error <= bound, f"relative error {error:.3g} above {bound:g} ({reason})"
