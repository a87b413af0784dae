"""A peer in JAX: EGGROLL, evolution strategies with low-rank perturbations of the weights.

Member p of a population of N runs the whole sequence with W + sigma E_p in the place of every matrix W. Biases are
perturbed by full Gaussian noise:

    E_p = A_p B_p^T / sqrt(r),  A_p (m, r) and B_p (n, r) of unit variance
    x (W + sigma E_p)^T = x W^T + sigma (x B_p) A_p^T / sqrt(r)         one product for all members, and two thin ones
    dL/dW = 1 / (N sigma) sum_p (L_p - mean L) E_p                       fitness is -L

With antithetic members, p and p + N/2 have the same E and opposite signs. Every member sees all B samples, so one
update is N B T rollout-steps. Source: "Evolution Strategies at the Hyperscale", arXiv:2511.16652; written from its
equations.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from compare_peers import Task

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

RANK = 1
SIGMA = 1e-2
"""Larger than that of the rollouts: they compute the deviation itself, EGGROLL subtracts two losses in float32."""


def obstacle(device_type: str) -> str | None:
    """Return why JAX cannot run on that kind of device, or None."""
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    if device_type == "cuda" and not any(map(importlib.util.find_spec, PLUGINS)):
        return "the jax that is installed has no CUDA"
    return None


def prepare(threads: int) -> None:
    """Set what JAX reads at import: torch's number of threads, and no preallocated memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")


class Weights(NamedTuple):
    """Parameters, or their gradients."""

    w_ih: Any
    """(H, I)."""
    w_hh: Any
    """(H, H)."""
    bias: Any
    """(H,)."""
    w_o: Any
    """(O, H)."""
    b_o: Any
    """(O,)."""


class Noise(NamedTuple):
    """A population's perturbations: a pair of factors for each matrix, a vector for each bias."""

    w_ih: tuple[Any, Any]
    """(N, H, r) and (N, I, r)."""
    w_hh: tuple[Any, Any]
    bias: Any
    """(N, H)."""
    w_o: tuple[Any, Any]
    b_o: Any


def weights_of(task: Task) -> Weights:
    """Return the network's parameters as arrays; the two recurrent biases are added."""
    rnn, readout = task.rnn, task.readout
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    parameters = (rnn.weight_ih_l0, rnn.weight_hh_l0, bias, readout.weight, readout.bias)
    return Weights(*(parameter.detach().cpu().numpy() for parameter in parameters))


def draw(key: Any, weights: Weights, members: int, rank: int, *, antithetic: bool) -> Noise:
    """Return the perturbations of a population."""
    import jax
    import jax.numpy as jnp

    count = members // 2 if antithetic else members
    keys = iter(jax.random.split(key, 8))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), (count, *shape))

    def signed(draws: Any) -> Any:
        return jnp.concatenate((draws, -draws)) if antithetic else draws

    def factors(matrix: Any) -> tuple[Any, Any]:
        left, right = normal(matrix.shape[0], rank), normal(matrix.shape[1], rank)
        return signed(left), jnp.concatenate((right, right)) if antithetic else right

    return Noise(
        factors(weights.w_ih),
        factors(weights.w_hh),
        signed(normal(*weights.bias.shape)),
        factors(weights.w_o),
        signed(normal(*weights.b_o.shape)),
    )


def estimate(weights: Weights, noise: Noise, inputs: Any, targets: Any, sigma: float) -> tuple[Weights, Any]:
    """Return the estimated gradients, and every member's loss, (N,).

    Args:
        weights: the parameters.
        noise: the population's perturbations.
        inputs: (T, B, I).
        targets: (T, B, O).
        sigma: standard deviation of the perturbations.
    """
    import jax
    import jax.numpy as jnp

    rank = noise.w_hh[0].shape[-1]
    members = noise.bias.shape[0]
    size = sigma / rank**0.5

    def thin(values: Any, factors: tuple[Any, Any]) -> Any:
        """Return sigma values E^T, (N, B, m), from values (N, B, n) or, shared by all members, (B, n)."""
        left, right = factors
        return size * jnp.einsum("pbr,pmr->pbm", values @ right, left)

    def step(state: Any, now: tuple[Any, Any]) -> tuple[Any, Any]:
        x, y = now
        preact = x @ weights.w_ih.T + weights.bias + thin(x, noise.w_ih)
        preact = preact + state @ weights.w_hh.T + thin(state, noise.w_hh) + sigma * noise.bias[:, None]
        state = jnp.tanh(preact)
        outputs = state @ weights.w_o.T + weights.b_o + thin(state, noise.w_o) + sigma * noise.b_o[:, None]
        return state, jnp.square(outputs - y).mean((1, 2))

    start = jnp.zeros((members, inputs.shape[1], weights.bias.shape[0]), weights.bias.dtype)
    _, losses = jax.lax.scan(step, start, (inputs, targets))
    loss = losses.mean(0)
    share = (loss - loss.mean()) / (members * sigma)

    def matrix(factors: tuple[Any, Any]) -> Any:
        left, right = factors
        return jnp.einsum("pmr,pnr->mn", share[:, None, None] * left, right) / rank**0.5

    gradients = Weights(
        matrix(noise.w_ih), matrix(noise.w_hh), share @ noise.bias, matrix(noise.w_o), share @ noise.b_o
    )
    return gradients, loss


