"""Cross-entropy at clean outputs on a GPU: against the reference in float64, and what a wrong target does."""

import subprocess
import sys

import pytest
import torch
from cross_entropy_cases import FORMS, SHAPES, Case
from tolerances import assert_close

from anpgpu.kernels import cross_entropy as reference

pytestmark = pytest.mark.gpu

WRONG = """
import torch, anpgpu
rnn, readout = anpgpu.RNN(2, 4).cuda(), torch.nn.Linear(4, 3).cuda()
targets = torch.zeros(5, 2, dtype=torch.int64, device="cuda")
targets[3, 1] = {}
anpgpu.estimate_grad_(rnn, readout, torch.randn(5, 2, 2, device="cuda"), targets, "cross_entropy")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_references(form, shape):
    from anpgpu.kernels import cross_entropy_triton

    arguments = Case(form, shape).arguments(torch.float64)
    expected = reference.clean_cross_entropy(**arguments)
    smoothing = arguments["smoothing"]
    on_gpu = {name: arguments[name].cuda() for name in ("targets", "weight")}
    found = cross_entropy_triton.clean_cross_entropy(
        arguments["outputs"].float().cuda(),
        **on_gpu,
        ignore_index=arguments["ignore_index"],
        smoothing=None if smoothing is None else reference.Smoothing(*(share.float().cuda() for share in smoothing)),
    )
    for name in ("losses", "probs", "gradient", "weight"):
        assert_close(getattr(found, name).cpu(), getattr(expected, name), "float32")
    assert torch.equal(found.target.cpu(), expected.target)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_target_that_is_no_class_fails_an_assertion_of_the_device(wrong):
    done = subprocess.run([sys.executable, "-c", WRONG.format(wrong)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


def test_an_ignored_target_does_not():
    done = subprocess.run([sys.executable, "-c", WRONG.format(-100)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
