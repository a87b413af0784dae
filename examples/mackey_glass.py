"""Mackey-Glass: a chaotic series (tau = 17) 15 steps into the future, with and without backpropagation through time.

    python examples/mackey_glass.py --output output/

The series is reservoirpy's. Each update sees the next window of eight stretches of the training part and starts from
the last state; the test part comes later in the series. The loss is in units of the training part's variance.
"""

from __future__ import annotations

import tasks
import training


def main() -> None:
    parser = training.arguments(__doc__, updates=600, lr=1e-3)
    parser.add_argument("--ahead", type=int, default=15, help="how many steps into the future")
    parser.add_argument("--steps", type=int, default=40, help="length of a window")
    options = parser.parse_args()
    training.compare(tasks.mackey_glass(options.ahead, steps=options.steps), options)


if __name__ == "__main__":
    main()