def dense_estimate(weights: Weights, noise: Noise, inputs: Any, targets: Any, sigma: float) -> tuple[Weights, Any]:
    """As `estimate`, from every member's full matrices, member by member, in float64."""
    matrices = [np.asarray(weight, np.float64) for weight in weights]
    factors = (noise.w_ih, noise.w_hh, noise.bias, noise.w_o, noise.b_o)
    losses, perturbations = [], []
    for p in range(noise.bias.shape[0]):
        moved = []
        for factor in factors:
            if isinstance(factor, tuple):
                left, right = (np.asarray(side[p], np.float64) for side in factor)
                moved.append(left @ right.T / np.sqrt(left.shape[1]))
            else:
                moved.append(np.asarray(factor[p], np.float64))
        w_ih, w_hh, bias, w_o, b_o = (weight + sigma * noise_p for weight, noise_p in zip(matrices, moved, strict=True))
        state, loss = np.zeros((inputs.shape[1], bias.shape[0])), 0.0
        for x, y in zip(np.asarray(inputs, np.float64), np.asarray(targets, np.float64), strict=True):
            state = np.tanh(x @ w_ih.T + state @ w_hh.T + bias)
            loss += np.mean((state @ w_o.T + b_o - y) ** 2) / len(inputs)
        losses.append(loss)
        perturbations.append(moved)
    loss = np.array(losses)
    share = (loss - loss.mean()) / (len(loss) * sigma)
    return Weights(*(sum(s * moved[i] for s, moved in zip(share, perturbations, strict=True)) for i in range(5))), loss


def worst_error(estimate: tuple[Weights, Any], exact: tuple[Weights, Any]) -> float:
    """Return the largest relative error of gradients and of the members' losses about their mean."""
    pairs = [*zip(estimate[0], exact[0], strict=True)]
    pairs.append((estimate[1] - np.mean(estimate[1]), exact[1] - np.mean(exact[1])))
    return max(float(np.linalg.norm(np.asarray(left) - right) / np.linalg.norm(right)) for left, right in pairs)


def error_against_dense(task: Task, *, antithetic: bool) -> float:
    """Return the worst relative error of `estimate` against `dense_estimate` on a task, at rank 2 and sigma 0.1."""
    import jax

    weights = weights_of(task)
    noise = draw(jax.random.key(0), weights, task.case.rollouts, 2, antithetic=antithetic)
    data = task.inputs.cpu().numpy(), task.targets.cpu().numpy()
    return worst_error(estimate(weights, noise, *data, 0.1), dense_estimate(weights, noise, *data, 0.1))


def update(task: Task) -> Callable[[], object]:
    """Return the work of one estimate of all gradients. It has P members, antithetic where P is even."""
    import jax

    device = jax.devices("gpu" if task.device.type == "cuda" else "cpu")[0]
    weights = jax.device_put(weights_of(task), device)
    data = jax.device_put((task.inputs.cpu().numpy(), task.targets.cpu().numpy()), device)
    members = task.case.rollouts
    antithetic = members % 2 == 0

    @jax.jit
    def once(key: Any) -> tuple[Weights, Any, Any]:
        current, following = jax.random.split(key)
        return (
            *estimate(weights, draw(current, weights, members, RANK, antithetic=antithetic), *data, SIGMA),
            following,
        )

    keys = [jax.device_put(jax.random.key(0), device)]

    def run() -> object:
        gradients, loss, keys[0] = once(keys[0])
        return jax.block_until_ready((gradients, loss))

    return run
