"""`estimate_grad_`: gradients of an RNN and its readout from forward passes alone, without autograd."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from .estimators.found import Estimate, FoundOfProblem
from .estimators.job import Job
from .network.cells import cell_name
from .network.weights import valid_steps
from .perturbation import Perturbation, check_perturbation
from .registry import CELLS, ESTIMATORS, Estimator
from .runtime.memory import default_memory
from .runtime.ranges import entered
from .runtime.settings import new_seed, resolve
from .task.losses import LossFunction
from .task.problem import Problem, canonical


def estimate_grad_(
    rnn: nn.RNN,
    readout: nn.Module | None,
    inputs: Tensor | PackedSequence,
    targets: Tensor | None,
    loss: str | LossFunction = "mse",
    *,
    perturbation: Perturbation | None = None,
    hx: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate gradients from forward passes and add them to `.grad`, as `backward()` does, without an autograd graph.

    Args:
        rnn: an `anpgpu.RNN` or any `torch.nn.RNN`.
        readout: `torch.nn.Linear` from hidden states to outputs, or None: the hidden state is the output. With a
            callable loss also a module without trainable parameters.
        inputs: as the rnn's, (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
        targets: per step, (T, B, O) or class indices (T, B), batch first where the inputs are; or per sequence, (B, O)
            or (B,): then only each sample's last valid step has a loss. Class -100 is ignored. For a callable loss, any
            tensor whose shape begins with (T, B) or (B,) (per step where both fit), or None.
        loss: "mse" or "cross_entropy", averaged over the steps that count ("mse": also over outputs); or
            `loss(outputs, targets)` with outputs (T, B, p, O) and targets with a rollout axis of size 1, which returns
            values per step, (T, B, p), or per sequence, (B, p); these are averaged. It may be called on some of the
            samples and need not be differentiable. The gradient of a Linear readout is then estimated from perturbed
            outputs.
        perturbation: the default is the rnn's own, or `Perturbation()`.
        hx: initial state, as the rnn's.
        lengths: valid steps of each sample, (B,), in [1, T]; padding contributes nothing.
        generator: draws the update's one seed; the default is torch's default generator of the device.

    Returns:
        `Estimate`: clean loss, outputs and final state, rollouts skipped, split-half cosine.

    Raises:
        ValueError, TypeError: an argument is not of this form; the message quotes it.
        RuntimeError: as `torch.nn.RNN`; or no rollout of a sample is finite. `.grad` is then unchanged.
        MemoryError: `max_memory` is too little for one rollout.
    """
    perturbation = check_perturbation(getattr(rnn, "perturbation", None) if perturbation is None else perturbation)
    estimator = ESTIMATORS[perturbation.method]
    for name, tensor in (("inputs", inputs), ("hx", hx)):
        _check_leaf(name, tensor, perturbation, estimator)
    with entered("estimate_grad_"), torch.no_grad(), parametrize.cached():
        _compute_parametrized(rnn, readout)
        problem = canonical(rnn, readout, inputs, targets, loss, hx, lengths)
        work = problem if estimator.exact else _job(rnn, problem, perturbation, generator)
        # BPTT runs under the caller's autocast, as torch's own backward pass would.
        with nullcontext() if estimator.exact else torch.autocast(problem.inputs.device.type, enabled=False):
            result: FoundOfProblem = estimator.walk(problem.network.directions)(work)
        _add_gradients(rnn, readout, inputs, hx, problem, result)
        outputs = result.outputs
        if problem.lengths is not None:
            outputs = torch.where(valid_steps(len(outputs), problem.lengths, outputs.device).unsqueeze(-1), outputs, 0)
        return Estimate(
            loss=result.loss,
            outputs=problem.layout.restore(outputs),
            h_n=result.h_n if problem.layout.batched else result.h_n.squeeze(1),
            skipped=result.skipped,
            split_half=result.split_half,
            ridge_grown=result.ridge_grown,
        )


def _check_leaf(name: str, tensor: object, perturbation: Perturbation, estimator: type[Estimator]) -> None:
    """Raise where a tensor requires a gradient that `estimate_grad_` cannot give it."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return
    if not tensor.is_leaf:
        raise ValueError(
            f"{name} come from a graph, and estimate_grad_ sends nothing back through one: detach them, "
            "or use loss.backward() through anpgpu.RNN"
        )
    if estimator.weights_only:
        raise ValueError(
            f"method={perturbation.method!r} estimates gradients of weights alone, but {name} requires grad; "
            "detach it, or use method='anp' or 'np'"
        )


def _job(rnn: nn.RNN, problem: Problem, perturbation: Perturbation, generator: torch.Generator | None) -> Job:
    """Return the job of an estimator that runs rollouts, and draw its seed."""
    settings = resolve(perturbation, CELLS[cell_name(rnn)], rnn.all_weights[0][1])
    device, limit = problem.inputs.device, perturbation.max_memory
    return Job(
        problem,
        settings,
        new_seed(device, generator),
        default_memory(device) if limit is None else limit,
        perturb_readout=perturbation.readout == "perturbed" or problem.loss.black_box,
    )


@torch.enable_grad()
def _compute_parametrized(*modules: nn.Module | None) -> None:
    """Compute parametrized weights with a graph to their parameters; `parametrize.cached` keeps both."""
    for module in modules:
        parametrizations = getattr(module, "parametrizations", None)
        for name in parametrizations if isinstance(parametrizations, nn.ModuleDict) else ():
            getattr(module, name)


def _add_gradients(
    rnn: nn.RNN,
    readout: nn.Module | None,
    inputs: Tensor | PackedSequence,
    hx: Tensor | None,
    problem: Problem,
    result: FoundOfProblem,
) -> None:
    """Add the gradients to `.grad` of every leaf that requires one, through parametrizations."""
    gradient_of: list[tuple[Tensor | None, Tensor | None]] = []
    for weights, sums in zip(rnn.all_weights, result.layers, strict=True):
        gradient_of += zip(weights, sums.totals(biases=rnn.bias), strict=True)
    if isinstance(readout, nn.Linear):
        gradient_of += [(readout.weight, result.weight_o), (readout.bias, result.bias_o)]
    computed = []
    for weight, gradient in gradient_of:
        if weight is None or weight.is_leaf:
            _add(weight, gradient)
        elif gradient is not None:
            computed.append((weight, gradient.to(weight.dtype)))
    if computed:
        torch.autograd.backward([weight for weight, _ in computed], [gradient for _, gradient in computed])
    if isinstance(inputs, Tensor) and inputs.requires_grad:
        _add(inputs, problem.layout.restore(result.inputs))
    if hx is not None:
        _add(hx, result.h_0 if problem.layout.batched else result.h_0.squeeze(1))


def _add(leaf: Tensor | None, gradient: Tensor | None) -> None:
    if leaf is None or gradient is None or not leaf.requires_grad:
        return
    gradient = gradient.to(leaf.dtype)
    leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad + gradient
