"""A problem in the forms in which a caller may hand it over, and what torch makes of it."""

import torch
from tolerances import assert_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation

T, B, I, H, O = 6, 3, 2, 4, 5  # noqa: E741  (the design's names)
BPTT = Perturbation("bptt")
CLOSE = Perturbation("anp-ls", rollouts=4 * H, sigma=1e-5, ridge=0.0)
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
MODULES = {
    "mse": nn.MSELoss(),
    "mse, sum": nn.MSELoss(reduction="sum"),
    "cross-entropy": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHT),
    "ignored class": nn.CrossEntropyLoss(ignore_index=1),
    "a class out of range ignored": nn.CrossEntropyLoss(ignore_index=99),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.3),
    "all smooth": nn.CrossEntropyLoss(label_smoothing=1.0),
    "everything": nn.CrossEntropyLoss(weight=CLASS_WEIGHT, ignore_index=1, label_smoothing=0.3),
    "everything, sum": nn.CrossEntropyLoss(weight=CLASS_WEIGHT, ignore_index=1, label_smoothing=0.3, reduction="sum"),
}
NETWORKS = {
    "one layer": {},
    "two layers of relu": {"num_layers": 2, "nonlinearity": "relu"},
    "bidirectional": {"bidirectional": True},
}
FORMS = ("time first", "batch first", "unbatched", "lengths", "packed", "a length of 0")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def squared(outputs, targets):
    return (outputs - targets).square().mean(-1)


class Form:
    """One problem in one of the forms in which a caller may hand it over, and what torch makes of it."""

    def __init__(self, form, loss, network="one layer", *, head=True, per_sequence=False):
        torch.manual_seed(0)
        self.form, self.loss = form, loss
        self.rnn = nn.RNN(I, H, dtype=torch.float64, batch_first=form == "batch first", **NETWORKS[network])
        width = H * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, O, dtype=torch.float64) if head else None
        outputs, self.batch = O if head else width, 1 if form == "unbatched" else B
        self.lengths = {"lengths": [4, 6, 1], "packed": [4, 6, 1], "a length of 0": [4, 0, 6]}.get(form)
        self.valid = torch.arange(T).unsqueeze(1) < torch.tensor(self.lengths or [T] * self.batch)
        self.inputs, self.hx = draw(T, self.batch, I), draw(len(self.rnn.all_weights), self.batch, H, seed=1) / 2
        start = () if per_sequence else (T,)
        if isinstance(loss, nn.CrossEntropyLoss):
            self.targets = (3 * torch.arange(T).unsqueeze(1) + torch.arange(self.batch)) % outputs
            self.targets[2, 0] = loss.ignore_index
            self.targets = self.targets[1] if per_sequence else self.targets
        else:
            self.targets = draw(*start, self.batch, outputs, seed=2)
        self.step_weight = None

    def in_layout(self, values):
        """Return (T, B, ...) values as the caller holds them."""
        if self.form == "unbatched":
            return values[:, 0]
        return values.transpose(0, 1) if self.form == "batch first" else values

    def estimate(self, perturbation, loss=None, **named):
        inputs = self.in_layout(self.inputs)
        named.setdefault("lengths", self.lengths)
        if self.form == "packed":
            inputs = pack_padded_sequence(self.inputs, self.lengths, enforce_sorted=False)
            named["lengths"] = None
        per_sequence = self.targets.shape[0] != T
        targets = self.targets if per_sequence else self.in_layout(self.targets)
        if self.step_weight is not None:
            named["step_weight"] = self.in_layout(self.step_weight)
        for leaf in self.leaves:
            leaf.grad = None
        hx = self.hx[:, 0] if self.form == "unbatched" else self.hx
        loss = self.loss if loss is None else loss
        return anpgpu.estimate_grad_(
            self.rnn, self.head, inputs, targets, loss, perturbation=perturbation, hx=hx, **named
        )

    @property
    def leaves(self):
        return [leaf for module in (self.rnn, self.head) if module is not None for leaf in module.parameters()]

    @property
    def gradient(self):
        return torch.cat([leaf.grad.flatten() for leaf in self.leaves])

    def states(self):
        """torch's outputs, (T, B, O), and h_n, sample by sample."""
        twin = nn.RNN(
            I, H, self.rnn.num_layers, bidirectional=self.rnn.bidirectional, nonlinearity=self.rnn.nonlinearity,
            dtype=torch.float64,
        )  # fmt: skip
        for name, parameter in self.rnn.named_parameters():
            setattr(twin, name, parameter)
        outputs, final = [], []
        for sample in range(self.batch):
            length = int(self.valid[:, sample].sum())
            hidden, h_n = self.inputs.new_zeros(T, H * (2 if self.rnn.bidirectional else 1)), self.hx[:, sample]
            if length:
                run, h_n = twin(self.inputs[:length, sample], h_n)
                hidden = torch.cat((run, hidden[length:]))
            values = hidden if self.head is None else self.head(hidden)
            outputs.append(torch.where(self.valid[:, sample].unsqueeze(-1), values, 0))
            final.append(h_n)
        return torch.stack(outputs, 1), torch.stack(final, 1)

    def expected(self, loss):
        """torch's loss, gradient, outputs and h_n; `loss` takes outputs and targets of the steps that count."""
        outputs, h_n = self.states()
        if self.targets.shape[0] == T:
            value = loss(outputs[self.valid], self.targets[self.valid])
        else:
            value = loss(outputs[self.valid.sum(0) - 1, torch.arange(self.batch)], self.targets)
        gradients = torch.autograd.grad(value, self.leaves)
        return value, torch.cat([gradient.flatten() for gradient in gradients]), outputs, h_n


def assert_same(form, expected, *, bptt_only=False):
    value, gradient, outputs, h_n = expected
    seen = form.estimate(BPTT)
    assert_close(form.gradient, gradient, "float64")
    for estimate in (seen,) if bptt_only else (seen, form.estimate(CLOSE)):
        assert_close(estimate.loss, value, "float64")
        assert_close(estimate.outputs, form.in_layout(outputs), "float64")
        assert_close(estimate.h_n, h_n[:, 0] if form.form == "unbatched" else h_n, "float64")
    if not bptt_only:
        assert_close(form.gradient, gradient, "least_squares")
