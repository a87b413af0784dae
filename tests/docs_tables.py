"""A function for each published table of figures, from result files to the rows on the page; see docs_figures.py.

Functions also hold the labels of rows, so that they give whole tables. Numbers are rounded only in this file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_HALF_UP, Decimal
from statistics import fmean

Rows = list[list[str]]

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"
"""A cell whose figure was not measured."""


def significant(value: float | str, digits: int = 3) -> str:
    """Return a number to some significant digits, thousands with commas; halves are rounded up."""
    number = Decimal(str(value))
    if not number:
        return "0"
    place = Decimal(1).scaleb(number.adjusted() - digits + 1)
    return f"{number.quantize(place, ROUND_HALF_UP):,f}"


def without_zero(text: str) -> str:
    """Return a number as text without the zero before the point."""
    return re.sub(rf"^({MINUS}?)0\.", r"\1.", text)


def decimals(value: float, places: int = 2) -> str:
    """Return a number to some decimal places, without the zero before the point, with a true minus sign."""
    return without_zero(f"{value:.{places}f}".replace("-", MINUS))


def signed(value: float) -> str:
    """Return a number to one decimal place, with a true minus sign."""
    return f"{value:.1f}".replace("-", MINUS)


def percent(share: float, places: int = 0) -> str:
    """Return a share in per cent, with a true minus sign."""
    return f"{100 * share:.{places}f} %".replace("-", MINUS)


def peers_h200(lines: Sequence[str]) -> Rows:
    """One update beside its peers on a GPU, in milliseconds."""
    times: dict[str, dict[str, str]] = defaultdict(dict)
    for record in _records(lines, "peer"):
        shape = ", ".join(record[name] for name in "TBPH")
        times[shape][record["peer"]] = significant(record["ms"])
    exact = [f"BPTT cuDNN {precision}" for precision in ("fp32", "tf32", "fp16")]
    return [
        [
            shape,
            *(peers[name] for name in ("ours anp", "ours anp graph", "ours backward", "ours anp-ls")),
            " / ".join(peers[name] for name in exact),
            peers.get("cuBLAS + pointwise, CUDA graph", ABSENT),
            peers.get("eager torch", ABSENT),
        ]
        for shape, peers in times.items()
        if "ours anp" in peers
    ]


def published_h200(lines: Sequence[str]) -> Rows:
    """The published code on a GPU: its time, and our rollout-steps per second over its."""
    records = _records(lines, "peer")
    ours = {(record["peer"], record["B"]): record for record in records if (record["T"], record["H"]) == ("210", "500")}

    def ratio(peer: str, batch: str) -> str:
        record = ours.get((peer, batch))
        if record is None:
            return ABSENT
        theirs = ours["published code", batch]
        return significant(float(theirs["ms"]) / float(record["ms"]) * int(record["P"]) / int(theirs["P"]))

    return [
        [batch, significant(record["ms"]), ratio("ours anp", batch), ratio("ours anp graph", batch)]
        for (peer, batch), record in ours.items()
        if peer == "published code"
    ]


def long_h200(lines: Sequence[str]) -> Rows:
    """A long sequence on a GPU."""
    return [
        [*(f"{int(record[name]):,}" for name in "TBPH"), significant(record["ms"]), significant(record["peak_mib"])]
        for record in _records(lines, "long")
    ]


def tests_h200(lines: Sequence[str]) -> Rows:
    """The number of tests that passed on a GPU where none failed, and their seconds."""
    # Where a test fails, pytest's summary begins with the failures.
    ((passed, seconds),) = re.findall(r"^(\d+) passed, \d+ warnings? in ([\d.]+)s", "\n".join(lines), re.MULTILINE)
    return [[passed, significant(seconds)]]


STUDY = {
    "mackey-glass-15": "Mackey-Glass, 15 steps ahead",
    "copying-5": "copying after 5 steps",
    "copying-10": "copying after 10",
    "copying-20": "copying after 20",
    "weather-1h": "weather, 1 hour ahead",
    "weather-24h": "weather, 24 hours ahead",
    "digits": "digits by pixel",
    "digits-permuted": "digits by permuted pixel",
    "adding": "adding",
}
COMPARED = ("bptt", "anp-ls", "anp", "np", "wp")


def study_means(study: dict) -> Rows:
    """Test losses of the study, means over seeds."""
    return [[STUDY[task], *(f"{methods[name]['loss']:.4f}" for name in COMPARED)] for task, methods in _methods(study)]


def study_losses(study: dict) -> Rows:
    """Test losses of the study with their spread, and the share of BPTT's gain that anp-ls keeps."""
    rows = []
    for task, methods in _methods(study):
        memoryless = study["tasks"][task]["baselines"]["memoryless"]["loss"]
        share = (memoryless - methods["anp-ls"]["loss"]) / (memoryless - methods["bptt"]["loss"])
        losses = [f"{methods[name]['loss']:.4f} ± {methods[name]['spread']:.4f}" for name in COMPARED]
        rows.append([STUDY[task], *losses, percent(share)])
    return rows


