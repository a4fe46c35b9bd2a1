// How the work on a network and a frame is divided, and where its numbers are.
//
//     unit      kWidth rows (atoms of one element, or nodes of a net) that lie side by side in vectors
//     panel     numbers of some units, as in layers.h; flat: a row after another, `pitch` numbers apart
//     record    all that predict() saves of a unit; Places says what is where in it
//     Plan      sizes, and where the records are in the saved memory
//     block     a few units, of atoms (AtomBlock) or of nodes (NodeBlock), that are worked on at once
//     Run       neighbouring columns of the coefficients (n, 4, T K)
//     Desk      the memory of one worker

#pragma once

#include <algorithm>
#include <vector>

#include "../network.h"
#include "layers.h"
#include "matrix.h"

namespace rlekf::cpu {

constexpr int64_t kRowsAtOnce = 32;  // of a block

template <typename Scalar>
constexpr int64_t kUnitsAtOnce = kRowsAtOnce / kWidth<Scalar>;

/// The places, in the record of a unit, of what is saved of a net.
struct Places {
  std::vector<int64_t> x, h, y_bar, z_bar;
};

template <typename Scalar>
Places places_of(const Net<Scalar>& net, bool with_bars, int64_t& used) {
  const auto take = [&](int64_t numbers) {
    const int64_t place = used;
    used += numbers * kWidth<Scalar>;
    return place;
  };
  Places places;
  for (size_t l = 0; l < net.size(); ++l) {
    places.x.push_back(l > 0 ? take(net[l].inputs) : -1);  // that of the first layer is kept by the caller
    places.h.push_back(take(net[l].outputs));
    places.y_bar.push_back(with_bars ? take(net[l].outputs) : -1);
    places.z_bar.push_back(with_bars ? take(net[l].outputs) : -1);
  }
  return places;
}

template <typename Scalar>
Traces<Scalar> traces_of(const Places& places, Panel<Scalar> record, Panel<Scalar> x) {
  const auto at = [&](int64_t place) {
    return place < 0 ? Panel<Scalar>{} : Panel<Scalar>{record.data + place, record.stride};
  };
  Traces<Scalar> traces(places.h.size());
  for (size_t l = 0; l < traces.size(); ++l) {
    traces[l].x = l > 0 ? at(places.x[l]) : x;
    traces[l].h = at(places.h[l]);
    traces[l].y_bar = at(places.y_bar[l]);
    traces[l].z_bar = at(places.z_bar[l]);
  }
  return traces;
}

/// The nodes of the net of one pair of elements, a few units at once.
struct NodeBlock {
  int64_t pair, unit, units;
};

/// Sizes of a network and a frame, and where predict() saves what.
template <typename Scalar>
struct Plan {
  static constexpr int64_t kW = kWidth<Scalar>;

  Plan(const Network<Scalar>& net, const Geometry<Scalar>& geometry, bool with_forces)
      : network(net),
        frame(geometry),
        forces(with_forces),
        num_types(geometry.num_types),
        num_values(net.num_values()),
        pitch(padded<Scalar>(num_values)),
        num_columns(num_types * geometry.num_nodes),
        num_outputs(num_values * net.axis),
        node_units(geometry.num_nodes / kW) {
    for (int64_t t = 0; t < num_types; ++t) {
      first_unit.push_back(num_units);
      num_units += (geometry.first_atom[t + 1] - geometry.first_atom[t] + kW - 1) / kW;
    }
    first_unit.push_back(num_units);
    node_record = kW;  // x comes first
    node_places = places_of(net.embeddings[0], false, node_record);
    node_y = node_record;
    node_record += num_values * kW;
    atom_record = 4 * num_values * kW;
    atom_places = places_of(net.fittings[0], forces, atom_record);
    atom_d_bar = atom_record;
    if (forces) atom_record += num_outputs * kW;
    Arena<Scalar> arena{nullptr};
    arena.take(num_types * num_types * node_units * node_record);
    values = arena.used;
    arena.take(num_types * num_columns * pitch);
    atoms = arena.used;
    arena.take(num_units * atom_record);
    t_bar = arena.used;
    if (forces) arena.take(geometry.num_atoms * 4 * pitch);
    saved_size = arena.used;
  }

