"""`estimate_grad_`: gradients of an RNN and its readout from forward passes alone, without autograd."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from .estimators.found import Estimate, FoundOfProblem, NonFiniteRolloutsError
from .estimators.job import Job
from .estimators.kept import kept_of
from .network.cells import cell_name
from .network.weights import valid_steps
from .perturbation import Perturbation, check_perturbation
from .registry import CELLS, ESTIMATORS, Estimator
from .runtime.memory import default_memory
from .runtime.processes import replicas, shared_update
from .runtime.ranges import entered
from .runtime.settings import check_extent, new_seed, resolve
from .task.black_box import LossFunction
from .task.problem import Problem, canonical, packed_like


def estimate_grad_(
    rnn: nn.RNNBase,
    readout: nn.Module | None,
    inputs: Tensor | PackedSequence,
    targets: Tensor | None,
    loss: str | LossFunction = "mse",
    *,
    perturbation: Perturbation | None = None,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    targets_per: str | None = None,
    step_weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate gradients from forward passes and add them to `.grad`, as `backward()` does, without an autograd graph.

    Args:
        rnn: an RNN, GRU or LSTM of anpgpu or of torch.nn.
        readout: `torch.nn.Linear` from hidden states to outputs, or None: the hidden state is the output. With a
            callable loss also a module without trainable parameters.
        inputs: as the rnn's, (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
        targets: per step, (T, B, O) or class indices (T, B), batch first where the inputs are; or per sequence, (B, O)
            or (B,): then only each sample's last valid step has a loss. Class -100 is ignored. For a callable loss, any
            tensor beginning with (T, B) or (B,), or None.
        loss: "mse" or "cross_entropy", averaged over the steps that count (and outputs); or `torch.nn.MSELoss` or
            `torch.nn.CrossEntropyLoss` with any option but reduction="none" and class probabilities as targets; the
            loss is then the module's of the outputs that count. Or a callable, other loss modules included,
            `loss(outputs, targets)` with outputs (T, B, p, O) and targets with a rollout axis of size 1, which returns
            (T, B, p) values per step or (B, p) per sequence. It may be called on part of the samples, may work in place
            and need not be differentiable; its values are averaged. Outputs past a sample's length are zero; targets
            are as given; a parameter `lengths` gets the lengths of the samples of the call, (B,) int64. A Linear
            readout's weights are then perturbed. Values that no rollout changes, as those of a step function at a
            small sigma, teach nothing: `Estimate.moved` is 0, and on the CPU a warning says so, once.
        perturbation: the default is the rnn's own, or `Perturbation()`.
        hx: initial state, as the rnn's; of an LSTM (h_0, c_0).
        lengths: valid steps of each sample, (B,), in [0, T]; padding contributes nothing. A sample of length 0 has
            outputs 0, its first state as the final one, and no loss, and is not counted in a mean.
        targets_per: "step" or "sequence", for targets of a callable loss whose sizes fit both.
        step_weight: weight of each step's loss, (T, B), batch first where the inputs are; finite and not negative. The
            mean becomes sum(weight * loss) / sum(weight), with class weights sum(weight * class weight) below. What
            stands in padding is not read. On CUDA values are not checked, and a sum of 0 gives NaN.
        generator: where the update's one seed is drawn; the default is torch's default generator of the device.

    Returns:
        `Estimate`: clean loss, outputs and final state, split-half cosine, counts of rollouts.

    Raises:
        ValueError, TypeError: an argument is not of this form; the message quotes it.
        RuntimeError: as `torch.nn.RNN`; no rollout of a sample is finite; or, with shard_rollouts=True, another process
            failed (not on CUDA, where gradients are then NaN). `.grad` is then unchanged.
        MemoryError: `max_memory` is too little for one rollout.
    """
    perturbation = check_perturbation(getattr(rnn, "perturbation", None) if perturbation is None else perturbation)
    estimator = ESTIMATORS[perturbation.method]
    values = inputs.data if isinstance(inputs, PackedSequence) else inputs
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    for name, tensor in (("inputs", values), *(("hx", state) for state in states)):
        _check_leaf(name, tensor, perturbation, estimator)
    shared = perturbation.shard_rollouts and not estimator.exact and isinstance(values, Tensor)
    # Tensors of inference mode could not be used outside it, and some live longer than a call.
    with entered("estimate_grad_"), torch.inference_mode(False), torch.no_grad(), parametrize.cached():
        with shared_update(values.device) if shared else nullcontext():
            _compute_parametrized(rnn, readout)
            problem = canonical(rnn, readout, inputs, targets, loss, hx, lengths, targets_per, step_weight)
            wanted = (_wants(values), any(map(_wants, states)))
            work = problem if estimator.exact else _job(rnn, problem, perturbation, generator, wanted)
            # BPTT runs under the caller's autocast, as torch's own backward pass would.
            with nullcontext() if estimator.exact else torch.autocast(problem.inputs.device.type, enabled=False):
                try:
                    result: FoundOfProblem = estimator.walk(problem.network.directions)(work)
                except NonFiniteRolloutsError as error:
                    _blame_targets(problem, error)
                    raise
        moved = None if estimator.exact else result.moved
        if moved is not None and moved.device.type == "cpu":
            _warn_unmoved(problem, perturbation, moved)
        outputs, final = result.outputs, result.h_n
        report = Estimate(
            loss=result.loss,
            outputs=None,
            h_n=None,
            skipped=result.skipped,
            split_half=result.split_half,
            ridge_grown=result.ridge_grown,
            moved=moved,
            prior=result.prior,
        )
        _add_gradients(rnn, readout, inputs, states, problem, result)
        if problem.lengths is not None:
            outputs = torch.where(valid_steps(len(outputs), problem.lengths, outputs.device).unsqueeze(-1), outputs, 0)
        h_n = _states(final, problem)
        return report._replace(outputs=problem.layout.restore(outputs), h_n=h_n[0] if len(h_n) == 1 else h_n)