def study_margins(study: dict) -> Rows:
    """Losses without a network, each method's margin over np and wp, and the cost of an update."""
    rows = []
    for task, methods in _methods(study):
        baselines = study["tasks"][task]["baselines"]
        margins = study["tasks"][task]["findings"]["margins"]
        linear = f"{baselines['linear']['loss']:.4f}" if "linear" in baselines else ABSENT
        rows.append(
            [
                STUDY[task],
                f"{baselines['memoryless']['loss']:.4f}",
                linear,
                *(signed(margins[name]) for name in ("anp-ls", "anp", "anp-1")),
                *(f"{methods[name]['per_update'] / methods['bptt']['per_update']:.1f}" for name in ("anp-ls", "anp")),
            ]
        )
    return rows


def study_shortfall(study: dict) -> Rows:
    """The shares of BPTT's gain that anp-ls and the truncated rules keep, by task."""
    names = ("anp-ls", "bptt-1", "anp-0", "published-anp")
    rows = []
    for task, methods in _methods(study):
        memoryless = study["tasks"][task]["baselines"]["memoryless"]["loss"]
        gain = memoryless - methods["bptt"]["loss"]
        rows.append([STUDY[task], *(percent((memoryless - methods[name]["loss"]) / gain) for name in names)])
    return rows


def study_decorrelation(study: dict) -> Rows:
    """The loss without decorrelation minus that with it, in units of the two spreads added, by method and task."""
    margins: dict[str, list[float]] = defaultdict(list)
    for _, methods in _methods(study):
        for name, plain in methods.items():
            helped = methods.get(f"{name} + decorrelation")
            if helped is not None:
                margins[name].append((plain["loss"] - helped["loss"]) / (plain["spread"] + helped["spread"]))
    return [
        [
            f"`{name}`",
            *(signed(margin) for margin in by_task),
            *(str(sum(sign * margin > 1 for margin in by_task)) for sign in (1, -1)),
        ]
        for name, by_task in margins.items()
    ]


def scaling(result: dict) -> Rows:
    """Alignment with BPTT's gradient against H, T and P."""
    rows = {
        tuple(str(row[name]) for name in "HTP"): [decimals(row[name]) for name in ("np", "anp-0", "anp", "anp-ls")]
        for varied in "HTP"
        for row in result["results"][f"alignment against {varied}"]
    }
    return [[f"{int(size):,}" for size in sizes] + cosines for sizes, cosines in rows.items()]


def long_cpu(result: dict) -> Rows:
    """Memory of long sequences, in MiB."""
    return [
        [
            f"`{row['method']}`",
            f"{row['T']:,}",
            f"{row['max_memory MiB']:.0f}" if row.get("max_memory MiB") else ABSENT,
            f"{row['peak MiB over T = 100']:,.0f}" if row["outcome"] == "done" else row["outcome"],
        ]
        for row in result["results"]
    ]


def memory(result: dict) -> Rows:
    """The memory of an update, over its `max_memory`."""
    return [
        [
            ", ".join(str(row[name]) for name in "TBPH"),
            f"{row['max_memory MiB']:.0f}",
            f"{row['used MiB']:.0f}",
            decimals(row["used / max_memory"]),
            f"{row['delta_a whole MiB']:,.0f}",
        ]
        for row in result["results"]
    ]


def published_cpu(*results: dict) -> Rows:
    """Rollout-steps per second over the published code's, and the share of matrix products: medians."""
    return [
        [
            str(result["machine"]["threads"]),
            str(row["case"]["batch"]),
            str(row["case"]["rollouts"]),
            significant(row["ratio"][1]),
            decimals(row["matmul_share"][1]),
        ]
        for result in results
        for row in result["results"]
    ]


CPU_PEERS = (
    "ours, anp-ls",
    "ours, without Numba",
    "ours, bf16 operands",
    "BPTT, nn.RNN fp32",
    "eager torch",
    "torch.compile",
    "torch.func.vmap",
    "EGGROLL, JAX",
)


def compare_cpu(result: dict) -> Rows:
    """One update on a CPU: ours in milliseconds, and the time of the peers over ours."""
    shapes: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in result["results"]:
        shapes[", ".join(str(row[name]) for name in "TBPH")][row["peer"]] = row
    return [
        [
            shape,
            significant(peers["ours"]["ms"]),
            *(without_zero(significant(peers[name]["time / ours"])) for name in CPU_PEERS),
        ]
        for shape, peers in shapes.items()
    ]


def digits_pixels(result: dict) -> Rows:
    """Test accuracy after the last epoch: mean, lowest and highest of the seeds."""
    accuracies: dict[str, list[float]] = defaultdict(list)
    for run in result["results"]:
        accuracies[run["method"]].append(run["accuracy"][-1])
    return [
        [f"`{method}`", str(len(values)), percent(fmean(values), 1), percent(min(values), 1), percent(max(values), 1)]
        for method, values in accuracies.items()
    ]


