// selective_scan, tactic "chain" with two lanes a channel: a tile of 16 tokens, a state at a time.
//
// A lane finishes every other token; dt, dt * u and parts of y go to the channel's other lane by shuffles.
#pragma once

#include "selective_scan_chain_layout.cuh"

namespace mamba::scan {

template <typename T, typename L>
__device__ __forceinline__ void chain_tile(T* acts, const float* bc, const float* A, float* carry_in, float* carry_out,
                                           uint64_t* in_ready, uint64_t* out_ready, int parity, int valid, float bias,
                                           float D, bool use_softplus, bool has_z) {
  constexpr int G = L::kWidth, kAct = L::kTensor, kRow = L::kRow, kStep = L::kStep, kToC = L::kToC;
  const bool odd = threadIdx.x & 16;  // this half of the warp finishes the odd tokens, the other the even ones
  float dt[16], du[16], y[16], d[8], x[8];
  T* own = acts + (odd ? G : 0);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    d[i] = to_float(own[kAct + 2 * i * G]) + bias;
    x[i] = to_float(own[2 * i * G]);
  }
  if (use_softplus) {
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = softplus<sizeof(T) == 4>(d[i]);
  }
  if (valid < 16) {  // past the end of the row; what is there may be NaN
    const int left = valid - (odd ? 1 : 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (2 * i >= left) d[i] = x[i] = 0.0f;
    }
  }
  const float D0 = odd ? 0.0f : D, D1 = odd ? D : 0.0f;
  const int even_lane = threadIdx.x & 15, odd_lane = even_lane + 16;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    y[2 * i] = D0 * x[i], y[2 * i + 1] = D1 * x[i];
    x[i] *= d[i];
    dt[2 * i] = __shfl_sync(~0u, d[i], even_lane), dt[2 * i + 1] = __shfl_sync(~0u, d[i], odd_lane);
    du[2 * i] = __shfl_sync(~0u, x[i], even_lane), du[2 * i + 1] = __shfl_sync(~0u, x[i], odd_lane);
  }
  float a[16], b[16];  // decays, then states; what comes in
#pragma unroll
  for (int t = 0; t < 16; t++) a[t] = ex2(dt[t] * A[0]);
  auto inputs = [&](const float* B) {
#pragma unroll
    for (int t = 0; t < 16; t += 4) {
      const Vec<float, 4> v = load_vec<float, 4>(B + t / 4 * kStep);
#pragma unroll
      for (int r = 0; r < 4; r++) b[t + r] = du[t + r] * v.v[r];
    }
  };
  // From the wait to the arrival nothing but the recurrence: every tile of the row waits for it.
  auto recur = [&](int s) {
    mbarrier_wait(in_ready + s, parity);
    float h = carry_in[s * 32];
#pragma unroll
    for (int t = 0; t < 16; t++) a[t] = h = fmaf(a[t], h, b[t]);
    carry_out[s * 32] = h;
    mbarrier_arrive(out_ready + s);
    __syncwarp();  // keeps what follows from being scheduled into the recurrence
  };
  auto outputs = [&](const float* C, auto last, float As) {
#pragma unroll
    for (int t = 0; t < 16; t += 4) {
      const Vec<float, 4> v = load_vec<float, 4>(C + t / 4 * kStep);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        y[t + r] = fmaf(v.v[r], a[t + r], y[t + r]);
        if (!last) a[t + r] = ex2(dt[t + r] * As);
      }
    }
  };
  inputs(bc);
#pragma unroll 1
  for (int s = 0; s < L::kStates - 1; s++) {
    recur(0);
    A += 32, carry_in += 32, carry_out += 32, in_ready++, out_ready++;
    outputs(bc + kToC, std::false_type{}, A[0]);
    bc += kRow;
    inputs(bc);
  }
  recur(0);
  outputs(bc + kToC, std::true_type{}, 0.0f);
  T* out = own + 2 * kAct;
  float v[8], gate[8];
  if (has_z) {  // all eight at once, not each between two stores
#pragma unroll
    for (int i = 0; i < 8; i++) gate[i] = silu(to_float(out[2 * i * G]));
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float mine = odd ? y[2 * i + 1] : y[2 * i], theirs = odd ? y[2 * i] : y[2 * i + 1];
    v[i] = mine + __shfl_xor_sync(~0u, theirs, 16);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) out[2 * i * G] = from_float<T>(has_z ? v[i] * gate[i] : v[i]);
}

}  // namespace mamba::scan
