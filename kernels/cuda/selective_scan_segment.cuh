// selective_scan, tactic "segment": time in parallel inside a warp. For small batch x channels and short rows.
//
// A warp has two channels and a chunk of 16 segments of kTau tokens: a lane is one channel of one segment. For each
// state it computes the kTau decays once into registers, runs its segment from zero, takes part in a scan over the
// segments (the decay of a whole segment is exp(A sum dt), so one exponential more), and runs the segment again from
// the right state, adding to y. B and C come from shared memory, where both lanes of a segment read the same words.
//
// A block has `pairs` pairs of channels and one or two warps ("phases") for each, which have neighbouring chunks: the
// state passes between them through shared memory, tagged with its chunk, state by state, so the second phase runs one
// state behind the first and hardly ever waits.
#pragma once

#include <type_traits>

#include "selective_scan.cuh"

namespace mamba::scan {

template <typename T, int kTau, int kPhases> struct Segment {
  static constexpr int kSegments = 16, kChunk = kSegments * kTau;
  static constexpr int kPitch = kTau + 4;                    // floats of a segment of one state's B or C
  static constexpr int kRuns = 2 * kState * sizeof(T) / 16;  // 16-byte runs of a token's B and C

  // Floats of a state's row of B or C. Rows come in the order B0 B8 C0 C8 B1 B9 ..., so that the four threads that
  // have a token's 32 values store them, transposed, into different banks.
  static constexpr int kRow = kPhases * kSegments * kPitch + 8;
  // Elements of a segment of an activation tile: lanes of different segments fall into different banks.
  static __host__ __device__ int segment_elements(int width) { return kTau * width + 4; }
  static __host__ __device__ int tile_elements(int width) { return kPhases * kSegments * segment_elements(width); }
  static size_t shared_bytes(int pairs) {
    const int width = 2 * pairs;
    return sizeof(float) * 2 * kState * kRow +
           sizeof(T) * (kPhases * kChunk * 2 * kState + 6 * tile_elements(width)) + width * kState * sizeof(uint4) +
           pairs * kPhases * 2 * sizeof(float);
  }
};

// x moves up by `lanes`; lanes below keep their own value, and `moved` is false there.
__device__ __forceinline__ float shift_up(float x, int lanes, bool& moved) {
  float r;
  int p;
  asm volatile("{\n.reg .pred q;\nshfl.sync.up.b32 %0|q, %2, %3, 0, 0xffffffff;\nselp.b32 %1, 1, 0, q;\n}"
               : "=f"(r), "=r"(p)
               : "f"(x), "r"(lanes));
  moved = p != 0;
  return r;
}

// Inclusive scan over the segments of a warp's two channels, of two states at once (alone, each step would wait for
// the shuffle of the one before): h becomes the state after the lane's segment.
__device__ __forceinline__ void scan_segments(float (&h)[2], float (&P)[2]) {
#pragma unroll
  for (int o = 2; o < 32; o *= 2) {
    bool moved;
    float before[2], decay[2];
#pragma unroll
    for (int i = 0; i < 2; i++) before[i] = shift_up(h[i], o, moved);
#pragma unroll
    for (int i = 0; i < 2; i++) decay[i] = o < 16 ? shift_up(P[i], o, moved) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (moved) h[i] = fmaf(P[i], before[i], h[i]);
      if (moved) P[i] *= decay[i];
    }
  }
}

// A state on its way from one chunk to the next: value, the number of the chunk that it enters, and the state's A.
__device__ __forceinline__ float take_state(const uint4* slot, uint32_t chunk, float& A) {
  uint4 v;
  do {
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(smem_address(slot))
                 : "memory");
  } while (v.y != chunk);
  A = __uint_as_float(v.z);
  return __uint_as_float(v.x);
}
__device__ __forceinline__ void pass_state(uint4* slot, float h, uint32_t chunk) {
  asm volatile("st.volatile.shared.v2.u32 [%0], {%1, %2};" ::"r"(smem_address(slot)), "r"(__float_as_uint(h)), "r"(chunk)
               : "memory");
}

