"""Pictures: that they are written, and that they show what the files say."""

import json

import numpy as np
import pytest

from rlekf_ext.errors import InputError, RlekfError
from rlekf_ext.potential.evaluate import Comparison

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'rlekf_ext[plot]'")

import matplotlib.image

from rlekf_ext.potential import plot
from rlekf_ext.potential.plot import plot_epochs, plot_lcurve, plot_parity, read_curve

OURS = """\
#  step    rmse_val    rmse_trn  rmse_e_val  rmse_e_trn  rmse_f_val  rmse_f_trn       lr
      1    6.60e+00    5.82e+00    7.95e-02    7.83e-02    2.09e-01    1.84e-01  1.0e+00
    100    7.94e-01    6.67e-01    9.84e-02    1.32e-01    2.50e-02    2.08e-02  1.0e+00
"""
# of `dp --pt train`
DEEPMD = """\
# step         rmse_val    rmse_trn    rmse_e_val  rmse_e_trn    rmse_f_val  rmse_f_trn   lr
# If there is no available reference data, rmse_*_{val,trn} will print nan
      1      6.60e+00    5.82e+00      7.95e-02    7.83e-02      2.09e-01    1.84e-01    1.0e-03
    100      7.94e-01    6.67e-01      9.84e-02    1.32e-01      2.50e-02    2.08e-02    1.0e-03
"""
# the same without validation_data, and without energy labels
NO_VALIDATION = """\
# step         rmse_trn    rmse_e_trn    rmse_f_trn   lr
# If there is no available reference data, rmse_*_{val,trn} will print nan
      1      5.82e+00           nan      1.84e-01    1.0e-03
    100      6.67e-01           nan      2.08e-02    1.0e-03
"""
EPOCHS = [
    {"epoch": 1.0, "updates": 8, "seconds": 0.5, "energy_rmse": 3e-3, "force_rmse": 0.17},
    {"epoch": 2.0, "updates": 16, "seconds": 1.25, "energy_rmse": 1e-3, "force_rmse": 0.12},
]


@pytest.fixture
def shown(monkeypatch):
    """The figure of the last picture, before it is closed."""
    figures = []
    save = plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, output: figures.append(figure) or save(figure, output))
    return figures


