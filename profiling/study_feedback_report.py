"""The tables of `study_feedback.py`, from its finished runs: one list of rows for each table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from report import quartiles
from study_feedback_plan import (
    CLOSED,
    FLOOR,
    PARTS_OF_METHOD,
    RATIO,
    WARMUPS,
    learned,
    without_feedback,
)
from study_feedback_runs import CASES, EVERY, EXACT, KNOWN

Rows = list[dict[str, object]]

REACHED_AT = 0.8
"""BPTT's loss after this share of the updates must be reached by the end."""

LAST = {1000: 1, 1200: 2}
"""Parts of a run's losses that are its final loss, by its updates: the last 50 and 120 updates."""


def grouped(runs: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    """Return runs by the values of some settings."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault(tuple(run["settings"][name] for name in names), []).append(run)
    return groups


def of_kind(runs: Sequence[dict], kind: str) -> list[dict]:
    return [run for run in runs if run["settings"]["kind"] == kind]


def mean_of(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def cosines(runs: Sequence[dict], estimator: str, window: str, weight: str = "weight_hh_l0") -> list[float]:
    """Return an estimator's cosine in a window of updates, one for each run that has it."""
    found = [run["cosine"].get(estimator, {}).get(weight, {}).get(window) for run in runs]
    return [value for value in found if value is not None]


def last_window(run: dict) -> str:
    updates = run["settings"]["updates"]
    return f"{max(0, updates - 10)}-{updates}"


def cosine(runs: Sequence[dict]) -> Rows:
    """Cosine of dW_hh to BPTT's over the last ten updates of the seven cases."""
    rows: Rows = []
    for (task,), mine in grouped(runs, "task").items():
        last = last_window(mine[0])
        plain = learned(8, warmup=0)
        values = cosines(mine, plain, last)
        rows.append(
            {
                "task": task,
                "seeds": len(mine),
                "P = 8": mean_of(values),
                "lowest": min(values, default=None),
                "P = 8, B not moved with W": mean_of(cosines(mine, learned(8, warmup=0, follow=False), last)),
                "P = 4": mean_of(cosines(mine, learned(4, warmup=0), last)),
                "P = 1": mean_of(cosines(mine, learned(1, warmup=0), last)),
                "anp-ls, P = 8": mean_of(cosines(mine, "anp-ls rollouts=8", last)),
                KNOWN: mean_of(cosines(mine, KNOWN, last)),
                "updates 0-10": mean_of(cosines(mine, plain, "0-10")),
                "0-10, warmed up": mean_of(cosines(mine, learned(8), "0-10")),
                "warmed up": mean_of(cosines(mine, learned(8), last)),
            }
        )
    return rows


def sizes(runs: Sequence[dict]) -> Rows:
    """The same cosine while B is learnt, at other sizes and structures; one row for each W_hh."""
    rows: Rows = []
    names = ("task", "hidden", "batch", "nonlinearity", "layers", "bidirectional")
    for key, mine in grouped(runs, *names).items():
        settings = dict(zip(names, key, strict=True))
        last = last_window(mine[0])
        for estimator in [name for name in mine[0]["cosine"] if "feedback" in name]:
            rollouts = int(estimator.split("rollouts=")[1].split()[0])
            for weight in mine[0]["cosine"][estimator]:
                windows = ("0-10", "20-30", "50-60", "90-100")
                rows.append(
                    {
                        **settings,
                        "rollouts": rollouts,
                        "weight": weight,
                        "seeds": len(mine),
                        "updates": mine[0]["settings"]["updates"],
                        **{window: mean_of(cosines(mine, estimator, window, weight)) for window in windows},
                        "last 10": mean_of(cosines(mine, estimator, last, weight)),
                        "anp-ls": mean_of(cosines(mine, f"anp-ls rollouts={rollouts}", last, weight)),
                        KNOWN: mean_of(cosines(mine, KNOWN, last, weight)),
                    }
                )
    return rows


def final(run: dict) -> float:
    """Return the mean loss of a run's last updates; infinite where it broke off."""
    value = fmean(run["losses"][-LAST.get(run["settings"]["updates"], 1) :])
    return value if math.isfinite(value) else math.inf


def accuracy_of(run: dict) -> float:
    """Return the mean accuracy near the end of a run."""
    return fmean(accuracy for _, accuracy in run.get("looks") or [run["test"]])


def by_estimator(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Return runs by the estimator that trained."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["settings"]["estimators"][0], []).append(run)
    return groups


def closed(runs: Sequence[dict]) -> Rows:
    """Final losses where each estimator trains, and whether learned feedback keeps up with BPTT."""
    rows: Rows = []
    by_task = grouped(of_kind(runs, "train"), "task")
    for task in [name for name in CLOSED if (name,) in by_task]:
        named = by_estimator(by_task[(task,)])
        exact, ours = named.get(EXACT, []), named.get(learned(8), [])
        if not exact or len(exact) != len(ours):
            continue
        bptt, loss = (fmean(map(final, group)) for group in (exact, ours))
        early = fmean(run["losses"][round(REACHED_AT * len(run["losses"])) - 1] for run in exact)
        chance = CASES[task].chance
        first = {
            name: next((final(run) for run in group if not run["settings"]["seed"]), None)
            for name, group in named.items()
        }
        accuracy = {
            name: None if group[0]["test"][1] is None else 100 * fmean(map(accuracy_of, group))
            for name, group in ((EXACT, exact), ("ours", ours))
        }
        rows.append(
            {
                "task": task,
                "seeds": len(exact),
                "chance": chance,
                "BPTT": bptt,
                "P = 8": loss,
                "P = 8 over BPTT": loss / bptt,
                "BPTT at 80 %": early,
                "BPTT solves it": bptt < chance / 2,
                "kept up": loss <= RATIO * bptt + FLOOR and loss <= early,
                "BPTT, accuracy": accuracy[EXACT],
                "P = 8, accuracy": accuracy["ours"],
                "seed 0: BPTT": first.get(EXACT),
                "P = 16": first.get(learned(16)),
                "8": first.get(learned(8)),
                "4": first.get(learned(4)),
                KNOWN: first.get(KNOWN),
                "anp-ls, 8": first.get("anp-ls rollouts=8"),
                **{
                    f"{name}, s": mean_of([run["seconds"] for run in group])
                    for name, group in (("BPTT", exact), ("P = 8", ours))
                },
                "losses": {
                    name: [fmean(part) for part in zip(*(run["losses"] for run in group), strict=False)]
                    for name, group in (("BPTT", exact), ("P = 8", ours))
                },
            }
        )
    return rows


def long(runs: Sequence[dict]) -> Rows:
    """Loss and accuracy on long sequences, seed by seed on the same batches."""
    rows: Rows = []
    for (seed,), mine in sorted(grouped(of_kind(runs, "train"), "seed").items()):
        named = by_estimator(mine)
        if EXACT in named and learned(8) in named:
            (exact,), (ours,) = named[EXACT], named[learned(8)]
            rows.append(
                {
                    "seed": seed,
                    "BPTT": final(exact),
                    "P = 8": final(ours),
                    "P = 8 over BPTT": final(ours) / final(exact),
                    "BPTT, accuracy": 100 * exact["test"][1],
                    "P = 8, accuracy": 100 * ours["test"][1],
                    "BPTT, s": exact["seconds"],
                    "P = 8, s": ours["seconds"],
                }
            )
    if len(rows) > 1:
        means = {name: fmean(row[name] for row in rows) for name in list(rows[0])[1:]}
        rows.append({"seed": "mean", **means, "P = 8 over BPTT": means["P = 8"] / means["BPTT"]})
    return rows


def parts_of_method(runs: Sequence[dict]) -> Rows:
    """What B's motion and the warm-up do: error of the sum of clipped dW_hh, and training with seed 0."""
    paths = [run for run in of_kind(runs, "path") if run["settings"]["estimators"][0] == EXACT]
    trained = by_estimator([run for run in of_kind(runs, "train") if not run["settings"]["seed"]])
    rows: Rows = []
    for words, estimator in {"BPTT": EXACT, **PARTS_OF_METHOD, KNOWN: KNOWN}.items():
        run = trained.get(estimator, [None])[0]
        sums = [path["sum"].get(estimator, {}).get("weight_hh_l0") for path in paths]
        sums = [value for value in sums if value is not None]
        rows.append(
            {
                "part": words,
                "error of the sum": mean_of([value["error"] for value in sums]),
                "of a random walk": mean_of([value["random walk"] for value in sums]),
                "cosine 0-10": mean_of(cosines(paths, estimator, "0-10")),
                "cosine, last 10": mean_of(cosines(paths, estimator, last_window(paths[0]))) if paths else None,
                "loss": None if run is None else final(run),
                "accuracy": None if run is None else 100 * run["test"][1],
            }
        )
    return without_blanks(rows)


def without_blanks(rows: Rows) -> Rows:
    """Return the rows that have a figure."""
    return [row for row in rows if any(value is not None for value in list(row.values())[1:])]


def own_path(runs: Sequence[dict]) -> Rows:
    """The error of the sum of clipped dW_hh where learned feedback itself trains."""
    return [
        {"seed": run["settings"]["seed"], **run["sum"][run["settings"]["estimators"][0]]["weight_hh_l0"]}
        for run in of_kind(runs, "path")
        if run["settings"]["estimators"][0] != EXACT
    ]


def speed(runs: Sequence[dict]) -> Rows:
    """The time of an update over another's: median of the turns, with quartiles."""
    rows: Rows = []
    for (threads, hidden), mine in grouped(runs, "threads", "hidden").items():
        half, ours, fewer = f"anp-ls rollouts={hidden // 2}", learned(8, warmup=0), learned(4, warmup=0)

        def ratios(upper: str, lower: str, mine: Sequence[dict] = mine) -> list[float]:
            pairs = [(run["ms"][upper], run["ms"][lower]) for run in mine if {upper, lower} <= run["ms"].keys()]
            return [a / b for above, below in pairs for a, b in zip(above, below, strict=True)]

        exact = [value for run in mine for value in run["ms"].get(EXACT, [])]
        rows.append(
            {
                "H": hidden,
                "threads": threads,
                "clock": mine[0]["clock"],
                "BPTT ms": quartiles(exact).median,
                **{
                    f"{words}{suffix}": value
                    for words, pair in (
                        ("P = 8 / BPTT", (ours, EXACT)),
                        ("P = 4 / BPTT", (fewer, EXACT)),
                        ("P = 8 / anp-ls P = H/2", (ours, half)),
                    )
                    if ratios(*pair)
                    for suffix, value in zip((" low", "", " high"), quartiles(ratios(*pair)), strict=True)
                },
            }
        )
    return rows


def warmup(runs: Sequence[dict]) -> Rows:
    """Cosine of the first ten updates and the loss after the last, by the number of warm-up estimates."""
    rows: Rows = []
    for (task,), mine in grouped(runs, "task").items():
        trained = by_estimator(of_kind(mine, "train"))
        for words, estimator in {
            "BPTT": EXACT,
            **{str(number): learned(8, warmup=number) for number in WARMUPS},
        }.items():
            finals = [fmean(run["losses"][-3:]) for run in trained.get(estimator, [])]
            middle = [run["losses"][len(run["losses"]) // 3] for run in trained.get(estimator, [])]
            rows.append(
                {
                    "task": task,
                    "warmup": words,
                    "seeds": len(finals),
                    "cosine 0-10": mean_of(cosines(of_kind(mine, "cosine"), estimator, "0-10")),
                    "loss at a third": mean_of(middle),
                    "loss": mean_of(finals),
                }
            )
    return rows


def gated(runs: Sequence[dict]) -> Rows:
    """Cosine of all gradients of a GRU or LSTM to BPTT's, with B, with what is known alone, and with neither."""
    rows: Rows = []
    late = "90-120"
    for (module, hold), mine in grouped(of_kind(runs, "cosine"), "module", "hold").items():
        plain = learned(8, warmup=0)
        last = cosines(mine, plain, late, EVERY)
        rows.append(
            {
                "cell": module,
                "hold": hold,
                "seeds": len(mine),
                **{window: mean_of(cosines(mine, plain, window, EVERY)) for window in ("0-10", "20-30")},
                late: mean_of(last),
                "lowest": min(last, default=None),
                **{f"{KNOWN}, {window}": mean_of(cosines(mine, KNOWN, window, EVERY)) for window in ("20-30", late)},
                **{
                    f"{words}, P = {rollouts}": mean_of(cosines(mine, estimator(rollouts), late, EVERY))
                    for rollouts in (8, 16, 32)
                    for words, estimator in (("known", without_feedback), ("anp-ls", "anp-ls rollouts={}".format))
                },
            }
        )
    return rows


def gated_closed(runs: Sequence[dict]) -> Rows:
    """Final losses where each estimator trains a GRU or LSTM: mean and highest of the seeds, or seed 0 alone."""
    rows: Rows = []
    for (module,), mine in grouped(of_kind(runs, "train"), "module").items():
        finals = {name: [final(run) for run in group] for name, group in by_estimator(mine).items()}
        row: dict[str, object] = {"cell": module}
        for words, name in (("BPTT", EXACT), ("P = 8", learned(8)), ("anp-ls, P = 64", "anp-ls rollouts=64")):
            values = finals.get(name, [])
            row |= {
                f"{words}, seeds": len(values),
                words: mean_of(values),
                f"{words}, highest": max(values, default=None),
            }
        for rollouts in (8, 32):
            for words, name in (("known", without_feedback(rollouts)), ("anp-ls", f"anp-ls rollouts={rollouts}")):
                row[f"{words}, P = {rollouts}"] = mean_of(finals.get(name, []))
        rows.append(row | {KNOWN: mean_of(finals.get(KNOWN, []))})
    return rows


TABLES: dict[str, tuple[str, Callable[[Sequence[dict]], Rows]]] = {
    "cosine": ("cosine", cosine),
    "closed": ("closed", closed),
    "long": ("long", long),
    "parts": ("long", parts_of_method),
    "own path": ("long", own_path),
    "speed": ("time", speed),
    "warmup": ("warmup", warmup),
    "sizes": ("sizes", sizes),
    "gated": ("gated", gated),
    "gated, closed": ("gated", gated_closed),
}
"""The tables: the part of the study that each is made of, and how."""
