"""Launches of a kernel at every step: compiled once, the arguments of Triton's own, and little of the host's time."""

import dataclasses
import functools
import itertools
import types

import pytest
import torch

from anpgpu.kernels import tiles, tiles_measured
from anpgpu.kernels.cell import RELU, TANH
from anpgpu.kernels.cell_gated import GRU
from anpgpu.kernels.loss import LinearLoss, SquaredLoss
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import INTERPRETED

idle = pytest.importorskip("idle_driver", reason="needs Triton")
repeated_triton = pytest.importorskip("anpgpu.kernels.repeated_triton", reason="needs Triton")

triton = pytest.importorskip("triton")
tl, knobs, driver = triton.language, triton.knobs, triton.runtime.driver
rollout_triton = pytest.importorskip("anpgpu.kernels.rollout_triton")
TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]


@triton.jit(do_not_specialize=["step"])
def numbered(pair, step, count, SIZE: tl.constexpr):
    tl.store(pair[0] + tl.arange(0, SIZE), tl.load(pair[1] + tl.arange(0, SIZE)) + step + count)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Arguments of every launch on a GPU that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", idle.Driver())
    monkeypatch.setattr(idle.Driver, "keeps", True)
    monkeypatch.setattr(idle.Driver, "launched", [])
    monkeypatch.setattr(idle.Driver, "encoded", 0)
    return idle.Driver.launched


def addresses(values):
    """Return what Triton's launcher makes of arguments."""
    if isinstance(values, torch.Tensor):
        return values.data_ptr()
    if isinstance(values, idle.Encoded):
        return values.address
    return tuple(map(addresses, values)) if isinstance(values, tuple) else values


def rollouts(cell, loss, units, time, monkeypatch, *, ordinary):
    """Run a stepwise rollout whose launches do nothing, with Triton's own launches or with `Repeated`."""
    if ordinary:
        monkeypatch.setattr(repeated_triton.Repeated, "_first", repeated_triton.Repeated._ordinary)
    torch.manual_seed(0)
    gates = 5 if cell is GRU else 1
    preact, states = torch.randn(time, 2, gates * units), torch.randn(time, 2, units)
    weight = torch.randn(cell.gates * units, units)
    given = (
        LinearLoss(states) if loss == "linear" else SquaredLoss(torch.randn(3, units), states[..., :3], states[..., 0])
    )
    options = RolloutOptions(64, 1e-3, cell=cell, precision="bf16")
    made = []
    empty = torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    rollout_triton.rollout(preact, states, weight, given, torch.tensor(1), options=options)
    return made


