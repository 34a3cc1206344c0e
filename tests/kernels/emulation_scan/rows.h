// Rows for an emulated selective_scan: tensors of them, the recurrence in double, and how far a result is from it.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "selective_scan.cuh"

struct Rows {
  int batch, tokens, dim, ngroups;
  bool ragged, reverse, z, state;
  bool softplus = true, bare = false;  // bare: neither D nor a bias
  bool in_place = false;               // the final state takes the place of the initial one
  int gap = 0;                         // elements between a token's channels and the next one's
  float slowest = 1e-4f, spread = 8;   // A = -(slowest + spread |normal|)
  float delta = -3, delta_spread = 0.5f, bias_spread = 0.3f;
  int d_state = mamba::scan::kState;
  int row() const { return dim + gap; }
};

template <typename T> struct Tensors {
  std::vector<T> u, delta, z, y, B, C;
  std::vector<float> A, D, bias, start, end;
  std::vector<int> lens;
};

// Everything behind a row's end, and in gaps, is NaN; so are the outputs.
template <typename T> mamba::scan::Args<T> arguments(const Rows& r, Tensors<T>& t) {
  std::mt19937 random(r.tokens + r.dim);
  std::normal_distribution<float> normal;
  const size_t n = size_t(r.batch) * r.tokens * r.row(), m = size_t(r.batch) * r.tokens * r.ngroups * r.d_state;
  auto draw = [&](auto& v, size_t count, float scale, float shift) {
    v.resize(count);
    for (auto& x : v) x = mamba::from_float<std::decay_t<decltype(x)>>(scale * normal(random) + shift);
  };
  draw(t.u, n, 1, 0), draw(t.delta, n, r.delta_spread, r.delta), draw(t.z, n, 1, 0), draw(t.B, m, 1, 0), draw(t.C, m, 1, 0);
  draw(t.D, r.dim, 1, 0), draw(t.bias, r.dim, r.bias_spread, 0), draw(t.A, size_t(r.dim) * r.d_state, r.spread, 0);
  for (float& a : t.A) a = -std::fabs(a) - r.slowest;
  draw(t.start, size_t(r.batch) * r.dim * r.d_state, 1, 0);
  const T poison = mamba::from_float<T>(NAN);
  t.y.assign(n, poison), t.end.assign(t.start.size(), NAN);
  if (r.in_place) t.end = t.start;
  t.lens.assign(r.batch, r.tokens);
  for (int b = 0; r.ragged && b < r.batch; b++) t.lens[b] = b == 2 ? 0 : int(random() % (r.tokens + 1));
  for (size_t row = 0; row < size_t(r.batch) * r.tokens; row++) {
    const bool padding = int(row % r.tokens) >= t.lens[row / r.tokens];
    for (size_t i = row * r.row() + (padding ? 0 : r.dim); i < (row + 1) * r.row(); i++) t.u[i] = t.delta[i] = t.z[i] = poison;
    const size_t width = padding ? size_t(r.ngroups) * r.d_state : 0;
    for (size_t i = 0; i < width; i++) t.B[row * width + i] = t.C[row * width + i] = poison;
  }
  mamba::scan::Args<T> a{};
  a.u = t.u.data(), a.delta = t.delta.data(), a.z = r.z ? t.z.data() : nullptr, a.B = t.B.data(), a.C = t.C.data();
  a.y = t.y.data(), a.A = t.A.data(), a.D = r.bare ? nullptr : t.D.data(), a.bias = r.bare ? nullptr : t.bias.data();
  a.h0 = r.state ? (r.in_place ? t.end : t.start).data() : nullptr, a.hT = t.end.data(), a.seq_lens = r.ragged ? t.lens.data() : nullptr;
  a.u_stride = a.delta_stride = a.z_stride = a.y_stride = {int64_t(r.tokens) * r.row(), r.row()};
  a.B_stride = a.C_stride = {int64_t(r.tokens) * r.ngroups * r.d_state, r.ngroups * r.d_state};
  a.seqlen = r.tokens, a.dim = r.dim, a.ngroups = r.ngroups, a.group_dim = r.dim / r.ngroups, a.d_state = r.d_state;
  a.softplus = r.softplus, a.reverse = r.reverse, a.vec = 1, a.pieces = 1, a.piece_len = r.tokens;
  return a;
}

template <typename T> double time_step_of(const Rows& r, const Tensors<T>& t, size_t row, int d) {
  const double v = double(mamba::to_float(t.delta[row * r.row() + d])) + (r.bare ? 0 : t.bias[d]);
  return r.softplus ? std::log1p(std::exp(v)) : v;
}

struct Exact {
  std::vector<double> y, end;  // [batch, tokens, dim], zeros at padding; [batch, dim, d_state]
};
template <typename T> Exact recurrence(const Rows& r, const Tensors<T>& t) {
  auto value = [](T v) { return double(mamba::to_float(v)); };
  Exact exact{std::vector<double>(size_t(r.batch) * r.tokens * r.dim), std::vector<double>(t.end.size())};
  for (int b = 0; b < r.batch; b++) {
    for (int d = 0; d < r.dim; d++) {
      const size_t state = (size_t(b) * r.dim + d) * r.d_state, group = d / (r.dim / r.ngroups);
      double* h = &exact.end[state];
      for (int s = 0; s < r.d_state; s++) h[s] = r.state ? t.start[state + s] : 0;
      for (int i = 0; i < t.lens[b]; i++) {
        const size_t row = size_t(b) * r.tokens + (r.reverse ? t.lens[b] - 1 - i : i), at = row * r.row() + d;
        const double dt = time_step_of(r, t, row, d), u = value(t.u[at]), z = value(t.z[at]);
        double y = r.bare ? 0 : t.D[d] * u;
        for (int s = 0; s < r.d_state; s++) {
          const size_t bc = (row * r.ngroups + group) * r.d_state + s;
          h[s] = std::exp(dt * t.A[size_t(d) * r.d_state + s]) * h[s] + dt * u * value(t.B[bc]);
          y += h[s] * value(t.C[bc]);
        }
        exact.y[row * r.dim + d] = r.z ? y * z / (1 + std::exp(-z)) : y;
      }
    }
  }
  return exact;
}

// The relative errors of y and of the final state; padding must be zero, and gaps as they were.
template <typename T> struct Errors {
  double y, state;
  bool padding = true;
  bool small() const { return y < (sizeof(T) == 4 ? 3e-6 : 4e-3) && state < 1e-5 && padding; }
};
template <typename T> Errors<T> errors(const Rows& r, const Tensors<T>& t, const Exact& exact) {
  double y_error = 0, y_norm = 0, h_error = 0, h_norm = 0;
  Errors<T> e;
  for (size_t row = 0; row < size_t(r.batch) * r.tokens; row++) {
    const bool padding = int(row % r.tokens) >= t.lens[row / r.tokens];
    for (int d = 0; d < r.row(); d++) {
      const double y = double(mamba::to_float(t.y[row * r.row() + d]));
      if (d >= r.dim) {
        e.padding &= y != y;
        continue;
      }
      const double wanted = exact.y[row * r.dim + d];
      if (padding) e.padding &= y == 0;
      y_error += (y - wanted) * (y - wanted), y_norm += wanted * wanted;
    }
  }
  for (size_t i = 0; i < t.end.size(); i++) {
    h_error += (t.end[i] - exact.end[i]) * (t.end[i] - exact.end[i]), h_norm += exact.end[i] * exact.end[i];
  }
  e.y = std::sqrt(y_error / (y_norm + 1e-30)), e.state = std::sqrt(h_error / (h_norm + 1e-30));
  return e;
}
