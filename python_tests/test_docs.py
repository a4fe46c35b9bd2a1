"""What the documents name exists: data sets, tables that scripts write, files and sections that links lead to, public
names. Their Python runs, their JSON is read, and their commands have the arguments that they show."""

import importlib.util
import inspect
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import bench_data
import plot_online
import plot_race
import plot_scaling
import plot_step
import plot_study
import pytest
import torch.distributed as dist
import torch.distributed.nn  # before a group is made: docs/scaling.md
from ase.build import bulk
from helpers import NACL, RCUT, make_model, write_data
from rows import PLACE
from torch.distributed.run import parse_args

import rlekf_ext
from rlekf_ext import RLEKF, FrameUpdater, cli
from rlekf_ext.integrations import lkf
from rlekf_ext.potential import Calculator
from rlekf_ext.potential.checkpoint import save_checkpoint
from rlekf_ext.potential.data import frames
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.load import load_systems

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
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
    assert len(described()) == 22


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=name_of)
def test_every_data_set_is_described(path):
    assert set(SET.findall(path.read_text())) <= described()


def test_every_table_has_its_script():
    marked = [place["name"] for page in PAGES for place in PLACE.finditer(page.read_text())]
    assert sorted(marked) == sorted(
        name
        for script in (plot_study, plot_scaling, plot_step, plot_race, plot_online, bench_data)
        for name in script.TABLES
    )


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        # no folders: the site shows none
        assert link.startswith("http") or target.is_file(), f"{page.name} links {link}, which is not a file here"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}, a section that is not there"


def test_the_site_has_every_page():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(map(name_of, PAGES))


def test_the_citation_is_of_this_version():
    versions = [
        re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1]
        for file, pattern in (("pyproject.toml", r'^version = "(.*)"$'), ("CITATION.cff", r"^version: (.*)$"))
    ]
    assert versions[0] == versions[1]


# Public names


PUBLIC = {
    **{f"rlekf_ext.{name}": getattr(rlekf_ext, name) for name in rlekf_ext.__all__},
    "rlekf_ext.potential.Calculator": Calculator,
    **{
        f"{lkf.__name__}.{name}": value
        for name, value in vars(lkf).items()
        if getattr(value, "__module__", "") == lkf.__name__ and not name.startswith("_")
    },
}


def test_api_page_lists_the_public_names():
    listed = re.findall(r"^\| `([\w.]+)`", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if callable(value)])
def test_public_names_have_docstrings(name):
    value = PUBLIC[name]
    members = vars(value) if inspect.isclass(value) else {}
    own = {
        f"{name}.{member}": found
        for member, found in members.items()
        if (member == "__call__" or not member.startswith("_"))
        and (inspect.isroutine(found) or isinstance(found, property))
    }
    assert not [each for each, found in {name: value, **own}.items() if not inspect.getdoc(found)]


# Code blocks


class Block(NamedTuple):
    language: str  # "" for an indented block
    line: int
    text: str

    @property
    def first_word(self):
        return self.text.split(maxsplit=1)[0]


CODE = re.compile(r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)", re.MULTILINE | re.DOTALL)
# Indented blocks that are not commands, by their first word: formulas, and a list of files.
NOT_COMMANDS = {
    ("docs/algorithm.md", "K_l"),
    ("docs/algorithm.md", "P"),
    ("docs/algorithm.md", "if"),
    ("docs/performance.md", "T"),
    ("CONTRIBUTING.md", "setup.py,"),
}
# What the text around a Python block says that the reader has, by page and number of the block.
READER_HAS = {
    ("docs/updates.md", 4): {"model", "frames"},
    ("docs/reliability.md", 1): {"optimizer"},
    ("docs/online.md", 1): {"model", "saved"},
    ("docs/online.md", 2): {"atoms"},
    ("docs/scaling.md", 1): {"model", "group"},
    ("docs/uncertainty.md", 1): {"optimizer", "jacobian"},
}
UNCHECKED = {
    "dp": "is in an environment of its own; `make test-deepmd` runs it",
    "git": "clones a repository without a name",
    ".": "enters an environment",
}


def blocks(page, *languages):
    text, found = page.read_text(), []
    for code in CODE.finditer(text):
        before = text[: code.start()]
        in_a_list = code[3] and before.rstrip().splitlines()[-1].startswith(("- ", "  "))
        if not in_a_list:
            found.append(Block(code[1] or "", before.count("\n") + 1, code[2] or textwrap.dedent(code[3])))
    return [block for block in found if not languages or block.language in languages]


def pages_with(language):
    return pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, language)], ids=name_of)


