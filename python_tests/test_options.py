"""The table of options, and what is made from it; the options of each call in the input file are in potential/."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import rlekf_ext
from rlekf_ext import RLEKF, FrameUpdater, KalmanFilter, options
from rlekf_ext.errors import InputError, OptionError
from rlekf_ext.options import PRESETS, FilterOptions, OptimizerOptions, Options, resolve
from rlekf_ext.potential import input as input_file
from rlekf_ext.schema import option, range_text, read

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("cls", "section"), [(KalmanFilter, FilterOptions), (RLEKF, OptimizerOptions), (FrameUpdater, Options)]
)
def test_help_shows_every_option_with_its_default(cls, section):
    keywords = inspect.signature(cls).parameters
    for f in fields(section):
        assert keywords[f.name].default == f.default
        assert keywords[f.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"    {f.name} = {f.default!r}: {f.metadata['help']}" in cls.__doc__
    assert "options" not in keywords


def test_every_option_has_help_and_presets_name_options_alone():
    for f in fields(Options):
        assert f.metadata["help"].endswith("."), f.name
    for name in PRESETS:
        assert resolve({"preset": name}).preset == name


def test_defaults_are_those_of_the_paper_and_a_preset_is_what_it_changes():
    assert resolve({"preset": "paper"}) == Options(preset="paper")
    robust = resolve({})
    changed = {f.name for f in fields(Options) if getattr(robust, f.name) != f.default}
    assert changed == set(PRESETS["robust"])
    assert resolve({"memory_factor": 0.9}).memory_factor == 0.9


def test_pages_are_up_to_date():
    for name, page in (("options", options.page), ("input", input_file.page)):
        assert (ROOT / f"docs/{name}.md").read_text() == page(), "run `make docs`"


def test_dtypes_may_be_torchs():
    for given in (torch.float32, "float32"):
        assert KalmanFilter(rlekf_ext.BlockPlan((3,)), covariance_dtype=given).options.covariance_dtype == "float32"
    with pytest.raises(OptionError, match='covariance_dtype = "float16" is not supported'):
        RLEKF([torch.nn.Parameter(torch.ones(3))], covariance_dtype=torch.float16)


def test_a_misspelt_keyword_is_named_with_the_nearest_one():
    with pytest.raises(OptionError, match="blocksize is not a known option; did you mean block_size"):
        RLEKF([torch.nn.Parameter(torch.ones(3))], blocksize=3)
    with pytest.raises(InputError, match="num_groups is not a known option; known options are"):
        RLEKF([torch.nn.Parameter(torch.ones(3))], num_groups=3)  # FrameUpdater's


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    found = resolve({"block_size": numpy.int64(7), "memory_factor": numpy.float32(0.5)})
    assert (found.block_size, found.memory_factor) == (7, 0.5)
    assert type(found.block_size) is int
    assert type(found.memory_factor) is float
    with pytest.raises(OptionError, match="block_size must be a whole number but is: true"):
        resolve({"block_size": True})


def test_ranges_in_words():
    assert range_text(option(1, above=0, high=2).metadata) == "> 0 and <= 2"
    assert range_text(option("a", choices=("a", "b")).metadata) == "a, b"
    assert range_text(option(True).metadata) == ""
    assert read(FilterOptions, {}) == FilterOptions()
