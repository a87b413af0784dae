"""Fuzzed calls of `estimator_state` and `load_estimator_state_`, and what must hold of their results."""

import torch
from fuzzing import Call, spoilt, tried
from hypothesis import strategies as st
from torch import nn

import anpgpu
from anpgpu import Perturbation


def learnt(model, warmup):
    """The state of a model whose own networks have made an update."""
    for module in model.modules():
        if isinstance(module, anpgpu.RNN):
            module.perturbation = Perturbation("anp-feedback", rollouts=3, warmup=warmup)
            module(torch.randn(4, 2, 2))[0].sum().backward()
    return anpgpu.estimator_state(model)


@st.composite
def state_calls(draw, models, loads):
    model = draw(models)
    state = learnt(model, draw(st.sampled_from([0, 2])))
    if draw(st.booleans()):
        # Another model of another structure.
        model = draw(models)
    return Call(*draw(spoilt({"model": model} | ({"state": state} if loads else {}))))


def check_state(call):
    state = tried("estimator_state", anpgpu.estimator_state, call)
    if state is None:
        return
    model = call.arguments["model"]
    assert set(state) <= {name for name, module in model.named_modules() if isinstance(module, nn.RNN)}
    anpgpu.load_estimator_state_(model, {})
    assert anpgpu.estimator_state(model) == {}


def check_loaded_state(call):
    model, state = call.arguments["model"], call.arguments["state"]
    before = anpgpu.estimator_state(model) if isinstance(model, nn.Module) else {}
    excuses = ("the state has a module", "of module")
    result = tried("load_estimator_state_", loaded, call, excuses=excuses)
    if isinstance(model, nn.Module):
        expected = before if result is None else state
        after = anpgpu.estimator_state(model)
        assert after.keys() == expected.keys()
        for name, tensors in after.items():
            # Feedback follows the model's own weights.
            fixed = [key for key in tensors if key.endswith((".gram", "updates"))]
            assert all(
                torch.equal(torch.as_tensor(tensors[key]), torch.as_tensor(expected[name][key])) for key in fixed
            )


def loaded(model, state):
    anpgpu.load_estimator_state_(model, state)
    return model
