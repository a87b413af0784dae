"""The arguments of `estimate_grad_`, checked and in canonical form: time first, batched, in the working type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from anpgpu.checks import one_of
from anpgpu.network.cells import RECURRENT, cell_name
from anpgpu.network.stack import Network
from anpgpu.network.weights import valid_steps
from anpgpu.registry import CELLS, LOSSES
from anpgpu.runtime.settings import working_dtype

from .black_box import BlackBox, LossFunction
from .losses import LossOptions, MeasuredLoss, Steps, Targets

VARYING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Modules whose function depends, in training mode, on a random draw or on what else is in the batch."""


class Layout(NamedTuple):
    """The layout of the caller's tensors."""

    batch_first: bool
    batched: bool

    def time_first(self, values: Tensor) -> Tensor:
        """Return (T, B, ...) from the caller's layout."""
        if not self.batched:
            return values.unsqueeze(1)
        return values.transpose(0, 1) if self.batch_first else values

    def restore(self, values: Tensor) -> Tensor:
        """Return the caller's layout from (T, B, ...)."""
        if not self.batched:
            return values.squeeze(1)
        return values.transpose(0, 1) if self.batch_first else values


class Sequences(NamedTuple):
    """A network and the sequences it runs on, in canonical form: detached and in the working type."""

    network: Network
    inputs: Tensor
    """(T, B, I)."""
    h_0: Tensor
    """(layers * D, B, S); of an LSTM h_0 and c_0 joined."""
    lengths: Tensor | None
    layout: Layout


class Problem(NamedTuple):
    """A call of `estimate_grad_` in canonical form."""

    network: Network
    weight_o: Tensor | None
    """(O, D * H); None where the hidden state is the output."""
    bias_o: Tensor | None
    inputs: Tensor
    """(T, B, I)."""
    h_0: Tensor
    """(layers * D, B, S); of an LSTM h_0 and c_0 joined."""
    lengths: Tensor | None
    loss: MeasuredLoss
    dropout: Callable[[Tensor], Tensor] | None
    layout: Layout

    @property
    def width(self) -> int:
        """D * H."""
        return self.network.hidden_size * self.network.directions

    @property
    def outputs_size(self) -> int:
        """O."""
        return self.width if self.weight_o is None else self.weight_o.shape[0]

    def lengths_of(self, samples: slice) -> Tensor | None:
        """Return the valid steps of some samples, (b,); None where all steps are valid."""
        return None if self.lengths is None else self.lengths[samples]

    def read(self, hidden: Tensor) -> Tensor:
        """Return the outputs of hidden states (..., D * H)."""
        return hidden if self.weight_o is None else nn.functional.linear(hidden, self.weight_o, self.bias_o)

    def readout_of(self, direction: int) -> Tensor | None:
        """Return the readout's columns for one direction, (O, H); None for the identity."""
        if self.network.directions == 1:
            return self.weight_o
        weight = self.weight_o
        if weight is None:
            weight = torch.eye(self.width, dtype=self.inputs.dtype, device=self.inputs.device)
        units = self.network.hidden_size
        return weight[:, direction * units : (direction + 1) * units]


