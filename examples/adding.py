"""The adding problem: the sum of two marked values is due after the last step, with and without backpropagation.

    python examples/adding.py --steps 10 --output output/

Fresh sequences for every update. Without memory 1 is the best guess, and 1/6 the squared error.
"""

from __future__ import annotations

import tasks
import training


def main() -> None:
    parser = training.arguments(__doc__, updates=1200, lr=3e-3, batch=32)
    parser.add_argument("--steps", type=int, default=10, help="length of the sequences")
    options = parser.parse_args()
    training.compare(tasks.adding(options.steps), options)


if __name__ == "__main__":
    main()
