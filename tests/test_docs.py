"""README.md and docs/: code blocks run, names and files exist, and figures in tables are those of the result files."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import docs_figures
import pytest
from docs_figures import NO_FIGURES, PRINTED, ROOT, differences, expected, numbers, tables_of
from forking import scripts

import anpgpu

SCRIPTS = scripts(anpgpu)
NAMES = ("methods", "evidence", "compatibility", "internals", "extending", "limits")
README = ROOT / "README.md"
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
SHELLS = {"sh", "bash", "shell", "console"}

MOST_LINES, MOST_WORDS = 150, 1200
"""Limits of README.md, as `wc -lw` counts."""

MANY_NUMBERS = 3
"""A table with so many cells with numbers must name their source, or say that they are no measurements."""

PRINTED_ROWS = 3
"""Number of rows, over all pages, whose figures are in no result file."""

FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|txt|json|jsonl|png|toml)|(?:[\w.-]+/)+|\.ci/\w+")
"""Code that names a file or folder."""

WRITTEN = {"map.png"}
"""Files that a command of a page writes."""

FOLDERS = [ROOT, *(ROOT / name for name in ("anpgpu", "kernels"))]
"""Where a page's file names begin."""


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(languages):
    return [
        (path, number, source)
        for path, text in TEXTS.items()
        for number, (language, source) in enumerate(FENCE.findall(text))
        if language in languages
    ]


PYTHON = blocks({"python"})


def plain(text):
    """A page without its blocks."""
    return FENCE.sub("", text)


def inline(text):
    return CODE.findall(plain(text))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(path):
    return {
        slug(heading) for heading in re.findall(r"^#+ (.+)$", plain(path.read_text(encoding="utf-8")), re.MULTILINE)
    }


class Place(NamedTuple):
    """A table and the page it is on."""

    page: Path
    table: docs_figures.Table

    @property
    def name(self):
        return f"{name_of(self.page)}:{self.table.line + 1}"


TABLES = [Place(path, table) for path, text in TEXTS.items() for table in tables_of(text)]
FIGURES = [place for place in TABLES if place.table.comment.startswith("figures:")]


def test_docs_has_its_six_pages():
    assert {path.name for path in (ROOT / "docs").iterdir()} == {f"{name}.md" for name in NAMES}
    assert set(docs_figures.PAGES) == set(PAGES)
    for path in PAGES[1:]:
        assert f"({name_of(path)})" in TEXTS[README], f"README.md has no link to {name_of(path)}"


def test_the_readme_is_short():
    text = TEXTS[README]
    assert text.count("\n") <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_fence_is_labelled_and_closed(path):
    # An unlabelled or unclosed one would hide what follows it from the tests below.
    assert TEXTS[path].count("```") == 2 * len(FENCE.findall(TEXTS[path]))


def test_the_readme_shows_python_and_shell():
    languages = {language for language, _ in FENCE.findall(TEXTS[README])}
    assert "python" in languages
    assert languages & SHELLS


@pytest.mark.parametrize(
    ("path", "number", "source"), PYTHON, ids=[f"{name_of(path)}-{number}" for path, number, _ in PYTHON]
)
def test_python_block_runs(path, number, source, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(source, encoding="utf-8")
    status, _, warned = SCRIPTS.ask(str(tmp_path), str(script), [], True)
    assert status == 0, warned


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        target for _, _, block in blocks(SHELLS) for target in re.findall(r"^\s*make ([a-z-]+)", block, re.MULTILINE)
    }
    named |= {
        target for text in TEXTS.values() for code in inline(text) for target in re.findall(r"^make ([a-z-]+)", code)
    }
    assert named >= {"demo", "test"}
    assert named <= targets, f"no such targets: {sorted(named - targets)}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", plain(TEXTS[path]))
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{name_of(path)}: {link}"
        assert there.is_relative_to(ROOT), f"{name_of(path)}: {link}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(path)}: {link}; there are {sorted(anchors(there))}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_files_it_names_exist(path):
    words = [word.partition(":")[0] for code in inline(TEXTS[path]) for word in code.split()]
    words += [word for _, _, source in blocks(SHELLS) for word in source.split()]
    named = {word for word in words if FILE.fullmatch(word)}
    # A folder's files stand in its own row, without the folder.
    folders = [*FOLDERS, *(ROOT / "anpgpu" / word for word in named if word.endswith("/"))]
    missing = [word for word in sorted(named - WRITTEN) if not any((folder / word).exists() for folder in folders)]
    assert missing == []


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent.name for path in (ROOT / "anpgpu").glob("*/__init__.py") if path.parent.name != "kernels"),
)
def test_internals_lists_the_files_of_each_folder(folder):
    (row,) = re.findall(rf"^\| `{folder}/` \|.*$", TEXTS[ROOT / "docs" / "internals.md"], re.MULTILINE)
    assert set(re.findall(r"`(\w+\.py)`", row)) == {
        path.name for path in (ROOT / "anpgpu" / folder).glob("*.py") if path.name != "__init__.py"
    }


