// selective_scan, tactic "chain": the exponentials of many tokens at once, the recurrence handed from warp to warp.
//
// A block owns K groups of G channels for the whole sequence (or one piece of it). Its W warps take tiles of kTau
// tokens in turn: warp w has tiles w, w + W, ... of all K groups. For a (group, tile) a warp computes the decays
// exp(dt A) of its tokens into registers, which needs no state and is where the special-function unit binds; then it
// waits for the state from the warp that has the tile before, runs the short chain h = a h + b, hands h on, and only
// then forms y. So time is parallel without any exponential computed twice, and even 12 channels fill an SM.
//
// Lanes: G channels x (32 / G) lanes, each lane with G / 2 of the 16 states. All shared memory but the state slots
// is private to a warp.
#pragma once

#include <type_traits>

#include "selective_scan.cuh"

namespace mamba::scan {

template <int G> struct Chain {
  static constexpr int kTau = 64 / G;       // tokens of a tile: a lane keeps kTau * kS = 32 decays
  static constexpr int kLanes = 32 / G;     // lanes of a channel
  static constexpr int kS = kState / kLanes;
  static constexpr int kPairs = G / 2;      // for loads and stores a lane has one token and two channels
  // Row pitches (floats) that make every access pattern below free of bank conflicts.
  static constexpr int kRow = G == 4 ? 24 : 12;
  static constexpr int kPart = G * kRow + (G == 4 ? 4 : 8);
  // B (then C) of a tile, float32: rows of 16 states, for G = 4 two tokens interleaved so that one 16-byte load
  // gives a lane its two states of both.
  static constexpr int kBcRow = G == 4 ? 36 : 16;
  static constexpr int kBc = kTau * kState / (G == 4 ? 32 : 16) * kBcRow;
  static constexpr int kScratch = kLanes * kPart > 2 * kBc ? kLanes * kPart : 2 * kBc;  // B and C, later partial y
  static constexpr int kWarpFloats = kScratch + 2 * G * kRow;
  // Activations move in runs of four channels; a lane has row lane % kTau and every kRunStep-th run of it.
  static constexpr int kRunStep = 32 / kTau;
  static constexpr int kRunSteps = 3;  // so at most kRunStep * kRunSteps runs: 24 channels with G = 4, 48 with G = 8

  static constexpr int kSlot = 32 * kS;  // a group's states in transit

  // Tiles of u, delta, z (two buffers) and y of a warp, in elements.
  static __host__ __device__ int tile_elements(int K) { return 7 * kTau * K * G; }
  static size_t shared_bytes(int K, int W, size_t element) {
    size_t floats = W * kWarpFloats + K * W * kSlot + K * 32 * kS + 2 * K * G + W * K * G;
    return floats * sizeof(float) + (K * W + 1) / 2 * 2 * sizeof(uint64_t) + W * tile_elements(K) * element;
  }
};

template <int S> __device__ __forceinline__ void load_run(float (&r)[S], const float* p) {
  Vec<float, S> v = load_vec<float, S>(p);
#pragma unroll
  for (int s = 0; s < S; s++) r[s] = v.v[s];
}

template <typename T, int G> __device__ __forceinline__ void stage_bc(float* bc, int token, int half, const Run<T>& run) {
  using L = Chain<G>;
  if constexpr (G == 4) {
    float f[8];
    to_floats(f, run);
    float* dst = bc + token / 2 * L::kBcRow + half * 16 + token % 2 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) *reinterpret_cast<float2*>(dst + 4 * j) = make_float2(f[2 * j], f[2 * j + 1]);
  } else {
    stage_states(bc + token * L::kBcRow + half * 8, run);
  }
}
template <int G, int kTau, int kS> __device__ __forceinline__ void load_bc_rows(float (&r)[kTau][kS], const float* bc, int q) {
  constexpr int kTokens = 4 / kS;  // tokens a 16-byte load brings
#pragma unroll
  for (int t = 0; t < kTau; t += kTokens) {
    const float4 v = *reinterpret_cast<const float4*>(bc + t / kTokens * Chain<G>::kBcRow + q * 4);
    r[t][0] = v.x, r[t][1] = v.y;
    r[t + (kTokens - 1)][kS - 2] = v.z, r[t + (kTokens - 1)][kS - 1] = v.w;
  }
}