def _check_leaf(name: str, tensor: object, perturbation: Perturbation, estimator: type[Estimator]) -> None:
    """Raise where a tensor requires a gradient that `estimate_grad_` cannot give it."""
    if not isinstance(tensor, Tensor) or not _wants(tensor):
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


def _blame_targets(problem: Problem, error: NonFiniteRolloutsError) -> None:
    """Raise the error anew where it is the targets that are not finite."""
    targets = problem.loss.targets.values
    if targets is not None and targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
        count = int((~torch.isfinite(targets)).sum())
        raise NonFiniteRolloutsError(f"targets hold {count} values that are not finite: {error}") from error


def _warn_unmoved(problem: Problem, perturbation: Perturbation, moved: Tensor) -> None:
    """Warn where no rollout changed a caller's loss, so that every gradient is zero; Python shows it once a place."""
    loss = problem.loss
    if moved or not problem.inputs.shape[1]:
        return
    warnings.warn(
        f"no rollout changed the loss, whose values are {loss.returned}, and every gradient is zero: "
        f"sigma={perturbation.sigma!r} may be too small to move it",
        UserWarning,
        stacklevel=3,
    )


def _states(states: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """Return states, (layers * D, B, S), in the caller's layout: h, and of an LSTM c."""
    states = states if problem.layout.batched else states.squeeze(1)
    return states.chunk(problem.network.cell.forms.states, -1)


def _wants(tensor: object) -> bool:
    """Return whether it is a tensor that requires a gradient."""
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _job(
    rnn: nn.RNNBase,
    problem: Problem,
    perturbation: Perturbation,
    generator: torch.Generator | None,
    wanted: tuple[bool, bool],
) -> Job:
    """Return the job of an estimator that runs rollouts, and draw its seed; `wanted`: of inputs, of first states."""
    settings = resolve(perturbation, CELLS[cell_name(rnn)], rnn.all_weights[0][1])
    if settings.estimator.keeps_state:
        kept = kept_of(rnn)
        # Not those of an earlier forward pass: replicas that do not take part would be waited for.
        kept.replicas = replicas()
        settings = settings._replace(kept=kept)
    check_extent(len(rnn.all_weights), *problem.inputs.shape[:2])
    device, limit = problem.inputs.device, perturbation.max_memory
    return Job(
        problem,
        settings,
        new_seed(device, generator),
        default_memory(device) if limit is None else limit,
        perturbation.readout == "perturbed" or problem.loss.black_box,
        *wanted,
    )


@torch.enable_grad()
def _compute_parametrized(*modules: nn.Module | None) -> None:
    """Compute parametrized weights with a graph to their parameters; `parametrize.cached` keeps both."""
    for module in modules:
        parametrizations = getattr(module, "parametrizations", None)
        for name in parametrizations if isinstance(parametrizations, nn.ModuleDict) else ():
            getattr(module, name)


def _add_gradients(
    rnn: nn.RNNBase,
    readout: nn.Module | None,
    inputs: Tensor | PackedSequence,
    states: Sequence[Tensor | None],
    problem: Problem,
    result: FoundOfProblem,
) -> None:
    """Add what was found to `.grad` of every leaf that requires a gradient, through parametrizations.

    Autograd itself does it: in place where a gradient is there, with hooks.
    """
    gradients: list[tuple[Tensor | None, Tensor | None]] = []
    for weights, sums in zip(rnn.all_weights, result.layers, strict=True):
        gradients += zip(weights, sums.totals(biases=rnn.bias), strict=True)
    if isinstance(readout, nn.Linear):
        gradients += [(readout.weight, result.taken("weight_o")), (readout.bias, result.taken("bias_o"))]
    if isinstance(inputs, PackedSequence):
        if inputs.data.requires_grad:
            gradients.append((inputs.data, packed_like(result.inputs, inputs)))
    elif inputs.requires_grad:
        gradients.append((inputs, problem.layout.restore(result.inputs)))
    if any(state is not None and state.requires_grad for state in states):
        gradients += zip(states, _states(result.h_0, problem), strict=False)
    learning = [
        (tensor, gradient.to(tensor.dtype))
        for tensor, gradient in gradients
        if tensor is not None and gradient is not None and tensor.requires_grad
    ]
    if not learning:
        return
    tensors = [tensor for tensor, _ in learning]
    found = [gradient for _, gradient in learning]
    # Autograd keeps a gradient that nobody else holds, and copies any other.
    del gradients, learning
    with torch.enable_grad():
        end = _Handed.apply(found, *tensors)  # type: ignore[no-untyped-call]
    end.backward(torch.empty_like(end))


class _Handed(torch.autograd.Function):
    """The end of a graph whose backward pass hands out the gradients of a list, and empties it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients
