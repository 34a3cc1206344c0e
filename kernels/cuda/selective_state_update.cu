// selective_state_update: memory-bound. A lane has 16 bytes of a channel's state, so a channel is 1 to 16 lanes of a
// warp; a thread takes kRows batch rows of the same channel, whose loads are all in flight before the first is used.
#include "common.cuh"
#include "mamba/selective_state_update.h"

namespace mamba::update {
namespace {

using Params = mamba_selective_state_update_params;

constexpr int kThreads = 128;

// kRows batch rows, d_state = kLanes * V states, V of them (16 bytes) to a lane.
template <typename T, typename S, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Params p, int group_dim) {
  constexpr int V = 16 / sizeof(S), N = kLanes * V;
  const int channel = (blockIdx.x * kThreads + threadIdx.x) / kLanes, q = threadIdx.x % kLanes;
  const bool active = channel < p.dim;
  const int c = active ? channel : p.dim - 1;  // idle lanes shadow the last channel, for the shuffles
  const int g = p.ngroups == 1 ? 0 : c / group_dim, b0 = blockIdx.y * kRows;

  uint4 raw[kRows];
  T u[kRows], delta[kRows], z[kRows];
  float A[V], B[kRows][V], C[kRows][V];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int b = min(b0 + r, p.batch - 1);
    raw[r] = *reinterpret_cast<const uint4*>(static_cast<const S*>(p.state_in) + (int64_t(b) * p.dim + c) * N + q * V);
    u[r] = static_cast<const T*>(p.u)[b * p.u_batch_stride + c];
    delta[r] = static_cast<const T*>(p.delta)[b * p.delta_batch_stride + c];
    z[r] = p.z ? static_cast<const T*>(p.z)[b * p.z_batch_stride + c] : from_float<T>(0.0f);
    const T* pb = static_cast<const T*>(p.B) + b * p.B_batch_stride + g * N + q * V;
    const T* pc = static_cast<const T*>(p.C) + b * p.C_batch_stride + g * N + q * V;
#pragma unroll
    for (int i = 0; i < V; i++) B[r][i] = to_float(pb[i]), C[r][i] = to_float(pc[i]);
  }
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    *reinterpret_cast<float4*>(A + i) = *reinterpret_cast<const float4*>(p.A + int64_t(c) * N + q * V + i);
  }
  const float bias = p.delta_bias ? p.delta_bias[c] : 0.0f, D = p.D ? p.D[c] : 0.0f;
#pragma unroll
  for (int i = 0; i < V; i++) A[i] *= kLog2e;

#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const float x = to_float(u[r]), sp = softplus<true>(to_float(delta[r]) + bias);
    const float dt = p.delta_softplus ? sp : to_float(delta[r]) + bias, dx = dt * x;
    pair_t<S>* pairs = reinterpret_cast<pair_t<S>*>(&raw[r]);
    float y = 0.0f;
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      float2 h = to_float2(pairs[i / 2]);
      h.x = fmaf(ex2(dt * A[i]), h.x, dx * B[r][i]);
      h.y = fmaf(ex2(dt * A[i + 1]), h.y, dx * B[r][i + 1]);
      y = fmaf(C[r][i], h.x, y);
      y = fmaf(C[r][i + 1], h.y, y);
      pairs[i / 2] = from_float2<S>(h.x, h.y);
    }
#pragma unroll
    for (int o = 1; o < kLanes; o *= 2) y += __shfl_xor_sync(~0u, y, o);
    y = fmaf(D, x, y);
    if (p.z) y *= silu(to_float(z[r]));
    if (active && b0 + r < p.batch) {
      const int64_t b = b0 + r;
      *reinterpret_cast<uint4*>(static_cast<S*>(p.state_out) + (b * p.dim + c) * N + q * V) = raw[r];
      if (q == 0) static_cast<T*>(p.y)[b * p.y_batch_stride + c] = from_float<T>(y);
    }
  }
}

// Any d_state, any alignment: eight lanes to a channel, states in strides of eight.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) generic_kernel(const __grid_constant__ Params p) {
  const int channel = (blockIdx.x * kThreads + threadIdx.x) / 8, q = threadIdx.x % 8, N = p.d_state;
  const bool active = channel < p.dim;
  const int c = active ? channel : p.dim - 1, g = c / (p.dim / p.ngroups);
  const int64_t b = blockIdx.y;
  const float x = to_float(static_cast<const T*>(p.u)[b * p.u_batch_stride + c]);
  const float v = to_float(static_cast<const T*>(p.delta)[b * p.delta_batch_stride + c]) + (p.delta_bias ? p.delta_bias[c] : 0.0f);
  const float dt = p.delta_softplus ? softplus<true>(v) : v;
  const T* B = static_cast<const T*>(p.B) + b * p.B_batch_stride + g * N;
  const T* C = static_cast<const T*>(p.C) + b * p.C_batch_stride + g * N;
  const int64_t at = (b * p.dim + c) * N;
  float y = 0.0f;
  for (int n = q; n < N && active; n += 8) {
    float h = to_float(static_cast<const S*>(p.state_in)[at + n]);
    h = fmaf(ex2(dt * kLog2e * p.A[int64_t(c) * N + n]), h, dt * x * to_float(B[n]));
    y = fmaf(to_float(C[n]), h, y);
    static_cast<S*>(p.state_out)[at + n] = from_float<S>(h);
  }
