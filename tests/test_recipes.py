"""The recipes of docs/methods.md for other readouts and embeddings: their gradients are those of BPTT."""

import re
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from torch import nn

import anpgpu

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
SECTION = PAGE.read_text(encoding="utf-8").split("\n## Other readouts, and embeddings\n")[1].split("\n## ")[0]
RECIPES = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
MODULES = ("embedding", "rnn", "readout")
SMALL_NOISE = "rollouts=64, sigma=1e-5, ridge=1e-6"


@pytest.fixture
def _in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def gradients(modules):
    """All gradients of each module, which are then cleared."""
    found = [torch.cat([parameter.grad.flatten() for parameter in module.parameters()]) for module in modules]
    for module in modules:
        module.zero_grad()
    return found


def test_there_are_three_recipes():
    assert len(RECIPES) == 3
    # P = 2 H.
    assert all("rollouts=64" in recipe and "RNN(8, 32" in recipe for recipe in RECIPES)


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("small", [False, True], ids=["as documented", "small noise"])
@pytest.mark.parametrize("recipe", range(len(RECIPES)))
def test_a_recipe_gives_the_gradients_of_bptt(recipe, small):
    torch.manual_seed(0)
    source = RECIPES[recipe].replace("rollouts=64", SMALL_NOISE) if small else RECIPES[recipe]
    names = {}
    exec(source, names)  # the block as readers copy it
    modules = [names[name] for name in MODULES]
    estimates = gradients(modules)
    embedding, rnn, readout = modules
    if isinstance(rnn, anpgpu.RNN):
        anpgpu.unswap_(rnn)
    scores = readout(rnn(embedding(names["words"]))[0])
    nn.functional.cross_entropy(scores.flatten(0, 1), names["labels"].flatten()).backward()
    exact = gradients(modules)
    for estimate, gradient in zip(estimates, exact, strict=True):
        assert float(torch.cosine_similarity(estimate, gradient, dim=0)) > (0.999999 if small else 0.999)
        assert abs(float(estimate.norm() / gradient.norm()) - 1) < (1e-3 if small else 0.05)
    # The readout's are exact.
    assert_close(estimates[2], exact[2], "float64")
