"""Batches with cross-entropy at clean outputs, and what torch and autograd make of them in float64."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.task.cross_entropy import CrossEntropy
from anpgpu.task.losses import Steps, Targets

SHAPES = ((1, 1, 1), (3, 2, 5), (40, 1, 8), (5, 7, 33), (2, 3, 1300))
"""(T, B, O): a single class, no power of two, more than a program's steps, more than a program's outputs."""

FORMS = {
    "plain": {},
    "ignored": {"ignore_index": -100},
    "a class ignored": {"ignore_index": 0},
    "class weights": {"weight": True},
    "smoothed": {"label_smoothing": 0.2},
    "all smoothed": {"label_smoothing": 1.0},
    "everything": {"weight": True, "ignore_index": 0, "label_smoothing": 0.3, "reduction": "sum"},
    "one of a sequence": {},
    "large": {"label_smoothing": 0.1},
    "larger": {},
}
SIZES = {"large": 30.0, "larger": 1e4}
"""Of the logits, where it is not 1."""


class Case:
    """A batch of some form and shape (T, B, O)."""

    def __init__(self, form: str, shape: tuple[int, int, int]) -> None:
        time, batch, width = shape
        generator = torch.Generator().manual_seed(sum(shape))
        options = dict(FORMS[form])
        if "weight" in options:
            options["weight"] = torch.rand(width, generator=generator, dtype=torch.float64) + 0.1
        self.module = nn.CrossEntropyLoss(**options)
        self.ignored = self.module.ignore_index
        size = SIZES.get(form, 1.0)
        self.outputs = (size * torch.randn(shape, generator=generator)).double()
        self.targets = torch.randint(width, (time, batch), generator=generator)
        if "ignore_index" in options and time * batch > 1:
            self.targets[torch.rand(time, batch, generator=generator) < 0.3] = self.ignored
            self.targets[0, 0], self.targets[-1, -1] = width - 1, self.ignored
        per_step = form != "one of a sequence"
        if not per_step:
            self.targets = self.targets[-1].expand(time, batch)
        values = self.targets if per_step else self.targets[-1]
        nothing = per_step and bool((self.targets == self.ignored).all())
        if nothing:
            self.targets, self.ignored = self.targets + 0, -100
            self.module.ignore_index = -100
        steps = Steps(time, batch, None, values.device)
        self.loss = CrossEntropy(Targets(values, per_step), steps, CrossEntropy.options_of(self.module))
        self.per_step, self.weight = per_step, self.loss.weight

    def arguments(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the arguments of `clean_cross_entropy`."""
        outputs = self.outputs.to(dtype)
        return {
            "outputs": outputs,
            "targets": self.loss.dense,
            "weight": self.weight,
            "ignore_index": self.ignored,
            "smoothing": self.loss.smoothing(outputs),
        }

    def by_autograd(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return torch's loss, 0-dim, and its gradient in the outputs, (T, B, O)."""
        outputs = self.outputs.clone().requires_grad_()
        seen, targets = (outputs, self.targets) if self.per_step else (outputs[-1:], self.targets[-1:])
        value = self.module(seen.flatten(0, 1), targets.flatten())
        (gradient,) = torch.autograd.grad(value, outputs)
        return value.detach(), gradient

    def each_by_autograd(self) -> torch.Tensor:
        """Return torch's loss of each step times its weight, (T, B)."""
        index = self.targets.masked_fill(self.targets == self.ignored, 0)
        unreduced = F.cross_entropy(self.outputs.flatten(0, 1), index.flatten(), reduction="none")
        return unreduced.view(index.shape) * self.weight
