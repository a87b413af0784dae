"""Counter-based noise in plain CUDA C: one thread per number, the oracle of the fast kernels.

The contract is `noise.noise`. Philox4x32-10 is written from Salmon, Moraes, Dror, Shaw (2011), "Parallel random
numbers: as easy as 1, 2, 3". Every thread makes the whole Philox block that its unit reads and keeps one bit or one
number of it.

The other CuPy files build on `NOISE_SOURCE`, `THREAD_SOURCE` and `launch`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .noise import Counters, first_word

THREADS = 256

REAL_NAMES = {torch.float32: "float", torch.float64: "double"}
"""What the sources call REAL."""

THREAD_SOURCE = r"""
__device__ long long this_thread()
{
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}
"""

NOISE_SOURCE = (
    THREAD_SOURCE
    + r"""
typedef unsigned int word_t;
typedef unsigned long long wide_t;

/* Philox4x32-10: overwrites the four counter words with the four random words. */
__device__ void philox(word_t *counter, wide_t seed)
{
    word_t key_low = (word_t)seed, key_high = (word_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        wide_t left = (wide_t)0xD2511F53u * counter[0];
        wide_t right = (wide_t)0xCD9E8D57u * counter[2];
        word_t next0 = (word_t)(right >> 32) ^ counter[1] ^ key_low;
        word_t next2 = (word_t)(left >> 32) ^ counter[3] ^ key_high;
        counter[0] = next0;
        counter[1] = (word_t)right;
        counter[2] = next2;
        counter[3] = (word_t)left;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}

/* +1 or -1: bit 2 a + b of word w of block 4 g + q, where unit = 512 g + 128 w + 8 a + 2 q + b. */
__device__ REAL rademacher(wide_t seed, word_t c0, word_t c1, word_t c2, word_t c3, long long unit)
{
    int g = (int)(unit / 512), w = (int)(unit % 512 / 128), a = (int)(unit % 128 / 8);
    int q = (int)(unit % 8 / 2), b = (int)(unit % 2);
    word_t words[4] = {c0 + 4 * g + q, c1, c2, c3};
    philox(words, seed);
    return (words[w] >> (2 * a + b)) & 1u ? (REAL)1 : (REAL)-1;
}

/* Standard normal: element 2 e + b of block 4 g + q, where unit = 16 g + 8 e + 2 q + b, by Box-Muller. */
__device__ REAL gaussian(wide_t seed, word_t c0, word_t c1, word_t c2, word_t c3, long long unit)
{
    int g = (int)(unit / 16), e = (int)(unit % 16 / 8), q = (int)(unit % 8 / 2), b = (int)(unit % 2);
    word_t words[4] = {c0 + 4 * g + q, c1, c2, c3};
    philox(words, seed);
    /* 2^-32 and 2^-33: the logarithm's argument lies in (0, 1]. */
    REAL x = (REAL)words[2 * e] * (REAL)2.3283064365386963e-10 + (REAL)1.1641532182693481e-10;
    REAL angle = (REAL)words[2 * e + 1] * (REAL)(6.283185307179586 * 2.3283064365386963e-10);
    REAL radius = sqrt((REAL)-2 * log(x));
    return b ? radius * sin(angle) : radius * cos(angle);
}

__device__ REAL unit_noise(int kind, wide_t seed, word_t c0, word_t c1, word_t c2, word_t c3, long long unit)
{
    return kind ? gaussian(seed, c0, c1, c2, c3, unit) : rademacher(seed, c0, c1, c2, c3, unit);
}
"""
)

NOISE_KERNEL_SOURCE = (
    NOISE_SOURCE
    + r"""
/* One thread per number; c0 to c3 are the counter words of element (0, 0, 0, 0). */
extern "C" __global__ void noise(
    REAL *out,             /* (time, batch, rollouts, hidden) */
    const long long *seed, /* () */
    long long c0, long long c1, long long c2, long long c3, long long kind, double sigma,
    long long batch, long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long unit = i % hidden, p = i / hidden % rollouts, b = i / (hidden * rollouts) % batch;
    long long t = i / (hidden * rollouts * batch);
    out[i] = (REAL)sigma * unit_noise((int)kind, (wide_t)*seed, (word_t)c0, (word_t)(c1 + t), (word_t)(c2 + p),
                                      (word_t)(c3 + b), unit);
}
"""
)

KINDS = {"rademacher": 0, "gaussian": 1}


def noise(
    seed: Tensor,
    shape: tuple[int, int, int, int],
    *,
    sigma: float = 1.0,
    kind: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return noise of standard deviation `sigma`, shape (T, B, P, H); the contract is `noise.noise`."""
    _, batch, rollouts, hidden = shape
    out = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32), device=seed.device)
    launch(
        NOISE_KERNEL_SOURCE,
        "noise",
        out.dtype,
        out.numel(),
        (out, seed, *counter_words(counters), KINDS[kind], float(sigma), batch, rollouts, hidden),
    )
    return out.to(dtype)


def counter_words(counters: Counters) -> tuple[int, int, int, int]:
    """Return c0 to c3 of the first unit block, step, rollout and sample."""
    return first_word(counters), counters.time, counters.rollout, (counters.rank << 20) + counters.sample


def launch(
    source: str, name: str, dtype: torch.dtype, threads: int, arguments: tuple[Tensor | int | float, ...]
) -> None:
    """Run one thread per element on torch's current stream, REAL being `dtype`.

    A kernel takes its tensors (contiguous, not copied), integers as long long and floats as double, in the order of
    `arguments`, and the number of threads last.
    """
    if threads == 0:
        return
    cupy = import_cupy()
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_TorchStream(device)):
        operands = tuple(_operand(cupy, argument) for argument in (*arguments, threads))
        kernel(source, name, dtype)((-(-threads // THREADS),), (THREADS,), operands)


@functools.cache
def kernel(source: str, name: str, dtype: torch.dtype) -> Any:
    """Return the kernel; NVRTC compiles it at its first launch on a device."""
    return import_cupy().RawKernel(source, name, options=(f"-DREAL={REAL_NAMES[dtype]}",))


def import_cupy() -> Any:
    """Return the module `cupy`, or say how to install it."""
    try:
        import cupy
    except ImportError as error:
        message = 'the CuPy backend needs CuPy: pip install "anpgpu[cuda12]" or "anpgpu[cuda13]", as the driver is'
        raise ImportError(message) from error
    return cupy


class _TorchStream:
    """Torch's current stream of a device, for CuPy."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _operand(cupy: Any, argument: Tensor | int | float) -> Any:
    """Return an argument as CuPy takes it; a tensor's memory is shared."""
    if isinstance(argument, Tensor):
        return cupy.asarray(argument.detach())
    return np.int64(argument) if isinstance(argument, int) else np.float64(argument)
