#include "layers.h"

#include <algorithm>

#include "lanes.h"

namespace rlekf::cpu {
namespace {

/// What the loops over single numbers of a layer need: `rows` numbers in each of `units` units.
template <typename Scalar>
struct Pointwise {
  int64_t units, rows, inputs, copies;
  const Scalar* timestep;  // or null
  Panel<Scalar> h, x, y;   // y may be without data
};

/// Calls function(at) for every vector of a row of kWidth numbers; `at` is where it starts.
template <int kBytes, typename Scalar, typename Function>
RLEKF_INLINE void over_vectors(const Function& function) {
#pragma GCC unroll 4
  for (int64_t at = 0; at < kWidth<Scalar>; at += kLanes<Scalar, kBytes>) function(at);
}

/// The row of x, of the unit, that a shortcut adds to this row of y; null without one.
template <typename Scalar>
RLEKF_INLINE const Scalar* shortcut(const Pointwise<Scalar>& p, int64_t unit, int64_t row) {
  return p.copies ? p.x.data + unit * p.x.stride + (row % p.inputs) * kWidth<Scalar> : nullptr;
}

/// y = h idt + shortcut.
template <int kBytes, typename Scalar>
RLEKF_INLINE void finish_rows(const Pointwise<Scalar>& p) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const Scalar *h = p.h.data + u * p.h.stride + r * kWidth<Scalar>, *x = shortcut(p, u, r);
      Scalar* y = p.y.data + u * p.y.stride + r * kWidth<Scalar>;
      over_vectors<kBytes, Scalar>([&](int64_t at) RLEKF_INLINED {
        Vector<Scalar, kBytes> value = read<kBytes>(h + at);
        if (p.timestep) value *= p.timestep[r];
        write<kBytes>(y + at, x ? value + read<kBytes>(x + at) : value);
      });
    }
  }
}

/// y_dot = z_dot (1 - h²) idt + shortcut, with x and y standing for x_dot and y_dot.
template <int kBytes, typename Scalar>
RLEKF_INLINE void finish_rows_along(const Pointwise<Scalar>& p, Panel<Scalar> z_dot, bool hidden) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const Scalar *h_row = p.h.data + u * p.h.stride + r * kWidth<Scalar>, *x = shortcut(p, u, r);
      const Scalar* z_row = z_dot.data + u * z_dot.stride + r * kWidth<Scalar>;
      Scalar* y = p.y.data + u * p.y.stride + r * kWidth<Scalar>;
      over_vectors<kBytes, Scalar>([&](int64_t at) RLEKF_INLINED {
        Vector<Scalar, kBytes> dot = read<kBytes>(z_row + at);
        const Vector<Scalar, kBytes> h = read<kBytes>(h_row + at);
        if (hidden) dot *= 1 - h * h;
        if (p.timestep) dot *= p.timestep[r];
        write<kBytes>(y + at, x ? dot + read<kBytes>(x + at) : dot);
      });
    }
  }
}

/// z_bar = y_bar idt (1 - h²), with y standing for y_bar; along, also - 2 h z_dot z_bar of the sum of outputs.
template <int kBytes, typename Scalar>
RLEKF_INLINE void start_rows_back(const Pointwise<Scalar>& p, bool hidden, Panel<Scalar> z_bar, Panel<Scalar> z_dot,
                                  Panel<Scalar> z_bar_of_sum) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t r = 0; r < p.rows; ++r) {
      over_vectors<kBytes, Scalar>([&](int64_t first) RLEKF_INLINED {
        const int64_t at = r * kWidth<Scalar> + first;
        Vector<Scalar, kBytes> bar = read<kBytes>(p.y.data + u * p.y.stride + at);
        const Vector<Scalar, kBytes> h = read<kBytes>(p.h.data + u * p.h.stride + at);
        if (p.timestep) bar *= p.timestep[r];
        if (hidden) {
          bar *= 1 - h * h;
          if (z_dot.data) {
            bar -= 2 * h * read<kBytes>(z_dot.data + u * z_dot.stride + at) *
                   read<kBytes>(z_bar_of_sum.data + u * z_bar_of_sum.stride + at);
          }
        }
        write<kBytes>(z_bar.data + u * z_bar.stride + at, bar);
      });
    }
  }
}

