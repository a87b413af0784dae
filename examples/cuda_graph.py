"""A training step as a CUDA graph, in three ways: the host then launches one graph instead of every kernel.

    python examples/cuda_graph.py                  # the whole step, optimiser included, captured by hand
    python examples/cuda_graph.py --way compiled   # the RNN compiled, torch.compile(mode="reduce-overhead")
    python examples/cuda_graph.py --way callable   # the RNN's two passes, torch.cuda.make_graphed_callables
    python examples/cuda_graph.py --way eager      # without a graph, on any device, for comparison

Every replay draws a seed of its own, so that no two updates share their noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import mse_loss

import anpgpu

DELAY = 3


class Recall:
    """An RNN that learns to recall its input of some steps ago, and one step of its training.

    Args:
        device: where it runs.
    """

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.rnn: Callable[..., tuple[torch.Tensor, torch.Tensor]] = anpgpu.RNN(
            4, 64, perturbation=anpgpu.Perturbation(rollouts=32), device=device
        )
        self.head = nn.Linear(64, 4, device=device)
        # A graph holds the optimiser's step only where that keeps its counters on the device.
        parameters = [*self.rnn.parameters(), *self.head.parameters()]
        self.optimiser = torch.optim.Adam(parameters, lr=3e-3, capturable=device == "cuda")
        self.inputs = torch.randn(20, 16, 4, device=device)
        """A graph reads the same memory at each replay: new data are copied there."""
        self.loss = torch.zeros((), device=device)

    def step(self) -> None:
        """Train on what `inputs` holds, and leave the loss in `loss`."""
        self.optimiser.zero_grad(set_to_none=True)
        hidden, _ = self.rnn(self.inputs)
        loss = mse_loss(self.head(hidden[DELAY:]), self.inputs[:-DELAY])
        loss.backward()
        self.optimiser.step()
        self.loss.copy_(loss.detach())


def eager(task: Recall) -> Callable[[], None]:
    """Return the step as it is."""
    return task.step


def whole(task: Recall) -> Callable[[], None]:
    """Return the replay of a graph of the whole step."""
    # Kernels are compiled and memory is found in a few steps on a stream of their own, as torch asks.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            task.step()
    torch.cuda.current_stream().wait_stream(side)
    task.optimiser.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task.step()
    return graph.replay


def compiled(task: Recall) -> Callable[[], None]:
    """Return the step with an RNN that torch compiles into graphs."""
    task.rnn = torch.compile(task.rnn, mode="reduce-overhead", fullgraph=True)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        task.step()

    return step


def graphed(task: Recall) -> Callable[[], None]:
    """Return the step with an RNN whose forward and backward pass are a graph each."""
    task.rnn = torch.cuda.make_graphed_callables(task.rnn, (task.inputs.clone(),))
    return task.step


WAYS = {"graph": whole, "compiled": compiled, "callable": graphed, "eager": eager}


def train(way: str, updates: int, device: str) -> tuple[list[float], float]:
    """Train in one way; return every loss, and the seconds of the second half's updates."""
    task = Recall(device)
    step = WAYS[way](task)
    losses, start = [], 0.0
    for update in range(updates):
        if update == updates // 2:
            start = time.perf_counter()
        task.inputs.normal_()
        step()
        losses.append(task.loss.clone())
    return torch.stack(losses).tolist(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="graph")
    parser.add_argument("--updates", type=int, default=300)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.way != "eager":
        parser.error(f"--way {options.way} needs a CUDA device, and there is none here: use --way eager")
    losses, seconds = train(options.way, options.updates, device)
    each = 1e3 * seconds / max(1, options.updates - options.updates // 2)
    print(f"{options.way}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {each:.2f} ms an update")


if __name__ == "__main__":
    main()
