"""Code in README and docs runs, and says the same as .ci/run."""

import re
import shlex
from pathlib import Path

import pytest

from moe_numba import cli
from moe_numba.families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """The code blocks of a page in one language, with the indentation of a list item removed."""
    fenced = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in fenced]


@pytest.fixture
def _families_as_before():
    """A page may add one."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.usefixtures("_families_as_before")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    if page.name == "transformers.md":
        pytest.importorskip("torch", reason="that page is for torch: pip install torch")
        pytest.importorskip("transformers", reason="pip install transformers, after torch")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


def test_ci_runs_the_test_command_of_the_readme():
    install, test = (block.strip() for block in blocks(ROOT / "README.md", "sh")[:2])
    assert install.endswith("moe-numba run")
    assert test.endswith("pytest")
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_command_line_in_the_pages_is_one_that_the_parser_takes():
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("moe-numba ")
    ]
    assert lines
    for line in lines:
        cli._parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_named_in_pages_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:moe_numba|tests|perf|docs)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_the_table_of_families_is_complete():
    table = (ROOT / "docs" / "checkpoints.md").read_text().partition("| family |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) - {"model_type"} == set(FAMILIES)
