"""Does an LSTM language model learn from rollouts as from BPTT? `examples/char_lm.py`, with equal updates.

    python profiling/study_char_lm.py --text BOOK.txt            results/char_lm/
    python profiling/study_char_lm.py --text BOOK.txt --report   table and plot of what there is
    python profiling/study_char_lm.py --quick                    a small model on Python's reference: a look

Three trainings from the same start on the same windows: BPTT; `--method`, by default "anp-feedback", with H / 8
rollouts; and the known part alone, which needs no rollouts: an LSTM through which gradients flow along c and up the
layers, never through h_{t-1} (e-prop's approximation, Bellec et al. 2020). The goal: bits per character of the held-out
text at most 1.03 times BPTT's, where the known part is further away than that.

Every finished training is one line of `runs.jsonl`, found by its complete configuration and text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from statistics import fmean

import machine
import torch
from gate import estimate_check, require
from report import table, write
from study import Finished
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from tqdm import tqdm

import anpgpu

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import char_lm

RESULTS = Path(__file__).resolve().parent / "results" / "char_lm"

EXACT, KNOWN = "bptt", "known part"
GOAL = 1.03
"""Most bits per character over BPTT's."""


class KnownPart(nn.LSTM):
    """An nn.LSTM whose outputs have torch's values, and whose gradients do not pass h_{t-1}."""

    def forward(
        self, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return outputs and final states of a time-first batch."""
        if state is None:
            state = (inputs.new_zeros(self.num_layers, inputs.shape[1], self.hidden_size),) * 2
        finals = []
        for layer, (h, c) in enumerate(zip(*state, strict=True)):
            weight_ih, weight_hh, bias_ih, bias_hh = self.all_weights[layer]
            outputs = []
            for step in F.linear(inputs, weight_ih, bias_ih):
                i, f, g, o = (step + F.linear(h.detach(), weight_hh, bias_hh)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()  # noqa: PLW2901  (the state of this layer)
                h = o.sigmoid() * c.tanh()  # noqa: PLW2901
                outputs.append(h)
            inputs = torch.stack(outputs)
            finals.append((h, c))
        return inputs, (torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals]))


def change_(model: nn.Module, method: str, rollouts: int) -> None:
    """Let a model learn by a method."""
    if method == KNOWN:
        for module in model.modules():
            if isinstance(module, nn.LSTM):
                module.__class__ = KnownPart
    elif method != EXACT:
        anpgpu.swap_(model, anpgpu.Perturbation(method, rollouts))


def key_of(run: dict) -> str:
    """Return what identifies a finished training."""
    return json.dumps([run["settings"], run["text"]], sort_keys=True)


def plan(method: str, options: char_lm.Options, seeds: int) -> list[dict[str, object]]:
    """Return the settings of all trainings."""
    rollouts = {method: options.hidden // 8}
    return [
        {**options._replace(seed=seed)._asdict(), "method": name, "rollouts": rollouts.get(name)}
        for seed in range(seeds)
        for name in (EXACT, method, KNOWN)
    ]


def study(finished: Finished, settings: list[dict], path: Path | None) -> None:
    """Make the trainings that are missing."""
    text, digest = char_lm.read(path), digest_of(path)
    commit = machine.commit(Path(__file__).resolve().parent)
    for mine in tqdm(settings, desc="trainings"):
        if key_of({"settings": mine, "text": digest}) in finished.runs:
            continue
        options = char_lm.Options(**{name: mine[name] for name in char_lm.Options._fields})

        def changed_(model: nn.Module, mine: dict = mine) -> None:
            change_(model, mine["method"], mine["rollouts"])

        _, curve = char_lm.train(text, options, changed_, name=mine["method"])
        curve = curve._replace(losses=[round(loss, 4) for loss in curve.losses])
        finished.add({"settings": mine, "text": digest, **curve._asdict(), "commit": commit})


def digest_of(path: Path | None) -> str:
    """Return a short name of a text, whatever its file is called."""
    return "Python's reference" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def results(runs: list[dict]) -> list[dict[str, object]]:
    """Return a row for each method: bits per character, means over seeds, and the ratio to BPTT's."""
    rows = []
    for method in dict.fromkeys(run["settings"]["method"] for run in runs):
        mine = [run for run in runs if run["settings"]["method"] == method]
        bits = [run["valid"][-1] for run in mine]
        row = {"method": method, "P": mine[0]["settings"]["rollouts"], "seeds": len(mine), "bits": fmean(bits)}
        row |= {"lowest": min(bits), "highest": max(bits), "seconds": fmean(run["seconds"] for run in mine)}
        rows.append(row)
    exact = next((row for row in rows if row["method"] == EXACT), None)
    ratio = "bits over BPTT's"
    return [
        {
            **row,
            ratio: row["bits"] / exact["bits"] if exact else None,
            "seconds over BPTT's": row["seconds"] / exact["seconds"] if exact else None,
            f"within {GOAL}": "yes" if exact and row["bits"] <= GOAL * exact["bits"] else "no",
        }
        for row in rows
    ]


def report(finished: Finished, settings: list[dict], digest: str, checks: list[dict[str, object]]) -> None:
    """Print the table; write char_lm.json, .txt and .png."""
    keys = [key_of({"settings": mine, "text": digest}) for mine in settings]
    runs = [finished.runs[key] for key in keys if key in finished.runs]
    if not runs:
        return
    host, rows = machine.machine(), results(runs)
    shared = {name: settings[0][name] for name in char_lm.Options._fields if name != "seed"}
    words = ", ".join(f"{name} {value}" for name, value in shared.items())
    text = f"{machine.line(host)}\n\nbits per character of held-out text; two LSTM layers, {words}\n\n{table(rows)}"
    print(text)
    path = finished.path.with_name("char_lm.json")
    commits = sorted({run["commit"] or "" for run in runs})
    record = {"machine": host, "checks": checks, "commits": commits, "text": digest, "settings": shared}
    write(path, {**record, "results": rows}, text)
    first = {
        run["settings"]["method"]: char_lm.Curve(*(run[name] for name in char_lm.Curve._fields))
        for run in runs
        if run["settings"]["seed"] == 0
    }
    char_lm.plot(first, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: Python's reference)")
    parser.add_argument("--method", default="anp-feedback")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 updates of a small model")
    parser.add_argument("--report", action="store_true", help="only table and plot of what there is")
    parser.add_argument("--output", type=Path, help="folder of the finished trainings, table and plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared = char_lm.Options(options.updates, options.hidden, lr=options.lr)
    if options.quick:
        shared = shared._replace(updates=20, hidden=16, steps=10)
    folder = options.output or (RESULTS.with_name("char_lm-quick") if options.quick else RESULTS)
    settings = plan(options.method, shared, options.seeds)
    checks, finished = require([estimate_check()]), Finished(folder / "runs.jsonl", key_of)
    if not options.report:
        study(finished, settings, options.text)
    report(finished, settings, digest_of(options.text), checks)


if __name__ == "__main__":
    main()
