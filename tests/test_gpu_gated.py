"""GRU and LSTM on a device: updates by both faces against float64 on the CPU, and what users do.

A test's body takes a device. With "cpu" it runs in the reference leg, which shows that the test itself is right; with
"cuda" in `make gpu`.
"""

import pytest
import torch
from device_cases import fixed_seed
from test_gated import LENGTHS, as_hx, as_states, draw
from test_gpu_faces import draw_seeds_by, no_synchronisation
from tolerances import TOLERANCES, relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation
from anpgpu.registry import CELLS, ESTIMATORS
from anpgpu.runtime.dispatch import choose_backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODULES = {"gru": anpgpu.GRU, "lstm": anpgpu.LSTM}
T, B, I, H, O, P = 12, 3, 4, 20, 3, 16  # noqa: E741  (the letters of the design)
SETTINGS = {
    "anp": {"method": "anp", "discount": 0.9},
    "anp at discount 0": {"method": "anp", "discount": 0.0},
    "anp-ls": {"method": "anp-ls"},
    "np": {"method": "np", "discount": 0.9, "noise": "gaussian"},
    "wp": {"method": "wp"},
}


@pytest.fixture(autouse=True)
def _exact_products():
    # By default cuDNN rounds the operands of a float32 recurrent network to TensorFloat32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision="ieee"):
        yield


def update(face, cell, setting, device, dtype, **options):
    """Gradients of an update by a face, by name, on the CPU: two layers, samples of several lengths."""
    torch.manual_seed(3)
    how = Perturbation(rollouts=P, **SETTINGS[setting], **options)
    module, readout = MODULES[cell](I, H, 2, perturbation=how).to(device, dtype), nn.Linear(H, O).to(device, dtype)
    inputs, targets = (draw(T, B, size).to(device, dtype) for size in (I, O))
    states = tuple(0.5 * draw(2, B, H, seed=seed).to(device, dtype) for seed in range(CELLS[cell].forms.states))
    if not ESTIMATORS[how.method].weights_only:
        inputs.requires_grad_()
        states = tuple(state.requires_grad_() for state in states)
    if face == "estimate_grad_":
        anpgpu.estimate_grad_(module, readout, inputs, targets, "mse", hx=as_hx(states), lengths=LENGTHS)
    else:
        packed = pack_padded_sequence(inputs, LENGTHS, enforce_sorted=False)
        outputs, final = module(packed, as_hx(states))
        ends = sum(state.square().mean() for state in as_states(final))
        (readout(outputs.data).square().mean() + ends).backward()
    leaves = {**dict(module.named_parameters()), "inputs": inputs, **dict(zip(("h_0", "c_0"), states, strict=False))}
    return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("face", ["backward", "estimate_grad_"])
@pytest.mark.parametrize("cell", MODULES)
def test_update_is_that_of_float64(cell, face, setting, device, monkeypatch):
    draw_seeds_by(monkeypatch, fixed_seed)
    expected = update(face, cell, setting, "cpu", torch.float64, backend="torch")
    # "auto" takes 16-bit operands on a GPU.
    for precision, bound in (("fp32", "float32_long"), ("bf16" if device == "cpu" else "auto", "bfloat16")):
        found = update(face, cell, setting, device, torch.float32, precision=precision)
        assert found.keys() == expected.keys()
        errors = {name: relative_error(found[name], gradient) for name, gradient in expected.items()}
        assert max(errors.values()) <= TOLERANCES[bound].bound, errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", MODULES)
def test_auto_takes_the_fast_kernels(cell, device):
    forms = CELLS[cell].forms
    expected = {"cpu": "numba" if forms.numba is not None else "torch", "cuda": "triton"}[device]
    assert choose_backend("auto", torch.device(device), torch.float32, forms) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("cell", MODULES)
def test_an_update_does_not_make_the_host_wait(cell, monkeypatch):
    draw_seeds_by(monkeypatch, fixed_seed)
    module = MODULES[cell](I, H, perturbation=Perturbation("anp", rollouts=P)).cuda()
    inputs = torch.randn(T, B, I, device="cuda")
    module(inputs)[0].square().mean().backward()
    with no_synchronisation("cuda"):
        module(inputs)[0].square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
