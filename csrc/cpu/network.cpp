// The network on a table, on a CPU.
//
// Ideas, in order:
//   1. What depends on the weights alone comes first: the embedding nets at the nodes. Then atoms, in blocks that stay
//      in the second-level cache from the coefficients to the fitting net and back.
//   2. In the descriptor and the fitting net eight atoms (sixteen in float32) lie side by side in a vector; padding atoms
//      have no coefficients and no factor. So each of the small products of an atom is arithmetic on whole vectors.
//   3. A worker has whole blocks and adds into derivatives of its own, which are added up in a fixed order. So the bits
//      are the same on every run with the same number of workers.
//   4. A direction in which atoms move needs no second derivative: with what predict() saved, the derivative of a force
//      is one pass along it and one pass back.

#include "../network.h"

#include <algorithm>

#include "edges.h"
#include "lanes.h"
#include "layers.h"
#include "matrix.h"
#include "plan.h"

namespace rlekf::cpu {
namespace {

/// T (4, M) of U units: D = Tᵀ T_<, (M, M_<).
template <typename Scalar>
struct Moments {
  int64_t units, size, axis;  // M, M_<
  Panel<Scalar> t;
};

template <int kBytes, typename Scalar>
RLEKF_INLINE void describe(const Moments<Scalar>& m, Panel<Scalar> d) {
  using Values = Vector<Scalar, kBytes>;
  constexpr int64_t kW = kWidth<Scalar>;
  for (int64_t u = 0; u < m.units; ++u) {
    for (int64_t at = 0; at < kW; at += kLanes<Scalar, kBytes>) {
      const Scalar* t = m.t.data + u * m.t.stride + at;
      Scalar* to = d.data + u * d.stride + at;
      for (int64_t i = 0; i < m.size; ++i) {
        Values left[4];
        for (int c = 0; c < 4; ++c) left[c] = read<kBytes>(t + (c * m.size + i) * kW);
        for (int64_t j = 0; j < m.axis; ++j, to += kW) {
          Values total = left[0] * read<kBytes>(t + j * kW);
          for (int c = 1; c < 4; ++c) total += left[c] * read<kBytes>(t + (c * m.size + j) * kW);
          write<kBytes>(to, total);
        }
      }
    }
  }
}

template <int kBytes, typename Scalar>
RLEKF_INLINE void describe_along(const Moments<Scalar>& m, Panel<Scalar> t_dot, Panel<Scalar> d_dot) {
  using Values = Vector<Scalar, kBytes>;
  constexpr int64_t kW = kWidth<Scalar>;
  for (int64_t u = 0; u < m.units; ++u) {
    for (int64_t at = 0; at < kW; at += kLanes<Scalar, kBytes>) {
      const Scalar *t = m.t.data + u * m.t.stride + at, *dot = t_dot.data + u * t_dot.stride + at;
      Scalar* to = d_dot.data + u * d_dot.stride + at;
      for (int64_t i = 0; i < m.size; ++i) {
        Values left[4], left_dot[4];
        for (int c = 0; c < 4; ++c) {
          left[c] = read<kBytes>(t + (c * m.size + i) * kW);
          left_dot[c] = read<kBytes>(dot + (c * m.size + i) * kW);
        }
        for (int64_t j = 0; j < m.axis; ++j, to += kW) {
          Values total{};
          for (int c = 0; c < 4; ++c) {
            const int64_t right = (c * m.size + j) * kW;
            total += left_dot[c] * read<kBytes>(t + right) + left[c] * read<kBytes>(dot + right);
          }
          write<kBytes>(to, total);
        }
      }
    }
  }
}

/// t_bar (+)= the derivative by T of <d_bar, Tᵀ T_<>.
template <int kBytes, typename Scalar>
RLEKF_INLINE void describe_back(const Moments<Scalar>& m, Panel<Scalar> d_bar, Panel<Scalar> t_bar, bool accumulate) {
  using Values = Vector<Scalar, kBytes>;
  constexpr int64_t kW = kWidth<Scalar>;
  for (int64_t u = 0; u < m.units; ++u) {
    if (!accumulate) std::fill_n(t_bar.data + u * t_bar.stride, 4 * m.size * kW, Scalar{});
    for (int64_t at = 0; at < kW; at += kLanes<Scalar, kBytes>) {
      const Scalar *t = m.t.data + u * m.t.stride + at, *bar = d_bar.data + u * d_bar.stride + at;
      Scalar* to = t_bar.data + u * t_bar.stride + at;
      for (int64_t i = 0; i < m.size; ++i) {
        Values left[4], total[4];
        for (int c = 0; c < 4; ++c) {
          left[c] = read<kBytes>(t + (c * m.size + i) * kW);
          total[c] = Values{};
        }
        for (int64_t j = 0; j < m.axis; ++j, bar += kW) {
          const Values factor = read<kBytes>(bar);
          for (int c = 0; c < 4; ++c) {
            const int64_t right = (c * m.size + j) * kW;
            total[c] += factor * read<kBytes>(t + right);
            write<kBytes>(to + right, read<kBytes>(to + right) + factor * left[c]);
          }
        }
        for (int c = 0; c < 4; ++c) {
          Scalar* own = to + (c * m.size + i) * kW;
          write<kBytes>(own, read<kBytes>(own) + total[c]);
        }
      }
    }
  }
}

/// For `units` units of rows: panel (groups x numbers, kWidth) from flat rows, kWidth x groups of a unit, with numbers
/// `pitch` apart; or the other way.
template <bool kToPanel, typename Scalar>
RLEKF_INLINE void exchange(int64_t units, int64_t groups, int64_t numbers, Panel<Scalar> panel, Scalar* flat,
                           int64_t pitch) {
  constexpr int64_t kW = kWidth<Scalar>;
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t g = 0; g < groups; ++g) {
      Scalar* rows = panel.data + u * panel.stride + g * numbers * kW;
      Scalar* first = flat + (u * kW * groups + g) * pitch;
      for (int64_t n = 0; n < numbers; ++n) {
        for (int64_t lane = 0; lane < kW; ++lane) {
          Scalar& one = rows[n * kW + lane];
          Scalar& other = first[lane * groups * pitch + n];
          if (kToPanel) one = other;
          else other = one;
        }
      }
    }
  }
}

