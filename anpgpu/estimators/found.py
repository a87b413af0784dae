"""The result of an update: gradients in parts, agreement of two halves of the rollouts, counts of skipped rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anpgpu.kernels.weight_gradients import weight_gradients
from anpgpu.network.cells import Cell, GateAdjoints, LayerRun
from anpgpu.network.stack import Network
from anpgpu.network.weights import LayerWeights
from anpgpu.runtime.processes import Share
from anpgpu.runtime.ranges import within
from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem


class Estimate(NamedTuple):
    """The report of an update, besides the gradients.

    `RNN.last_estimate` has only `skipped`, `split_half`, `ridge_grown` and `prior`; the other fields are then None.
    """

    loss: Tensor | None
    """Clean loss, 0-dim."""
    outputs: Tensor | None
    """Clean outputs in the layout of the inputs: (T, B, O), (B, T, O) with batch_first, (T, O) unbatched."""
    h_n: Tensor | tuple[Tensor, ...] | None
    """Clean final states, as torch's modules return them: of an LSTM (h_n, c_n)."""
    skipped: Tensor
    """Number of rollouts left out because they were not finite, over samples, layers and directions; 0-dim int64."""
    split_half: Tensor
    """Cosine between the estimates from the even and the odd rollouts, 0-dim. Near 1, more rollouts would change
    little. It shows variance, not bias: a discount of 0 can look perfect. NaN with one rollout, for "anp-ls" unless
    `Perturbation(split_half=True)` asks for it, and for "anp-feedback"."""
    ridge_grown: Tensor
    """Number of least-squares systems ("anp-ls") whose Cholesky factorisation failed with the given ridge; they were
    solved with a ridge as large as the system itself. 0-dim int64."""
    moved: Tensor | None = None
    """Number of rollouts that changed a callable loss, over samples, the last layer's directions, and the readout's
    rollouts; 0-dim int64. At 0 every gradient is zero: on the CPU a warning says so, on CUDA, where nothing makes the
    host wait, this number alone. None for other losses, and with method "bptt"."""
    prior: Tensor | None = None
    """How good the prior mean of "anp-feedback" was, (layers * D, 2); (0, 2) for other methods. First the mean gain
    with which the returns confirm it, in [0, 1]; then the ratio of what the returns show of the feedback's part to what
    the feedback matrix predicts. Both near 1 once it has converged; NaN where nothing was predicted or learnt, as in
    layers that need no gradient."""


class NonFiniteRolloutsError(RuntimeError):
    """No rollout of some sample stayed finite, so its gradient cannot be estimated."""


def raise_if_lost(counts: Tensor, first_sample: int, sigma: float) -> None:
    """Raise NonFiniteRolloutsError if a sample has no finite rollout; `counts` is their number, (b,).

    On CUDA the estimate becomes NaN instead, because reading `counts` would make the host wait.
    """
    if counts.is_cuda:
        return
    lost = (counts == 0).nonzero().flatten() + first_sample
    if len(lost):
        raise NonFiniteRolloutsError(
            f"every rollout of sample {', '.join(map(str, lost[:8].tolist()))} is not finite ({len(lost)} such "
            f"samples, sigma={sigma!r}): look for NaN or inf in inputs and weights, or for a state that explodes"
        )