/// x_bar = the shortcut's part of it, from y_bar, which y stands for.
template <int kBytes, typename Scalar>
RLEKF_INLINE void shortcut_back(const Pointwise<Scalar>& p, Panel<Scalar> x_bar) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t i = 0; i < p.inputs; ++i) {
      over_vectors<kBytes, Scalar>([&](int64_t at) RLEKF_INLINED {
        Vector<Scalar, kBytes> bar{};
        for (int64_t copy = 0; copy < p.copies; ++copy) {
          bar += read<kBytes>(p.y.data + u * p.y.stride + (copy * p.inputs + i) * kWidth<Scalar> + at);
        }
        write<kBytes>(x_bar.data + u * x_bar.stride + i * kWidth<Scalar> + at, bar);
      });
    }
  }
}

/// Adds to by_timestep (rows) the sum of y_bar h and, along, of y_bar of the sum of outputs times h_dot.
template <int kBytes, typename Scalar>
RLEKF_INLINE void add_by_timestep(const Pointwise<Scalar>& p, Panel<Scalar> z_dot, Panel<Scalar> y_bar_of_sum,
                                  Scalar* by_timestep) {
  for (int64_t r = 0; r < p.rows; ++r) {
    Vector<Scalar, kBytes> total{};
    for (int64_t u = 0; u < p.units; ++u) {
      over_vectors<kBytes, Scalar>([&](int64_t first) RLEKF_INLINED {
        const int64_t at = r * kWidth<Scalar> + first;
        const Vector<Scalar, kBytes> h = read<kBytes>(p.h.data + u * p.h.stride + at);
        total += read<kBytes>(p.y.data + u * p.y.stride + at) * h;
        if (z_dot.data) {
          total += read<kBytes>(y_bar_of_sum.data + u * y_bar_of_sum.stride + at) *
                   (read<kBytes>(z_dot.data + u * z_dot.stride + at) * (1 - h * h));
        }
      });
    }
    by_timestep[r] += sum<Scalar, kBytes>(total);
  }
}

/// For each unit, rows (numbers, kWidth) -> columns: [number / kWidth][first + row][number % kWidth].
template <typename Scalar>
RLEKF_INLINE void turn(int64_t units, int64_t numbers, Panel<Scalar> from, Scalar* to, int64_t block, int64_t first) {
  constexpr int64_t kW = kWidth<Scalar>;
  for (int64_t u = 0; u < units; ++u) {
    const Scalar* rows = from.data + u * from.stride;
    for (int64_t n = 0; n < numbers; n += kW) {
      Scalar* columns = to + n / kW * block + (first + u * kW) * kW;
      const int64_t count = std::min(kW, numbers - n);
      for (int64_t lane = 0; lane < kW; ++lane) {
        for (int64_t i = 0; i < count; ++i) columns[lane * kW + i] = rows[(n + i) * kW + lane];
        for (int64_t i = count; i < kW; ++i) columns[lane * kW + i] = 0;
      }
    }
  }
}

template <typename Scalar>
Pointwise<Scalar> pointwise(const Layer<Scalar>& layer, int64_t units, Panel<Scalar> h, Panel<Scalar> x,
                            Panel<Scalar> y) {
  return {units, layer.outputs, layer.inputs, layer.copies, layer.timestep, h, x, y};
}

/// z = x W + initial.
template <typename Scalar>
void through(const Layer<Scalar>& layer, int64_t units, Panel<Scalar> x, Panel<Scalar> z, const Scalar* initial) {
  constexpr int64_t kW = kWidth<Scalar>;
  multiply(Product<Scalar>{layer.outputs, layer.inputs, units, layer.weight, 1, layer.outputs, x.data, kW, x.stride,
                           z.data, kW, z.stride, initial});
}

/// x_bar = z_bar Wᵀ + the shortcut's part.
template <typename Scalar>
void through_back(const Layer<Scalar>& layer, const Pointwise<Scalar>& p, Panel<Scalar> z_bar, Panel<Scalar> x_bar) {
  constexpr int64_t kW = kWidth<Scalar>;
  if (p.copies) on_widest([&]<int kBytes>() RLEKF_INLINED { shortcut_back<kBytes>(p, x_bar); });
  multiply(Product<Scalar>{layer.inputs, layer.outputs, p.units, layer.weight, layer.outputs, 1, z_bar.data, kW,
                           z_bar.stride, x_bar.data, kW, x_bar.stride, nullptr, p.copies > 0});
}