template <typename Scalar>
void to_panel(int64_t units, int64_t groups, int64_t numbers, Panel<Scalar> panel, Scalar* flat, int64_t pitch) {
  on_widest([&]<int>() RLEKF_INLINED { exchange<true>(units, groups, numbers, panel, flat, pitch); });
}

template <typename Scalar>
void from_panel(int64_t units, int64_t groups, int64_t numbers, Panel<Scalar> panel, Scalar* flat, int64_t pitch) {
  on_widest([&]<int>() RLEKF_INLINED { exchange<false>(units, groups, numbers, panel, flat, pitch); });
}

/// flat (atoms, 4, pitch) = C values, and as a panel.
template <typename Scalar>
void moments_of(const Plan<Scalar>& plan, const AtomBlock& block, const std::vector<Run>& runs,
                const Scalar* coefficients, const Scalar* values, Scalar* flat, Panel<Scalar> t) {
  constexpr int64_t kW = kWidth<Scalar>;
  for (const Run& run : runs) {
    multiply(Product<Scalar>{4 * block.atoms, run.end - run.begin, plan.pitch / kW, coefficients + run.begin,
                             plan.num_columns, 1, values + (block.element * plan.num_columns + run.begin) * plan.pitch,
                             plan.pitch, kW, flat, plan.pitch, kW, nullptr, run.begin != runs[0].begin});
  }
  std::fill(flat + 4 * block.atoms * plan.pitch, flat + 4 * block.units * kW * plan.pitch, Scalar{});
  to_panel(block.units, 4, plan.num_values, t, flat, plan.pitch);
}