def check_picture(path, figure):
    """A PNG of some size with more than its background and axes in it."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[::4, ::4].reshape(-1, pixels.shape[2]), axis=0)) > 20
    assert not plot.plt.fignum_exists(figure.number)  # closed: a hundred pictures do not fill the memory


def lines_of(figure):
    return [{line.get_label(): line.get_xydata() for line in axes.lines} for axes in figure.axes]


@pytest.mark.parametrize("text", [OURS, DEEPMD])
def test_lcurve(tmp_path, shown, text):
    (tmp_path / "lcurve.out").write_text(text)
    path = plot_lcurve(tmp_path / "lcurve.out", tmp_path / "curve.png")
    assert path == tmp_path / "curve.png"
    check_picture(path, shown[0])
    energy, force = lines_of(shown[0])
    np.testing.assert_allclose(energy["held out"], [[1, 79.5], [100, 98.4]])  # meV/atom
    np.testing.assert_allclose(energy["training batch"], [[1, 78.3], [100, 132]])
    np.testing.assert_allclose(force["held out"], [[1, 209], [100, 25]])
    np.testing.assert_allclose(force["training batch"], [[1, 184], [100, 20.8]])


def test_lcurve_without_validation_and_without_energies(tmp_path, shown):
    (tmp_path / "lcurve.out").write_text(NO_VALIDATION)
    check_picture(plot_lcurve(tmp_path / "lcurve.out", tmp_path / "curve.png"), shown[0])
    (force,) = lines_of(shown[0])
    assert list(force) == ["training batch"]
    np.testing.assert_allclose(force["training batch"][:, 1], [184, 20.8])


def test_lcurve_cut_off_by_a_kill(tmp_path, shown):
    (tmp_path / "lcurve.out").write_text(OURS[:-3])
    plot_lcurve(tmp_path / "lcurve.out", tmp_path / "curve.png")
    assert len(lines_of(shown[0])[0]["held out"]) == len(OURS.splitlines()) - 2


def test_lcurve_with_virials(tmp_path, shown):
    (tmp_path / "lcurve.out").write_text("# step rmse_e_trn rmse_f_trn rmse_v_trn lr\n 1 1e-3 2e-3 3e-3 1\n")
    plot_lcurve(tmp_path / "lcurve.out", tmp_path / "curve.png")
    assert [axes.get_ylabel() for axes in shown[0].axes][2] == "virial RMSE (meV/atom)"
    np.testing.assert_allclose(lines_of(shown[0])[2]["training batch"], [[1, 3]])


def test_lcurve_of_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "lcurve.out").write_text(OURS.splitlines()[0] + "\n")
    assert plot_lcurve(tmp_path / "lcurve.out", tmp_path / "curve.png").stat().st_size > 0


def test_epochs_of_the_trainers_json(tmp_path, shown):
    (tmp_path / "lcurve.json").write_text(json.dumps({"epochs": EPOCHS}))
    plot_lcurve(tmp_path / "lcurve.json", tmp_path / "curve.png")
    np.testing.assert_allclose(lines_of(shown[0])[0]["held out"][:, 1], [3, 1])
    assert shown[0].axes[0].get_xlabel() == "epoch"


def test_read_curve_of_the_trainers_json(tmp_path):
    file = tmp_path / "lcurve.json"
    file.write_text(json.dumps({"step": 2, "epochs": EPOCHS}))
    curve = read_curve(file)
    assert list(curve) == list(EPOCHS[0])
    np.testing.assert_array_equal(curve["energy_rmse"], [3e-3, 1e-3])
    file.write_text(json.dumps({"step": 0, "epochs": []}))
    assert read_curve(file) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.out", "", "is not an lcurve.out"),
        ("text.out", "Dear diary,\ntoday\n", "is not an lcurve.out"),
        ("cut.out", OURS.replace("7.95e-02", ""), "is not an lcurve.out"),
        ("total.out", "# step rmse_trn lr\n 1 2 4\n", "has no columns step and rmse_e_trn or rmse_f_trn"),
        ("input.json", json.dumps({"model": {}}), "has no columns step"),
        ("words.out", OURS.replace("7.95e-02", "seven"), "is not an lcurve.out"),
        ("broken.json", "{", "is not JSON: "),
        ("list.json", "[1]", "is not an lcurve.out"),
        ("rows.json", json.dumps({"epochs": [{"step": 1}, {"epoch": 2}]}), "is not an lcurve.out"),
        ("strings.json", json.dumps({"epochs": [{"step": "one"}]}), "is not an lcurve.out"),
    ],
)
def test_files_that_are_no_learning_curve(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} {message}"):
        plot_lcurve(tmp_path / name, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_files_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "lcurve.out").write_text(OURS)
    with pytest.raises(InputError, match=r"none\.out cannot be read: No such file or directory\."):
        plot_lcurve(tmp_path / "none.out", tmp_path / "curve.png")
    (tmp_path / "binary.out").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"binary\.out is not text in UTF-8: byte 0\."):
        plot_lcurve(tmp_path / "binary.out", tmp_path / "curve.png")
    with pytest.raises(InputError, match=r"lcurve\.out/curve\.png cannot be written: .*lcurve\.out: "):
        plot_lcurve(tmp_path / "lcurve.out", tmp_path / "lcurve.out" / "curve.png")
    for name in ("curve", "curve.xyz"):
        with pytest.raises(InputError, match=rf"must end in one of .*\.png.* but is: .*{name}\."):
            plot_lcurve(tmp_path / "lcurve.out", tmp_path / name)
    assert not plot.plt.get_fignums()


def test_a_fault_of_our_own_is_not_the_users(tmp_path, monkeypatch):
    (tmp_path / "lcurve.out").write_text(OURS)
    monkeypatch.setattr(plot, "_panels", lambda *_: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip") as caught:
        plot_lcurve(tmp_path / "lcurve.out", tmp_path / "curve.png")
    assert not isinstance(caught.value, RlekfError)


def test_epochs_of_several_runs(tmp_path, shown):
    slower = [{**row, "seconds": 3 * row["seconds"]} for row in EPOCHS]
    check_picture(plot_epochs({"RLEKF": EPOCHS, "Adam": slower}, tmp_path / "epochs.png"), shown[0])
    energy, force = lines_of(shown[0])
    np.testing.assert_allclose(energy["RLEKF"], [[0.5, 3], [1.25, 1]])
    np.testing.assert_allclose(force["Adam"], [[1.5, 170], [3.75, 120]])
    assert shown[0].axes[0].get_xlabel() == "training time (s)"
    plot_epochs({"RLEKF": EPOCHS}, tmp_path / "updates.png", against="updates")
    np.testing.assert_allclose(lines_of(shown[1])[0]["RLEKF"][:, 0], [8, 16])


def test_parity(tmp_path, shown):
    random = np.random.default_rng(0)
    energy, force, virial = (random.normal(size=(n, 1)) for n in (20, 60, 9))
    comparison = Comparison(
        np.hstack([energy, energy + 0.002]), np.hstack([force, force - 0.03]), np.hstack([virial, virial + 0.1])
    )
    check_picture(plot_parity({"model": comparison}, tmp_path / "parity.png"), shown[0])
    left, right, last = shown[0].axes
    points = left.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], 1e3 * (energy[:, 0] - energy.mean()), atol=1e-9)
    np.testing.assert_allclose(points[:, 1] - points[:, 0], 2, atol=1e-9)  # meV/atom above the diagonal
    np.testing.assert_array_equal(right.collections[0].get_offsets(), comparison.force)
    assert left.get_legend().texts[0].get_text() == "model: 2 meV/atom"
    assert right.get_legend().texts[0].get_text() == "model: 30 meV/Å"
    np.testing.assert_array_equal(last.collections[0].get_offsets(), comparison.virial)
    assert last.get_legend().texts[0].get_text() == "model: 100 meV/atom"
    energies = Comparison(comparison.energy, np.empty((0, 2)), np.empty((0, 2)))
    plot_parity({"model": energies}, tmp_path / "energies.png")
    assert [axes.get_xlabel() for axes in shown[1].axes] == ["DFT energy − DFT mean (meV/atom)"]
