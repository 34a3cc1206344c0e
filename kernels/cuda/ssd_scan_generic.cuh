// The SSD scan for any headdim and d_state and for float32, in plain FFMA: chunked like the tensor-core kernel, so
// the time steps of a chunk run in parallel. A block owns kCols columns (of headdim) of one head, its state in
// shared memory; all operands are widened to float32 there.
#pragma once

#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

template <typename T_, int kChunk_, int kCols_>
struct Generic {
  using T = T_;
  static constexpr int kChunk = kChunk_, kCols = kCols_, kThreads = 256;
  static_assert(kChunk <= 32, "the decays of a chunk are made by one warp");

  // Row length of the tiles over d_state: whole float4s, and four floats of padding against bank conflicts.
  static __host__ __device__ int stride(int d_state) { return (d_state + 3) / 4 * 4 + 4; }
  static __host__ __device__ int shared_bytes(int d_state) {
    return 4 * ((2 * kChunk + kCols) * stride(d_state) + kChunk * (kCols + 4) + kChunk * (kChunk + 4) + 4 * kChunk);
  }
};

// dst[row][col] = src[row][col] as floats, zero outside rows x cols.
template <typename T>
__device__ __forceinline__ void load_widened(float* dst, int stride, int all_rows, int all_cols, const T* src,
                                             int64_t src_stride, int rows, int cols) {
  for (int idx = threadIdx.x; idx < all_rows * all_cols; idx += blockDim.x) {
    const int row = idx / all_cols, col = idx % all_cols;
    dst[row * stride + col] = row < rows && col < cols ? to_float(src[row * src_stride + col]) : 0.f;
  }
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float acc) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, acc))));
}

// out(r, c, sum over k of a[r][k] b[c][k]) for a grid of rows x cols, 2 x 2 a thread; k in fours.
template <typename Out>
__device__ __forceinline__ void product_nt(const float* a, const float* b, int stride, int rows, int cols, int depth,
                                           Out out) {
  for (int tile = threadIdx.x; tile < rows / 2 * (cols / 2); tile += blockDim.x) {
    // Rows r and r + half: neighbouring threads then read neighbouring rows.
    const int r = tile / (cols / 2), c = tile % (cols / 2);
    const float *a0 = a + r * stride, *a1 = a0 + rows / 2 * stride, *b0 = b + c * stride, *b1 = b0 + cols / 2 * stride;
    float s00 = 0.f, s01 = 0.f, s10 = 0.f, s11 = 0.f;
    for (int k = 0; k < depth; k += 4) {
      const float4 u0 = *reinterpret_cast<const float4*>(a0 + k), u1 = *reinterpret_cast<const float4*>(a1 + k);
      const float4 v0 = *reinterpret_cast<const float4*>(b0 + k), v1 = *reinterpret_cast<const float4*>(b1 + k);
      s00 = dot4(u0, v0, s00), s01 = dot4(u0, v1, s01), s10 = dot4(u1, v0, s10), s11 = dot4(u1, v1, s11);
    }
    out(r, c, s00), out(r, c + cols / 2, s01), out(r + rows / 2, c, s10), out(r + rows / 2, c + cols / 2, s11);
  }
}