def test_tests_it_cites_exist():
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    cited = {code for text in TEXTS.values() for code in inline(text) if re.fullmatch(r"test_\w+", code)}
    assert cited
    assert cited <= defined, f"no such tests: {sorted(cited - defined)}"


def test_every_row_of_what_works_names_what_shows_it():
    page = ROOT / "docs" / "compatibility.md"
    (table,) = (table for table in tables_of(TEXTS[page]) if "test" in table.header)
    assert len(table.rows) > 15
    assert [row for row in table.rows if "`test_" not in row[-1]] == []


def exists(dotted):
    """Whether a dotted name of the package exists."""
    value = anpgpu
    for name in dotted.split(".")[1:]:
        if not hasattr(value, name) and importlib.util.find_spec(f"{value.__name__}.{name}"):
            importlib.import_module(f"{value.__name__}.{name}")
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def test_public_names_exist():
    named = {
        match[0]
        for text in TEXTS.values()
        for code in inline(text)
        if (match := re.match(r"anpgpu(?:\.[A-Za-z_]\w*)+", code))
    }
    assert named >= {"anpgpu.swap_", "anpgpu.diagnose"}
    assert [name for name in sorted(named) if not exists(name)] == []


# Figures.


@pytest.mark.parametrize("place", FIGURES, ids=lambda place: place.name)
def test_figures_are_those_of_the_result_files(place):
    assert differences(place.table, expected(place.table.comment)) == []


def test_every_table_of_figures_says_where_they_are_from():
    assert len(FIGURES) > 10
    unmarked = [place.name for place in TABLES if needs_a_comment(place.table)]
    assert unmarked == []


def needs_a_comment(table):
    marked = table.comment in {NO_FIGURES, PRINTED} or table.comment.startswith("figures:")
    return len(numbers(table)) >= MANY_NUMBERS and not marked


def test_figures_without_a_result_file_are_few():
    printed = [place.table for place in TABLES if place.table.comment == PRINTED]
    rows = [row for table in printed for row in table.rows]
    assert len(rows) <= PRINTED_ROWS
    # Each of these rows has the command that prints it.
    assert [row for row in rows if not CODE.fullmatch(row[-1])] == []


def test_every_function_of_figures_is_used():
    used = {docs_figures.CITED.fullmatch(place.table.comment)[1] for place in FIGURES}
    assert used == set(docs_figures.TABLES)


def test_result_files_of_figures_are_measurements():
    for place in FIGURES:
        for name in docs_figures.CITED.fullmatch(place.table.comment)[2].split(", "):
            assert name.startswith("profiling/results/") or name == "tests/compiled.json", place.name


def test_the_number_of_tests_run_on_a_gpu_is_the_result_files():
    ((passed, _),) = expected("figures: tests_h200 from profiling/results/tests-h200-2026-11-26.txt")
    assert re.findall(r"(\d+) tests of the kernels passed", TEXTS[README]) == [passed]


def with_cell(table, row, column, text):
    rows = [list(cells) for cells in table.rows]
    rows[row][column] = text
    return table._replace(rows=rows)


@pytest.mark.parametrize("place", FIGURES, ids=lambda place: place.name)
def test_a_wrong_digit_is_noticed(place):
    right = expected(place.table.comment)
    assert len(numbers(place.table)) >= 1
    for row, column in numbers(place.table):
        cell = place.table.rows[row][column]
        for digit in re.finditer(r"\d", cell):
            wrong = f"{cell[: digit.start()]}{(int(digit[0]) + 1) % 10}{cell[digit.end() :]}"
            noticed = differences(with_cell(place.table, row, column, wrong), right)
            assert len(noticed) == 1
            assert wrong in noticed[0]


def test_a_lost_row_or_cell_is_noticed():
    for place in FIGURES:
        right = expected(place.table.comment)
        assert differences(place.table._replace(rows=place.table.rows[:-1]), right)
        assert differences(place.table._replace(rows=[row[:-1] for row in place.table.rows]), right)


PLANTED = """
| | a | b |
|---|---|---|
| x | 1.2 | .3 |
| `y` | -4 | `5` |
"""


@pytest.mark.parametrize(
    ("comment", "noticed"),
    [
        ("", True),
        ("<!-- a remark -->", True),
        ("<!-- no figures -->", False),
        ("<!-- figures: a from b.json -->", False),
    ],
)
def test_a_table_of_figures_without_its_comment_is_noticed(comment, noticed):
    (table,) = tables_of(f"Text.\n\n{comment}\n{PLANTED}")
    assert numbers(table) == [(0, 1), (0, 2), (1, 1)]
    assert needs_a_comment(table) is noticed


@pytest.mark.parametrize(
    "comment", ["figures: nothing from profiling/results/study/study.json", "figures: scaling", "figures"]
)
def test_a_comment_that_names_no_function_or_file_raises(comment):
    with pytest.raises(ValueError, match=re.escape(repr(comment))):
        expected(comment)