template <typename Scalar>
void predict_nodes(const Plan<Scalar>& plan, const NodeBlock& block, Scalar* saved) {
  constexpr int64_t kW = kWidth<Scalar>;
  const int64_t center = block.pair / plan.num_types, neighbor = block.pair % plan.num_types;
  const Normalization<Scalar>& normal = plan.network.normalization;
  const Panel<Scalar> record = plan.nodes(saved, block.pair, block.unit);
  const double per_node = normal.last / static_cast<double>(plan.frame.num_nodes - 1);
  const double mean = normal.davg[4 * center], deviation = normal.dstd[4 * center];
  for (int64_t u = 0; u < block.units; ++u) {
    for (int64_t lane = 0; lane < kW; ++lane) {
      const double s = static_cast<double>((block.unit + u) * kW + lane) * per_node;
      record.data[u * record.stride + lane] = static_cast<Scalar>((s - mean) / deviation);
    }
  }
  const Panel<Scalar> y{record.data + plan.node_y, record.stride};
  forward(plan.network.embedding(center, neighbor), block.units, traces_of(plan.node_places, record, record), y);
  Scalar* to = saved + plan.values + plan.row(block) * plan.pitch;
  std::fill_n(to, block.units * kW * plan.pitch, Scalar{});
  from_panel(block.units, 1, plan.num_values, y, to, plan.pitch);
}

template <typename Scalar>
void predict_atoms(const Plan<Scalar>& plan, const AtomBlock& block, const Desk<Scalar>& desk,
                   const Prediction<Scalar>& result, Scalar* by_edges) {
  constexpr int64_t kW = kWidth<Scalar>;
  const Net<Scalar>& net = plan.network.fittings[static_cast<size_t>(block.element)];
  const Panel<Scalar> record = plan.atoms_from(result.saved, block.unit);
  const int64_t size = 4 * plan.num_columns;
  const std::vector<Run> runs = runs_of(plan, block);
  moments_of(plan, block, runs, plan.frame.coefficients + block.atom * size, result.saved + plan.values, desk.flat,
             record);
  const Moments<Scalar> moments{block.units, plan.num_values, plan.network.axis, record};
  on_widest([&]<int kBytes>() RLEKF_INLINED { describe<kBytes>(moments, desk.d); });
  const Traces<Scalar> traces = traces_of(plan.atom_places, record, desk.d);
  forward(net, block.units, traces, desk.y);
  for (int64_t i = 0; i < block.atoms; ++i) {
    result.energies[plan.frame.order[block.atom + i]] = desk.y.data[i / kW * desk.y.stride + i % kW];
  }
  if (!plan.forces) return;
  const Panel<Scalar> y_bar = traces.back().y_bar;
  for (int64_t i = 0; i < block.units * kW; ++i) y_bar.data[i / kW * y_bar.stride + i % kW] = i < block.atoms ? 1 : 0;
  const Panel<Scalar> d_bar{record.data + plan.atom_d_bar, record.stride};
  backward(net, block.units, traces, d_bar);
  on_widest([&]<int kBytes>() RLEKF_INLINED { describe_back<kBytes>(moments, d_bar, desk.t_bar, false); });
  from_panel(block.units, 4, plan.num_values, desk.t_bar, desk.flat, plan.pitch);
  std::copy_n(desk.flat, 4 * block.atoms * plan.pitch, result.saved + plan.t_bar + 4 * block.atom * plan.pitch);
  for (const Run& run : runs) {
    const int64_t t = run.begin / plan.frame.num_nodes, unit = run.begin % plan.frame.num_nodes / kW;
    const Panel<Scalar> nodes = plan.nodes(result.saved, block.element * plan.num_types + t, unit);
    multiply(Product<Scalar>{4 * block.atoms, plan.num_values, (run.end - run.begin) / kW, desk.flat, plan.pitch, 1,
                             nodes.data + plan.node_y, kW, nodes.stride, desk.columns + run.begin, plan.num_columns,
                             kW});
  }
  by_edge(plan.frame, row_scale(plan.network.normalization, plan.frame, block.element), block.atom,
          block.atom + block.atoms, {desk.columns, by_edges + 3 * plan.frame.first_edge[block.atom]});
}

