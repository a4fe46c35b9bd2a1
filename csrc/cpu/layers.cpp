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

template <typename Scalar>
RLEKF_INLINE Vector<Scalar> shortcut(const Pointwise<Scalar>& p, Panel<Scalar> x, int64_t unit, int64_t row) {
  if (p.copies == 0) return Vector<Scalar>{};
  return read(x.data + unit * x.stride + (row % p.inputs) * kWidth<Scalar>);
}

/// y = h idt + shortcut.
template <typename Scalar>
RLEKF_INLINE void finish_rows(const Pointwise<Scalar>& p) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t r = 0; r < p.rows; ++r) {
      Vector<Scalar> h = read(p.h.data + u * p.h.stride + r * kWidth<Scalar>);
      if (p.timestep) h *= p.timestep[r];
      write<Scalar>(p.y.data + u * p.y.stride + r * kWidth<Scalar>, h + shortcut(p, p.x, u, r));
    }
  }
}

/// y_dot = z_dot (1 - h²) idt + shortcut, with x and y standing for x_dot and y_dot.
template <typename Scalar>
RLEKF_INLINE void finish_rows_along(const Pointwise<Scalar>& p, Panel<Scalar> z_dot, bool hidden) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t r = 0; r < p.rows; ++r) {
      Vector<Scalar> dot = read(z_dot.data + u * z_dot.stride + r * kWidth<Scalar>);
      const Vector<Scalar> h = read(p.h.data + u * p.h.stride + r * kWidth<Scalar>);
      if (hidden) dot *= 1 - h * h;
      if (p.timestep) dot *= p.timestep[r];
      write<Scalar>(p.y.data + u * p.y.stride + r * kWidth<Scalar>, dot + shortcut(p, p.x, u, r));
    }
  }
}

/// z_bar = y_bar idt (1 - h²), with y standing for y_bar; along, also - 2 h z_dot z_bar of the sum of outputs.
template <typename Scalar>
RLEKF_INLINE void start_rows_back(const Pointwise<Scalar>& p, bool hidden, Panel<Scalar> z_bar, Panel<Scalar> z_dot,
                                  Panel<Scalar> z_bar_of_sum) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t at = r * kWidth<Scalar>;
      Vector<Scalar> bar = read(p.y.data + u * p.y.stride + at);
      const Vector<Scalar> h = read(p.h.data + u * p.h.stride + at);
      if (p.timestep) bar *= p.timestep[r];
      if (hidden) {
        bar *= 1 - h * h;
        if (z_dot.data) {
          bar -=
              2 * h * read(z_dot.data + u * z_dot.stride + at) * read(z_bar_of_sum.data + u * z_bar_of_sum.stride + at);
        }
      }
      write<Scalar>(z_bar.data + u * z_bar.stride + at, bar);
    }
  }
}

/// x_bar = the shortcut's part of it, from y_bar, which y stands for.
template <typename Scalar>
RLEKF_INLINE void shortcut_back(const Pointwise<Scalar>& p, Panel<Scalar> x_bar) {
  for (int64_t u = 0; u < p.units; ++u) {
    for (int64_t i = 0; i < p.inputs; ++i) {
      Vector<Scalar> bar{};
      for (int64_t copy = 0; copy < p.copies; ++copy) {
        bar += read(p.y.data + u * p.y.stride + (copy * p.inputs + i) * kWidth<Scalar>);
      }
      write<Scalar>(x_bar.data + u * x_bar.stride + i * kWidth<Scalar>, bar);
    }
  }
}

