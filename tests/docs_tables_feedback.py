"""The published tables of learned feedback, and of the study of the defaults, from their result files."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from docs_tables import ABSENT, Rows, decimals, percent, significant, without_zero

ACCURACIES = ("BPTT, accuracy", "P = 8, accuracy")


def cosine(value: float | None) -> str:
    """Return a cosine to two decimal places, to three where it is near 1; none is rounded up to 1."""
    if value is None:
        return ABSENT
    places = 2 if value < 0.9 else 3
    return decimals(value, places) if value < 0.9995 else "> .999"


def loss(value: float | None) -> str:
    return ABSENT if value is None else without_zero(significant(value))


def feedback_cosine(result: dict) -> Rows:
    """Cosine of dW_hh to BPTT's after 140 updates: mean of the seeds, and the lowest for 8 rollouts."""
    names = ("P = 8, B not moved with W", "P = 4", "P = 1", "known part", "anp-ls, P = 8", "updates 0-10")
    return [
        [row["task"], *(cosine(row[name]) for name in ("P = 8", "lowest", *names, "0-10, warmed up"))]
        for row in result["results"]["cosine"]
    ]


def feedback_closed(result: dict) -> Rows:
    """Final losses where each estimator trains, means over seeds, and those of seed 0 for the others."""
    return [
        [
            row["task"],
            loss(row["BPTT"]),
            loss(row["P = 8"]),
            significant(row["P = 8 over BPTT"]),
            "yes" if row["kept up"] else "no" if row["BPTT solves it"] else "BPTT does not solve it",
            *(ABSENT if row[name] is None else percent(row[name] / 100, 1) for name in ACCURACIES),
            *(f"{row[name]:.0f}" for name in ("BPTT, s", "P = 8, s")),
            *(loss(row[name]) for name in ("seed 0: BPTT", "P = 16", "8", "4", "known part", "anp-ls, 8")),
        ]
        for row in result["results"]["closed"]
    ]


def feedback_long(result: dict) -> Rows:
    """Loss and accuracy on long sequences, seed by seed."""
    return [
        [
            str(row["seed"]),
            loss(row["BPTT"]),
            loss(row["P = 8"]),
            significant(row["P = 8 over BPTT"]),
            *(percent(row[name] / 100, 1) for name in ACCURACIES),
            *(f"{row[name]:.0f}" for name in ("BPTT, s", "P = 8, s")),
        ]
        for row in result["results"]["long"]
    ]


def feedback_parts(result: dict) -> Rows:
    """Errors of sums, cosines and final loss with the parts of the method switched off."""
    return [
        [
            row["part"],
            *(
                ABSENT if row[name] is None else decimals(row[name], 3)
                for name in ("error of the sum", "of a random walk")
            ),
            cosine(row["cosine 0-10"]),
            loss(row["loss"]),
        ]
        for row in result["results"]["parts"]
    ]


def feedback_speed(result: dict) -> Rows:
    """The time of an update over BPTT's, and over that of anp-ls with half as many rollouts as units."""
    names = ("P = 8 / BPTT", "P = 4 / BPTT", "P = 8 / anp-ls P = H/2")
    return [
        [
            str(row["H"]),
            str(row["threads"]),
            significant(row["BPTT ms"]),
            *(without_zero(significant(row[name])) if name in row else ABSENT for name in names),
        ]
        for row in result["results"]["speed"]
    ]


def feedback_warmup(result: dict) -> Rows:
    """Cosine of the first ten updates and later losses, by the estimates of the warm-up."""
    return [
        [row["task"], row["warmup"], cosine(row["cosine 0-10"]), loss(row["loss at a third"]), loss(row["loss"])]
        for row in result["results"]["warmup"]
    ]


def feedback_sizes(result: dict) -> Rows:
    """Cosine of dW_hh while B is learnt, at other sizes and structures; the lowest of the W_hh."""
    groups: dict[tuple, list[dict]] = {}
    names = ("task", "hidden", "batch", "nonlinearity", "layers", "bidirectional", "rollouts")
    for row in result["results"]["sizes"]:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    rows = []
    for key, mine in groups.items():
        setting = dict(zip(names, key, strict=True))
        words = [
            "400 steps" * ("400" in setting["task"]),
            "ReLU" * (setting["nonlinearity"] == "relu"),
            "two layers" * (setting["layers"] == 2),
            "two directions" * setting["bidirectional"],
            f"B = {setting['batch']}" * (setting["batch"] != 8),
        ]

        def lowest(window: str, mine: list[dict] = mine) -> str:
            values = [row[window] for row in mine]
            return ABSENT if None in values else cosine(min(values))

        windows = ("0-10", "20-30", "50-60", "90-100", "last 10", "anp-ls", "known part")
        rows.append(
            [
                ", ".join(word for word in words if word) or ABSENT,
                f"{setting['hidden']:,}",
                str(setting["rollouts"]),
                *map(lowest, windows),
            ]
        )
    return rows


