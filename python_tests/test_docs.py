"""What the documents name exists: data sets, tables that scripts write, files and sections that links lead to."""

import re
from pathlib import Path

import plot_scaling
import plot_step
import plot_study
import pytest
from rows import PLACE

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.toml"))]
SET = re.compile(r"\b(?:[A-Z][a-z]?\d*)+/[a-z]\w*_\w+")  # Element/name, as Cu/pwmlff_aimd_72


def name_of(page):
    return str(page.relative_to(ROOT))


def described():
    """The sets in the first column of the table of docs/data.md."""
    lines = (ROOT / "docs/data.md").read_text().splitlines()
    return {name for line in lines if line.startswith("| `") for name in SET.findall(line.split("|")[1])}


def test_sets_are_recognised():
    text = '"Cu/pwmlff_aimd_72", `MgAlCu/gpaw_pbe_8`; H2O/deepmd_water_192 E/atom results/study.csv Linux/x86_64'
    assert SET.findall(text) == ["Cu/pwmlff_aimd_72", "MgAlCu/gpaw_pbe_8", "H2O/deepmd_water_192"]
    assert len(described()) == 16


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=name_of)
def test_every_data_set_is_described(path):
    assert set(SET.findall(path.read_text())) <= described()


def test_every_table_has_its_script():
    marked = [place["name"] for page in PAGES for place in PLACE.finditer(page.read_text())]
    assert sorted(marked) == sorted(name for script in (plot_study, plot_scaling, plot_step) for name in script.TABLES)


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert link.startswith("http") or target.exists(), f"{page.name} links {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}, a section that is not there"


def test_the_citation_is_of_this_version():
    versions = [
        re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1]
        for file, pattern in (("pyproject.toml", r'^version = "(.*)"$'), ("CITATION.cff", r"^version: (.*)$"))
    ]
    assert versions[0] == versions[1]