def commands(page):
    """The words of each command, and the folder that it runs in: those of blocks and, of some tools, in sentences."""
    shell = [b.text for b in blocks(page, "", "bash") if (name_of(page), b.first_word) not in NOT_COMMANDS]
    inline = re.findall(r"`((?:make|pip|python3?) [^`]+)`", CODE.sub("", page.read_text()))
    for text in [*(text.replace("\\\n", " ") for text in shell), *(text.replace("\n", " ") for text in inline)]:
        folder = page.parent if page.parent.parent == ROOT / "examples" else ROOT
        for command in text.replace(" && ", "\n").splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["cd"]:
                folder = folder / words[1]
                assert folder.is_dir(), command
            elif words:
                yield words, folder


def test_lists_of_blocks_hold_nothing_old():
    every = {name_of(page): page for page in PAGES}
    indented = {(name, block.first_word) for name, page in every.items() for block in blocks(page, "")}
    assert indented >= NOT_COMMANDS
    for (name, number), names in READER_HAS.items():
        text = blocks(every[name], "python")[number - 1].text
        assert all(re.search(rf"\b{each}\b", text) for each in names), name
    used = {words[0] for page in PAGES for words, _ in commands(page)}
    assert used >= UNCHECKED.keys()


def test_blocks_are_recognised(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A:\n\n```python\nfor i in j:\n\n    k\n```\n\n    make\n\n    make\n\n- list\n\n    | table |\n")
    assert blocks(page) == [Block("python", 3, "for i in j:\n\n    k\n"), Block("", 9, "make\n\nmake\n")]
    assert {block.language for page in PAGES for block in blocks(page)} <= {"", "bash", "json", "python"}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What a reader may have: a model of energies and forces, frames, an optimizer, H, a process group, atoms of ASE,
    and the checkpoint of a network that is trained."""
    monkeypatch.chdir(tmp_path)
    systems = load_systems([write_data(tmp_path / "data", count=2)], ("Na", "Cl"))
    labelled = frames(systems, RCUT, 2, torch.float64)
    model = make_model(("Na", "Cl"), rcut=RCUT, frames=labelled)
    trained = {"filter": RLEKF(model.named_parameters(), transpose=True).state_dict()}
    save_checkpoint(tmp_path / "model.ckpt.pt", model, optimizer=trained)
    optimizer = RLEKF(model.parameters())
    jacobian = torch.ones(optimizer.filter.plan.num_weights)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "model": model,
        "frames": labelled,
        "optimizer": optimizer,
        "jacobian": jacobian,
        "group": dist.group.WORLD,
        "saved": {"optimizer": RLEKF(model.parameters()).state_dict(), "updater": FrameUpdater(model).state_dict()},
        "atoms": bulk("NaCl", "rocksalt", 5.6, cubic=True),
    }
    dist.destroy_process_group()


@pages_with("python")
def test_python_runs(page, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        names |= {name: reader[name] for name in READER_HAS.get((name_of(page), number), ())}
        exec(compile("\n" * block.line + block.text, page, "exec"), names)


@pages_with("json")
def test_json_is_an_input_or_a_part_of_one(page):
    whole = json.loads((NACL.parent / "rlekf.json").read_text())
    for block in blocks(page, "json"):
        text = block.text.strip().rstrip(",")
        read_input({**whole, **json.loads(text if text.startswith("{") else f"{{{text}}}")})


def check_rlekf(arguments, folder):
    assert cli.main(arguments) == 0
    if arguments[0] == "train" and arguments[1] != "input.json":  # which is the reader's
        read_input(folder / arguments[1])


def check_torchrun(arguments, folder):
    parsed = parse_args(arguments)
    if parsed.module:
        assert parsed.training_script == "rlekf_ext"
        check_rlekf(parsed.training_script_args, folder)
    else:
        assert parsed.training_script in UNCHECKED


def check_make(arguments, _):
    makefile = (ROOT / "Makefile").read_text()
    known = re.findall(r"^([\w-]+):", makefile, re.MULTILINE) + re.findall(r"\$\((?:or \$\()?([A-Z]+)\b", makefile)
    assert {argument.partition("=")[0] for argument in arguments} <= set(known)


def check_python(arguments, folder):
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    scripts = [argument for argument in arguments if argument.endswith(".py")]
    assert all((folder / script).is_file() for script in scripts)
    if arguments[0] in scripts:
        text = (folder / arguments[0]).read_text()
        asked = [argument for argument in arguments if argument.startswith("-")]
        assert all(re.search(rf"""["']{option}["']""", text) for option in asked)


def check_pip(arguments, _):
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for asked in re.findall(r"\.\[(.*)\]", " ".join(arguments)):
        assert set(asked.split(",")) <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


CHECKS = {
    "rlekf": check_rlekf,
    "torchrun": check_torchrun,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    ".venv/bin/python": check_python,
    ".venv-deepmd/bin/python": check_python,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page, monkeypatch):
    for name in [name for name in vars(cli) if name.startswith("run_")]:
        monkeypatch.setattr(cli, name, lambda _: 0)
    for words, folder in commands(page):
        assert words[0] in CHECKS or words[0] in UNCHECKED, f"Not a command that this test knows: {words}"
        if words[0] in CHECKS:
            CHECKS[words[0]](words[1:], folder)