template <typename Scalar>
int64_t padded_weights(const Layer<Scalar>& layer) {
  return padded<Scalar>(layer.inputs) * layer.outputs;
}

}  // namespace

template <typename Scalar>
void forward(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, Panel<Scalar> y) {
  for (size_t l = 0; l < net.size(); ++l) {
    const Trace<Scalar>& t = traces[l];
    through(net[l], units, t.x, t.h, net[l].bias);
    if (net[l].hidden) {
      for (int64_t u = 0; u < units; ++u) tanh_all(t.h.data + u * t.h.stride, net[l].outputs * kWidth<Scalar>);
    }
    const auto p = pointwise(net[l], units, t.h, t.x, l + 1 < net.size() ? traces[l + 1].x : y);
    on_widest([&]<int kBytes>() RLEKF_INLINED { finish_rows<kBytes>(p); });
  }
}

template <typename Scalar>
void backward(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, Panel<Scalar> x_bar) {
  for (size_t l = net.size(); l-- > 0;) {
    const Trace<Scalar>& t = traces[l];
    const auto p = pointwise(net[l], units, t.h, t.x, t.y_bar);
    on_widest([&]<int kBytes>() RLEKF_INLINED { start_rows_back<kBytes>(p, net[l].hidden, t.z_bar, {}, {}); });
    const Panel<Scalar> to = l > 0 ? traces[l - 1].y_bar : x_bar;
    if (to.data) through_back(net[l], p, t.z_bar, to);
  }
}

template <typename Scalar>
void forward_along(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces) {
  for (size_t l = 0; l < net.size(); ++l) {
    const Trace<Scalar>& t = traces[l];
    through<Scalar>(net[l], units, t.x_dot, t.z_dot, nullptr);
    if (l + 1 == net.size()) break;
    const auto p = pointwise(net[l], units, t.h, t.x_dot, traces[l + 1].x_dot);
    on_widest([&]<int kBytes>() RLEKF_INLINED { finish_rows_along<kBytes>(p, t.z_dot, net[l].hidden); });
  }
}

template <typename Scalar>
void reverse(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, bool along, Panel<Scalar> y_bar,
             Panel<Scalar> x_bar, Scalar* gradient, Scalar* scratch) {
  constexpr int64_t kW = kWidth<Scalar>;
  const int64_t width = widest(net), terms = along ? 2 : 1, rows = units * kW, inner = terms * rows;
  const Panel<Scalar> z_bar{scratch, width * kW};
  Scalar* next = scratch + units * width * kW;
  Panel<Scalar> other{next, width * kW};  // y_bar of the layer before: it and this one take turns
  next += units * width * kW;
  Scalar* left = next;  // z_bar, (outputs, inner)
  next += width * inner;
  Scalar* right = next;  // x, in vectors of inputs
  gradient += padded_size(net);
  for (size_t l = net.size(); l-- > 0;) {
    const Layer<Scalar>& layer = net[l];
    const Trace<Scalar>& t = traces[l];
    const auto p = pointwise(layer, units, t.h, t.x, y_bar);
    const Panel<Scalar> z_dot = along ? t.z_dot : Panel<Scalar>{};
    on_widest([&]<int kBytes>() RLEKF_INLINED { start_rows_back<kBytes>(p, layer.hidden, z_bar, z_dot, t.z_bar); });
    gradient -= padded_weights(layer) + layer.outputs * (layer.timestep ? 2 : 1);
    for (int64_t term = 0; term < terms; ++term) {
      const Panel<Scalar> x = term ? t.x_dot : t.x;
      on_widest([&]<int>() RLEKF_INLINED { turn(units, layer.inputs, x, right, inner * kW, term * rows); });
      const Panel<Scalar> z = term ? t.z_bar : z_bar;
      for (int64_t o = 0; o < layer.outputs; ++o) {
        for (int64_t u = 0; u < units; ++u) {
          std::copy_n(z.data + u * z.stride + o * kW, kW, left + o * inner + term * rows + u * kW);
        }
      }
    }
    multiply(Product<Scalar>{layer.outputs, inner, padded<Scalar>(layer.inputs) / kW, left, inner, 1, right, kW,
                             inner * kW, gradient, kW, layer.outputs * kW, nullptr, true});
    Scalar* by_bias = gradient + padded_weights(layer);
    for (int64_t o = 0; o < layer.outputs; ++o) {
      Scalar total{};
      for (int64_t row = 0; row < rows; ++row) total += left[o * inner + row];
      by_bias[o] += total;
    }
    if (layer.timestep) {
      on_widest([&]<int kBytes>()
                    RLEKF_INLINED { add_by_timestep<kBytes>(p, z_dot, t.y_bar, by_bias + layer.outputs); });
    }
    const Panel<Scalar> to = l > 0 ? other : x_bar;
    if (to.data) through_back(layer, p, z_bar, to);
    std::swap(y_bar, other);
  }
}

