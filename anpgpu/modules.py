"""`RNN`, `GRU` and `LSTM`: torch's modules with a backward pass that runs perturbed rollouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .estimators.found import Estimate
from .estimators.kept import Kept, before_loading
from .kernels.noise import COUNTER_LIMITS
from .network.cells import cell_name
from .ops.network import Structure, autocast_dtype, differentiable_run, new_seed, run_perturbed
from .ops.tensors import forward_mode
from .perturbation import Perturbation, check_perturbation
from .registry import CELLS, ESTIMATORS
from .runtime.processes import replicas
from .runtime.settings import resolve

States = tuple[Tensor, ...]
"""h, and in an LSTM c, each (layers * D, B, H), or (layers * D, H) unbatched."""


class Perturbed(nn.RNNBase):
    """What `RNN`, `GRU` and `LSTM` share; each derives from this and from torch's module, whose errors it raises."""

    perturbation: Perturbation

    def __init__(self, *args: Any, perturbation: Perturbation | None = None, **kwargs: Any) -> None:
        # The limit is torch's business too: without it, a huge number of layers would take all memory first.
        self._check_depth(*args, **kwargs)
        super().__init__(*args, **kwargs)
        if self.proj_size:
            raise ValueError(f"{type(self).__name__} does not support projections, got proj_size={self.proj_size}")
        self.perturbation = check_perturbation(perturbation)
        self._record = Record()
        self._estimator_state = Kept()
        let_dynamo_trace()

    depth_at: tuple[int, int] = (2, 6)
    """Places of num_layers and bidirectional among the constructor's arguments."""

    @classmethod
    def _check_depth(cls, *args: Any, **kwargs: Any) -> None:
        """Raise where layers times directions exceed the layer field of the noise counters."""
        first, second = cls.depth_at
        layers = kwargs.get("num_layers", args[first] if len(args) > first else 1)
        both = kwargs.get("bidirectional", args[second] if len(args) > second else False)
        most = COUNTER_LIMITS["layer"] // (2 if both is True else 1)
        if isinstance(layers, int) and layers > most:
            raise ValueError(f"num_layers must be at most {most}, got {layers}")

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)  # type: ignore[no-untyped-call]
        let_dynamo_trace()

    def _apply(self, fn: Any, recurse: bool = True) -> Perturbed:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._estimator_state.move(self.all_weights[0][1])
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before_loading(self)
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def last_estimate(self) -> Estimate | None:
        """Report of the last backward pass, None before the first; torch.compile and torch.func do not update it."""
        return self._record.estimate

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002  (torch's own name)
        hx: Any = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Run the network; see torch's module."""
        result: tuple[Tensor | PackedSequence, Any] = self._run(input, hx)
        if "parametrizations" in self._modules and not torch.compiler.is_compiling():
            # torch's modules cache computed weights; with their graph the module could not be deep-copied.
            self._flat_weights = [None if weight is None else weight.detach() for weight in self._flat_weights]
        return result

    def _states(self, hx: Any) -> States:
        """Return the states that hx holds."""
        return (hx,)

    def _hx(self, states: States) -> Any:
        """Return the states in the form of hx."""
        return states[0]

    def _run(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: Any,
    ) -> tuple[Tensor | PackedSequence, Any]:
        perturbation = check_perturbation(self.perturbation)
        weights: list[Tensor] = [weight for layer in self.all_weights for weight in layer]
        values = input.data if isinstance(input, PackedSequence) else input
        leaves = [*weights, values, *(hx if isinstance(hx, (tuple, list)) else (hx,))]
        learns = any(getattr(leaf, "requires_grad", False) for leaf in leaves)
        needed = torch.is_grad_enabled() and learns
        exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        # The compiler would unroll nn.RNN over time; the op's graph does not grow with the sequence.
        compiling = torch.compiler.is_compiling() and not exporting and not forward_mode()
        exact = ESTIMATORS[perturbation.method].exact or exporting
        if CELLS[cell_name(self)].native and (exact or not (needed or compiling)):
            result = super().forward(input, hx)
            if learns and self.training and not torch.is_grad_enabled() and not exact:
                # A pass that activation checkpointing repeats with gradients: the repetition draws this number again,
                # and the next update another. Dropout, too, draws in training without gradients.
                new_seed(values.device)
            return result[0], result[1]
        if not torch.compiler.is_compiling():
            self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights, needed)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        states = None if hx is None else self._states(hx)
        if states is not None and any(state.dim() != input.dim() for state in states):
            kind, names = "batched" if batched else "unbatched", "hx" if len(states) == 1 else "hx and cx"
            raise RuntimeError(
                f"For {kind} {input.dim()}-D input, {names} should also be {input.dim()}-D but got "
                f"{', '.join(f'{state.dim()}-D' for state in states)}"
            )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)  # noqa: A001
            states = None if states is None else tuple(state.unsqueeze(1) for state in states)
        if states is None:
            states = self._no_states(input, input.shape[batch_dim])
        self.check_forward_args(input, self._hx(states), None)
        time_first = input.transpose(0, 1) if self.batch_first else input
        if not time_first.shape[0]:
            # Raises torch's own error.
            result = super().forward(input, self._hx(states))
            return result[0], result[1]
        outputs, final = self._perturbed(time_first, states, weights, None, needed)
        outputs = outputs.transpose(0, 1) if self.batch_first else outputs
        if batched:
            return outputs, self._hx(final)
        return outputs.squeeze(batch_dim), self._hx(tuple(state.squeeze(1) for state in final))

    def _no_states(self, values: Tensor, batch: int) -> States:
        """Return zeros for the first states."""
        count: int = CELLS[cell_name(self)].forms.states
        shape = (len(self.all_weights), batch, self.hidden_size)
        return tuple(values.new_zeros(shape) for _ in range(count))

    def _forward_packed(
        self, packed: PackedSequence, hx: Any, weights: list[Tensor], needed: bool
    ) -> tuple[PackedSequence, Any]:
        states = self._no_states(packed.data, int(packed.batch_sizes[0])) if hx is None else self._states(hx)
        self.check_forward_args(packed.data, self._hx(states), packed.batch_sizes)
        # Unpacked into the caller's order of samples, which is also hx's.
        padded, lengths = pad_packed_sequence(packed)
        outputs, final = self._perturbed(padded, states, weights, lengths, needed)
        order = packed.sorted_indices
        if order is not None:
            outputs, lengths = outputs.index_select(1, order), lengths[order.cpu()]
        data, _ = torch._VF._pack_padded_sequence(outputs, lengths, False)
        return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices), self._hx(final)

    def _perturbed(
        self, inputs: Tensor, states: States, weights: list[Tensor], lengths: Tensor | None, needed: bool
    ) -> tuple[Tensor, States]:
        perturbation = check_perturbation(self.perturbation)
        for tensor in (*states, *weights):
            if tensor.device != inputs.device:
                # With one tensor on meta an op runs its fake, whose result is uninitialised memory.
                raise RuntimeError(
                    "Input, hidden and parameter tensors are not at the same device, found input tensor at "
                    f"{inputs.device} and another at {tensor.device}"
                )
        estimator = ESTIMATORS[perturbation.method]
        if needed and estimator.measures_losses:
            raise RuntimeError(
                f"method={perturbation.method!r} measures losses and runs in anpgpu.estimate_grad_ alone: call that, "
                "or use torch.no_grad() where no gradient is wanted"
            )
        if needed and estimator.weights_only and any(tensor.requires_grad for tensor in (inputs, *states)):
            what = "the input" if inputs.requires_grad else "hx"
            raise RuntimeError(
                f"method={perturbation.method!r} estimates gradients of weights alone, but {what} requires grad; "
                "detach it, or use method='anp' or 'np'"
            )
        structure = Structure(cell_name(self), self.bias, 2 if self.bidirectional else 1, autocast_dtype(inputs.device))
        settings = None
        if not estimator.exact and not torch.compiler.is_compiling():
            # Fails early on a missing backend or a wrong type; under torch.compile the backward pass does.
            settings = resolve(perturbation, CELLS[structure.cell], weights[1])
        masks = []
        if self.dropout and self.training:
            shape = (*inputs.shape[:2], structure.directions * self.hidden_size)
            ones = inputs.new_ones(shape, dtype=structure.state_dtype(weights[0], packed=lengths is not None))
            masks = [nn.functional.dropout(ones, self.dropout) for _ in range(self.num_layers - 1)]
        state = states[0] if len(states) == 1 else self._joined(states, structure.autocast)
        if estimator.exact or torch.compiler.is_exporting():
            outputs, final = differentiable_run(structure, inputs, state, weights, masks, lengths)
        else:
            # The seed is drawn last, so that dropout masks are those of nn.RNN.
            seed = new_seed(inputs.device) if needed else None
            kept = self._kept(perturbation.method) if needed and estimator.keeps_state else 0
            outputs, final = run_perturbed(
                self._record, perturbation, structure, seed, inputs, state, weights, masks, lengths, kept, settings
            )
        if len(states) == 1:
            return outputs, (final,)
        # Tensors of their own, which the caller may change in place.
        return outputs, tuple(
            part.clone(memory_format=torch.contiguous_format) for part in final.chunk(len(states), -1)
        )

    def _kept(self, method: str) -> int:
        """Return the handle of the module's state, which knows from now on with which processes it learns."""
        if not torch.compiler.is_compiling():
            self._estimator_state.replicas = replicas()
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(
                f"method={method!r} cannot tell, when it is compiled, with which processes it shares its feedback "
                "matrix: use method='anp-ls', or do not compile it where there is a process group"
            )
        return self._estimator_state.handle

    @staticmethod
    def _joined(states: States, autocast: torch.dtype | None) -> Tensor:
        """Return the states in one tensor, (layers * D, B, S)."""
        kinds = {state.dtype for state in states}
        if len(kinds) > 1 and autocast is None:
            raise RuntimeError(f"the states in hx must have one type, got {', '.join(sorted(map(str, kinds)))}")
        return torch.cat(states, -1)


