"""`RNN`: a `torch.nn.RNN` whose backward pass runs perturbed rollouts."""

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


def _check_depth(*args: Any, **kwargs: Any) -> None:
    """Raise where layers times directions exceed the layer field of the noise counters; arguments of `torch.nn.RNN`."""
    layers = kwargs.get("num_layers", args[2] if len(args) > 2 else 1)
    both = kwargs.get("bidirectional", args[7] if len(args) > 7 else False)
    most = COUNTER_LIMITS["layer"] // (2 if both is True else 1)
    if isinstance(layers, int) and layers > most:
        raise ValueError(f"num_layers must be at most {most}, got {layers}")


class RNN(nn.RNN):
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

    perturbation: Perturbation

    def __init__(self, *args: Any, perturbation: Perturbation | None = None, **kwargs: Any) -> None:
        _check_depth(*args, **kwargs)
        super().__init__(*args, **kwargs)
        self.perturbation = check_perturbation(perturbation)
        self._record = Record()
        self._estimator_state = Kept()
        let_dynamo_trace()

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)  # type: ignore[no-untyped-call]
        let_dynamo_trace()

    def _apply(self, fn: Any, recurse: bool = True) -> RNN:
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

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,  # noqa: A002  (nn.RNN's own name)
        hx: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the network; see `torch.nn.RNN`."""
        result = self._run(input, hx)
        if "parametrizations" in self._modules and not torch.compiler.is_compiling():
            # nn.RNN caches computed weights; with their graph the module could not be deep-copied.
            self._flat_weights = [None if weight is None else weight.detach() for weight in self._flat_weights]
        return result

    def _run(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: Tensor | None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        perturbation = check_perturbation(self.perturbation)
        weights: list[Tensor] = [weight for layer in self.all_weights for weight in layer]
        values = input.data if isinstance(input, PackedSequence) else input
        leaves = [*weights, values] if hx is None else [*weights, values, hx]
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
            return result
        if not torch.compiler.is_compiling():
            self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights, needed)
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched" if batched else "unbatched"
            raise RuntimeError(
                f"For {kind} {input.dim()}-D input, hx should also be {input.dim()}-D but got {hx.dim()}-D"
            )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)  # noqa: A001
            hx = None if hx is None else hx.unsqueeze(1)
        if hx is None:
            hx = input.new_zeros((len(self.all_weights), input.shape[batch_dim], self.hidden_size))
        self.check_forward_args(input, hx, None)
        time_first = input.transpose(0, 1) if self.batch_first else input
        if not time_first.shape[0]:
            # Raises nn.RNN's own error.
            return super().forward(input, hx)
        outputs, h_n = self._perturbed(time_first, hx, weights, None, needed)
        outputs = outputs.transpose(0, 1) if self.batch_first else outputs
        return (outputs, h_n) if batched else (outputs.squeeze(batch_dim), h_n.squeeze(1))

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None, weights: list[Tensor], needed: bool
    ) -> tuple[PackedSequence, Tensor]:
        batch = int(packed.batch_sizes[0])
        h_0 = packed.data.new_zeros((len(self.all_weights), batch, self.hidden_size)) if hx is None else hx
        self.check_forward_args(packed.data, h_0, packed.batch_sizes)
        # Unpacked into the caller's order of samples, which is also hx's.
        padded, lengths = pad_packed_sequence(packed)
        outputs, h_n = self._perturbed(padded, h_0, weights, lengths, needed)
        order = packed.sorted_indices
        if order is not None:
            outputs, lengths = outputs.index_select(1, order), lengths[order.cpu()]
        data, _ = torch._VF._pack_padded_sequence(outputs, lengths, False)
        return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices), h_n

    def _perturbed(
        self, inputs: Tensor, hx: Tensor, weights: list[Tensor], lengths: Tensor | None, needed: bool
    ) -> tuple[Tensor, Tensor]:
        perturbation = check_perturbation(self.perturbation)
        for tensor in (hx, *weights):
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
        if needed and estimator.weights_only and (inputs.requires_grad or hx.requires_grad):
            what = "the input" if inputs.requires_grad else "hx"
            raise RuntimeError(
                f"method={perturbation.method!r} estimates gradients of weights alone, but {what} requires grad; "
                "detach it, or use method='anp' or 'np'"
            )
        structure = Structure(cell_name(self), self.bias, 2 if self.bidirectional else 1, autocast_dtype(inputs.device))
        if not estimator.exact and not torch.compiler.is_compiling():
            # Fails early on a missing backend or a wrong type; under torch.compile the backward pass does.
            resolve(perturbation, CELLS[structure.cell], weights[1])
        masks = []
        if self.dropout and self.training:
            shape = (*inputs.shape[:2], structure.directions * self.hidden_size)
            ones = inputs.new_ones(shape, dtype=structure.state_dtype(weights[0]))
            masks = [nn.functional.dropout(ones, self.dropout) for _ in range(self.num_layers - 1)]
        if estimator.exact or torch.compiler.is_exporting():
            return differentiable_run(structure, inputs, hx, weights, masks, lengths)
        # The seed is drawn last, so that dropout masks are those of nn.RNN.
        seed = new_seed(inputs.device) if needed else None
        kept = 0
        if needed and estimator.keeps_state:
            kept = self._estimator_state.handle
            if not torch.compiler.is_compiling():
                self._estimator_state.replicas = replicas()
            elif torch.distributed.is_available() and torch.distributed.is_initialized():
                raise RuntimeError(
                    f"method={perturbation.method!r} cannot tell, when it is compiled, with which processes it shares "
                    "its feedback matrix: do not compile it where there is a process group"
                )
        return run_perturbed(self._record, perturbation, structure, seed, inputs, hx, weights, masks, lengths, kept)


class Record:
    """Holds the report of the last backward pass, for `RNN.last_estimate`."""

    def __init__(self) -> None:
        self.estimate: Estimate | None = None

    def keep(self, skipped: Tensor, split_half: Tensor, ridge_grown: Tensor, prior: Tensor) -> None:
        """Store the report of a backward pass."""
        self.estimate = Estimate(None, None, None, skipped, split_half, ridge_grown, prior=prior)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """Return an empty record: a copied module has had no backward pass."""
        return Record()


def let_dynamo_trace() -> None:
    """Let torch.compile trace subclasses of `torch.nn.RNN`, at which it breaks the graph by default."""
    # Imported late: it takes as long as torch itself, and the first op that runs imports it anyway.
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True
