"""A GPU that is not there: what an update would issue to it, counted without one.

Tensors are fake, of the CPU but say that they are on CUDA; kernels of Triton are noted and not launched. A value that
the host reads raises, as a fake tensor has none: so what is counted never makes a host wait for its GPU.

`Issued` sees every operation of torch's, inside the library's own operations, too, which it enters. Views and
allocations start nothing on a GPU and do not count; a clean run, which is torch's or cuDNN's own, counts once. An
operation of torch's may start several kernels, so that the number is a lower bound of those.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

import anpgpu
from anpgpu.estimators import by_layer
from anpgpu.kernels import least_squares
from anpgpu.kernels.tiles import SHARED_BYTES
from anpgpu.network import checkpoints
from anpgpu.ops import network
from anpgpu.runtime import dispatch

PACKAGE = Path(anpgpu.__file__).parent

FREE = {
    "alias",
    "detach",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "set_",
    "_reshape_alias",
    "_unsafe_view",
}
"""Operations that start no kernel, beside those whose schema says that they are views."""

CLEAN_RUN = "clean run"

FLAT = not hasattr(nvidia, "annotate_arguments")
"""Whether a kernel's arguments follow those of the launch one by one, as up to Triton 3.6."""


@dataclass(frozen=True)
class Encoded:
    """A descriptor as CUDA takes it."""

    address: int
    block: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Launcher(nvidia.CudaLauncher):
    """Triton's launcher, which encodes descriptors as that does, around a function that launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        described = getattr(metadata, "tensordesc_meta", None)
        self.launch = nvidia.wrap_handle_tensordesc(Driver.launch, dict(source.signature), described)
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, False, metadata.launch_pdl
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.arg_annotations = self.kernel_signature = None


class Driver:
    """A driver of Triton that knows a target, for which kernels are compiled, and whose launches do nothing."""

    launched: ClassVar[list[tuple[Any, ...]]] = []
    """Of every launch: grid, stream, kernel, what is known of it and of the launch, hooks, and the kernel's arguments.

    Of all drivers: Triton keeps the first one's launchers.
    """
    keeps: ClassVar[bool] = False
    """Whether they are kept."""
    encoded: ClassVar[int] = 0
    """Number of descriptors that were encoded, of all drivers."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": SHARED_BYTES[90]}

    def load_binary(self, name: str, *_: Any) -> tuple[object, str, int, int, int]:
        return object(), name, 255, 0, 1024

    @staticmethod
    def fill_tma_descriptor(
        address: int, swizzle: int, size: int, kind: int, block: Any, shape: Any, strides: Any, padding: int
    ) -> Encoded:
        del swizzle, size, kind, padding
        Driver.encoded += 1
        return Encoded(address, tuple(block), tuple(shape), tuple(strides))

    fill_tma_descriptor_tiled = fill_tma_descriptor
    """Its name from Triton 3.7 on."""

    @staticmethod
    def launch(*arguments: Any) -> None:
        """Take what Triton hands to the function that would call CUDA."""
        if not Driver.keeps:
            return
        if FLAT:
            head, rest = (*arguments[:5], *arguments[9:13]), list(arguments[13:])
        else:
            head, rest = (*arguments[:5], *arguments[7:11]), list(arguments[-1])
        values = []
        while rest:
            values.append(rest.pop(0))
            if isinstance(values[-1], Encoded):
                # Shape and strides follow.
                del rest[: 2 * len(values[-1].shape)]
        Driver.launched.append((*head, *values))


