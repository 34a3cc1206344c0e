// Runs the chain kernel block by block, a thread for every thread, and compares with the recurrence in double.
#include "prelude.h"
//
#include "selective_scan_chain.cuh"

#include <random>

namespace mamba {
int sm_count() { return 132; }
size_t max_shared_bytes() { return sizeof(scan::shared); }
}  // namespace mamba

using namespace mamba::scan;

struct Case {
  int lanes, batch, tokens, dim, ngroups, groups, warps, copiers;
  bool few_slots, ragged, reverse, z, state;
};

template <typename T> struct Tensors {
  std::vector<T> u, delta, z, y, B, C;
  std::vector<float> A, D, bias, start, end;
  std::vector<int> lens;
};

template <typename T> Args<T> arguments(const Case& c, Tensors<T>& t) {
  std::mt19937 random(c.tokens + c.dim);
  std::normal_distribution<float> normal;
  const size_t n = size_t(c.batch) * c.tokens * c.dim, m = size_t(c.batch) * c.tokens * c.ngroups * kState;
  auto draw = [&](auto& v, size_t count, float scale, float shift) {
    v.resize(count);
    for (auto& x : v) x = mamba::from_float<std::decay_t<decltype(x)>>(scale * normal(random) + shift);
  };
  draw(t.u, n, 1, 0), draw(t.delta, n, 0.5f, -3), draw(t.z, n, 1, 0), draw(t.B, m, 1, 0), draw(t.C, m, 1, 0);
  draw(t.D, c.dim, 1, 0), draw(t.bias, c.dim, 0.3f, 0), draw(t.A, size_t(c.dim) * kState, 8, 0);
  for (float& a : t.A) a = -std::fabs(a) - 1e-4f;
  draw(t.start, size_t(c.batch) * c.dim * kState, 1, 0);
  t.y.assign(n, mamba::from_float<T>(NAN)), t.end.assign(t.start.size(), NAN);
  t.lens.assign(c.batch, c.tokens);
  const T poison = mamba::from_float<T>(NAN);
  for (int b = 0; c.ragged && b < c.batch; b++) {
    t.lens[b] = int(random() % (c.tokens + 1));
    for (size_t row = size_t(b) * c.tokens + t.lens[b]; row < size_t(b + 1) * c.tokens; row++) {
      for (int d = 0; d < c.dim; d++) t.u[row * c.dim + d] = t.delta[row * c.dim + d] = t.z[row * c.dim + d] = poison;
      const size_t width = size_t(c.ngroups) * kState;
      for (size_t i = 0; i < width; i++) t.B[row * width + i] = t.C[row * width + i] = poison;
    }
  }
  Args<T> a{};
  a.u = t.u.data(), a.delta = t.delta.data(), a.z = c.z ? t.z.data() : nullptr, a.B = t.B.data(), a.C = t.C.data();
  a.y = t.y.data(), a.A = t.A.data(), a.D = t.D.data(), a.bias = t.bias.data(), a.hT = t.end.data();
  a.h0 = c.state ? t.start.data() : nullptr, a.seq_lens = c.ragged ? t.lens.data() : nullptr;
  a.u_stride = a.delta_stride = a.z_stride = a.y_stride = {int64_t(c.tokens) * c.dim, c.dim};
  a.B_stride = a.C_stride = {int64_t(c.tokens) * c.ngroups * kState, c.ngroups * kState};
  a.seqlen = c.tokens, a.dim = c.dim, a.ngroups = c.ngroups, a.group_dim = c.dim / c.ngroups, a.d_state = kState;
  a.softplus = 1, a.reverse = c.reverse, a.vec = 1, a.pieces = 1, a.piece_len = c.tokens;
  return a;
}

template <typename T, int kLanes> void launch(const Chain<T, kLanes>& layout, const Case& c, const Args<T>& a) {
  const int least = mamba::ceil_div(c.warps, kChainTiles) + c.copiers;
  const int slots = c.few_slots ? least : layout.slots({0, c.groups, c.warps, c.copiers, 1});
  if (slots < least) std::abort();
  const unsigned threads = 32 * (c.groups * c.warps + c.copiers);
  const unsigned blocks = c.ngroups * mamba::ceil_div(a.group_dim, c.groups * layout.kWidth);
  for (unsigned b = 0; b < blocks * c.batch; b++) {
    std::memset(mamba::scan::shared, 0xff, sizeof mamba::scan::shared);
    std::barrier<> all(threads);
    emulation::whole_block = &all;
    std::vector<std::unique_ptr<emulation::Warp>> warps;
    for (unsigned w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<emulation::Warp>(32));
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; i++) {
      running.emplace_back([&, i] {
        emulation::thread = dim3(i), emulation::block = dim3(b % blocks, b / blocks), emulation::block_size = dim3(threads);
        emulation::warp = warps[i / 32].get(), emulation::lane = int(i % 32);
        chain_kernel<T, kLanes>(a, c.groups, c.warps, slots);
      });
    }
    for (auto& t : running) t.join();
  }
}