def canonical(
    rnn: nn.RNNBase,
    readout: nn.Module | None,
    inputs: Tensor | PackedSequence,
    targets: Tensor | None,
    loss: str | LossFunction,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    lengths: Tensor | Sequence[int] | None,
    targets_per: str | None = None,
    step_weight: Tensor | None = None,
) -> Problem:
    """Check the arguments of `estimate_grad_`, where they are described, and return them in canonical form."""
    if not isinstance(rnn, RECURRENT):
        raise TypeError(f"rnn must be an RNN, GRU or LSTM of anpgpu or torch.nn, got {type(rnn).__name__}")
    if rnn.proj_size:
        raise ValueError(f"an LSTM with projections cannot be perturbed, got proj_size={rnn.proj_size}")
    kind = loss_class(loss)
    options = kind.options_of(loss)
    _check_readout(readout, kind, loss, rnn.hidden_size * (2 if rnn.bidirectional else 1))
    network, values, h_0, sizes, layout = sequences(rnn, inputs, hx, lengths)
    dtype = values.dtype
    if readout is not None:
        for name, parameter in readout.named_parameters():
            _same_device(f"readout.{name}", parameter, values)
    time, batch, _ = values.shape
    steps = Steps(time, batch, sizes, values.device)
    linear = readout if isinstance(readout, nn.Linear) else None
    weight_o = None if linear is None else linear.weight.detach().to(dtype)
    bias_o = None if linear is None or linear.bias is None else linear.bias.detach().to(dtype)
    outputs = network.hidden_size * network.directions if weight_o is None else weight_o.shape[0]
    if targets_per is not None:
        one_of("targets_per", targets_per, ("step", "sequence"))
    canonical_targets = _targets(targets, kind, options, layout, (time, batch, outputs), values, targets_per)
    if not canonical_targets.per_step and sizes is not None and not bool((sizes > 0).all()):
        raise ValueError(f"lengths must be at least 1 where a sequence has one target, got {sizes.tolist()}")
    weight = None
    if step_weight is not None:
        if not canonical_targets.per_step and not kind.black_box:
            raise ValueError(
                "step_weight weighs a loss of each step, but targets are one for each sequence: got targets of shape "
                f"{tuple(getattr(targets, 'shape', ()))}"
            )
        weight = _step_weight(step_weight, layout, steps.valid)
    measured = (
        BlackBox(
            loss,
            canonical_targets,
            steps,
            weight,
            readout=None if linear is not None else readout,
        )
        if kind.black_box and callable(loss)
        else kind(canonical_targets, steps, options, weight)
    )
    dropout = _dropout(rnn.dropout) if rnn.training and rnn.dropout else None
    return Problem(network, weight_o, bias_o, values, h_0, sizes, measured, dropout, layout)


def loss_class(loss: object) -> type[MeasuredLoss]:
    """Return the class of a loss, from its name, a loss module of torch's, or another callable.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no loss of that name; the message lists those that exist.
    """
    for kind in LOSSES.values() if isinstance(loss, nn.Module) else ():
        known: type[MeasuredLoss] = kind
        # A module derived from torch's that computes something else is its author's own.
        if known.module is not None and isinstance(loss, known.module) and type(loss).forward is known.module.forward:
            return known
    if callable(loss):
        return BlackBox
    named: type[MeasuredLoss] = LOSSES[loss] if isinstance(loss, str) else LOSSES.find(loss)
    return named


def sequences(
    rnn: nn.RNNBase,
    inputs: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    lengths: Tensor | Sequence[int] | None,
) -> Sequences:
    """Check an RNN and its sequences and return them in canonical form; arguments as in `estimate_grad_`."""
    names = [name for layer in rnn._all_weights for name in layer]
    weights = [weight for layer in rnn.all_weights for weight in layer]
    for name, weight in zip(names, weights, strict=True):
        if not weight.is_floating_point():
            raise TypeError(f"the rnn's parameters must be floating, got {name} of {weight.dtype}")
    dtype = working_dtype(weights[0].dtype)
    values, sizes, layout = _padded(rnn, inputs, lengths)
    for name, weight in zip(names, weights, strict=True):
        _same_device(f"the rnn's {name}", weight, values)
    if values.is_meta:
        raise ValueError(f"inputs must hold values to estimate from, got a tensor on {values.device}")
    network = Network.of(
        weights,
        biases=rnn.bias,
        directions=2 if rnn.bidirectional else 1,
        cell=CELLS[cell_name(rnn)],
    ).to(dtype)
    h_0 = _initial_state(rnn, network.cell.forms.states, values, hx, layout)
    time, batch, _ = values.shape
    if not time:
        raise RuntimeError(
            f"Expected sequence length to be larger than 0 in RNN, got inputs of shape {tuple(values.shape)}"
        )
    valid_lengths = _lengths(sizes, time, batch)
    if valid_lengths is not None:
        # Padding may hold anything, even NaN, and must not reach the states.
        values = torch.where(valid_steps(time, valid_lengths, values.device).unsqueeze(-1), values, 0)
    return Sequences(network, values.detach().to(dtype), h_0.detach().to(dtype), valid_lengths, layout)


def packed_like(values: Tensor, packed: PackedSequence) -> Tensor:
    """Return (T, B, ...) values in the layout of a packed sequence's data."""
    _, lengths = pad_packed_sequence(packed)
    order = packed.sorted_indices
    if order is not None:
        values, lengths = values.index_select(1, order), lengths[order.cpu()]
    data, _ = torch._VF._pack_padded_sequence(values, lengths, False)
    return data


