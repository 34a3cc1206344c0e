// ssd_state_update: one token of Mamba-2. The state is read and written once; everything else is small, so the
// kernel is a copy with arithmetic: 16-byte accesses, several rows in flight in every thread.
#include "mamba/ssd_state_update.h"

#include "common.cuh"

namespace mamba {
namespace {

constexpr int kThreads = 128;

struct UpdateArgs {
  mamba_ssd_state_update_params p;
  int lanes, lanes_log2;  // threads that share a state row, a power of two up to 32
  int blocks_per_head;
};

struct Decay {
  float dt, keep;
};

template <typename T>
__device__ __forceinline__ Decay decay_of(const mamba_ssd_state_update_params& p, int batch, int head) {
  float dt = to_float(static_cast<const T*>(p.dt)[batch * p.dt_batch_stride + head]);
  if (p.dt_bias) dt += p.dt_bias[head];
  if (p.dt_softplus) dt = softplus<true>(dt);
  dt = fminf(fmaxf(dt, p.dt_min), p.dt_max);
  return {dt, ex2(dt * p.A[head] * kLog2e)};
}

template <typename T>
__device__ __forceinline__ void write_output(const mamba_ssd_state_update_params& p, int batch, int head, int row,
                                             float x, float y) {
  const int at = head * p.headdim + row;
  if (p.D) y = fmaf(p.D[p.d_per_channel ? at : head], x, y);
  if (p.z) y *= silu(to_float(static_cast<const T*>(p.z)[batch * p.z_batch_stride + at]));
  static_cast<T*>(p.y)[batch * p.y_batch_stride + at] = from_float<T>(y);
}

// A row of the state is kVecs 16-byte vectors for each of `lanes` threads; a thread works on kRows rows at once.
template <typename T, typename S, int kVecs, int kRows>
__global__ void __launch_bounds__(kThreads) update_rows_kernel(const __grid_constant__ UpdateArgs args) {
  constexpr int kWidth = 16 / sizeof(S);
  const mamba_ssd_state_update_params& p = args.p;
  const int head = blockIdx.x / args.blocks_per_head, batch = blockIdx.y;
  const int lane = threadIdx.x & (args.lanes - 1), rows_per_pass = kThreads >> args.lanes_log2;
  const int row0 = (blockIdx.x % args.blocks_per_head) * rows_per_pass * kRows + (threadIdx.x >> args.lanes_log2);
  const int64_t state_at = (static_cast<int64_t>(batch) * p.nheads + head) * p.headdim * p.d_state;
  const S* in = static_cast<const S*>(p.state_in) + state_at;
  S* out = static_cast<S*>(p.state_out) + state_at;

  // The state first: it is what takes long.
  Vec<S, kWidth> state[kRows][kVecs];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int row = row0 + r * rows_per_pass;
    if (row >= p.headdim) break;
#pragma unroll
    for (int v = 0; v < kVecs; v++)
      state[r][v] = load_vec<S, kWidth>(in + static_cast<int64_t>(row) * p.d_state + (v * args.lanes + lane) * kWidth);
  }
  float x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int row = row0 + r * rows_per_pass;
    x[r] = row < p.headdim
               ? to_float(static_cast<const T*>(p.x)[batch * p.x_batch_stride + head * p.headdim + row]) : 0.f;
  }
  const int group = head / (p.nheads / p.ngroups);
  const T* B_row = static_cast<const T*>(p.B) + batch * p.B_batch_stride + group * p.d_state;
  const T* C_row = static_cast<const T*>(p.C) + batch * p.C_batch_stride + group * p.d_state;
  Vec<T, kWidth> B[kVecs], C[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; v++) {
    B[v] = load_vec<T, kWidth>(B_row + (v * args.lanes + lane) * kWidth);
    C[v] = load_vec<T, kWidth>(C_row + (v * args.lanes + lane) * kWidth);
  }
  const Decay decay = decay_of<T>(p, batch, head);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int row = row0 + r * rows_per_pass;
    float y = 0.f;
    if (row < p.headdim) {
      const float dtx = decay.dt * x[r];
#pragma unroll
      for (int v = 0; v < kVecs; v++) {
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
          const float h = fmaf(to_float(state[r][v].v[e]), decay.keep, dtx * to_float(B[v].v[e]));
          y = fmaf(h, to_float(C[v].v[e]), y);
          state[r][v].v[e] = from_float<S>(h);
        }
        store_vec<S, kWidth>(out + static_cast<int64_t>(row) * p.d_state + (v * args.lanes + lane) * kWidth, state[r][v]);
      }
    }
    for (int d = args.lanes / 2; d > 0; d /= 2) y += __shfl_xor_sync(0xffffffffu, y, d);
    if (lane == 0 && row < p.headdim) write_output<T>(p, batch, head, row, x[r], y);
  }
}