def variance(result: dict) -> Rows:
    """Cosine of one estimate with BPTT's gradient, by method of variance reduction, at 64 rollouts."""
    tricks = ("plain", "baseline", "antithetic", "half units", "readout", "+-")
    return [
        [f"`{row['method']}`", without_zero(significant(row["sigma"], 1)), *(decimals(row[name]) for name in tricks)]
        for row in result["rows"]
        if row["rollouts"] == 64
    ]


TASKS = {"adding": "adding problem", "xor": "temporal xor"}


def diagnosed(result: dict) -> Rows:
    """Losses of BPTT, of what `diagnose` recommended and of the default's 32 rollouts, and their cosines."""
    return [
        [
            TASKS[row["task"]],
            str(row["seed"]),
            *(significant(row[name]) for name in ("bptt", "recommended", "default")),
            significant(row["recommended"] / row["bptt"]),
            decimals(row["cosine start"]),
            decimals(row["default's start"]),
        ]
        for row in result["results"]
    ]


def decorrelation_fixed(result: dict) -> Rows:
    """The factor by which the squared correlation falls while W is fixed: lowest and highest of the seeds."""
    lowered: dict[tuple[float, int], list[float]] = defaultdict(list)
    for row in result["fixed weights"]:
        lowered[row["rate"], row["updates"]].append(row["lowered"])
    return [
        [without_zero(significant(rate, 1)), f"{updates:,}", significant(min(values)), significant(max(values))]
        for (rate, updates), values in lowered.items()
    ]


def decorrelation_trained(result: dict) -> Rows:
    """Test error with and without D, and the factor by which D lowers the squared correlation while W learns."""
    rows: dict[str, dict[bool, dict]] = defaultdict(dict)
    for row in result["trained"]:
        rows[row["method"]][row["D rate"] != "none"] = row
    return [
        [
            f"`{method}`",
            *(
                f"{significant(row['test error'])} ({significant(row['lowest'])} to {significant(row['highest'])})"
                for row in (entries[False], entries[True])
            ),
            significant(entries[True]["corr^2 of h"] / entries[True]["corr^2 of D h"]),
        ]
        for method, entries in rows.items()
    ]


COMPILED = {
    "resident-128-bf16-loss": ("RNN", "128", "loss"),
    "resident-128-bf16-loss-stored": ("RNN", "128", "loss, δa stored"),
    "resident-256-bf16-loss": ("RNN", "256", "loss"),
    "resident-256-bf16-loss-stored": ("RNN", "256", "loss, δa stored"),
    "gru-resident-128-bf16": ("GRU", "128", "loss, δh stored"),
    "lstm-resident-128-bf16": ("LSTM", "128", "loss, δh and δc stored"),
    "lstm-resident-100-bf16": ("LSTM", "100", "loss, δh and δc stored"),
}


def compiled(table: dict) -> Rows:
    """Instructions of a step of the resident kernel on sm_90, per rollout and unit."""
    return [
        [
            *words,
            f"{row['issued']:.2f}",
            f"{row['special']:.1f}",
            str(row["barriers"]),
            str(row["local_in_loop"]),
        ]
        for case, words in COMPILED.items()
        for row in [table["rows"][f"sm_90:{case}"]]
    ]


HOST = {"estimate, mse": "`estimate_grad_`, mse", "estimate, cross_entropy": "`estimate_grad_`, cross-entropy"}
"""What the rows of host.py are called."""


def host(record: dict) -> Rows:
    """Operations and launches of an update, and the host's time of a step, before a change and now."""
    before, now = (record["results"][version] for version in ("before", "now"))
    return [
        [
            HOST.get(new["update"], "forward and backward pass"),
            *(str(row[name]) for row in (old, new) for name in ("operations", "launches")),
            *(f"{row['host ms']:.1f}" for row in (old, new)),
        ]
        for old, new in zip(before["updates"], now["updates"], strict=True)
    ]


def host_steps(record: dict) -> Rows:
    """The host's time of a step of stepwise rollouts, before a change and now."""
    before, now = (record["results"][version]["steps"] for version in ("before", "now"))
    return [
        [old["loss"], *(f"{row['host us a step']:.1f}" for row in (old, new))]
        for old, new in zip(before, now, strict=True)
    ]


def _records(lines: Sequence[str], kind: str) -> list[dict[str, str]]:
    """Return the lines `kind=<kind> name=value ...` as dictionaries; values may hold spaces."""
    return [dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", line)) for line in lines if line.startswith(f"kind={kind} ")]


def _methods(study: dict) -> Iterator[tuple[str, dict[str, dict]]]:
    for task, results in study["tasks"].items():
        yield task, {row["name"]: row for row in results["methods"]}


TABLES: dict[str, Callable[..., Rows]] = {
    table.__name__: table
    for table in (
        compare_cpu,
        compiled,
        decorrelation_fixed,
        decorrelation_trained,
        diagnosed,
        digits_pixels,
        host,
        host_steps,
        long_cpu,
        long_h200,
        memory,
        peers_h200,
        published_cpu,
        published_h200,
        scaling,
        study_decorrelation,
        study_losses,
        study_margins,
        study_means,
        study_shortfall,
        tests_h200,
        variance,
    )
}