/// Forces of the sorted atoms [begin, end), and what their edges add to the virials.
template <typename Scalar>
void add_edges(const Geometry<Scalar>& frame, const Scalar* by_edges, int64_t begin, int64_t end, Scalar* forces,
               Scalar* virials) {
  for (int64_t atom = begin; atom < end; ++atom) {
    const int64_t own = frame.order[atom];
    double total[3] = {}, virial[9] = {};
    for (int64_t e = frame.first_edge[atom]; e < frame.first_edge[atom + 1]; ++e) {
      for (int a = 0; a < 3; ++a) total[a] += static_cast<double>(by_edges[3 * e + a]);
      if (!virials) continue;
      const Edge<Scalar>& edge = frame.edges[e];
      for (int i = 0; i < 9; ++i) {
        const double along = static_cast<double>(edge.length) * static_cast<double>(edge.direction[i / 3]);
        virial[i] -= along * static_cast<double>(by_edges[3 * e + i % 3]);
      }
    }
    for (int64_t i = frame.first_incoming[own]; i < frame.first_incoming[own + 1]; ++i) {
      for (int a = 0; a < 3; ++a) total[a] -= static_cast<double>(by_edges[3 * frame.incoming[i] + a]);
    }
    for (int a = 0; a < 3; ++a) forces[3 * own + a] = static_cast<Scalar>(total[a]);
    for (int i = 0; virials && i < 9; ++i) virials[9 * frame.structure[own] + i] += static_cast<Scalar>(virial[i]);
  }
}

template <typename Scalar>
void gradients_of_atoms(const Plan<Scalar>& plan, const AtomBlock& block, const Desk<Scalar>& desk, Scalar* saved,
                        const Factors<Scalar>& factors) {
  constexpr int64_t kW = kWidth<Scalar>;
  const Net<Scalar>& net = plan.network.fittings[static_cast<size_t>(block.element)];
  const Panel<Scalar> record = plan.atoms_from(saved, block.unit);
  const int64_t size = 4 * plan.num_columns, rows = 4 * block.atoms;
  const bool is_along = factors.forces != nullptr;
  const Moments<Scalar> moments{block.units, plan.num_values, plan.network.axis, record};
  const Moments<Scalar> moved{block.units, plan.num_values, plan.network.axis, desk.t_dot};
  Traces<Scalar> traces = traces_of(plan.atom_places, record, desk.d);
  const std::vector<Run> runs = runs_of(plan, block);
  on_widest([&]<int kBytes>() RLEKF_INLINED { describe<kBytes>(moments, desk.d); });
  if (is_along) {
    for (int64_t row = 0; row < rows; ++row) {
      for (const Run& run : runs) {
        std::fill(desk.columns + row * plan.num_columns + run.begin, desk.columns + row * plan.num_columns + run.end,
                  Scalar{});
      }
    }
    along(plan.frame, row_scale(plan.network.normalization, plan.frame, block.element), block.atom,
          block.atom + block.atoms, factors, desk.columns);
    moments_of(plan, block, runs, desk.columns, saved + plan.values, desk.flat, desk.t_dot);
    on_widest([&]<int kBytes>() RLEKF_INLINED { describe_along<kBytes>(moments, desk.t_dot, desk.d_dot); });
    for (size_t l = 0; l < net.size(); ++l) {
      traces[l].x_dot = desk.x_dot[l];
      traces[l].z_dot = desk.z_dot[l];
    }
    forward_along(net, block.units, traces);
  }
  for (int64_t i = 0; i < block.units * kW; ++i) {
    desk.y.data[i / kW * desk.y.stride + i % kW] =
        i < block.atoms ? factors.energies[plan.frame.order[block.atom + i]] : 0;
  }
  reverse(net, block.units, traces, is_along, desk.y, desk.d_bar, desk.fitting_bar + block.element * desk.by_fitting,
          desk.net_scratch);
  const Panel<Scalar> d_bar_of_sum{record.data + plan.atom_d_bar, record.stride};
  on_widest([&]<int kBytes>() RLEKF_INLINED {
    describe_back<kBytes>(moments, desk.d_bar, desk.t_bar, false);
    if (is_along) describe_back<kBytes>(moved, d_bar_of_sum, desk.t_bar, true);
  });
  from_panel(block.units, 4, plan.num_values, desk.t_bar, desk.flat, plan.pitch);
  Scalar* to = desk.node_values_bar + block.element * plan.num_columns * plan.pitch;
  for (const Run& run : runs) {
    Product<Scalar> product{run.end - run.begin,
                            rows,
                            plan.pitch / kW,
                            plan.frame.coefficients + block.atom * size + run.begin,
                            1,
                            plan.num_columns,
                            desk.flat,
                            plan.pitch,
                            kW,
                            to + run.begin * plan.pitch,
                            plan.pitch,
                            kW,
                            nullptr,
                            true};
    multiply(product);
    if (!is_along) continue;
    product.a = desk.columns + run.begin;
    product.b = saved + plan.t_bar + 4 * block.atom * plan.pitch;
    multiply(product);
  }
}

