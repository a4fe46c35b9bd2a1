"""Imports run downwards only, and optional packages stay in their own file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rlekf_ext"
# Highest first: a module imports only what is on a line below its own, or on its own line.
ORDER = [
    ["rlekf_ext.__main__"],
    ["rlekf_ext.cli"],
    ["rlekf_ext.integrations", "rlekf_ext.potential"],
    ["rlekf_ext"],
    ["rlekf_ext.stepper", "rlekf_ext.updates"],
    ["rlekf_ext.optim", "rlekf_ext.batch_parts", "rlekf_ext.graphs"],
    ["rlekf_ext.filter"],
    ["rlekf_ext.sharding", "rlekf_ext.ops"],
    ["rlekf_ext.covariance", "rlekf_ext.diagnostics", "rlekf_ext.processes"],
    ["rlekf_ext.packing", "rlekf_ext.options", "rlekf_ext.environment"],
    ["rlekf_ext.partition", "rlekf_ext.schema"],
    ["rlekf_ext.errors", "rlekf_ext.prior", "rlekf_ext._C"],
]
OPTIONAL = {
    "dpdata": {"potential/load_dpdata.py"},
    "lmdb": {"potential/load_lmdb.py"},
    "msgpack": {"potential/load_lmdb.py"},
    "matplotlib": {"potential/plot.py"},
    "h5py": {"potential/deepmd_format.py", "potential/stores.py"},
    "ase": {"potential/calculator.py"},
    "tqdm": {"potential/train.py", "potential/batches.py", "potential/evaluate.py", "potential/select.py"},
    "triton": {"ops/triton.py"},
    "deepmd": {"integrations/deepmd/patch.py"},
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def line(name):
    """The line of ORDER that has the longest listed prefix of a dotted name."""
    places = {listed: place for place, names in enumerate(ORDER) for listed in names}
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in places:
            return places[".".join(parts[:end])]
    raise AssertionError(f"{name} is missing in ORDER")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    own = line(".".join(part for part in relative.parts if part != "__init__"))
    for name in imports(path):
        if name.startswith("rlekf_ext"):
            assert line(name) >= own, f"{path.name} imports {name}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_stay_in_their_own_file(path):
    for name in imports(path):
        owners = OPTIONAL.get(name.partition(".")[0])
        assert owners is None or path.relative_to(PACKAGE).as_posix() in owners, (
            f"{path} imports {name}; only {owners} should"
        )


def test_runtime_core_is_torch_and_numpy():
    """Importing the package loads no optional one (tqdm is left out: torch loads it itself if it is installed)."""
    unwanted = (set(OPTIONAL) | {"scipy"}) - {"tqdm"}
    code = f"import sys, rlekf_ext; sys.exit(sorted({unwanted} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