template <typename Scalar>
int64_t padded_size(const Net<Scalar>& net) {
  int64_t size = 0;
  for (const Layer<Scalar>& layer : net) size += padded_weights(layer) + layer.outputs * (layer.timestep ? 2 : 1);
  return size;
}

template <typename Scalar>
int64_t widest(const Net<Scalar>& net) {
  int64_t width = 0;
  for (const Layer<Scalar>& layer : net) width = std::max(width, layer.outputs);
  return width;
}

template <typename Scalar>
int64_t reverse_scratch(const Net<Scalar>& net, int64_t units) {
  const int64_t rows = units * kWidth<Scalar>;
  int64_t inputs = 0;
  for (const Layer<Scalar>& layer : net) inputs = std::max(inputs, padded<Scalar>(layer.inputs));
  return (2 + 2) * rows * widest(net) + 2 * rows * inputs;
}

template <typename Scalar>
void collect(const Net<Scalar>& net, const Scalar* padded_gradients, int64_t count, int64_t stride, int64_t part,
             int64_t parts, Scalar* gradient) {
  constexpr int64_t kW = kWidth<Scalar>;
  const Scalar* from = padded_gradients;
  for (const Layer<Scalar>& layer : net) {
    const auto total = [&](int64_t place) {
      Scalar sum = from[place];
      for (int64_t i = 1; i < count; ++i) sum += from[i * stride + place];
      return sum;
    };
    Scalar* to = gradient + layer.first;
    for (int64_t o = part * layer.outputs / parts; o < (part + 1) * layer.outputs / parts; ++o) {
      for (int64_t i = 0; i < layer.inputs; ++i) {
        to[o * layer.inputs + i] = total((i / kW * layer.outputs + o) * kW + i % kW);
      }
      for (int64_t k = 0; k < (layer.timestep ? 2 : 1); ++k) {
        to[layer.inputs * layer.outputs + k * layer.outputs + o] = total(padded_weights(layer) + k * layer.outputs + o);
      }
    }
    from += padded_weights(layer) + layer.outputs * (layer.timestep ? 2 : 1);
  }
}

#define RLEKF_INSTANTIATE(Scalar)                                                                               \
  template void forward(const Net<Scalar>&, int64_t, const Traces<Scalar>&, Panel<Scalar>);                     \
  template void backward(const Net<Scalar>&, int64_t, const Traces<Scalar>&, Panel<Scalar>);                    \
  template void forward_along(const Net<Scalar>&, int64_t, const Traces<Scalar>&);                              \
  template void reverse(const Net<Scalar>&, int64_t, const Traces<Scalar>&, bool, Panel<Scalar>, Panel<Scalar>, \
                        Scalar*, Scalar*);                                                                      \
  template int64_t padded_size(const Net<Scalar>&);                                                             \
  template int64_t widest(const Net<Scalar>&);                                                                  \
  template int64_t reverse_scratch(const Net<Scalar>&, int64_t);                                                \
  template void collect(const Net<Scalar>&, const Scalar*, int64_t, int64_t, int64_t, int64_t, Scalar*);
RLEKF_INSTANTIATE(double)
RLEKF_INSTANTIATE(float)

}  // namespace rlekf::cpu