def _same_device(name: str, given: Tensor, inputs: Tensor) -> None:
    if given.device != inputs.device:
        raise RuntimeError(f"{name} is on {given.device}, the inputs on {inputs.device}")


def _check_readout(readout: nn.Module | None, kind: type[MeasuredLoss], loss: str | LossFunction, width: int) -> None:
    if readout is None:
        return
    if isinstance(readout, nn.Linear):
        if readout.in_features != width:
            raise ValueError(f"readout.in_features must be {width}, the rnn's output size, got {readout.in_features}")
        if not readout.weight.is_floating_point():
            raise TypeError(f"the readout's parameters must be floating, got {readout.weight.dtype}")
        return
    if not isinstance(readout, nn.Module):
        raise TypeError(f"readout must be a torch.nn.Linear or None, got {type(readout).__name__}")
    if not kind.black_box:
        raise TypeError(
            f"readout must be a torch.nn.Linear or None with loss={loss!r}, got {type(readout).__name__}; "
            "use loss.backward() through anpgpu.RNN for other heads"
        )
    for name, module in readout.named_modules():
        if module.training and isinstance(module, VARYING):
            raise ValueError(
                f"the readout's {name or 'module'} ({type(module).__name__}) is another function at each call in "
                "training mode, and clean and perturbed losses could not be compared: call readout.eval()"
            )
    if any(parameter.requires_grad for parameter in readout.parameters()):
        raise TypeError(
            f"the parameters of readout {type(readout).__name__} cannot be estimated: only a torch.nn.Linear's can; "
            "freeze them, or use loss.backward() through anpgpu.RNN"
        )


def _padded(
    rnn: nn.RNNBase, inputs: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor | Sequence[int] | None, Layout]:
    """Return (T, B, I) inputs, lengths and the caller's layout."""
    if isinstance(inputs, PackedSequence):
        if lengths is not None:
            raise ValueError(f"a PackedSequence brings its own lengths, got lengths={lengths!r} as well")
        rnn.check_input(inputs.data, inputs.batch_sizes)
        padded, sizes = pad_packed_sequence(inputs)
        return padded, sizes, Layout(rnn.batch_first, True)
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor or a PackedSequence, got {type(inputs).__name__}")
    if inputs.dim() not in (2, 3):
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {inputs.dim()}D tensor instead")
    layout = Layout(rnn.batch_first, inputs.dim() == 3)
    time_first = layout.time_first(inputs)
    rnn.check_input(time_first, None)
    return time_first, lengths, layout


def _initial_state(
    rnn: nn.RNNBase, count: int, values: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None, layout: Layout
) -> Tensor:
    """Return the first states, (layers * D, B, S), `count` tensors joined."""
    shape = (len(rnn.all_weights), values.shape[1], rnn.hidden_size)
    if hx is None:
        return values.new_zeros((*shape[:2], count * shape[2]))
    if count == 1:
        return _state(hx, shape, values, layout)
    if not isinstance(hx, (tuple, list)) or len(hx) != count:
        size = f" of {len(hx)}" if isinstance(hx, (tuple, list)) else ""
        raise TypeError(f"hx must be a tuple (h_0, c_0), got {type(hx).__name__}{size}")
    return torch.cat([_state(part, shape, values, layout) for part in hx], -1)


def _state(hx: object, shape: tuple[int, int, int], values: Tensor, layout: Layout) -> Tensor:
    """Return h_0 or c_0 as given, (layers * D, B, H), checked."""
    if not isinstance(hx, Tensor):
        raise TypeError(f"hx must be a tensor, got {type(hx).__name__}")
    if hx.dim() != 2 + layout.batched:
        raise RuntimeError(f"hx should be {2 + layout.batched}-D for these inputs but got {hx.dim()}-D tensor")
    batched = hx if layout.batched else hx.unsqueeze(1)
    if batched.shape != shape:
        wanted = shape if layout.batched else (shape[0], shape[2])
        raise RuntimeError(f"Expected hidden size {wanted}, got {tuple(hx.shape)}")
    _same_device("hx", hx, values)
    mixed = torch.is_autocast_enabled(values.device.type) and hx.is_floating_point()
    if hx.dtype != values.dtype and not mixed:
        raise RuntimeError(f"hx must be {values.dtype}, as the inputs are, got {hx.dtype}")
    return batched