template <typename T, int kTau, int kPhases, bool kStateOnly>
__global__ void __launch_bounds__(384, 1)
segment_kernel(const __grid_constant__ Args<T> p, int pairs) {
  using L = Segment<T, kTau, kPhases>;
  using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;  // a run of four channels
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  const int pair = warp % pairs, phase = warp / pairs, segment = lane / 2, channel = 2 * pair + lane % 2;
  const int b = blockIdx.y, piece = blockIdx.z, width = 2 * pairs;
  const int blocks_per_group = ceil_div(p.group_dim, width);
  const int group = blockIdx.x / blocks_per_group;
  const int c0 = group * p.group_dim + (blockIdx.x % blocks_per_group) * width;
  const int c1 = min(c0 + width, (group + 1) * p.group_dim);
  const int row = row_length(p, b);
  const int t_begin = min(piece * p.piece_len, row), n_tokens = min(p.piece_len, row - t_begin);
  constexpr int span = kPhases * L::kChunk;  // tokens of a round of the block
  const int64_t dir = p.reverse ? -1 : 1;
  const int64_t first = p.reverse ? row - 1 - t_begin : t_begin;  // memory position of the piece's first token
  const bool use_softplus = p.softplus, has_z = !kStateOnly && p.z;

  extern __shared__ __align__(16) float shared[];
  const int segment_elements = L::segment_elements(width), tile_size = L::tile_elements(width);
  float* s_bc = shared;                                                // [32 states of B, C][kRow]
  T* s_raw = reinterpret_cast<T*>(s_bc + 2 * kState * L::kRow);         // [span][B 16 | C 16]
  T* s_tiles = s_raw + span * 2 * kState;                              // [2][u, delta, z]
  uint4* s_state = reinterpret_cast<uint4*>(s_tiles + 6 * tile_size);  // [width][16] states between chunks
  float* s_sum = reinterpret_cast<float*>(s_state + width * kState);   // [warps][2]

  // ---- moving tiles: a thread has a run of four channels of every row_step-th token; steps are whole segments
  const int runs = width / 4, run_row = threadIdx.x / runs, run_c = threadIdx.x % runs * 4, row_step = 64 * kPhases;
  const int run_at = run_row / kTau * segment_elements + run_row % kTau * width + run_c;
  const int run_jump = row_step / kTau * segment_elements;
  auto at = [&](auto* base, const Strides& s, int t) { return base + b * s.batch + (first + dir * t) * s.token; };
  auto stage = [&](int t0, T* tile) {
    const int tokens = min(span, n_tokens - t0);
    if (c0 + run_c < c1) {
      const T* u = at(p.u, p.u_stride, t0 + run_row) + c0 + run_c;
      const T* delta = at(p.delta, p.delta_stride, t0 + run_row) + c0 + run_c;
      const T* z = has_z ? at(p.z, p.z_stride, t0 + run_row) + c0 + run_c : u;
      T* dst = tile + run_at;
      for (int t = run_row; t < tokens; t += row_step) {
        cp_async<4 * sizeof(T)>(dst, u);
        cp_async<4 * sizeof(T)>(dst + tile_size, delta);
        if (has_z) cp_async<4 * sizeof(T)>(dst + 2 * tile_size, z);
        dst += run_jump;
        u += dir * row_step * p.u_stride.token, delta += dir * row_step * p.delta_stride.token;
        z += dir * row_step * p.z_stride.token;
      }
    }
    constexpr int kEach = 16 / sizeof(T);
    const int step = threads / L::kRuns, r = threadIdx.x % L::kRuns, t1 = threadIdx.x / L::kRuns;
    const bool is_b = r < L::kRuns / 2;
    const int64_t jump = dir * step * (is_b ? p.B_stride.token : p.C_stride.token);
    const T* src = (is_b ? at(p.B, p.B_stride, t0 + t1) : at(p.C, p.C_stride, t0 + t1)) + group * kState +
                   r % (L::kRuns / 2) * kEach;
    T* dst = s_raw + threadIdx.x * kEach;
    for (int t = t1; t < tokens; t += step, src += jump, dst += threads * kEach) cp_async<16>(dst, src);
    cp_async_commit();
  };
  auto store_y = [&](int t0, const T* tile) {
    if (c0 + run_c >= c1) return;
    const int tokens = min(span, n_tokens - t0);
    T* dst = at(p.y, p.y_stride, t0 + run_row) + c0 + run_c;
    const T* src = tile + run_at;
    for (int t = run_row; t < tokens; t += row_step, src += run_jump, dst += dir * row_step * p.y_stride.token) {
      *reinterpret_cast<Four*>(dst) = *reinterpret_cast<const Four*>(src);
    }
  };
  // B and C to float32, transposed. Past the end zeros: B meets dt u there, which must not be NaN.
  auto convert = [&](int t0) {
    const int t1 = threadIdx.x / 4, step = threads / 4;  // whole segments: threads is a multiple of 64
    float* dst = s_bc + threadIdx.x % 4 * L::kRow + t1 / kTau * L::kPitch + t1 % kTau;
    const T* src = s_raw + threadIdx.x * 8;
    for (int t = t1; t < span; t += step, dst += step / kTau * L::kPitch, src += threads * 8) {
      float f[8] = {};
      if (t0 + t < n_tokens) {
        Run<T> run;
        load_run8<T, true>(run, src);
        to_floats(f, run);
      }
#pragma unroll
      for (int j = 0; j < 8; j++) dst[4 * j * L::kRow] = f[j];
    }
  };

  if (n_tokens > 0) stage(0, s_tiles);
  const bool active = c0 + channel < c1;
  const float bias = active && p.bias ? p.bias[c0 + channel] : 0.0f, D = active && p.D ? p.D[c0 + channel] : 0.0f;
  for (int i = threadIdx.x; i < width * kState; i += threads) {
    const int c = c0 + i / kState, n = i % kState;
    float A = 0.0f, h = 0.0f;
    if (c < c1) {
      A = p.A[int64_t(c) * kState + n] * kLog2e;
      if (!kStateOnly) {
        if (p.h0) h = p.h0[(int64_t(b) * p.dim + c) * kState + n];
        for (int j = 0; j < piece; j++) {
          const int64_t at = (int64_t(b) * p.pieces + j) * p.dim + c;
          h = fmaf(ex2(A * p.piece_dt[at]), h, p.piece_state[at * kState + n]);
        }
      }
    }
    s_state[i] = make_uint4(__float_as_uint(h), 0, __float_as_uint(A), 0);
  }

  float dt_total = 0.0f;
  int buffer = 0;
  uint32_t chunk = phase;
  for (int t0 = 0; t0 < n_tokens; t0 += span, buffer ^= 1, chunk += kPhases) {
    T* tile = s_tiles + buffer * 3 * tile_size;
    T* other = s_tiles + (buffer ^ 1) * 3 * tile_size;
    cp_async_wait<0>();
    __syncthreads();  // this round's data is here; the round before is done with B, C and its tile
    convert(t0);
    if (!kStateOnly && t0 > 0) store_y(t0 - span, other);
    __syncthreads();
    if (t0 + span < n_tokens) stage(t0 + span, other);

    const int mine = t0 + phase * L::kChunk + segment * kTau;  // first token of this lane
    if (t0 + phase * L::kChunk >= n_tokens) continue;
    T* in = tile + (phase * L::kSegments + segment) * segment_elements + channel;
    const int valid = active ? n_tokens - mine : 0;
    float dt[kTau], du[kTau], y[kTau], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kTau; j++) {
      const float u = j < valid ? to_float(in[j * width]) : 0.0f;
      const float v = time_step<T>(to_float(in[tile_size + j * width]) + bias, use_softplus);
      dt[j] = j < valid ? v : 0.0f;
      du[j] = dt[j] * u;
      y[j] = D * u;
      sum += dt[j];
    }
    dt_total += sum;

    const float* bc = s_bc + (phase * L::kSegments + segment) * L::kPitch;
    uint4* slot = s_state + channel * kState;
#pragma unroll 1
    for (int n = 0; n < kState / 2; n++, slot++, bc += 4 * L::kRow) {
      // States n and n + 8, step by step together.
      float a[2][kTau], x[2][kTau], A[2], carry[2], h[2], P[2];
#pragma unroll
      for (int i = 0; i < 2; i++) carry[i] = take_state(slot + 8 * i, chunk, A[i]);
#pragma unroll
      for (int j = 0; j < kTau; j += 4) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float4 v = *reinterpret_cast<const float4*>(bc + i * L::kRow + j);
          x[i][j] = du[j] * v.x, x[i][j + 1] = du[j + 1] * v.y, x[i][j + 2] = du[j + 2] * v.z, x[i][j + 3] = du[j + 3] * v.w;
#pragma unroll
          for (int m = j; m < j + 4; m++) a[i][m] = ex2(dt[m] * A[i]);
        }
        // The segment from zero (the first one from the state that enters the chunk), right behind its decays.
#pragma unroll
        for (int m = j; m < j + 4; m++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            h[i] = m > 0 ? fmaf(a[i][m], h[i], x[i][m]) : (segment == 0 ? fmaf(a[i][0], carry[i], x[i][0]) : x[i][0]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) P[i] = ex2(A[i] * sum);
      scan_segments(h, P);
      if (segment == L::kSegments - 1) {
        pass_state(slot, h[0], chunk + 1);
        pass_state(slot + 8, h[1], chunk + 1);
      }
      if constexpr (!kStateOnly) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          bool moved;
          h[i] = shift_up(h[i], 2, moved);
          if (!moved) h[i] = carry[i];
        }
#pragma unroll
        for (int j = 0; j < kTau; j += 4) {
          float C[2][4];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            *reinterpret_cast<float4*>(C[i]) = *reinterpret_cast<const float4*>(bc + (2 + i) * L::kRow + j);
          }
#pragma unroll
          for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) h[i] = fmaf(a[i][j + m], h[i], x[i][j + m]);
            y[j + m] = fmaf(C[1][m], h[1], fmaf(C[0][m], h[0], y[j + m]));
          }
        }
      }
    }
    if (!kStateOnly) {
#pragma unroll
      for (int j = 0; j < kTau; j++) {
        const float gate = has_z ? silu(to_float(in[2 * tile_size + j * width])) : 1.0f;
        in[j * width] = from_float<T>(y[j] * gate);  // takes the place of u
      }
    }
  }

  __syncthreads();
  if (!kStateOnly && n_tokens > 0) store_y((n_tokens - 1) / span * span, s_tiles + (buffer ^ 1) * 3 * tile_size);
  if (kStateOnly) {
#pragma unroll
    for (int o = 2; o < 32; o *= 2) dt_total += __shfl_xor_sync(~0u, dt_total, o);
    if (lane < 2) s_sum[warp * 2 + lane] = dt_total;
    __syncthreads();
    for (int i = threadIdx.x; i < width && c0 + i < c1; i += threads) {
      float sum = 0.0f;
      for (int f = 0; f < kPhases; f++) sum += s_sum[(f * pairs + i / 2) * 2 + i % 2];
      p.piece_dt[(int64_t(b) * p.pieces + piece) * p.dim + c0 + i] = sum;
    }
  }
  const bool finish = kStateOnly || (p.hT && piece == p.pieces - 1);
  for (int i = threadIdx.x; finish && i < width * kState; i += threads) {
    const int c = c0 + i / kState, n = i % kState;
    const int64_t at = kStateOnly ? (int64_t(b) * p.pieces + piece) * p.dim + c : int64_t(b) * p.dim + c;
    if (c < c1) (kStateOnly ? p.piece_state : p.hT)[at * kState + n] = __uint_as_float(s_state[i].x);
  }
  if (!kStateOnly && piece == p.pieces - 1) zero_padding(p, b, row, c0, c1);
}

}  // namespace mamba::scan