  Panel<Scalar> nodes(Scalar* saved, int64_t pair, int64_t unit) const {
    return {saved + (pair * node_units + unit) * node_record, node_record};
  }
  /// Of a block in (T, T K, pitch).
  int64_t row(const NodeBlock& block) const {
    return block.pair / num_types * num_columns + block.pair % num_types * frame.num_nodes + block.unit * kW;
  }
  Panel<Scalar> atoms_from(Scalar* saved, int64_t unit) const {
    return {saved + atoms + unit * atom_record, atom_record};
  }

  const Network<Scalar>& network;
  const Geometry<Scalar>& frame;
  bool forces;
  int64_t num_types, num_values, pitch, num_columns, num_outputs, node_units;
  int64_t num_units = 0;
  std::vector<int64_t> first_unit;  // of each element
  int64_t node_y, node_record, atom_d_bar, atom_record;
  Places node_places, atom_places;
  int64_t values, atoms, t_bar, saved_size;
};

/// Calls mark(column) for the columns that are not zero for all of the sorted atoms [begin, end), of one element: those of
/// their stencils, by both ends, and the first node of each net, for the empty slots.
template <typename Scalar, typename Mark>
void mark_columns(const Geometry<Scalar>& frame, int64_t begin, int64_t end, const Mark& mark) {
  if (begin == end) return;
  for (int64_t t = 0; t < frame.num_types; ++t) mark(t * frame.num_nodes);
  for (int64_t e = frame.first_edge[begin]; e < frame.first_edge[end]; ++e) {
    const auto place = static_cast<int64_t>(frame.edges[e].place);
    mark(place);
    mark(place + kStencil - 1);
  }
}

/// The nodes that the frame needs.
template <typename Scalar>
std::vector<NodeBlock> node_blocks_of(const Plan<Scalar>& plan) {
  constexpr int64_t kUnits = kUnitsAtOnce<Scalar>;
  const Geometry<Scalar>& frame = plan.frame;
  const int64_t per_net = (plan.node_units + kUnits - 1) / kUnits;
  std::vector<bool> used(static_cast<size_t>(plan.num_types * plan.num_types * per_net));
  for (int64_t center = 0; center < plan.num_types; ++center) {
    mark_columns(frame, frame.first_atom[center], frame.first_atom[center + 1], [&](int64_t column) {
      const int64_t pair = center * plan.num_types + column / frame.num_nodes, node = column % frame.num_nodes;
      used[static_cast<size_t>(pair * per_net + node / (kUnits * plan.kW))] = true;
    });
  }
  std::vector<NodeBlock> blocks;
  for (int64_t i = 0; i < static_cast<int64_t>(used.size()); ++i) {
    const int64_t unit = i % per_net * kUnits;
    if (used[static_cast<size_t>(i)]) blocks.push_back({i / per_net, unit, std::min(kUnits, plan.node_units - unit)});
  }
  return blocks;
}

/// Some units of atoms of one element.
struct AtomBlock {
  int64_t element, unit, units, atom, atoms;
};

/// Calls function(block) for the share of the atoms that a worker has.
template <typename Scalar, typename Function>
void over_atoms(const Plan<Scalar>& plan, int64_t worker, int64_t num_workers, const Function& function) {
  const int64_t begin = worker * plan.num_units / num_workers, end = (worker + 1) * plan.num_units / num_workers;
  for (int64_t t = 0; t < plan.num_types; ++t) {
    const auto at = static_cast<size_t>(t);
    int64_t unit = std::max(begin, plan.first_unit[at]);
    const int64_t last = std::min(end, plan.first_unit[at + 1]), count = last - unit;
    if (count <= 0) continue;
    const int64_t blocks = (count + kUnitsAtOnce<Scalar> - 1) / kUnitsAtOnce<Scalar>;
    const int64_t step = (count + blocks - 1) / blocks;
    for (; unit < last; unit += step) {
      const int64_t units = std::min(step, last - unit);
      const int64_t atom = plan.frame.first_atom[t] + (unit - plan.first_unit[at]) * kWidth<Scalar>;
      function(AtomBlock{t, unit, units, atom, std::min(units * kWidth<Scalar>, plan.frame.first_atom[t + 1] - atom)});
    }
  }
}

/// What a worker needs beside what is saved.
template <typename Scalar>
struct Desk {
  Desk(const Plan<Scalar>& plan, Scalar* start) {
    constexpr int64_t kW = kWidth<Scalar>;
    const int64_t units = kUnitsAtOnce<Scalar>, rows = units * kW;
    const Net<Scalar>& net = plan.network.fittings[0];
    Arena<Scalar> arena{start};
    const auto panel = [&](int64_t numbers) { return Panel<Scalar>{arena.take(units * numbers * kW), numbers * kW}; };
    flat = arena.take(rows * 4 * plan.pitch);
    columns = arena.take(rows * 4 * plan.num_columns);
    d = panel(plan.num_outputs);
    d_dot = panel(plan.num_outputs);
    d_bar = panel(plan.num_outputs);
    t_bar = panel(4 * plan.num_values);
    t_dot = panel(4 * plan.num_values);
    y = panel(std::max(widest(net), widest(plan.network.embeddings[0])));
    for (size_t l = 0; l < net.size(); ++l) {
      x_dot.push_back(l > 0 ? panel(net[l].inputs) : d_dot);
      z_dot.push_back(panel(net[l].outputs));
    }
    net_scratch = arena.take(std::max(reverse_scratch(net, units), reverse_scratch(plan.network.embeddings[0], units)));
    node_values_bar = arena.take(plan.num_types * plan.num_columns * plan.pitch);
    by_embedding = padded_size(plan.network.embeddings[0]);
    by_fitting = padded_size(net);
    embedding_bar = arena.take(static_cast<int64_t>(plan.network.embeddings.size()) * by_embedding);
    fitting_bar = arena.take(plan.num_types * by_fitting);
    nets_size = arena.used - (embedding_bar - start);
    size = arena.used;
  }