@pytest.mark.parametrize("wave", [132, 0], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("cell", [TANH, RELU, GRU], ids=["tanh", "relu", "gru"])
@pytest.mark.parametrize("loss", ["linear", "squared", "wide"])
def test_every_launch_has_the_arguments_of_tritons_own(cell, loss, wave, launched, monkeypatch):
    """But for addresses, which are those of other tensors. A wide readout takes a launch of its own at every step."""
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", wave)
    if loss == "wide":
        monkeypatch.setattr(tiles, "JOINED_OUTPUTS", 2)
        monkeypatch.setattr(tiles, "JOINED_GATED_OUTPUTS", 2)
    rollouts(cell, loss, 300, 5, monkeypatch, ordinary=False)
    ours = [(head, tail) for *head, tail in ((arguments[:5], arguments[9:]) for arguments in launched)]
    launched.clear()
    rollouts(cell, loss, 300, 5, monkeypatch, ordinary=True)
    theirs = [(head, tail) for *head, tail in ((arguments[:5], arguments[9:]) for arguments in launched)]
    # Behind the steps: the partial sums of a linear loss, or the loss of the last step.
    assert len(ours) == len(theirs) == (10 if loss == "wide" else 5 + 1)
    for (head, values), (expected_head, expected) in zip(ours, theirs, strict=True):
        assert head == expected_head
        assert [kind(value) for value in values] == [kind(value) for value in expected]


def kind(value):
    """Return an argument without its address: addresses differ from call to call."""
    if isinstance(value, idle.Encoded):
        return dataclasses.replace(value, address=0)
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    if isinstance(value, torch.Tensor):
        return "address"
    return "address" if isinstance(value, int) and value > 2**40 else value


@pytest.mark.parametrize("loss", ["linear", "squared"])
@pytest.mark.parametrize("wave", [132, 0], ids=["pointers", "descriptors"])
def test_buffers_take_turns(launched, loss, wave, monkeypatch):
    """The step kernel reads what the step before has written, and so does what measures the last one."""
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", wave)
    rollouts(TANH, loss, 300, 6, monkeypatch, ordinary=False)
    steps = [arguments[9:] for arguments in launched if arguments[4] == "step_kernel"]
    # The number of the step, and the slot of its partial sums.
    assert [arguments[9:11] for arguments in steps] == [(step, step) for step in range(6)]
    assert [isinstance(arguments[2], idle.Encoded) for arguments in steps] == [wave == 0] * 6
    pairs = [addresses(tuple(arguments[2:4])) for arguments in steps]
    assert all(pair[0] == before[1] and pair != before for before, pair in itertools.pairwise(pairs))
    if loss == "squared":
        name, *measured = launched[-1][4], *launched[-1][9:]
        assert name == "measure_kernel"
        assert (addresses(measured[0]), measured[4]) == (pairs[-1][1], 5)


@pytest.mark.parametrize("time", [6, 40])
def test_descriptors_are_encoded_once_and_not_at_every_step(time, launched, monkeypatch):
    """By the three launches that are Triton's own, and once for all others from either buffer."""
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", 0)
    rollouts(TANH, "linear", 300, time, monkeypatch, ordinary=False)
    assert len([arguments for arguments in launched if arguments[4] == "step_kernel"]) == time
    # The weight and the two buffers.
    assert idle.Driver.encoded == 3 * (3 + 2)
    idle.Driver.encoded = 0
    rollouts(TANH, "linear", 300, time, monkeypatch, ordinary=True)
    assert idle.Driver.encoded == 3 * time


def test_a_launcher_that_is_not_known_encodes_at_every_step_and_a_warning_says_so(launched, monkeypatch):
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", 0)
    monkeypatch.setattr(repeated_triton, "ENCODING", {"another"})
    with pytest.warns(RuntimeWarning, match="Triton .* in a way that anpgpu does not know: they are encoded anew"):
        rollouts(TANH, "linear", 300, 6, monkeypatch, ordinary=False)
    assert idle.Driver.encoded == 3 * 6
    assert len([arguments for arguments in launched if arguments[4] == "step_kernel"]) == 6


def launcher_of(wrapper):
    return types.SimpleNamespace(launch=wrapper)


def wrapper_of(launcher, tensordesc_indices, tensordesc_meta, *, known=True):
    """Return a function like Triton's that encodes descriptors; known: with its function for one of them."""

    def inner(*arguments):
        return launcher(arguments, tensordesc_indices, tensordesc_meta)

    names = {"make_tensordesc_arg": lambda value, metadata: [(value.base.data_ptr(), metadata), 5]} if known else {}
    return types.FunctionType(inner.__code__, names, closure=inner.__closure__)


DESCRIPTOR = TensorDescriptor.from_tensor(torch.zeros(8, 8), [8, 8])


def test_each_descriptor_is_encoded_with_what_is_known_of_it_where_it_stands():
    direct = print
    launcher = launcher_of(wrapper_of(direct, {1, 3}, ["first", "second"]))
    bound = repeated_triton.encoded(launcher, [7, DESCRIPTOR, (DESCRIPTOR.base, 8), DESCRIPTOR, 9])
    address = DESCRIPTOR.base.data_ptr()
    assert bound.values == [7, (address, "first"), 5, (address, 8), (address, "second"), 5, 9]
    assert bound.places == [0, 1, 3, 4, 6]
    assert bound.launch.launch is direct
    # Triton's own launcher, which the kernel keeps, is as it was.
    assert launcher.launch is not direct


@pytest.mark.parametrize(
    "launcher",
    [
        object(),
        launcher_of(None),
        launcher_of(functools.partial(wrapper_of(print, {1}, [None]))),
        launcher_of(lambda *_: None),
        launcher_of(wrapper_of(print, {1}, [None], known=False)),
        launcher_of(wrapper_of(print, {0}, [None])),
        launcher_of(wrapper_of(print, {1}, [])),
        launcher_of(wrapper_of(print, None, None)),
    ],
    ids=[
        "no launch",
        "None",
        "no function",
        "another function",
        "no encoding",
        "another place",
        "less known",
        "nothing",
    ],
)
def test_descriptors_stay_as_they_are_where_the_launcher_is_not_known(launcher):
    arguments = [7, DESCRIPTOR, 9]
    with pytest.warns(RuntimeWarning, match="does not know"):
        bound = repeated_triton.encoded(launcher, arguments)
    assert bound.launch is launcher
    assert bound.values == arguments
    assert list(bound.places) == [0, 1, 2]


def test_the_first_launch_is_tritons_own_and_the_others_differ_in_the_number(launched):
    values = (torch.zeros(64), torch.ones(64))
    launch = repeated_triton.Repeated(numbered, 3, {"pair": values, "count": 5, "SIZE": 64}, {"step": 100}, num_warps=1)
    for step in (0, 1, 16, 99):
        launch(step)
    assert [arguments[:4] for arguments in launched] == [(3, 1, 1, 7)] * 4
    assert len({(id(arguments[5]), arguments[4]) for arguments in launched}) == 1
    tails = [addresses(arguments[9:]) for arguments in launched]
    assert tails == [(tuple(value.data_ptr() for value in values), step, 5, 64) for step in (0, 1, 16, 99)]
    assert all(arguments[6] is arguments[7] is arguments[8] is None for arguments in launched[1:])


def test_a_number_that_the_kernel_is_specialised_on_is_refused():
    with pytest.raises(ValueError, match="count changes from launch to launch, but the kernel is specialised on it"):
        repeated_triton.Repeated(numbered, 1, {}, {"count": 3})


def test_a_number_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"step must stay below 2147483648 in every launch, got up to 2147483649"):
        repeated_triton.Repeated(numbered, 1, {}, {"step": 2**31 + 1})
    repeated_triton.Repeated(numbered, 1, {}, {"step": 2**31})


def test_other_tensors_are_specialised_anew(launched):
    """A tensor whose address 16 does not divide has a kernel of its own."""
    room = torch.zeros(65)
    for first in (0, 1):
        pair = (room[first : first + 64], torch.ones(64))
        launch = repeated_triton.Repeated(numbered, 1, {"pair": pair, "count": 5, "SIZE": 64}, {"step": 9}, num_warps=1)
        launch(0)
        launch(1)
    kernels = [arguments[5] for arguments in launched]
    assert kernels[0] is kernels[1] is not kernels[2] is kernels[3]


def test_a_profilers_hooks_see_every_launch(launched):
    seen, hook = [], knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        launch = repeated_triton.Repeated(
            numbered, 1, {"pair": (torch.zeros(64),) * 2, "count": 5, "SIZE": 64}, {"step": 9}, num_warps=1
        )
        launch(0)
        launch(1)
    finally:
        hook.remove(seen.append)
    assert len(launched) == 2
    assert all(arguments[6] is not None and arguments[7] is hook for arguments in launched)