def feedback_gated(result: dict) -> Rows:
    """Cosine of all gradients of a GRU or LSTM to BPTT's, by what stands for the prior mean."""
    names = ("0-10", "20-30", "90-120", "lowest", "known part, 20-30", "known part, 90-120")
    few = [f"{words}, P = {rollouts}" for rollouts in (8, 16, 32) for words in ("known", "anp-ls")]
    return [
        [
            f"{row['cell']}, gates that hold" if row["hold"] else row["cell"],
            *(cosine(row[name]) for name in (*names, *few)),
        ]
        for row in result["results"]["gated"]
    ]


def feedback_gated_closed(result: dict) -> Rows:
    """Final losses where each estimator trains a GRU or LSTM."""
    names = [f"{words}{suffix}" for words in ("BPTT", "P = 8", "anp-ls, P = 64") for suffix in ("", ", highest")]
    few = ("known part", "known, P = 8", "anp-ls, P = 8", "known, P = 32", "anp-ls, P = 32")
    return [[row["cell"], *(loss(row[name]) for name in (*names, *few))] for row in result["results"]["gated, closed"]]


SETTINGS = {
    "known part": "known part, without rollouts",
    "np 1": "`np`, discount 1",
    "anp 0": "`anp`, discount 0, as published",
    "anp 0.9": "`anp`, discount .9",
    "anp 1": "`anp`, discount 1",
    "anp-ls 1 ridge 0.1": "`anp-ls`, ridge .1",
    "anp-ls 1 ridge 0.01": "`anp-ls`, ridge .01: the default",
    "anp-ls 1 ridge 1": "`anp-ls`, ridge 1",
    "anp-feedback 1 ridge 0.01": "`anp-feedback`, after 60 updates",
    "anp-feedback 1 ridge 0.01, first update": "`anp-feedback`, first update",
}
RATIOS = ((0, 0.04), (0.04, 0.1), (0.1, 0.3), (0.3, 0.8), (0.8, 1.5), (1.5, 3))
COSTS = ((0.04, 0.1), (0.3, 0.8), (1.5, 3))


def defaults(result: dict) -> Rows:
    """Cosine with BPTT's gradient by setting and P / H, and processor time over BPTT's; means over tasks."""

    def by_task(rows: list[dict], figure: str = "cosine") -> list[float]:
        values: dict[str, list[float]] = {}
        for row in rows:
            values.setdefault(row["task"], []).append(row[figure])
        return [fmean(mine) for mine in values.values()]

    def inside(rows: list[dict], low: float, high: float) -> list[dict]:
        return [row for row in rows if low < row["rollouts"] / row["hidden"] <= high]

    table = []
    for setting, words in SETTINGS.items():
        mine = [row for row in result["rows"] if row["setting"] == setting]
        means = by_task(mine)
        cosines = [fmean(by_task(inside(mine, low, high))) for low, high in RATIOS]
        costs = [fmean(by_task(inside(mine, low, high), "cost")) for low, high in COSTS]
        figures = [cosine(value) for value in (fmean(means), min(means), *cosines)]
        table.append([words, *figures, *(without_zero(significant(cost, 2)) for cost in costs)])
    return table


def curves(result: dict) -> Rows:
    """Final losses of the curves, their range over seeds, and processor time."""
    return [
        [
            row["method"],
            f"{row['lr']:g}",
            *(loss(row[name]) for name in ("test loss", "lowest", "highest")),
            significant(row["seconds"], 2),
            significant(row["seconds over BPTT's"], 2),
        ]
        for row in result["results"]
    ]


TABLES: dict[str, Callable[..., Rows]] = {
    table.__name__: table
    for table in (
        curves,
        defaults,
        feedback_closed,
        feedback_cosine,
        feedback_gated,
        feedback_gated_closed,
        feedback_long,
        feedback_parts,
        feedback_sizes,
        feedback_speed,
        feedback_warmup,
    )
}
