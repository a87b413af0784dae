"""The adding problem: the sum of two marked values is due after the last step, with and without backpropagation.

    python examples/adding.py --steps 10 --output output/

Sequences are fresh for every update. Without memory the best guess is 1, with a squared error of 1/6.
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