template <typename G, bool kStateOnly>
__global__ void __launch_bounds__(G::kThreads) ssd_generic_kernel(const __grid_constant__ ScanArgs p) {
  using T = typename G::T;
  constexpr int Q = G::kChunk, P = G::kCols, kInput = P + 4, kScores = Q + 4;
  extern __shared__ __align__(16) float smem[];
  const int stride = G::stride(p.d_state), width = stride - 4;
  float* h = smem;
  float* B = h + P * stride;
  float* C = B + Q * stride;
  float* x = C + Q * stride;
  float* scores = x + Q * kInput;
  float* sum = scores + Q * kScores;  // then dt, to_end, from_start
  float *dt = sum + Q, *to_end = dt + Q, *from_start = to_end + Q;

  const int tiles = (p.headdim + P - 1) / P, head = blockIdx.x / tiles, col0 = blockIdx.x % tiles * P;
  const int split = blockIdx.y, batch = blockIdx.z, group = head / (p.nheads / p.ngroups);
  const int64_t chunks = (p.seqlen + Q - 1) / Q;
  const int begin = static_cast<int>(chunks * split / p.splits) * Q;
  const int cols = min(P, p.headdim - col0), end = min(p.seqlen, static_cast<int>(chunks * (split + 1) / p.splits) * Q);
  const int len = p.seq_lens ? max(0, min(p.seqlen, p.seq_lens[batch])) : p.seqlen, limit = min(len, end);
  const int col = p.column(head) + col0;  // of the token
  const int64_t state = p.state_at(batch, head) + static_cast<int64_t>(col0) * p.d_state;
  const int64_t split_rows =
      ((static_cast<int64_t>(batch) * p.nheads + head) * p.splits + split) * p.headdim + col0;
  const T* x_row = static_cast<const T*>(p.x) + batch * p.x_batch + col;
  const T* z_row = static_cast<const T*>(p.z) + batch * p.z_batch + col;
  const T* B_row = static_cast<const T*>(p.B) + batch * p.B_batch + group * p.d_state;
  const T* C_row = static_cast<const T*>(p.C) + batch * p.C_batch + group * p.d_state;
  T* y_row = static_cast<T*>(p.y) + batch * p.y_batch + col;

  const float* h0 = kStateOnly ? nullptr
                    : p.splits > 1 ? p.split_state + split_rows * p.d_state
                    : p.initial_state ? p.initial_state + state : nullptr;
  load_widened(h, stride, P, width, h0, p.d_state, h0 ? cols : 0, p.d_state);

  const int of = p.step_head(head);
  const float a = p.A[of] * kLog2e, bias = p.dt_bias ? p.dt_bias[of] : 0.f;
  double decay_sum = 0.0;
  for (int t0 = begin; t0 < limit; t0 += Q) {
    const int rows = min(Q, limit - t0);
    __syncthreads();
    load_widened(B, stride, Q, width, B_row + t0 * p.B_token, p.B_token, rows, p.d_state);
    if (!kStateOnly) load_widened(C, stride, Q, width, C_row + t0 * p.C_token, p.C_token, rows, p.d_state);
    load_widened(x, kInput, Q, P, x_row + t0 * p.x_token, p.x_token, rows, cols);
    if (threadIdx.x < 32) {
      const int t = threadIdx.x;
      float v = 0.f;
      if (t < rows) {
        v = to_float(static_cast<const T*>(p.dt)[batch * p.dt_batch + (t0 + t) * p.dt_token + of]) + bias;
        if (p.dt_softplus) v = softplus<true>(v);
        v = fminf(fmaxf(v, p.dt_min), p.dt_max);
      }
      // In double, so that float32 inputs keep their precision; only differences become float.
      double s = fmaxf(v * a, kMinLog2Decay);
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, s, d);
        if (t >= d) s += other;
      }
      const double total = __shfl_sync(0xffffffffu, s, Q - 1);
      decay_sum += total;
      if (t < Q) {
        dt[t] = v;
        to_end[t] = v * exp2f(static_cast<float>(total - s));
        from_start[t] = exp2f(static_cast<float>(s));
      }
      if (!kStateOnly) {
        for (int other = 0; other < Q; other++) {
          const double before = __shfl_sync(0xffffffffu, s, other);
          if (t < Q) scores[t * kScores + other] = t >= other ? exp2f(static_cast<float>(s - before)) : 0.f;
        }
      }
    }
    __syncthreads();
    if (!kStateOnly) {
      product_nt(C, B, stride, Q, Q, width, [&](int t, int s, float v) {
        float& at = scores[t * kScores + s];
        at = t >= s ? v * at * dt[s] : 0.f;
      });
      __syncthreads();
      product_nt(C, h, stride, Q, P, width, [&](int t, int c, float v) {
        if (t >= rows || c >= cols) return;
        float acc = v * from_start[t];
        for (int s = 0; s <= t; s++) acc = fmaf(scores[t * kScores + s], x[s * kInput + c], acc);
        if (p.D) acc = fmaf(p.D[p.d_per_channel ? col + c : of], x[t * kInput + c], acc);
        if (p.z) acc *= silu(to_float(z_row[(t0 + t) * p.z_token + c]));
        y_row[(t0 + t) * p.y_token + c] = from_float<T>(acc);
      });
      __syncthreads();
    }
    for (int idx = threadIdx.x; idx < Q * P; idx += blockDim.x) x[idx / P * kInput + idx % P] *= to_end[idx / P];
    __syncthreads();
    const float decay = from_start[Q - 1];
    for (int tile = threadIdx.x; tile < P / 4 * (width / 4); tile += blockDim.x) {
      const int c = tile / (width / 4) * 4, n = tile % (width / 4) * 4;
      float4 acc[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        acc[i] = *reinterpret_cast<float4*>(h + (c + i) * stride + n);
        acc[i].x *= decay, acc[i].y *= decay, acc[i].z *= decay, acc[i].w *= decay;
      }
      for (int s = 0; s < rows; s++) {
        const float4 b = *reinterpret_cast<const float4*>(B + s * stride + n);
        const float4 u = *reinterpret_cast<const float4*>(x + s * kInput + c);
        const float w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          acc[i].x = fmaf(w[i], b.x, acc[i].x), acc[i].y = fmaf(w[i], b.y, acc[i].y);
          acc[i].z = fmaf(w[i], b.z, acc[i].z), acc[i].w = fmaf(w[i], b.w, acc[i].w);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) *reinterpret_cast<float4*>(h + (c + i) * stride + n) = acc[i];
    }
  }
  __syncthreads();

  float* out = kStateOnly                       ? p.split_state + split_rows * p.d_state
               : split == p.splits - 1 ? p.final_state : nullptr;
  if (out && !kStateOnly) out += state;
  if (out) {
    for (int idx = threadIdx.x; idx < cols * p.d_state; idx += blockDim.x)
      out[idx] = h[idx / p.d_state * stride + idx % p.d_state];
  }
  if (kStateOnly) {
    if (threadIdx.x == 0 && col0 == 0)
      p.split_decay[(static_cast<int64_t>(batch) * p.nheads + head) * p.splits + split] = static_cast<float>(decay_sum);
    return;
  }
  const int first = max(begin, len);
  for (int idx = threadIdx.x; idx < (end - first) * cols; idx += blockDim.x)
    y_row[(first + idx / cols) * p.y_token + idx % cols] = from_float<T>(0.f);
}

}  // namespace ssd
}  // namespace mamba