#pragma unroll
  for (int o = 1; o < 8; o *= 2) y += __shfl_xor_sync(~0u, y, o);
  if (p.D) y = fmaf(p.D[c], x, y);
  if (p.z) y *= silu(to_float(static_cast<const T*>(p.z)[b * p.z_batch_stride + c]));
  if (active && q == 0) static_cast<T*>(p.y)[b * p.y_batch_stride + c] = from_float<T>(y);
}

size_t dtype_size(int dtype) { return dtype == MAMBA_F32 ? 4 : 2; }

bool covers_vectors(const Params& p) {
  const int v = int(16 / dtype_size(p.state_dtype)), lanes = p.d_state / v;
  return p.d_state % v == 0 && (lanes == 2 || lanes == 4 || lanes == 8 || lanes == 16) && aligned(p.state_in, 16) &&
         aligned(p.state_out, 16) && aligned(p.A, 16);
}

// Rows to a thread: more of them share A, fewer fill the device at small batches.
int select(const Params& p) {
  if (!covers_vectors(p)) return 0;
  const double threads = double(p.batch) * p.dim * p.d_state * dtype_size(p.state_dtype) / 16;
  int rows = 4;
  while (rows > 1 && (threads / rows < 2048.0 * sm_count() || p.batch < rows)) rows /= 2;
  return rows;
}

template <typename T, typename S, int kLanes> int launch_rows(const Params& p, int rows, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.dim * kLanes, kThreads), ceil_div(p.batch, rows));
  switch (rows) {
    case 1: update_kernel<T, S, kLanes, 1><<<grid, kThreads, 0, stream>>>(p, p.dim / p.ngroups); break;
    case 2: update_kernel<T, S, kLanes, 2><<<grid, kThreads, 0, stream>>>(p, p.dim / p.ngroups); break;
    case 4: update_kernel<T, S, kLanes, 4><<<grid, kThreads, 0, stream>>>(p, p.dim / p.ngroups); break;
    default: return MAMBA_ERROR_TACTIC;
  }
  return launch_status();
}

template <typename T, typename S> int launch(const Params& p, int rows, cudaStream_t stream) {
  if (rows == 0) {
    generic_kernel<T, S><<<dim3(ceil_div(p.dim * 8, kThreads), p.batch), kThreads, 0, stream>>>(p);
    return launch_status();
  }
  if (!covers_vectors(p)) return MAMBA_ERROR_TACTIC;
  switch (p.d_state * int(sizeof(S)) / 16) {
    case 2: return launch_rows<T, S, 2>(p, rows, stream);
    case 4: return launch_rows<T, S, 4>(p, rows, stream);
    case 8: return launch_rows<T, S, 8>(p, rows, stream);
    default: return launch_rows<T, S, 16>(p, rows, stream);
  }
}

int check(const Params& p) {
  if (!p.u || !p.delta || !p.A || !p.B || !p.C || !p.y || !p.state_in || !p.state_out) return MAMBA_ERROR_NULL_POINTER;
  if (p.batch < 1 || p.batch > 65535 || p.dim < 1 || p.ngroups < 1 || p.dim % p.ngroups != 0 || p.d_state < 1) {
    return MAMBA_ERROR_SHAPE;
  }
  return MAMBA_OK;
}

}  // namespace
}  // namespace mamba::update

extern "C" int mamba_selective_state_update(const mamba_selective_state_update_params* params, mamba_stream stream) {
  using namespace mamba;
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  const int status = update::check(*params);
  if (status != MAMBA_OK) return status;
  const int rows = params->tactic < 0 ? update::select(*params) : params->tactic;
  return dispatch(params->dtype, [&](auto t) {
    return dispatch(params->state_dtype, [&](auto s) {
      return update::launch<decltype(t), decltype(s)>(*params, rows, static_cast<cudaStream_t>(stream));
    });
  });
}

extern "C" size_t mamba_selective_state_update_workspace(const mamba_selective_state_update_params*) { return 0; }

extern "C" int mamba_selective_state_update_tactics(const mamba_selective_state_update_params* params, int32_t* out,
                                                    int max) {
  if (!params || max < 1 || mamba::update::check(*params) != MAMBA_OK) return 0;
  out[0] = mamba::update::select(*params);
  int count = 1;
  for (int rows : {0, 1, 2, 4}) {
    if (count < max && rows != out[0] && (rows == 0 || out[0] != 0)) out[count++] = rows;
  }
  return count;
}