// The relative errors of y and of the final state; padding must be zero.
template <typename T> bool right(const Case& c) {
  Tensors<T> t;
  const Args<T> a = arguments(c, t);
  with_chain<T>({c.lanes == 2 ? Tactic::kChain : c.lanes == 4 ? Tactic::kChain4 : Tactic::kChain8, c.groups, c.warps, c.copiers, 1},
                [&](auto layout) { launch(layout, c, a); });
  double y_error = 0, y_norm = 0, h_error = 0, h_norm = 0;
  bool padding = true;
  auto value = [](T v) { return double(mamba::to_float(v)); };
  for (int b = 0; b < c.batch; b++) {
    for (int d = 0; d < c.dim; d++) {
      const size_t state = (size_t(b) * c.dim + d) * kState, group = d / (c.dim / c.ngroups);
      double h[kState];
      for (int s = 0; s < kState; s++) h[s] = c.state ? t.start[state + s] : 0;
      for (int i = 0; i < t.lens[b]; i++) {
        const size_t row = size_t(b) * c.tokens + (c.reverse ? t.lens[b] - 1 - i : i), at = row * c.dim + d;
        const double dt = std::log1p(std::exp(value(t.delta[at]) + t.bias[d])), u = value(t.u[at]), z = value(t.z[at]);
        double y = t.D[d] * u;
        for (int s = 0; s < kState; s++) {
          const size_t bc = (row * c.ngroups + group) * kState + s;
          h[s] = std::exp(dt * t.A[size_t(d) * kState + s]) * h[s] + dt * u * value(t.B[bc]);
          y += h[s] * value(t.C[bc]);
        }
        if (c.z) y *= z / (1 + std::exp(-z));
        y_error += (value(t.y[at]) - y) * (value(t.y[at]) - y), y_norm += y * y;
      }
      for (int i = t.lens[b]; i < c.tokens; i++) padding &= value(t.y[(size_t(b) * c.tokens + i) * c.dim + d]) == 0;
      for (int s = 0; s < kState; s++) h_error += (t.end[state + s] - h[s]) * (t.end[state + s] - h[s]), h_norm += h[s] * h[s];
    }
  }
  const double y = std::sqrt(y_error / (y_norm + 1e-30)), h = std::sqrt(h_error / (h_norm + 1e-30));
  const bool ok = y < (sizeof(T) == 4 ? 3e-6 : 4e-3) && h < 1e-5 && padding;
  std::printf("%s: %d lanes, %d x %d tokens, %d channels: y %.1e state %.1e padding %d\n", ok ? "right" : "WRONG", c.lanes, c.batch, c.tokens,
              c.dim, y, h, padding);
  return ok;
}

int main(int count, char**) {
  bool ok = true;
  if (count > 1) {  // the few for a sanitizer
    ok &= right<__nv_bfloat16>({2, 2, 90, 32, 2, 1, 3, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({2, 1, 200, 32, 1, 2, 2, 1, true, false, false, true, true});
    ok &= right<__nv_bfloat16>({4, 2, 90, 16, 2, 1, 3, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({4, 1, 200, 16, 1, 2, 2, 1, true, false, false, true, true});
    ok &= right<__nv_bfloat16>({8, 2, 90, 8, 2, 1, 3, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({8, 1, 200, 12, 1, 3, 2, 1, true, false, false, true, true});
    return !ok;
  }
  ok &= right<float>({2, 1, 100, 16, 1, 1, 2, 1, true, false, false, true, true});
  ok &= right<float>({2, 2, 70, 24, 1, 1, 3, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({2, 1, 333, 48, 1, 3, 5, 1, true, false, true, false, true});
  ok &= right<__nv_bfloat16>({2, 2, 150, 64, 2, 2, 3, 2, false, true, true, true, false});
  ok &= right<__nv_bfloat16>({2, 1, 1, 16, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({2, 1, 500, 16, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__half>({2, 1, 129, 32, 1, 2, 1, 1, true, false, false, true, true});
  ok &= right<float>({4, 1, 100, 16, 1, 2, 2, 1, true, false, false, true, true});
  ok &= right<float>({4, 2, 70, 24, 1, 2, 3, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({4, 1, 333, 40, 1, 5, 3, 1, true, false, true, false, true});
  ok &= right<__nv_bfloat16>({4, 2, 150, 48, 2, 2, 3, 2, false, true, true, true, false});
  ok &= right<__nv_bfloat16>({4, 1, 1, 8, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({4, 1, 500, 8, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__half>({4, 1, 129, 16, 1, 2, 1, 1, true, false, false, true, true});
  ok &= right<float>({8, 1, 100, 12, 1, 3, 2, 1, true, false, false, true, true});
  ok &= right<float>({8, 2, 70, 20, 1, 3, 3, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({8, 1, 333, 24, 1, 3, 5, 1, true, false, true, false, true});
  ok &= right<__nv_bfloat16>({8, 2, 150, 32, 2, 3, 4, 2, false, true, true, true, false});
  ok &= right<__nv_bfloat16>({8, 1, 1, 4, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({8, 1, 500, 8, 1, 2, 7, 2, true, false, false, true, true});
  ok &= right<__half>({8, 1, 129, 12, 1, 3, 1, 1, true, false, false, true, true});
  return !ok;
}