// Any d_state and alignment: a warp a row.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) update_any_kernel(const __grid_constant__ UpdateArgs args) {
  const mamba_ssd_state_update_params& p = args.p;
  const int head = blockIdx.x / args.blocks_per_head, batch = blockIdx.y, lane = threadIdx.x & 31;
  const int row = (blockIdx.x % args.blocks_per_head) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.headdim) return;
  const int group = head / (p.nheads / p.ngroups);
  const int64_t state_at = ((static_cast<int64_t>(batch) * p.nheads + head) * p.headdim + row) * p.d_state;
  const T* B = static_cast<const T*>(p.B) + batch * p.B_batch_stride + group * p.d_state;
  const T* C = static_cast<const T*>(p.C) + batch * p.C_batch_stride + group * p.d_state;
  const float x = to_float(static_cast<const T*>(p.x)[batch * p.x_batch_stride + head * p.headdim + row]);
  const Decay decay = decay_of<T>(p, batch, head);
  float y = 0.f;
  for (int n = lane; n < p.d_state; n += 32) {
    const float old = to_float(static_cast<const S*>(p.state_in)[state_at + n]);
    const float h = fmaf(old, decay.keep, decay.dt * x * to_float(B[n]));
    y = fmaf(h, to_float(C[n]), y);
    static_cast<S*>(p.state_out)[state_at + n] = from_float<S>(h);
  }
  for (int d = 16; d > 0; d /= 2) y += __shfl_xor_sync(0xffffffffu, y, d);
  if (lane == 0) write_output<T>(p, batch, head, row, x, y);
}

int state_width(const mamba_ssd_state_update_params& p) { return p.state_dtype == MAMBA_F32 ? 4 : 8; }

// Vectors a thread holds of one row, 0 if the rows do not divide into 16-byte vectors for up to 32 threads.
int vectors_per_lane(const mamba_ssd_state_update_params& p, int* lanes) {
  const int width = state_width(p), vectors = p.d_state / width;
  const size_t element = p.dtype == MAMBA_F32 ? 4 : 2, bytes = width * element < 16 ? width * element : 16;
  const bool wide = p.d_state % width == 0 && (vectors & (vectors - 1)) == 0 && vectors <= 64 &&
                    p.B_batch_stride % width == 0 && p.C_batch_stride % width == 0 && aligned(p.B, bytes) &&
                    aligned(p.C, bytes) && aligned(p.state_in, 16) && aligned(p.state_out, 16);
  if (!wide) return 0;
  *lanes = vectors < 32 ? vectors : 32;
  return vectors / *lanes;
}

int log2_of(int v) {
  int log = 0;
  while (v > 1) v /= 2, log++;
  return log;
}

// Enough rows a thread to keep memory busy, few enough that a small batch still spreads over all multiprocessors.
int choose(const mamba_ssd_state_update_params& p, int lanes) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.nheads * p.headdim, per_pass = kThreads / lanes;
  const int64_t blocks = ceil_div64(rows, per_pass);
  if (blocks >= 16 * sm_count()) return 3;  // 4 rows; 8 lose a fifth of the bandwidth
  return blocks >= 8 * sm_count() ? 2 : 1;
}

