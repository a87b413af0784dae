"""Updates whose memory test_memory.py measures, each in a process forked from one that has imported everything."""

import sys

import torch
from numba.core.event import install_recorder
from torch import nn

import anpgpu

MIB = 1 << 20


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def peak():
    """Return the bytes that this process alone had at most; what getrusage says includes what its parent had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def measure(case):
    """Print the peak of an update, or, where the case says not to run it, of a process that only holds what it needs.

    Printed before it: how many kernels Numba compiled, which takes memory, instead of loading them from the disk.
    Keys of a case: module, method, loss, time, batch, hidden, rollouts, mebibytes (of max_memory), run.
    """
    module, steps, batch, inputs_, hidden, outputs_ = (
        case.get("module", "RNN"), case["time"], case["batch"], 8, case["hidden"], 4,
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rnn, head = getattr(nn, module)(inputs_, hidden), nn.Linear(hidden, outputs_)
    by_autograd = case["loss"] == "autograd"

    def update(inputs, targets, **options):
        how = anpgpu.Perturbation(case["method"], discount=0.9, warmup=1, **options)
        if by_autograd:
            getattr(anpgpu, module)(inputs_, hidden, perturbation=how)(inputs)[0].sum().backward()
        else:
            loss = absolute if case["loss"] == "callable" else case["loss"]
            anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=how)

    inputs, targets = torch.randn(steps, batch, inputs_), torch.randn(steps, batch, outputs_)
    if case["loss"] == "cross_entropy":
        targets = targets.argmax(-1)
    with install_recorder("numba:compile") as compiled:
        update(inputs[:2], targets[:2], rollouts=2)
        if case["run"]:
            update(inputs, targets, rollouts=case["rollouts"], max_memory=case["mebibytes"] * MIB)
    held = None
    if not case["run"] and by_autograd:
        # What a backward pass may have beside: states, outputs, their gradient, pre-activations, adjoint and its
        # halves; in a gated cell those of each gate.
        held = torch.ones({"RNN": 10, "GRU": 24, "LSTM": 34}[module], steps, batch, hidden)
    elif not case["run"]:
        held = torch.ones(steps, batch, outputs_)
    sys.stdout.write(f"{len(compiled.buffer)} {peak()}")
    del held
    return 0


if __name__ == "__main__":
    from forking import serve

    serve(measure, ("torch._dynamo", "numba"))
