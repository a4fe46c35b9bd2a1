"""Batches of several frames: on one process, against hand-written updates; on several, as on one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from oracles import relative
from spawn import spawn
from test_updates import E, F, Quadratic, V, by_hand, dense_of, flat, generator, in_order_of, make_frame, recipe

from rlekf_ext import RLEKF
from rlekf_ext.batch_parts import force_groups
from rlekf_ext.options import BATCHES
from rlekf_ext.updates import FrameUpdater

COUNTS = [(5,), (7, 2), (4,), (6,), (3, 3)]  # atoms of the structures of each frame


def side_by_side(frames):
    def joined(read):
        return torch.cat([read(frame) for frame in frames])

    return SimpleNamespace(
        features={kind: joined(lambda frame, kind=kind: frame.features[kind]) for kind in (E, F, V)},
        **{
            name: joined(lambda frame, name=name: getattr(frame, name))
            for name in ("num_atoms", "energy", "forces", "virial")
        },
    )


@pytest.mark.parametrize("batch", ["mean", "sum"])
@pytest.mark.parametrize("relinearize", [True, False])
def test_a_list_of_frames_is_these_frames_side_by_side(batch, relinearize):
    results = []
    for arrange in (list, side_by_side):
        torch.manual_seed(0)
        model = Quadratic()
        optimizer = RLEKF(model.parameters(), block_size=4)
        measurement = recipe(3, 4, (F, E, V), batch=batch, relinearize=relinearize, adaptive_scale=True)
        updater = FrameUpdater(model, optimizer, **measurement, seed=3)
        errors = []
        for step in range(4):
            frames = [make_frame(model, 10 * step + i, counts) for i, counts in enumerate(COUNTS)]
            errors += [error.item() for _, error in updater(arrange(frames))]
        results.append((flat(model), torch.tensor(errors)))
    assert relative(results[0][0], results[1][0]) < 1e-12
    assert relative(results[0][1], results[1][1]) < 1e-12


@pytest.mark.parametrize("relinearize", [True, False])
def test_joint_measures_each_frame_and_uses_all_at_one_w(relinearize):
    """Ten frames per update, more than one pass of the filter takes; each kind of update at the weights before it."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4)
    dense, weights = dense_of(optimizer, model)
    measurement = recipe(2, 2, (E, F), batch="joint", energy_scale=2.0, force_scale=0.5, relinearize=relinearize)
    updater = FrameUpdater(model, optimizer, **measurement, seed=1)
    source = generator(1)
    for step in range(3):
        frames = [make_frame(model, 10 * step + i, (5,)) for i in range(10)]
        before = Quadratic()
        before.load_state_dict(model.state_dict())
        first = int(torch.randint(2**62, (), generator=source))
        groups = [force_groups(5, 2, 2, generator(first + i)) for i in range(10)]
        found = updater(frames)
        place = 0
        jacobian, innovation = [], []
        for kind, number in ((E, 0), (F, 0), (E, 0), (F, 1)):
            scale = measurement[f"{kind}_scale"]
            for frame, own in zip(frames, groups, strict=True):
                error, h = by_hand(before, frame, kind, own[number] if kind == F else None)
                assert found[place][0] == kind
                assert found[place][1].item() == pytest.approx(error, rel=1e-11)
                place += 1
                jacobian.append(scale * in_order_of(optimizer, model, h))
                innovation.append(scale * error)
            if relinearize:
                dense.step(weights, torch.stack(jacobian), innovation)
                jacobian, innovation = [], []
                for p, part in zip(before.parameters(), weights.split([6, 3, 1]), strict=True):
                    p.data.copy_(part.view(p.shape))
        if not relinearize:
            dense.step(weights, torch.stack(jacobian), innovation)
        assert place == len(found)
        assert relative(in_order_of(optimizer, model, flat(model)), weights) < 1e-11
    assert optimizer.health()["num_updates"] == 3 * 4 * 10
    assert optimizer.filter.memory_factor == pytest.approx(dense.lam, rel=1e-14)


def test_joint_takes_as_many_groups_as_the_smallest_frame_has():
    model = Quadratic()
    updater = FrameUpdater(model, RLEKF(model.parameters()), **recipe(6, 4, (F,), batch="joint"))
    found = updater([make_frame(model, 0, (30,)), make_frame(model, 1, (8,))])
    assert len(found) == 2 * 2


def trained(frames_of_step, group=None):
    """Weights after four batches, of which this process has the frames that frames_of_step chooses."""
    kept = {}
    for batch in BATCHES:
        for order in ((F, E), (E, V, F)):
            torch.manual_seed(0)
            model = Quadratic()
            optimizer = RLEKF(model.parameters(), block_size=4, process_group=group)
            settings = {"adaptive_scale": True, "early_scale": 5.0, "balance": 0.1, "relinearize": order == (F, E)}
            measurement = recipe(3, 2, order, batch=batch, **settings)
            updater = FrameUpdater(model, optimizer, **measurement, seed=3, process_group=group)
            errors = []
            for step in range(4):
                frames = [make_frame(labeller(), 10 * step + i, counts) for i, counts in enumerate(COUNTS)]
                if step == 3:
                    frames = [*frames[:2], make_frame(labeller(), 99, (4,), virial=False)]  # on one rank of several
                errors += [error for _, error in updater(frames_of_step(frames))]
            kept[batch, order] = flat(model), torch.stack(errors)
    return kept


def labeller():
    torch.manual_seed(1)
    return Quadratic()


def as_on_one_process(rank, wanted):
    size = dist.get_world_size()
    first, last = (place * len(COUNTS) // size for place in (rank, rank + 1))
    found = trained(lambda frames: frames[first:last], dist.group.WORLD)
    for key, (weights, errors) in torch.load(wanted).items():
        assert relative(found[key][0], weights) < 1e-12, key
        assert relative(found[key][1], errors) < 1e-12, key
    everywhere = [torch.empty_like(found[key][0]) for _ in range(size)]
    dist.all_gather(everywhere, found[key][0])
    assert all(torch.equal(everywhere[0], one) for one in everywhere)


@pytest.mark.parametrize("size", [2, 3, pytest.param(8, marks=pytest.mark.soak)])
def test_frames_divided_over_processes_give_the_weights_of_one(size, tmp_path):
    """Eight processes have five frames: three of them have none."""
    torch.save(trained(list), tmp_path / "wanted")
    spawn(as_on_one_process, size, tmp_path / "wanted")