template <typename T, int G, bool kStateOnly>
__global__ void __launch_bounds__(384, 1) chain_kernel(const __grid_constant__ Args<T> p, int K) {
  using L = Chain<G>;
  using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;  // a run of four channels
  constexpr int kTau = L::kTau, kS = L::kS, kLanes = L::kLanes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, W = blockDim.x / 32;
  const int b = blockIdx.y, piece = blockIdx.z;
  const int width = K * G;
  const int blocks_per_group = ceil_div(p.group_dim, width);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * width;
  const int c1 = min(c0 + width, (group + 1) * p.group_dim);
  const int row = row_length(p, b);
  const int t_begin = min(piece * p.piece_len, row), t_end = min(t_begin + p.piece_len, row);
  const int tiles = ceil_div(t_end - t_begin, kTau);

  extern __shared__ __align__(16) float shared[];
  float* scratch = shared + warp * L::kWarpFloats;
  float* s_dt = scratch + L::kScratch;
  float* s_dtu = s_dt + G * L::kRow;
  float* slots = shared + W * L::kWarpFloats;  // [K][W][kSlot] states in transit
  float* s_A = slots + K * W * L::kSlot;       // [K][32][kS]
  float* s_bias = s_A + K * 32 * kS;           // [K * G]
  float* s_D = s_bias + width;                 // [K * G]
  float* s_sum = s_D + width;                  // [W][K * G] sums of dt, state-only pass
  uint64_t* ready = reinterpret_cast<uint64_t*>(s_sum + W * width);  // [K][W]: the warp's states are in its slot
  T* tiles_smem = reinterpret_cast<T*>(ready + (K * W + 1) / 2 * 2) + warp * L::tile_elements(K);  // u, delta, z, u, delta, z, y
  const int tile_size = kTau * width;

  // State lanes: channel sc of the group, states sq*kS .. Load lanes: token lt of the tile, channels lc, lc + 1.
  const int sc = lane / kLanes, sq = lane % kLanes;
  const int lt = lane / L::kPairs, lc = 2 * (lane % L::kPairs);

  const int64_t dir = p.reverse ? -1 : 1;
  const int64_t first = p.reverse ? row - 1 - t_begin : t_begin;  // memory position of the piece's first token
  const int n_tokens = t_end - t_begin;
  const bool use_softplus = p.softplus, has_z = !kStateOnly && p.z;
  auto at = [&](auto* base, const Strides& s, int t) { return base + b * s.batch + (first + dir * t) * s.token; };

  // Activations: runs of four channels by cp.async, one tile ahead. Where a token or channel is out of range the
  // values of an earlier tile (at first zeros) stay: there dt = 0, and y is not stored.
  const int run_row = lane % kTau, run_c = lane / kTau * 4;
  const int64_t jump = dir * W * kTau;
  const T* pu = at(p.u, p.u_stride, warp * kTau + run_row) + c0 + run_c;
  const T* pd = at(p.delta, p.delta_stride, warp * kTau + run_row) + c0 + run_c;
  const T* pz = at(has_z ? p.z : p.u, has_z ? p.z_stride : p.u_stride, warp * kTau + run_row) + c0 + run_c;
  T* py = at(p.y, p.y_stride, warp * kTau + run_row) + c0 + run_c;
  const int my_width = c1 - c0 - run_c;
  auto load_u = [&](int tile, int buffer) {
    T* dst = tiles_smem + buffer * 3 * tile_size + run_row * width + run_c;
    if (tile * kTau + run_row < n_tokens) {
#pragma unroll
      for (int i = 0; i < L::kRunSteps; i++) {
        const int c = 4 * L::kRunStep * i;
        if (c < my_width) {
          cp_async<4 * sizeof(T)>(dst + c, pu + c);
          cp_async<4 * sizeof(T)>(dst + tile_size + c, pd + c);
          if (has_z) cp_async<4 * sizeof(T)>(dst + 2 * tile_size + c, pz + c);
        }
      }
    }
    cp_async_commit();
    pu += jump * p.u_stride.token, pd += jump * p.delta_stride.token, pz += jump * p.z_stride.token;
  };
  auto store_y = [&](int tile) {
    const T* src = tiles_smem + 6 * tile_size + run_row * width + run_c;
    if (tile * kTau + run_row < n_tokens) {
#pragma unroll
      for (int i = 0; i < L::kRunSteps; i++) {
        const int c = 4 * L::kRunStep * i;
        if (c < my_width) *reinterpret_cast<Four*>(py + c) = *reinterpret_cast<const Four*>(src + c);
      }
    }
    py += jump * p.y_stride.token;
  };

  // B and C: a tile is kTau rows of 16 states each; lanes take runs of eight.
  constexpr int kRuns = kTau * kState / 8;  // of B, and again of C
  constexpr int kPerLane = 2 * kRuns / 32;
  const T* pbc[kPerLane];
  int64_t bc_jump[kPerLane];
  Run<T> raw[kPerLane] = {};  // past the end the values of the tile before stay; there dt = 0 and y is not stored
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const int run = lane + 32 * i, r = run % kRuns;
    const bool is_b = run < kRuns;
    pbc[i] = at(is_b ? p.B : p.C, is_b ? p.B_stride : p.C_stride, warp * kTau + r / 2) + group * kState + (r % 2) * 8;
    bc_jump[i] = jump * (is_b ? p.B_stride.token : p.C_stride.token);
  }
  auto load_bc = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (tile * kTau + (lane + 32 * i) % kRuns / 2 < n_tokens) load_run8<T, true>(raw[i], pbc[i]);
      pbc[i] += bc_jump[i];
    }
  };
  for (int i = lane; i < L::tile_elements(K); i += 32) tiles_smem[i] = from_float<T>(0.0f);
  __syncwarp();
  load_u(warp, 0);
  load_bc(warp);

  for (int i = threadIdx.x; i < K * 32 * kS; i += blockDim.x) {
    int c = c0 + i / kState, n = i % kState;  // [K][lane][kS] is [channel][state]
    s_A[i] = c < c1 ? p.A[int64_t(c) * kState + n] * kLog2e : 0.0f;
  }
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    bool in = c0 + i < c1;
    s_bias[i] = in && p.bias ? p.bias[c0 + i] : 0.0f;
    s_D[i] = in && p.D ? p.D[c0 + i] : 0.0f;
  }
  if (kStateOnly) {
    for (int i = threadIdx.x; i < W * width; i += blockDim.x) s_sum[i] = 0.0f;
  }
  for (int i = threadIdx.x; i < K * W; i += blockDim.x) mbarrier_init(&ready[i], 1);
  __syncthreads();

  // The state before the first token of the piece goes where warp 0 looks for it: the last warp's slots.
  for (int i = threadIdx.x; i < K * 32 * kS; i += blockDim.x) {
    int k = i / (32 * kS), c = c0 + i / kState, n = i % kState;
    float h = 0.0f;
    if (c < c1 && !kStateOnly) {
      if (p.h0) h = p.h0[(int64_t(b) * p.dim + c) * kState + n];
      for (int j = 0; j < piece; j++) {
        int64_t at = (int64_t(b) * p.pieces + j) * p.dim + c;
        h = fmaf(ex2(s_A[i] * p.piece_dt[at]), h, p.piece_state[at * kState + n]);
      }
    }
    slots[(k * W + W - 1) * L::kSlot + i % L::kSlot] = h;
  }
  __syncthreads();

  const int from = warp == 0 ? W - 1 : warp - 1;
  int buffer = 0, parity = warp == 0;  // of the phase this warp waits for; warp 0 waits for the round before
  for (int tile = warp; tile < tiles; tile += W, buffer ^= 1, parity ^= 1) {
    float B[kTau][kS], C[kTau][kS];
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int run = lane + 32 * i, r = run % kRuns;
      stage_bc<T, G>(scratch + (run < kRuns ? 0 : L::kBc), r / 2, r % 2, raw[i]);
    }
    cp_async_wait<0>();
    __syncwarp();
    load_bc_rows<G>(B, scratch, sq);
    if (!kStateOnly) load_bc_rows<G>(C, scratch + L::kBc, sq);
    load_u(tile + W, buffer ^ 1);
    load_bc(tile + W);
    const bool in_range = tile * kTau + lt < n_tokens;
    const float *k_bias = s_bias + lc, *k_A = s_A + lane * kS, *slot_in = slots + from * L::kSlot + lane * kS;
    float* slot_out = slots + warp * L::kSlot + lane * kS;
    uint64_t *k_wait = ready + from, *k_signal = ready + warp;
    const T* k_u = tiles_smem + buffer * 3 * tile_size + lt * width + lc;
    T* k_y = tiles_smem + 6 * tile_size + lt * width + lc;

    for (int k = 0; k < K; k++) {
      const float2 u = to_float2(*reinterpret_cast<const pair_t<T>*>(k_u)), bias = *reinterpret_cast<const float2*>(k_bias);
      float2 dt = to_float2(*reinterpret_cast<const pair_t<T>*>(k_u + tile_size));
      // dt and dt * u, once per element, transposed through shared memory to the state lanes.
      dt.x = in_range ? time_step<T>(dt.x + bias.x, use_softplus) : 0.0f;
      dt.y = in_range ? time_step<T>(dt.y + bias.y, use_softplus) : 0.0f;
      float* row_dt = s_dt + lc * L::kRow + lt;
      row_dt[0] = dt.x;
      row_dt[L::kRow] = dt.y;
      row_dt[G * L::kRow] = dt.x * u.x;
      row_dt[G * L::kRow + L::kRow] = dt.y * u.y;
      if (kStateOnly) {
#pragma unroll
        for (int o = L::kPairs; o < 32; o *= 2) {
          dt.x += __shfl_xor_sync(~0u, dt.x, o);
          dt.y += __shfl_xor_sync(~0u, dt.y, o);
        }
        if (lt == 0) {
          s_sum[warp * width + k * G + lc] += dt.x;
          s_sum[warp * width + k * G + lc + 1] += dt.y;
        }
      }
      __syncwarp();

      float a[kTau][kS], A[kS], h[kS];
      load_run<kS>(A, k_A);
#pragma unroll
      for (int t0 = 0; t0 < kTau; t0 += 4) {
        float d4[4];
        load_run<4>(d4, s_dt + sc * L::kRow + t0);
#pragma unroll
        for (int t = 0; t < 4; t++) {
#pragma unroll
          for (int s = 0; s < kS; s++) a[t0 + t][s] = ex2(d4[t] * A[s]);
        }
      }

      float du[kTau];  // loaded before the wait: from here to the signal is the chain that every tile waits for
#pragma unroll
      for (int t = 0; t < kTau; t += 4) load_run<4>(*reinterpret_cast<float(*)[4]>(du + t), s_dtu + sc * L::kRow + t);
      if (tile > 0) mbarrier_wait(k_wait, parity);
      load_run<kS>(h, slot_in);
#pragma unroll
      for (int t = 0; t < kTau; t++) {
#pragma unroll
        for (int s = 0; s < kS; s++) {
          h[s] = fmaf(a[t][s], h[s], du[t] * B[t][s]);
          if (!kStateOnly) a[t][s] = h[s];
        }
      }
      Vec<float, kS> out;
#pragma unroll
      for (int s = 0; s < kS; s++) out.v[s] = h[s];
      store_vec<float, kS>(slot_out, out);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(k_signal);

      if (!kStateOnly) {
        // Partial sums over this lane's states, added across the channel's lanes in a fixed order.
#pragma unroll
        for (int t0 = 0; t0 < kTau; t0 += 4) {
          Vec<float, 4> y;
#pragma unroll
          for (int t = 0; t < 4; t++) {
            float v = C[t0 + t][0] * a[t0 + t][0];
#pragma unroll
            for (int s = 1; s < kS; s++) v = fmaf(C[t0 + t][s], a[t0 + t][s], v);
            y.v[t] = v;
          }
          store_vec<float, 4>(scratch + sq * L::kPart + sc * L::kRow + t0, y);
        }
        __syncwarp();
        const float2 D = *reinterpret_cast<const float2*>(k_bias + width);
        float y0 = D.x * u.x, y1 = D.y * u.y;
        const float* part = scratch + lc * L::kRow + lt;
#pragma unroll
        for (int q = 0; q < kLanes; q++) {
          y0 += part[q * L::kPart];
          y1 += part[q * L::kPart + L::kRow];
        }
        const float2 z = to_float2(*reinterpret_cast<const pair_t<T>*>(k_u + 2 * tile_size));
        y0 *= has_z ? silu(z.x) : 1.0f;
        y1 *= has_z ? silu(z.y) : 1.0f;
        *reinterpret_cast<pair_t<T>*>(k_y) = from_float2<T>(y0, y1);
      }
      k_u += G, k_y += G, k_bias += G, k_A += 32 * kS, slot_in += W * L::kSlot, slot_out += W * L::kSlot, k_wait += W, k_signal += W;
    }
    __syncwarp();  // y is complete; scratch is staged over next
    if (!kStateOnly) store_y(tile);
  }

  __syncthreads();
  const int last = (tiles + W - 1) % W;  // the warp that had the last tile; W - 1 still holds the start if none
  const bool finish = kStateOnly || (p.hT && piece == p.pieces - 1);
  for (int i = threadIdx.x; finish && i < K * 32 * kS; i += blockDim.x) {
    int k = i / (32 * kS), c = c0 + i / kState, n = i % kState;
    float h = slots[(k * W + last) * L::kSlot + i % L::kSlot];
    int64_t dst = kStateOnly ? ((int64_t(b) * p.pieces + piece) * p.dim + c) : (int64_t(b) * p.dim + c);
    if (c < c1) (kStateOnly ? p.piece_state : p.hT)[dst * kState + n] = h;
  }
  if (kStateOnly) {
    for (int i = threadIdx.x; i < width && c0 + i < c1; i += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < W; w++) sum += s_sum[w * width + i];
      p.piece_dt[(int64_t(b) * p.pieces + piece) * p.dim + c0 + i] = sum;
    }
  } else if (piece == p.pieces - 1) {
    zero_padding(p, b, row, c0, c1);
  }
}

}  // namespace mamba::scan
