"""The tables of figures in README.md and docs/, computed from the result files they cite.

    python tests/docs_figures.py            print every published table that differs from its result files
    python tests/docs_figures.py --write    the same, then rewrite those tables

A table of figures stands below a comment that names a function and the result files it reads:

    <!-- figures: scaling from profiling/results/study/scaling.json -->

The function, of docs_tables*.py, takes the contents of the files in that order and returns the rows of the table.
`<!-- figures printed by their commands -->` stands above figures without a result file, `<!-- no figures -->` above a
table whose numbers are no measurements.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import docs_tables
import docs_tables_feedback
import docs_tables_rivals
from docs_tables import MINUS, Rows

ROOT = Path(__file__).resolve().parent.parent
TABLES = docs_tables.TABLES | docs_tables_feedback.TABLES | docs_tables_rivals.TABLES
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

PRINTED = "figures printed by their commands"
NO_FIGURES = "no figures"
CITED = re.compile(r"figures: (\w+) from (\S+(?:, \S+)*)")
COMMENT = re.compile(r"<!-- (.*) -->")
SEPARATOR = re.compile(r"\|(?::?-+:?\|)+")
NUMBER = re.compile(rf"(?<![\w.])[-{MINUS}+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A number that is not part of a name such as fp32 or sm_90."""


class Table(NamedTuple):
    """A table of a page."""

    line: int
    """Line of its header, counted from 0."""
    comment: str
    """The text of the HTML comment above it; "" without one."""
    header: list[str]
    rows: Rows


def cells(line: str) -> list[str]:
    """Return the cells of a table's line, without bold type."""
    return [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]


def tables_of(text: str) -> Iterator[Table]:
    """Yield the tables of a page, each with the comment above it."""
    lines = text.splitlines()
    for number in range(1, len(lines)):
        if not SEPARATOR.fullmatch(lines[number].replace(" ", "")):
            continue
        end = number + 1
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        above = number - 2
        while above >= 0 and not lines[above].strip():
            above -= 1
        comment = COMMENT.fullmatch(lines[above].strip()) if above >= 0 else None
        rows = [cells(line) for line in lines[number + 1 : end]]
        yield Table(number - 1, comment[1] if comment else "", cells(lines[number - 1]), rows)


def numbers(table: Table) -> list[tuple[int, int]]:
    """Return row and column of every cell with a number outside code, links and pictures."""
    return [
        (row, column)
        for row, line in enumerate(table.rows)
        for column, cell in enumerate(line)
        if NUMBER.search(re.sub(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)", "", cell))
    ]


def read(name: str) -> Any:
    """Return the contents of a result file: JSON, or the lines of a text file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text.splitlines()


def expected(comment: str) -> Rows:
    """Return the rows that a comment's function makes of its result files.

    Raises:
        ValueError: the comment is not of this form, or names a function that does not exist.
    """
    cited = CITED.fullmatch(comment)
    if cited is None or cited[1] not in TABLES:
        raise ValueError(f"no table of figures is made by {comment!r}; there are {', '.join(sorted(TABLES))}")
    return TABLES[cited[1]](*map(read, cited[2].split(", ")))


def differences(table: Table, rows: Rows) -> list[str]:
    """Return a message for every cell of a published table that differs from the expected one."""
    wrong = []
    if len(table.rows) != len(rows):
        wrong.append(f"{len(table.rows)} rows instead of {len(rows)}")
    for published, right in zip(table.rows, rows, strict=False):
        if len(published) != len(right):
            wrong.append(f"{published} has {len(published)} cells instead of {len(right)}")
        wrong += [
            f"{published[0]}: {cell!r} instead of {right_cell!r}"
            for cell, right_cell in zip(published, right, strict=False)
            if cell != right_cell
        ]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the tables that differ")
    write = parser.parse_args().write
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for table in reversed(list(tables_of("\n".join(lines)))):
            if not CITED.fullmatch(table.comment):
                continue
            rows = expected(table.comment)
            if not differences(table, rows):
                continue
            table_lines = [f"| {' | '.join(row)} |" for row in rows]
            sys.stdout.write(
                "\n".join([f"{page.relative_to(ROOT)}:{table.line + 1}: {table.comment}", *table_lines, ""])
            )
            first = table.line + 2
            lines[first : first + len(table.rows)] = table_lines
        if write:
            page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
