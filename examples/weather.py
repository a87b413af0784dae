"""Weather: the wet-bulb temperature at a station one hour or a day ahead, with and without backpropagation.

    python examples/weather.py --csv STATION.csv --ahead 24 --output output/

The file holds hourly station data as NOAA offers them (Local Climatological Data), oldest first, with the columns of
`tasks.WEATHER`. Scaling is fitted on the first 70 % of the hours, the training part; the last 20 % are the test part.
"""

from __future__ import annotations

from pathlib import Path

import tasks
import training


def main() -> None:
    parser = training.arguments(__doc__, updates=600, lr=1e-3)
    parser.add_argument("--csv", type=Path, required=True, help="hourly station data")
    parser.add_argument("--ahead", type=int, default=1, help="how many hours into the future")
    parser.add_argument("--steps", type=int, default=48, help="length of a window, in hours")
    options = parser.parse_args()
    training.compare(tasks.weather(options.csv, options.ahead, steps=options.steps), options)


if __name__ == "__main__":
    main()