class RNN(Perturbed, nn.RNN):  # type: ignore[misc]
    """An Elman RNN trained by perturbed rollouts instead of backpropagation through time.

    Constructor arguments, parameters, state_dict, inputs, outputs and errors are those of `torch.nn.RNN`, and it
    returns the same values. The forward pass stores clean activity but no graph through time. The backward pass takes
    the gradient of the loss with respect to the outputs, runs perturbed rollouts and returns estimates of the gradients
    of weights, biases, inputs and initial state. Any head, loss and optimiser works.

    Each forward pass that needs gradients draws one 64-bit seed from torch's default generator of the module's device,
    and so does one in training mode under `torch.no_grad`, which activation checkpointing may repeat with gradients.

    torch.compile sees two ops, in a full graph. The first RNN of a process sets torch._dynamo.config.allow_rnn, without
    which the compiler breaks the graph at any subclass of `torch.nn.RNN`. torch.export exports the clean run, in
    torch's own ops. Forward-mode and second derivatives raise; torch.func.grad works, and so does vmap, slice by slice.

    Args:
        *args: as `torch.nn.RNN`.
        perturbation: how gradients are estimated; the attribute may be replaced at any time.
        **kwargs: as `torch.nn.RNN`.

    Raises:
        ValueError, TypeError: as `torch.nn.RNN`; ValueError also for more than 256 layers (128 with two directions),
            the limit of the noise counters.

    Source: Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967.
    """

    depth_at = (2, 7)


