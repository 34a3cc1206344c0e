#include "reference.h"

#include <algorithm>
#include <cmath>
#include <thread>

namespace plugin_tests {
namespace {

double silu(double x) { return x / (1.0 + std::exp(-x)); }
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

template <typename Body>
void parallel(int64_t count, Body body) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(count, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; w++) {
    threads.emplace_back([=] {
      for (int64_t i = w; i < count; i += workers) body(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void convolve(const Sizes& s, const Options& o, const Operands& in, int64_t row, Results* out) {
  const int64_t channels = s.width, columns = s.state - 1, valid = in.lens[static_cast<size_t>(row)];
  for (int64_t c = 0; c < channels; c++) {
    // Column j of the state followed by the row's tokens.
    const auto padded = [&](int64_t j) {
      return j < columns ? in.state[(row * channels + c) * columns + j] : in.x[(row * s.length + j - columns) * channels + c];
    };
    for (int64_t t = 0; t < s.length; t++) {
      double sum = in.bias[c];
      for (int64_t j = 0; j < s.state && t < valid; j++) sum += in.A[c * s.state + j] * padded(t + j);
      out->y[(row * s.length + t) * channels + c] = t < valid ? (o.activation ? silu(sum) : sum) : 0.0;
    }
    for (int64_t j = 0; j < columns; j++) out->state[(row * channels + c) * columns + j] = padded(valid + j);
  }
}

// One channel of one row: the recurrence, token by token.
void scan(Op op, const Sizes& s, const Options& o, const Operands& in, int64_t row, int64_t channel, Results* out) {
  const int64_t N = s.state, channels = s.width * s.headdim, head = channel / s.headdim;
  const int64_t group = head / (s.width / s.groups), valid = in.lens[static_cast<size_t>(row)];
  const double skip = in.D[is_ssd(op) && !o.skip_per_channel ? head : channel];
  double* h = &out->state[(row * channels + channel) * N];
  std::copy_n(&in.state[(row * channels + channel) * N], N, h);
  for (int64_t i = 0; i < s.length; i++) {
    const int64_t t = o.reverse ? s.length - 1 - i : i, token = row * s.length + t;
    double& y = out->y[token * channels + channel];
    y = 0.0;
    if (t >= valid) continue;
    double dt = in.dt[token * s.width + head] + in.bias[head];
    if (o.softplus) dt = softplus(dt);
    if (is_ssd(op)) dt = std::min(std::max(dt, o.dt_min), o.dt_max);
    const double u = in.x[token * channels + channel];
    const double *B = &in.B[(token * s.groups + group) * N], *C = &in.C[(token * s.groups + group) * N];
    double keep = is_ssd(op) ? std::exp(dt * in.A[head]) : 0.0;
    for (int64_t n = 0; n < N; n++) {
      if (!is_ssd(op)) keep = std::exp(dt * in.A[channel * N + n]);
      h[n] = keep * h[n] + dt * u * B[n];
      y += h[n] * C[n];
    }
    y += skip * u;
    if (o.gate) y *= silu(in.z[token * channels + channel]);
  }
}

}  // namespace

Results reference(Op op, const Sizes& s, const Options& o, const Operands& in) {
  Results out{std::vector<double>(in.x.size()), std::vector<double>(in.state.size())};
  if (op == Op::kConv) {
    parallel(s.batch, [&](int64_t row) { convolve(s, o, in, row, &out); });
  } else {
    const int64_t channels = s.width * s.headdim;
    parallel(s.batch * channels, [&](int64_t i) { scan(op, s, o, in, i / channels, i % channels, &out); });
  }
  return out;
}

}  // namespace plugin_tests