class Made:
    """A tensor that is made, filled with zeros, where somebody asks for it and nobody has filled it in."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, held: Any, owner: type) -> Any:
        if self.name not in held.made:
            held.made[self.name] = held.zeros(self.name)
        return held.made[self.name]

    def __set__(self, held: Any, tensor: Tensor | None) -> None:
        held.made[self.name] = tensor


class GradientSums:
    """Gradients of one layer's weights, in parts that add up to the estimate, (parts, ...) each.

    The first two parts come from the even and from the odd rollouts, a third from all rollouts together. `products`: a
    backend's `weight_gradients`.
    """

    weight_ih, weight_hh, bias_ih = Made(), Made(), Made()
    bias_hh = Made()
    """The same tensor as `bias_ih` unless the two biases have different gradients."""

    def __init__(
        self, weights: LayerWeights, parts: int = 2, products: Callable[..., list[Tensor]] = weight_gradients
    ) -> None:
        self.like, self.parts, self.products, self.made = weights, parts, products, dict[str, Tensor]()

    def zeros(self, name: str) -> Tensor:
        """Return the sums to which nothing has been added."""
        if name == "bias_hh":
            both: Tensor = self.bias_ih
            return both
        shape = self.like.weight_hh.shape[:1] if name == "bias_ih" else getattr(self.like, name).shape
        return self.like.weight_hh.new_zeros((self.parts, *shape))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All distinct sums."""
        biases = (self.bias_ih,) if self.bias_hh is self.bias_ih else (self.bias_ih, self.bias_hh)
        return self.weight_ih, self.weight_hh, *biases

    @within("weight_gradients")
    def add(self, gates: GateAdjoints, run: LayerRun) -> None:
        """Add sum_t A_t (x_t, 1)^T and sum_t R_t (h_{t-1}, 1)^T of some steps, A and R the fields of `gates`."""
        states = run.states[:-1, :, : self.like.weight_hh.shape[1]]
        if gates.recurrent is gates.inputs:
            self._add(gates.inputs, ("weight_ih", "weight_hh", "bias_ih"), (run.inputs, states))
        else:
            self._add(gates.inputs, ("weight_ih", "bias_ih"), (run.inputs,))
            self._add(gates.recurrent, ("weight_hh", "bias_hh"), (states,))

    def _add(self, adjoint: Tensor, names: Sequence[str], presynaptic: Sequence[Tensor]) -> None:
        sums = [getattr(self, name) for name in names] if names[0] in self.made else None
        self.made.update(zip(names, self.products(adjoint, presynaptic, sums), strict=True))

    def totals(self, *, biases: bool) -> tuple[Tensor, ...]:
        """Return the gradients in the order of the layer's parameters, each in memory of its own."""
        sums = (self.weight_ih, self.weight_hh, *((self.bias_ih, self.bias_hh) if biases else ()))
        first, *rest = zip(*(total.unbind() for total in sums), strict=True)
        if not rest:
            return tuple(total.clone() for total in first)
        totals = torch._foreach_add(first, rest[0])
        for more in rest[1:]:
            torch._foreach_add_(totals, more)
        return tuple(totals)


def split_half(sums: Sequence[GradientSums]) -> Tensor:
    """Return the cosine between the two halves' gradients over all weights and biases, a 0-dim tensor.

    It shows the estimate's variance, not its bias; NaN where a half is zero, as with one rollout, and where halves are
    not told apart.
    """
    like = sums[0].like.weight_hh
    if sums[0].parts == 1:
        return like.new_full((), torch.nan)
    halves = torch.cat([tensor[:2].flatten(1) for layer in sums for tensor in layer.tensors], 1)
    # The squares of gradients of 1e20 or 1e-23 leave float32's range.
    halves = halves.double()
    products = halves @ halves.t()
    cosine: Tensor = products[0, 1] / products.diagonal().prod().sqrt()
    return cosine.to(like.dtype)


