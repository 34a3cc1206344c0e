// selective_scan, tactic "ring": the states of a row go round a ring of warps, on one multiprocessor or several.
//
// A group is 32 channels of a row, a lane has one of them with all its states. A warp takes 16 tokens (a tile) of its group:
// it copies them in for itself, keeps dt, dt * u and y in registers and goes through the states one by one. For each it waits
// for the value at the end of the tile before, which another warp has, runs the recurrence and hands the value on.
//
// A cluster of blocks owns K groups. W warps of each block take W tiles of a group in a row, then those of the next
// block go on: one hand-over in W crosses multiprocessors. A value travels with the number of the tile it is for, in one
// 64-bit store that its reader waits for; there are no barriers. A place is written again only after the value of the round
// before has gone through its reader, since all later ones derive from it.
#pragma once

#include <type_traits>

#include "selective_scan_ring_copy.cuh"

namespace mamba::scan {

// ---- a value on its way ----

// A state with the tile it is for.
__device__ __forceinline__ uint64_t tagged(float h, uint32_t tag) { return uint64_t(tag) << 32 | __float_as_uint(h); }

// The state before the tile, once it is there.
__device__ __forceinline__ float wait_for(const uint64_t* place, uint32_t tag) {
  uint64_t both;
  do both = look(place);
  while (uint32_t(both >> 32) != tag);
  return __uint_as_float(uint32_t(both));
}

// ---- a tile ----

template <typename T> struct RingTile {
  using R = Ring<T>;
  static constexpr int kTokens = R::kTokens;
  float dt[kTokens], du[kTokens], y[kTokens];

  __device__ __forceinline__ void read(const R& s, int valid, float bias, float D, bool use_softplus) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      const float u = to_float(s.u[t][lane]);
      dt[t] = time_step<T>(to_float(s.delta[t][lane]) + bias, use_softplus);
      y[t] = D * u, du[t] = dt[t] * u;
    }
    if (valid < kTokens) {  // past the end of the row; what is there may be NaN
#pragma unroll
      for (int t = 0; t < kTokens; t++) {
        if (t >= valid) dt[t] = du[t] = 0.0f;
      }
    }
  }

  // Through all states; `after` is where this lane's first one goes, in this block or (kRemote) another. A state's
  // decays and inputs are made where those of the state before have just been used: special-function instructions in a
  // row would have the hand-overs queue behind them.
  template <bool kRemote> __device__ __forceinline__ void states(const R& s, const float* A, uint32_t after, uint32_t tile) {
    float a[kTokens], b[kTokens];  // decays; what comes in
    const uint64_t* before = &s.before[0][threadIdx.x % 32];
    const float* bc = s.bc[0];
#pragma unroll
    for (int t = 0; t < kTokens; t += 4) {
      const Vec<float, 4> B = load_vec<float, 4>(bc + t);
#pragma unroll
      for (int r = 0; r < 4; r++) a[t + r] = ex2(dt[t + r] * A[0]), b[t + r] = du[t + r] * B.v[r];
    }
    auto state = [&](auto last) {
      const float following = last ? 0.0f : A[R::kWidth];
      float h = wait_for(before, tile);
#pragma unroll
      for (int t = 0; t < kTokens; t += 4) {
        const Vec<float, 4> C = load_vec<float, 4>(bc + kState * R::kRow + t);
        Vec<float, 4> B{};
        if (!last) B = load_vec<float, 4>(bc + R::kRow + t);
#pragma unroll
        for (int r = 0; r < 4; r++) {
          h = fmaf(a[t + r], h, b[t + r]);
          y[t + r] = fmaf(C.v[r], h, y[t + r]);
          if (!last) a[t + r] = ex2(dt[t + r] * following), b[t + r] = du[t + r] * B.v[r];
        }
      }
      hand_on<kRemote>(after, tagged(h, tile + 1));
    };
#pragma unroll 5
    for (int i = 0; i < kState - 1; i++) {
      state(std::false_type{});
      A += R::kWidth, before += R::kWidth, after += R::kWidth * sizeof(uint64_t), bc += R::kRow;
    }
    state(std::true_type{});
  }

  __device__ __forceinline__ void write(R& s, bool has_z) const {
    T* z = &s.z[0][threadIdx.x % R::kWidth];
    if (has_z) {
#pragma unroll
      for (int t = 0; t < kTokens; t++) z[t * R::kWidth] = from_float<T>(y[t] * silu(to_float(z[t * R::kWidth])));
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; t++) z[t * R::kWidth] = from_float<T>(y[t]);
    }
  }
};