class GRU(Perturbed, nn.GRU):  # type: ignore[misc]
    """A GRU trained by perturbed rollouts instead of backpropagation through time.

    `torch.nn.GRU`'s constructor, parameters, state_dict, inputs, outputs and errors; see `RNN` for the rest. Noise is
    added to the H numbers of the state, behind the cell; from the estimate of dL/dh_t every gate's gradient follows
    within its step.

    Args:
        *args: as `torch.nn.GRU`.
        perturbation: how gradients are estimated; the attribute may be replaced at any time.
        **kwargs: as `torch.nn.GRU`.

    Raises:
        ValueError, TypeError: as `torch.nn.GRU`; ValueError also for more than 256 layers (128 with two directions).

    Source: arXiv:2405.08967; gates from the adjoint of the state: Bellec et al. 2020, Nature Communications 11, 3625,
    with a measured total derivative.
    """


class LSTM(Perturbed, nn.LSTM):  # type: ignore[misc]
    """An LSTM trained by perturbed rollouts instead of backpropagation through time.

    `torch.nn.LSTM`'s constructor, parameters, state_dict, inputs, outputs, states (h, c) and errors; see `RNN` and
    `GRU` for the rest. What reaches the loss through c is known from the estimate of dL/dh_t, and followed exactly.

    Args:
        *args: as `torch.nn.LSTM`.
        perturbation: how gradients are estimated; the attribute may be replaced at any time.
        **kwargs: as `torch.nn.LSTM`.

    Raises:
        ValueError, TypeError: as `torch.nn.LSTM`; ValueError also for more than 256 layers (128 with two directions),
            and for projections (`proj_size`), which are not supported.

    Source: as `GRU`.
    """

    def _states(self, hx: Any) -> States:
        return hx[0], hx[1]

    def _hx(self, states: States) -> Any:
        return states


class Record:
    """Holds the report of the last backward pass, for `last_estimate`."""

    def __init__(self) -> None:
        self.estimate: Estimate | None = None

    def keep(self, skipped: Tensor, split_half: Tensor, ridge_grown: Tensor, prior: Tensor) -> None:
        """Store the report of a backward pass."""
        self.estimate = Estimate(None, None, None, skipped, split_half, ridge_grown, prior=prior)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """Return an empty record: a copied module has had no backward pass."""
        return Record()


def let_dynamo_trace() -> None:
    """Let torch.compile trace subclasses of torch's recurrent modules, at which it breaks the graph by default."""
    # Imported late: it takes as long as torch itself, and the first op that runs imports it anyway.
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True