template <typename Scalar>
void gradients_of_nodes(const Plan<Scalar>& plan, const NodeBlock& block, const Desk<Scalar>& desk,
                        const std::vector<Desk<Scalar>>& desks, Scalar* saved) {
  constexpr int64_t kW = kWidth<Scalar>;
  const int64_t center = block.pair / plan.num_types, neighbor = block.pair % plan.num_types;
  const int64_t first = plan.row(block) * plan.pitch, count = block.units * kW * plan.pitch;
  Scalar* total = desk.flat;
  std::copy_n(desks[0].node_values_bar + first, count, total);
  for (size_t other = 1; other < desks.size(); ++other) {
    const Scalar* part = desks[other].node_values_bar + first;
    for (int64_t i = 0; i < count; ++i) total[i] += part[i];
  }
  to_panel(block.units, 1, plan.num_values, desk.y, total, plan.pitch);
  const Panel<Scalar> record = plan.nodes(saved, block.pair, block.unit);
  const Net<Scalar>& net = plan.network.embedding(center, neighbor);
  const int64_t number = &net - plan.network.embeddings.data();
  reverse(net, block.units, traces_of(plan.node_places, record, record), false, desk.y, {},
          desk.embedding_bar + number * desk.by_embedding, desk.net_scratch);
}

}  // namespace

template <typename Scalar>
int64_t saved_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, bool forces) {
  return Plan<Scalar>(network, geometry, forces).saved_size;
}

template <typename Scalar>
int64_t scratch_size(const Network<Scalar>& network, const Geometry<Scalar>& geometry, int64_t num_workers) {
  const Plan<Scalar> plan(network, geometry, true);
  return num_workers * (Desk<Scalar>(plan, nullptr).size + padded<Scalar>(9 * geometry.num_structures)) +
         padded<Scalar>(3 * geometry.num_edges);
}