template <typename T, typename S, int kVecs>
void launch_rows(int tactic, const UpdateArgs& a, cudaStream_t stream) {
  const dim3 grid(a.blocks_per_head * a.p.nheads, a.p.batch);
  switch (tactic) {
    case 1: update_rows_kernel<T, S, kVecs, 1><<<grid, kThreads, 0, stream>>>(a); break;
    case 2: update_rows_kernel<T, S, kVecs, 2><<<grid, kThreads, 0, stream>>>(a); break;
    case 3: update_rows_kernel<T, S, kVecs, 4><<<grid, kThreads, 0, stream>>>(a); break;
    default: update_rows_kernel<T, S, kVecs, 8><<<grid, kThreads, 0, stream>>>(a); break;
  }
}

template <typename T, typename S>
int launch_update(const mamba_ssd_state_update_params& p, cudaStream_t stream) {
  UpdateArgs a = {p, 32, 5, ceil_div(p.headdim, kThreads / 32)};
  const int vecs = vectors_per_lane(p, &a.lanes);
  const int tactic = p.tactic < 0 ? (vecs ? choose(p, a.lanes) : 0) : p.tactic;
  if (tactic > 4 || (tactic > 0 && !vecs)) return MAMBA_ERROR_TACTIC;
  if (tactic == 0) {
    update_any_kernel<T, S><<<dim3(a.blocks_per_head * p.nheads, p.batch), kThreads, 0, stream>>>(a);
    return launch_status();
  }
  a.lanes_log2 = log2_of(a.lanes);
  a.blocks_per_head = ceil_div(p.headdim, kThreads / a.lanes << (tactic - 1));
  if (vecs == 1)
    launch_rows<T, S, 1>(tactic, a, stream);
  else
    launch_rows<T, S, 2>(tactic, a, stream);
  return launch_status();
}

int check(const mamba_ssd_state_update_params& p) {
  if (p.batch < 0 || p.batch > 65535 || p.nheads <= 0 || p.headdim <= 0 || p.ngroups <= 0 || p.d_state <= 0 ||
      p.nheads % p.ngroups != 0)
    return MAMBA_ERROR_SHAPE;
  if (p.batch > 0 && (!p.x || !p.dt || !p.B || !p.C || !p.y || !p.A || !p.state_in || !p.state_out))
    return MAMBA_ERROR_NULL_POINTER;
  return MAMBA_OK;
}

}  // namespace
}  // namespace mamba

extern "C" size_t mamba_ssd_state_update_workspace(const mamba_ssd_state_update_params*) { return 0; }

extern "C" int mamba_ssd_state_update_tactics(const mamba_ssd_state_update_params* params, int32_t* out, int max) {
  using namespace mamba;
  if (!params || check(*params) != MAMBA_OK) return 0;
  int lanes = 32, count = 0;
  if (vectors_per_lane(*params, &lanes)) {
    const int best = choose(*params, lanes);
    if (count < max) out[count++] = best;
    for (int tactic = 1; tactic <= 4; tactic++)
      if (tactic != best && count < max) out[count++] = tactic;
  }
  if (count < max) out[count++] = 0;
  return count;
}

extern "C" int mamba_ssd_state_update(const mamba_ssd_state_update_params* params, mamba_stream stream) {
  using namespace mamba;
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  if (const int status = check(*params); status != MAMBA_OK) return status;
  if (params->batch == 0) return MAMBA_OK;
  return dispatch(params->dtype, [&](auto t) {
    return dispatch(params->state_dtype, [&](auto s) {
      return launch_update<decltype(t), decltype(s)>(*params, static_cast<cudaStream_t>(stream));
    });
  });
}
