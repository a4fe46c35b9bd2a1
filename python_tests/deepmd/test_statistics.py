"""davg, dstd and the energies of the elements: a survey of the frames against what the real dp computes from them."""

import numpy as np
import pytest
import torch
from helpers import make_model, write_data

from rlekf_ext.potential.frames import FrameList
from rlekf_ext.potential.load import load_systems

pytestmark = pytest.mark.deepmd


def test_statistics_are_those_of_dp(dp, tmp_path):
    count, type_map = 20, ["Na", "Cl"]
    folder = write_data(tmp_path / "salt", count=count)
    dp({"type": "Adam"}, steps=1, batch_size=count, system=folder, model={"data_stat_nbatch": 1})
    saved = torch.load(dp.folder / "model.ckpt-1.pt", weights_only=True)["model"]
    frames = FrameList(load_systems(folder, type_map), 4.5, 2)
    frames.look(0.5)
    survey = frames.survey()
    model = make_model(type_map, [60, 60], 4.5, rcut_smth=0.5)
    model.descriptor.fit_statistics(survey.sums)
    found = {name.rsplit(".", 1)[-1]: value for name, value in saved.items() if hasattr(value, "shape")}
    for ours, theirs in ((model.descriptor.davg, found["mean"]), (model.descriptor.dstd, found["stddev"])):
        np.testing.assert_allclose(ours, theirs[:, 0], rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(theirs[:, 0], theirs[:, -1])