template <typename Scalar>
void predict(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Prediction<Scalar>& result,
             Scalar* scratch, const Parallel& parallel) {
  const Plan<Scalar> plan(network, geometry, result.forces != nullptr);
  const int64_t num_workers = parallel.num_workers;
  const std::vector<Desk<Scalar>> desks = desks_of(plan, scratch, num_workers);
  Scalar* by_edges = scratch + num_workers * desks[0].size;
  Scalar* virials = by_edges + padded<Scalar>(3 * geometry.num_edges);
  const std::vector<NodeBlock> blocks = node_blocks_of(plan);
  parallel.run(static_cast<int64_t>(blocks.size()),
               [&](int64_t i) { predict_nodes(plan, blocks[static_cast<size_t>(i)], result.saved); });
  parallel.run(num_workers, [&](int64_t w) {
    over_atoms(plan, w, num_workers, [&](const AtomBlock& block) {
      predict_atoms(plan, block, desks[static_cast<size_t>(w)], result, by_edges);
    });
  });
  if (!plan.forces) return;
  const int64_t size = 9 * geometry.num_structures;
  parallel.run(num_workers, [&](int64_t w) {
    Scalar* own = result.virials ? virials + w * padded<Scalar>(size) : nullptr;
    if (own) std::fill_n(own, size, Scalar{});
    add_edges(geometry, by_edges, w * geometry.num_atoms / num_workers, (w + 1) * geometry.num_atoms / num_workers,
              result.forces, own);
  });
  for (int64_t i = 0; result.virials && i < size; ++i) {
    result.virials[i] = 0;
    for (int64_t w = 0; w < num_workers; ++w) result.virials[i] += virials[w * padded<Scalar>(size) + i];
  }
}

template <typename Scalar>
void gradients(const Network<Scalar>& network, const Geometry<Scalar>& geometry, const Scalar* saved,
               const Factors<Scalar>& factors, Scalar* gradient, Scalar* scratch, const Parallel& parallel) {
  const Plan<Scalar> plan(network, geometry, factors.forces != nullptr);
  const std::vector<NodeBlock> blocks = node_blocks_of(plan);
  const int64_t num_workers = parallel.num_workers, num_blocks = static_cast<int64_t>(blocks.size());
  const std::vector<Desk<Scalar>> desks = desks_of(plan, scratch, num_workers);
  Scalar* kept = const_cast<Scalar*>(saved);  // panels have no const
  parallel.run(num_workers, [&](int64_t w) {
    const Desk<Scalar>& desk = desks[static_cast<size_t>(w)];
    desk.clear(plan, blocks);
    over_atoms(plan, w, num_workers,
               [&](const AtomBlock& block) { gradients_of_atoms(plan, block, desk, kept, factors); });
  });
  parallel.run(num_workers, [&](int64_t w) {
    for (int64_t i = w * num_blocks / num_workers; i < (w + 1) * num_blocks / num_workers; ++i) {
      gradients_of_nodes(plan, blocks[static_cast<size_t>(i)], desks[static_cast<size_t>(w)], desks, kept);
    }
  });
  const auto num_embeddings = static_cast<int64_t>(network.embeddings.size());
  const int64_t num_nets = num_embeddings + plan.num_types;
  parallel.run(num_workers, [&](int64_t w) {
    for (int64_t i = 0; i < num_nets; ++i) {
      const bool embedding = i < num_embeddings;
      const int64_t own = embedding ? i : i - num_embeddings;
      const auto& nets = embedding ? network.embeddings : network.fittings;
      const Scalar* first = embedding ? desks[0].embedding_bar + own * desks[0].by_embedding
                                      : desks[0].fitting_bar + own * desks[0].by_fitting;
      collect(nets[static_cast<size_t>(own)], first, num_workers, desks[0].size, w, num_workers, gradient);
    }
  });
}

#define RLEKF_INSTANTIATE(Scalar)                                                                                 \
  template int64_t saved_size(const Network<Scalar>&, const Geometry<Scalar>&, bool);                             \
  template int64_t scratch_size(const Network<Scalar>&, const Geometry<Scalar>&, int64_t);                        \
  template void predict(const Network<Scalar>&, const Geometry<Scalar>&, const Prediction<Scalar>&, Scalar*,      \
                        const Parallel&);                                                                         \
  template void gradients(const Network<Scalar>&, const Geometry<Scalar>&, const Scalar*, const Factors<Scalar>&, \
                          Scalar*, Scalar*, const Parallel&);
RLEKF_INSTANTIATE(double)
RLEKF_INSTANTIATE(float)

}  // namespace rlekf::cpu