def _lengths(lengths: Tensor | Sequence[int] | None, time: int, batch: int) -> Tensor | None:
    if lengths is None:
        return None
    try:
        sizes = torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"lengths must be whole numbers, got {lengths!r}") from error
    if isinstance(lengths, (list, tuple)) and not lengths:
        # torch makes an empty list float32.
        sizes = sizes.long()
    if sizes.dtype.is_floating_point or sizes.dtype.is_complex or sizes.dtype == torch.bool:
        raise TypeError(f"lengths must be whole numbers, got {sizes.dtype}")
    if sizes.shape != (batch,):
        raise ValueError(
            f"lengths must have shape (B,) = ({batch},), got {sizes.tolist()} of shape {tuple(sizes.shape)}"
        )
    if batch and not (int(sizes.min()) >= 0 and int(sizes.max()) <= time):
        raise ValueError(f"lengths must be in [0, {time}], got {sizes.tolist()}")
    if batch and not bool(sizes.any()):
        raise ValueError(f"lengths must not all be 0, got {sizes.tolist()}")
    return sizes.long()


def _targets(
    targets: Tensor | None,
    kind: type[MeasuredLoss],
    options: LossOptions,
    layout: Layout,
    sizes: tuple[int, int, int],
    inputs: Tensor,
    targets_per: str | None,
) -> Targets:
    """Return targets in canonical form; `sizes` is (T, B, O)."""
    time, batch, outputs = sizes
    if targets is None and kind.black_box:
        return Targets(None, True)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.device != inputs.device:
        raise RuntimeError(f"targets are on {targets.device}, the inputs on {inputs.device}")
    tail = kind.tail(outputs)
    # (T, B) and (B,) in the caller's layout.
    per_step = ((batch, time) if layout.batch_first else (time, batch)) if layout.batched else (time,)
    per_sequence = (batch,) if layout.batched else ()
    shape = tuple(targets.shape)
    fits = {
        name: shape == (*start, *tail) if tail is not None else shape[: len(start)] == start
        for name, start in (("step", per_step), ("sequence", per_sequence))
    }
    if targets_per is None and fits["step"] and tail is None and shape == (*per_sequence, outputs):
        raise ValueError(
            f"targets of shape {shape} may be one for each step or {outputs} numbers for each sequence: say which with "
            "targets_per='step' or 'sequence'"
        )
    wanted = [name for name in fits if fits[name] and targets_per in {None, name}]
    if not wanted:
        shapes = {"step": (*per_step, *(tail or ("...",))), "sequence": (*per_sequence, *(tail or ("...",)))}
        what = " or ".join(str(shapes[name]) for name in fits if targets_per in {None, name})
        raise ValueError(f"targets must have shape {what}, got {shape}")
    if wanted[0] == "step":
        return Targets(kind.checked(layout.time_first(targets), outputs, inputs.dtype, options), True)
    targets = targets if layout.batched else targets.unsqueeze(0)
    return Targets(kind.checked(targets, outputs, inputs.dtype, options), False)


def _step_weight(step_weight: object, layout: Layout, valid: Tensor) -> Tensor:
    """Return the weight of each step, (T, B) float64, from the caller's layout; `valid` is (T, B) bool."""
    if not isinstance(step_weight, Tensor):
        raise TypeError(f"step_weight must be a tensor, got {type(step_weight).__name__}")
    if step_weight.dtype.is_complex:
        raise TypeError(f"step_weight must be real, got {step_weight.dtype}")
    _same_device("step_weight", step_weight, valid)
    wanted = tuple(layout.restore(valid).shape)
    if tuple(step_weight.shape) != wanted:
        raise ValueError(f"step_weight must have shape {wanted}, got {tuple(step_weight.shape)}")
    weight = layout.time_first(step_weight.detach()).to(torch.float64)
    if not weight.is_cuda:
        wrong = weight[valid & ~((weight >= 0) & weight.isfinite())]
        if len(wrong):
            raise ValueError(f"step_weight must be finite and not negative, got {float(wrong[0])}")
    return weight


def _dropout(probability: float) -> Callable[[Tensor], Tensor]:
    return lambda values: nn.functional.dropout(torch.ones_like(values), probability, training=True)