  /// The sums of a pass start at zero, those of the nodes in these blocks.
  void clear(const Plan<Scalar>& plan, const std::vector<NodeBlock>& blocks) const {
    constexpr int64_t kW = kWidth<Scalar>;
    for (const NodeBlock& block : blocks) {
      std::fill_n(node_values_bar + plan.row(block) * plan.pitch, block.units * kW * plan.pitch, Scalar{});
    }
    std::fill_n(embedding_bar, nets_size, Scalar{});
  }

  Scalar *flat, *columns;  // (atoms, 4, pitch), (atoms, 4, T, K)
  Panel<Scalar> d, d_dot, d_bar, t_bar, t_dot, y;
  std::vector<Panel<Scalar>> x_dot, z_dot;
  Scalar* net_scratch;
  Scalar *node_values_bar, *embedding_bar, *fitting_bar;  // sums: (T, T K, pitch), padded gradients
  int64_t by_embedding, by_fitting, nets_size, size;
};

/// Some columns of the coefficients, all of one net.
struct Run {
  int64_t begin, end;
};

/// The columns that are not zero for all atoms of a block.
template <typename Scalar>
std::vector<Run> runs_of(const Plan<Scalar>& plan, const AtomBlock& block) {
  const Geometry<Scalar>& frame = plan.frame;
  std::vector<bool> used(static_cast<size_t>(plan.num_columns / kNodesAtOnce));
  mark_columns(frame, block.atom, block.atom + block.atoms,
               [&](int64_t column) { used[static_cast<size_t>(column / kNodesAtOnce)] = true; });
  std::vector<Run> runs;
  for (int64_t column = 0; column < plan.num_columns; column += kNodesAtOnce) {
    if (!used[static_cast<size_t>(column / kNodesAtOnce)]) continue;
    const bool first_of_net = column % frame.num_nodes == 0;
    if (!runs.empty() && runs.back().end == column && !first_of_net) runs.back().end += kNodesAtOnce;
    else runs.push_back({column, column + kNodesAtOnce});
  }
  return runs;
}

template <typename Scalar>
std::vector<Desk<Scalar>> desks_of(const Plan<Scalar>& plan, Scalar* scratch, int64_t num_workers) {
  std::vector<Desk<Scalar>> desks;
  for (int64_t w = 0; w < num_workers; ++w) {
    desks.emplace_back(plan, scratch);
    scratch += desks.back().size;
  }
  return desks;
}

}  // namespace rlekf::cpu