def placed(whole: Tensor | None, part: Tensor, where: tuple[slice | int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of some shape with a part of it filled in.

    Args:
        whole: the tensor so far; None where nothing of it is there. The rest of it is zero.
        part: of it; where it is all of it, it is the result.
        where: its place.
        shape: of the whole.
    """
    if whole is None:
        if part.shape == shape:
            return part
        whole = part.new_zeros(shape)
    whole[where] = part
    return whole


class Found:
    """The result of an estimator, filled in step by step, in canonical form: gradients and counts.

    Args:
        network: in the working type.
        inputs: (T, B, I).
        h_0: (layers * D, B, S).
        settings: the resolved perturbation, which says in how many parts weights' gradients come, and who computes
            them; None is two parts, and the reference.
    """

    inputs, h_0 = Made(), Made()
    """dL/d(inputs), (T, B, I), and dL/d(first states), (layers * D, B, S)."""
    skipped, ridge_grown = Made(), Made()
    """See `Estimate`."""

    def __init__(self, network: Network, inputs: Tensor, h_0: Tensor, settings: Settings | None = None) -> None:
        self.cell: type[Cell] = network.cell
        parts = 2 if settings is None else settings.parts
        self.products = weight_gradients if settings is None else settings.weight_gradients
        self.layers = [GradientSums(weights, parts, self.products) for layer in network.layers for weights in layer]
        number = inputs.new_empty((), dtype=torch.int64)
        self.like: dict[str, Tensor | None] = {
            "inputs": inputs, "h_0": h_0, "skipped": number, "ridge_grown": number
        }  # fmt: skip
        self.made: dict[str, Tensor] = {}
        self.learners: list[Any] = []
        """What each layer and direction has learnt, of an estimator that keeps a state; None where it did not run."""

    def zeros(self, name: str) -> Tensor | None:
        """Return what nobody has filled in, or None where there is no such thing."""
        like = self.like[name]
        return None if like is None else like.new_zeros(like.shape)

    def place(self, name: str, part: Tensor, *where: slice | int) -> None:
        """Fill in a part of the gradient "inputs" or "h_0", or, in `estimate_grad_`, of "outputs" or "h_n"."""
        like = self.like[name]
        assert like is not None  # noqa: S101  (for the type checker; each of these exists)
        self.made[name] = placed(self.made.get(name), part, where, like.shape)

    def count(self, skipped: Tensor, ridge_grown: Tensor | None) -> None:
        """Add what the rollouts of some samples of a layer report, both as `Sweep` has it."""
        for name, number in (("skipped", skipped), ("ridge_grown", ridge_grown)):
            if number is not None:
                self.made[name] = self.made[name] + number if name in self.made else number

    def sum_(self, share: Share) -> None:
        """Sum gradients and counts over the processes that share the rollouts."""
        if share.alone:
            return
        share.sum_(*self.weights, self.inputs, self.h_0)
        share.sum_(self.skipped, self.ridge_grown)

    @property
    def prior(self) -> Tensor:
        """How good the prior means were, see `Estimate`, (layers * D, 2); (0, 2) without a prior."""
        if not self.learners:
            return self.layers[0].like.weight_hh.new_empty((0, 2))
        nothing = self.layers[0].like.weight_hh.new_full((2,), torch.nan)
        return torch.stack([nothing if learner is None else learner.report for learner in self.learners])

    @property
    def split_half(self) -> Tensor:
        """Cosine between the two halves' gradients, see `Estimate`."""
        return split_half(self.layers)

    @property
    def weights(self) -> list[Tensor]:
        """Every sum of the weights' gradients."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def credit(
        self, index: int, parts: Tensor, weights: LayerWeights, run: LayerRun, *, inputs: bool, start: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add the gradients of a layer's weights that follow from an adjoint; return those of what comes into it.

        Args:
            index: of the layer and direction in `layers`.
            parts: the adjoint in parts, (parts, L, b, S).
            weights: of the layer.
            run: its clean activity over these steps.
            inputs: whether dL/dx is wanted.
            start: whether the gradient of the state before these steps is wanted.

        Returns:
            dL/dx, (L, b, I), and dL/d(state before the first step), (b, S); None where it is not wanted.
        """
        gates = self.cell.gate_adjoints(parts, weights, run)
        self.layers[index].add(gates, run)
        first = self.cell.first_state_gradient(parts[:, 0].sum(0), weights, run) if start else None
        return gates.inputs.sum(0) @ weights.weight_ih if inputs else None, first


class FoundOfProblem(Found):
    """The result in `estimate_grad_`: also clean results, and the readout's gradient."""

    outputs, h_n, loss = Made(), Made(), Made()
    """Clean outputs, (T, B, O); clean final states, (layers * D, B, S); clean loss, 0-dim."""
    weight_o, bias_o = Made(), Made()
    """Gradients of the readout, (O, D * H) and (O,); None where there is none."""

    def __init__(self, problem: Problem, settings: Settings | None = None) -> None:
        super().__init__(problem.network, problem.inputs, problem.h_0, settings)
        time, batch, _ = problem.inputs.shape
        outputs = problem.inputs.new_empty((1, 1, 1)).expand(time, batch, problem.outputs_size)
        self.like |= {"outputs": outputs, "h_n": problem.h_0, "loss": problem.inputs.new_empty(())}
        self.like |= {"weight_o": problem.weight_o, "bias_o": problem.bias_o}
        self.readout: list[Tensor] | None = None
        """The readout's gradient from exact products, as they return it."""
        self.moved = None if problem.loss.moved is None else problem.loss.moved.zero_()

    def taken(self, name: str) -> Tensor | None:
        """Return what was found, which is then the caller's alone."""
        found: Tensor | None = getattr(self, name)
        del self.made[name]
        return found

    def add(self, name: str, value: Tensor) -> None:
        """Add to "loss"."""
        self.made[name] = self.made[name].add_(value) if name in self.made else value

    def sum_(self, share: Share) -> None:
        """Sum the results of the processes that share the rollouts."""
        if share.alone:
            return
        super().sum_(share)
        if self.moved is not None:
            share.sum_(self.moved)
        if share.by_samples:
            # Each process has run only its samples, of the clean network, too.
            readout = [gradient for gradient in (self.weight_o, self.bias_o) if gradient is not None]
            share.sum_(self.outputs, self.h_n, self.loss, *readout)

    def add_readout(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the readout's gradient from dL/do, (L, b, O), and the states it read, (L, b, D * H)."""
        if self.like["weight_o"] is None:
            return
        self.readout = self.products(gradient.unsqueeze(0), (hidden,), self.readout)
        weight, bias = (total[0] for total in self.readout)
        self.weight_o, self.bias_o = weight, None if self.like["bias_o"] is None else bias