class Issued(TorchDispatchMode):
    """Notes every operation that starts a kernel on a GPU, every launch, and the line of the package that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.silent = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        del types
        name = function._schema.name
        if name in OPDEFS and not self.silent:
            with self:
                return OPDEFS[name]._init_fn(*arguments, **(named or {}))
        known = name.startswith("aten::")
        if known and torch._C._dispatch_has_kernel_for_dispatch_key(name_of(function), "CompositeImplicitAutograd"):
            # Made of others; those of torch's called inside the library's arrive whole.
            with self:
                return function.decompose(*arguments, **(named or {}))
        if not self.silent and not function.is_view and name.split("::")[1] not in FREE:
            self.operations[name.split("::")[1], asked_at()] += 1
        return function(*arguments, **(named or {}))

    def launched(self, kernel: JITFunction[Any]) -> None:
        """Note a launch."""
        self.launches[kernel.fn.__name__, asked_at()] += 1

    def once(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, and counts as one operation."""

        def run(*arguments: Any, **named: Any) -> Any:
            self.operations[name, asked_at()] += 1
            before, self.silent = self.silent, True
            try:
                return work(*arguments, **named)
            finally:
                self.silent = before

        return run

    def __str__(self) -> str:
        lines = [
            f"{number:4}  {name:28} {where}"
            for name, where, number in sorted(
                ((name, where, number) for (name, where), number in (self.operations + self.launches).items()),
                key=lambda entry: (entry[1], entry[0]),
            )
        ]
        total = f"{self.operations.total()} operations, {self.launches.total()} launches"
        return "\n".join((*lines, total))


def name_of(function: Any) -> str:
    """Return an operation's name with its overload's."""
    name, overload = function._schema.name, function._schema.overload_name
    return f"{name}.{overload}" if overload else name


def asked_at() -> str:
    """Return file and line of the innermost frame of the package, or of the script above."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_absolute() and PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


@contextlib.contextmanager
def as_on_cuda() -> Iterator[pytest.MonkeyPatch]:
    """Let tensors of the CPU pass for tensors on CUDA, as far as the package asks them."""
    with pytest.MonkeyPatch.context() as patch:
        # Torch without CUDA indexes no tensor whose device is one.
        patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        patch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        patch.setattr(dispatch.Triton, "check", lambda _: None)
        patch.setitem(least_squares.BLOCK_BYTES, "cpu", least_squares.BLOCK_BYTES["cuda"])
        yield patch


@contextlib.contextmanager
def idle_driver() -> Iterator[Issued]:
    """Return what is issued to a GPU that is not there, of tensors made and used inside."""
    with as_on_cuda() as patch, FakeTensorMode():
        issued = Issued()

        def launcher(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
            del grid
            return lambda *_, **__: issued.launched(kernel)

        patch.setattr(JITFunction, "__getitem__", launcher)
        for module in (by_layer, checkpoints, network):
            patch.setattr(module, "run_network", issued.once(CLEAN_RUN, module.run_network))
        yield issued


class Update(NamedTuple):
    """What an update is made of."""

    way: str
    """"estimate" for `estimate_grad_`, "backward" for a forward pass and its backward pass from dL/d(outputs)."""
    loss: str = "mse"
    """Of `estimate_grad_`."""
    method: str = "anp"
    time: int = 20
    batch: int = 8
    rollouts: int = 128
    hidden: int = 128
    knobs: tuple[tuple[str, Any], ...] = ()
    """Of the perturbation."""

    def prepared(self) -> Callable[[], None]:
        """Return the update, which leaves gradients; it is to be called without any."""
        knobs = {"backend": "triton", "precision": "bf16", "max_memory": 1 << 40, **dict(self.knobs)}
        rule = anpgpu.Perturbation(self.method, self.rollouts, **knobs)  # type: ignore[arg-type]
        rnn, readout = anpgpu.RNN(16, self.hidden, perturbation=rule), nn.Linear(self.hidden, 8)
        inputs, targets = torch.zeros(self.time, self.batch, 16), torch.zeros(self.time, self.batch, 8)
        if self.loss == "cross_entropy":
            targets = torch.zeros((self.time, self.batch), dtype=torch.int64)
        gradient = torch.zeros(self.time, self.batch, self.hidden)

        def run() -> None:
            for parameter in (*rnn.parameters(), *readout.parameters()):
                parameter.grad = None
            if self.way == "estimate":
                anpgpu.estimate_grad_(rnn, readout, inputs, targets, self.loss)
            else:
                rnn(inputs)[0].backward(gradient)

        return run


def issued_by(update: Update) -> Issued:
    """Return what an update issues."""
    with idle_driver() as issued:
        run = update.prepared()
        with issued:
            run()
    return issued
