"""Fixtures for all test files."""

import os
from pathlib import Path

# Threads that spin for work make a test ten times slower on cores that other processes use too. Read by torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

collect_ignore = ["deepmd"]  # needs deepmd-kit; runs if named on pytest's command line

# Without a GPU, the triton kernels run in Triton's interpreter, which is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_data():
    """The folder of DFT data sets next to a development checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the data sets of the developers in {SHARED / 'data'}")
    return SHARED / "data"