// ---- all tiles of a warp ----

template <typename T>
__global__ void __launch_bounds__(32 * kRingWarps, 1) ring_kernel(const __grid_constant__ Args<T> p, int K, int W) {
  using R = Ring<T>;
  constexpr int kWidth = R::kWidth, kTokens = R::kTokens;
  const int rank = cluster_rank(), blocks = cluster_size(), cluster = blockIdx.x / blocks, b = blockIdx.y;
  const int clusters_per_group = ceil_div(p.group_dim, K * kWidth);
  const int group = cluster / clusters_per_group, end = (group + 1) * p.group_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = warp % K, w = warp / K;
  const int first = group * p.group_dim + cluster % clusters_per_group * K * kWidth, c0 = first + k * kWidth, c = c0 + lane;
  const int n = row_length(p, b), tiles = c0 < end ? ceil_div(n, kTokens) : 0, step = blocks * W;
  const bool in = c < end;

  extern __shared__ __align__(16) char shared[];
  R* all = reinterpret_cast<R*>(shared);  // [W][K]
  R& own = all[warp];
  float* A = reinterpret_cast<float*>(all + K * W) + k * kState * kWidth + lane;  // log2 units
  int tile = rank * W + w;
  const bool starts = tile == 0;  // the state before tile 0 waits for it already
  const int64_t row = int64_t(b) * p.dim + c;
  float of_channel[kState] = {};  // the state before the row, then A
  if (starts && in && p.h0) load_states(of_channel, p.h0 + row * kState);
#pragma unroll
  for (int s = 0; s < kState; s++) own.before[s][lane] = tagged(of_channel[s], starts ? 0 : ~0u);
  cluster_arrive();

  const RingCopier<T> copier(p, b, n, group, c0, end);
  auto fill = [&](int tile) {
    const int t0 = tile * kTokens;
    copier.fill(own.u, copier.u, t0), copier.fill(own.delta, copier.delta, t0), copier.fill_states(own, t0);
    cp_async_commit();
  };
  auto fill_z = [&](int tile) {
    if (p.z) copier.fill(own.z, copier.z, tile * kTokens);
    cp_async_commit();
  };
  fill(tile), fill_z(tile);
  if (w == 0 && in) {
    load_states(of_channel, p.A + int64_t(c) * kState);
#pragma unroll
    for (int s = 0; s < kState; s++) A[s * kWidth] = of_channel[s] * kLog2e;
  }
  const float bias = in && p.bias ? p.bias[c] : 0.0f, D = in && p.D ? p.D[c] : 0.0f;
  const bool remote = w == W - 1 && blocks > 1;
  const uint32_t stay = smem_address(&own.before[0][lane]);  // the last tile's states stay, having been read
  const uint64_t* reader = &all[(w == W - 1 ? 0 : w + 1) * K + k].before[0][lane];
  const uint32_t next = remote ? cluster_address(reader, (rank + 1) % blocks) : smem_address(reader);
  cluster_wait();

  for (; tile < tiles; tile += step) {
    const int valid = n - tile * kTokens;
    RingTile<T> work;
    cp_async_wait<1>();  // not for z
    __syncwarp();
    work.read(own, valid, bias, D, p.softplus);
    ring_states(own, valid);
    __syncwarp();
    fill(tile + step);
    if (remote && tile + 1 < tiles) {
      work.template states<true>(own, A, next, tile);
    } else {
      work.template states<false>(own, A, tile + 1 < tiles ? next : stay, tile);
    }
    cp_async_wait<1>();  // z; the next tile may be on its way
    __syncwarp();
    work.write(own, p.z);
    __syncwarp();
    copier.write_y(own, tile * kTokens);
    __syncwarp();
    fill_z(tile + step);
  }
  cp_async_wait<0>();
  if (p.hT && in && (tiles > 0 ? tile - step == tiles - 1 : starts)) {
    float* to = p.hT + row * kState;
#pragma unroll 1
    for (int s = 0; s < kState; s++) to[s] = __uint_as_float(uint32_t(look(&own.before[s][lane])));
  }
  zero_padding(p, b, n, first, min(first + K * kWidth, end), rank, blocks);
}

}  // namespace mamba::scan
