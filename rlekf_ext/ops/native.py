"""The compiled ops, torch.ops.rlekf: csrc/ops.cpp has the schemas and checks, csrc/cpu and csrc/cuda the kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rlekf_ext import _C
from rlekf_ext.covariance import Covariance

torch.ops.load_library(Path(__file__).parent.parent / "librlekf_ops.so")
OPS = torch.ops.rlekf
HAS_KERNELS = {key: torch._C._dispatch_has_kernel_for_dispatch_key("rlekf::step", key) for key in ("CPU", "CUDA")}

LEAST_CAPABILITY = 8, 0  # asynchronous copies


def why_absent(device_type: str) -> str:
    """Why there are no kernels for this kind of device, as a sentence; "" if there are."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return f"none are written for {device_type}."
    if not HAS_KERNELS[key]:
        return "this build found no nvcc; put one on PATH and reinstall rlekf_ext."
    if key == "CUDA" and not torch.cuda.is_available():
        built = f"torch {torch.__version__}"
        return f"{built} finds no GPU." if torch.version.cuda else f"{built} is built without CUDA."
    if key == "CUDA":
        built, capability = _C.build_info()["cuda_architectures"], torch.cuda.get_device_capability()
        if not covers(built, capability):
            way_out = (
                "reinstall rlekf_ext with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native"
                if capability >= LEAST_CAPABILITY
                else "its kernels need 8.0"
            )
            found = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
            return f"this build has code for {built}, but {found}; {way_out}."
    return ""


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for CMake's CUDA architectures, such as "80-real 90", runs on a GPU of this compute capability:
    machine code on those of the same major version, portable code (all but "-real") on later ones, too."""
    own = 10 * capability[0] + capability[1]
    for entry in architectures.split():
        number, _, kind = entry.partition("-")
        if not number.isdigit():  # native, all, ...: only the driver knows
            return True
        same = int(number) // 10 == capability[0] and int(number) <= own
        if (same and kind != "virtual") or (kind != "real" and int(number) <= own):
            return True
    return False


def project(p: Covariance, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    cross, gram = torch.ops.rlekf.project(p.tiles, p.pending, p.state, p.layout, jacobian)
    increment_version([p.tiles, p.pending, p.state])
    return cross, gram


def multiply_tiles(p: Covariance, jacobian: Tensor) -> Tensor:
    z = torch.ops.rlekf.multiply_tiles(p.tiles, p.pending, p.state, p.layout, jacobian)
    increment_version(p.tiles)
    return z


def finish_projection(p: Covariance, z: Tensor, jacobian: Tensor) -> Tensor:
    gram = torch.ops.rlekf.finish_projection(z, p.pending, p.state, p.layout, jacobian)
    increment_version([z, p.state])
    return gram


def correct(p: Covariance, weights: Tensor, cross: Tensor, gram: Tensor, jacobian: Tensor, innovation: Tensor) -> None:
    torch.ops.rlekf.correct(weights, p.pending, p.state, p.layout, cross, gram, jacobian, innovation)
    increment_version([weights, p.pending, p.state])


def step(p: Covariance, weights: Tensor, jacobian: Tensor, innovation: Tensor) -> None:
    torch.ops.rlekf.step(weights, p.tiles, p.pending, p.state, p.layout, jacobian, innovation)
    increment_version([weights, p.tiles, p.pending, p.state])


@torch.library.register_fake("rlekf::project")
def _(tiles, pending, state, layout, jacobian):
    count = jacobian.shape[0]
    return torch.empty_like(jacobian), jacobian.new_empty(2, layout.shape[0], count, count)


@torch.library.register_fake("rlekf::multiply_tiles")
def _(tiles, pending, state, layout, jacobian):
    return torch.empty_like(jacobian)


@torch.library.register_fake("rlekf::finish_projection")
def _(z, pending, state, layout, jacobian):
    count = jacobian.shape[0]
    return jacobian.new_empty(2, layout.shape[0], count, count)


@torch.library.register_fake("rlekf::correct")
def _(weights, pending, state, layout, cross, gram, jacobian, innovation):
    return None


@torch.library.register_fake("rlekf::step")
def _(weights, tiles, pending, state, layout, jacobian, innovation):
    return None


@torch.library.register_fake("rlekf::tabulate")
def _(edges, neighbors, types, slots, normal, sel, num_nodes, rcut, rcut_smth, last):
    num_atoms, num_types = types.shape[0], len(sel)
    num_edges = torch.library.get_ctx().new_dynamic_size()
    sizes = [(num_atoms,), (num_types + 1,), (num_atoms + 1,), (num_edges, 8), (num_edges,), (num_atoms + 1,)]
    sizes += [(num_edges,), (num_atoms, 4, num_types, num_nodes)]
    return [(edges if len(size) in (2, 4) else types).new_empty(size) for size in sizes]


@torch.library.register_fake("rlekf::predict")
def _(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures, forces, virials):
    like, saved = geometry[-2], torch.library.get_ctx().new_dynamic_size()
    num_atoms = like.shape[0]
    shapes = (num_atoms,), (num_atoms * forces, 3), (num_structures * (forces and virials), 3, 3), (saved,)
    return tuple(like.new_empty(shape) for shape in shapes)


@torch.library.register_fake("rlekf::gradients")
def _(parameters, geometry, normal, sel, last, sizes, timesteps, saved, by_energies, by_forces, by_virials):
    return saved.new_empty(by_energies.shape[0], sum(p.numel() for p in parameters))


@torch.library.register_fake("rlekf::measure")
def _(parameters, geometry, normal, sel, last, sizes, timesteps, bias, *labels_and_updates):
    count = len(labels_and_updates[-1])
    return bias.new_empty(count), bias.new_empty(count, sum(p.numel() for p in parameters))


@torch.library.register_fake("rlekf::find_pairs")
def _(points, cell, cutoff):
    count = torch.library.get_ctx().new_dynamic_size()
    pairs = points.new_empty(count, 2, dtype=torch.int64)
    return pairs, points.new_empty(count, 3), pairs.new_empty(())


@torch.library.register_fake("rlekf::survey")
def _(points, cells, types, num_types, cutoff, smooth):
    num_frames = points.shape[0]
    slots, sums = types.new_empty(num_frames, num_types), points.new_empty(num_frames, num_types, 3)
    return slots, points.new_empty(num_frames), sums


@torch.library.register_fake("rlekf::place_neighbors")
def _(pairs, vectors, types, num_types, cutoff):
    num_atoms, num_slots = types.shape[0], torch.library.get_ctx().new_dynamic_size()
    edges, neighbors = vectors.new_empty(num_atoms, num_slots, 3), types.new_empty(num_atoms, num_slots)
    return edges, neighbors, types.new_empty(num_types), vectors.new_empty(())