/// Adds to by_timestep (rows) the sum of y_bar h and, along, of y_bar of the sum of outputs times h_dot.
template <typename Scalar>
RLEKF_INLINE void add_by_timestep(const Pointwise<Scalar>& p, Panel<Scalar> z_dot, Panel<Scalar> y_bar_of_sum,
                                  Scalar* by_timestep) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t at = r * kWidth<Scalar>;
    Vector<Scalar> total{};
    for (int64_t u = 0; u < p.units; ++u) {
      const Vector<Scalar> h = read(p.h.data + u * p.h.stride + at);
      total += read(p.y.data + u * p.y.stride + at) * h;
      if (z_dot.data) {
        total += read(y_bar_of_sum.data + u * y_bar_of_sum.stride + at) *
                 (read(z_dot.data + u * z_dot.stride + at) * (1 - h * h));
      }
    }
    for (int64_t lane = 0; lane < kWidth<Scalar>; ++lane) by_timestep[r] += total[lane];
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

#define RLEKF_FOR_SCALAR(Scalar)                                                                                     \
  RLEKF_EVERY_ISA void finish(const Pointwise<Scalar>& p) { finish_rows(p); }                                        \
  RLEKF_EVERY_ISA void finish_along(const Pointwise<Scalar>& p, Panel<Scalar> z_dot, bool hidden) {                  \
    finish_rows_along(p, z_dot, hidden);                                                                             \
  }                                                                                                                  \
  RLEKF_EVERY_ISA void start_back(const Pointwise<Scalar>& p, bool hidden, Panel<Scalar> z_bar, Panel<Scalar> z_dot, \
                                  Panel<Scalar> z_bar_of_sum) {                                                      \
    start_rows_back(p, hidden, z_bar, z_dot, z_bar_of_sum);                                                          \
  }                                                                                                                  \
  RLEKF_EVERY_ISA void start_shortcut(const Pointwise<Scalar>& p, Panel<Scalar> x_bar) { shortcut_back(p, x_bar); }  \
  RLEKF_EVERY_ISA void by_timesteps(const Pointwise<Scalar>& p, Panel<Scalar> z_dot, Panel<Scalar> y_bar_of_sum,     \
                                    Scalar* result) {                                                                \
    add_by_timestep(p, z_dot, y_bar_of_sum, result);                                                                 \
  }                                                                                                                  \
  RLEKF_EVERY_ISA void turned(int64_t units, int64_t numbers, Panel<Scalar> from, Scalar* to, int64_t block,         \
                              int64_t first) {                                                                       \
    turn(units, numbers, from, to, block, first);                                                                    \
  }
RLEKF_FOR_SCALAR(double)
RLEKF_FOR_SCALAR(float)

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
  if (p.copies) start_shortcut(p, x_bar);
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
    finish(pointwise(net[l], units, t.h, t.x, l + 1 < net.size() ? traces[l + 1].x : y));
  }
}

template <typename Scalar>
void backward(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces, Panel<Scalar> x_bar) {
  for (size_t l = net.size(); l-- > 0;) {
    const Trace<Scalar>& t = traces[l];
    const auto p = pointwise(net[l], units, t.h, t.x, t.y_bar);
    start_back(p, net[l].hidden, t.z_bar, {}, {});
    const Panel<Scalar> to = l > 0 ? traces[l - 1].y_bar : x_bar;
    if (to.data) through_back(net[l], p, t.z_bar, to);
  }
}

template <typename Scalar>
void forward_along(const Net<Scalar>& net, int64_t units, const Traces<Scalar>& traces) {
  for (size_t l = 0; l < net.size(); ++l) {
    const Trace<Scalar>& t = traces[l];
    through<Scalar>(net[l], units, t.x_dot, t.z_dot, nullptr);
    if (l + 1 < net.size()) {
      finish_along(pointwise(net[l], units, t.h, t.x_dot, traces[l + 1].x_dot), t.z_dot, net[l].hidden);
    }
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
    start_back(p, layer.hidden, z_bar, z_dot, t.z_bar);
    gradient -= padded_weights(layer) + layer.outputs * (layer.timestep ? 2 : 1);
    for (int64_t term = 0; term < terms; ++term) {
      turned(units, layer.inputs, term ? t.x_dot : t.x, right, inner * kW, term * rows);
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
    if (layer.timestep) by_timesteps(p, z_dot, t.y_bar, by_bias + layer.outputs);
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
