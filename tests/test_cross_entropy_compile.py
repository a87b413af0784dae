"""The kernel of the cross-entropy answers a target that is no class as torch does: an assertion of the device fails."""

import pytest

pytest.importorskip("triton", reason="needs Triton")

import compile_cases_cross_entropy
import compile_kernels
import triton
from triton.backends.compiler import GPUTarget

pytestmark = pytest.mark.compile


def test_a_target_that_is_no_class_fails_an_assertion():
    kernel, signature, constexprs, options = compile_cases_cross_entropy.case(8)
    calls = {}
    for debug in (True, False):
        source = compile_kernels.ast_source(kernel, signature, constexprs)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**options, "debug": debug})
        calls[debug] = compiled.asm["ptx"].count("call.uni"), "neither a class nor ignored" in compiled.asm["ttir"]
    # One assertion, and none on overflows.
    assert calls == {True: (1, True), False: (0, False)}
