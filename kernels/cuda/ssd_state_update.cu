// ssd_state_update: checks, the choice of a tactic, launches.
#include "ssd_state_update_kernel.cuh"

namespace mamba::ssd_update {
namespace {

constexpr int kTactics = 3;  // 1, 2 and 4 rows a thread; 8 lose a fifth of the bandwidth

int state_width(const Params& p) { return p.state_dtype == MAMBA_F32 ? 4 : 8; }

// Vectors a thread holds of one row, 0 if the rows do not divide into 16-byte vectors for up to 32 threads.
int vectors_per_lane(const Params& p, int* lanes) {
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
int choose(const Params& p, int lanes) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.nheads * p.headdim, per_pass = kThreads / lanes;
  const int64_t blocks = ceil_div64(rows, per_pass);
  if (blocks >= 16 * sm_count() && lanes >= 4) return 3;
  return blocks >= 8 * sm_count() && lanes >= 2 ? 2 : 1;
}

template <typename T, typename S, int kVecs>
int launch_rows(int rows, const Params& p, const Plan& plan, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.headdim, kThreads / plan.lanes * rows), p.nheads, p.batch), block(kThreads);
  switch (rows) {
    case 1: return launch_early(rows_kernel<T, S, kVecs, 1>, grid, block, stream, p, plan);
    case 2: return launch_early(rows_kernel<T, S, kVecs, 2>, grid, block, stream, p, plan);
    default: return launch_early(rows_kernel<T, S, kVecs, 4>, grid, block, stream, p, plan);
  }
}

template <typename T, typename S> int launch(const Params& p, cudaStream_t stream) {
  Plan plan = {32, 5};
  const int vecs = vectors_per_lane(p, &plan.lanes);
  const int tactic = p.tactic < 0 ? (vecs ? choose(p, plan.lanes) : 0) : p.tactic;
  if (tactic > kTactics || (tactic > 0 && (!vecs || plan.lanes < 1 << (tactic - 1)))) return MAMBA_ERROR_TACTIC;
  if (tactic == 0) {
    const dim3 grid(ceil_div(p.headdim, kThreads / 32), p.nheads, p.batch);
    return launch_early(any_kernel<T, S>, grid, dim3(kThreads), stream, p);
  }
  plan.lanes_log2 = log2_of(plan.lanes);
  const int rows = 1 << (tactic - 1);
  return vecs == 1 ? launch_rows<T, S, 1>(rows, p, plan, stream) : launch_rows<T, S, 2>(rows, p, plan, stream);
}

int check(const Params& p) {
  if (p.batch < 0 || p.batch > 65535 || p.nheads <= 0 || p.nheads > 65535 || p.headdim <= 0 || p.ngroups <= 0 || p.d_state <= 0 ||
      p.nheads % p.ngroups != 0)
    return MAMBA_ERROR_SHAPE;
  if (p.batch > 0 && (!p.x || !p.dt || !p.B || !p.C || !p.y || !p.A || !p.state_in || !p.state_out))
    return MAMBA_ERROR_NULL_POINTER;
  return MAMBA_OK;
}

}  // namespace
}  // namespace mamba::ssd_update

extern "C" size_t mamba_ssd_state_update_workspace(const mamba_ssd_state_update_params*) { return 0; }

extern "C" int mamba_ssd_state_update_tactics(const mamba_ssd_state_update_params* params, int32_t* out, int max) {
  using namespace mamba::ssd_update;
  if (!params || check(*params) != MAMBA_OK) return 0;
  int lanes = 32, count = 0;
  if (vectors_per_lane(*params, &lanes)) {
    const int best = choose(*params, lanes);
    if (count < max) out[count++] = best;
    for (int tactic = 1; tactic <= kTactics; tactic++)
      if (tactic != best && 1 << (tactic - 1) <= lanes && count < max) out[count++] = tactic;
  }
  if (count < max) out[count++] = 0;
  return count;
}

extern "C" int mamba_ssd_state_update(const mamba_ssd_state_update_params* params, mamba_stream stream) {
  using namespace mamba;
  using namespace mamba::ssd_update;
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  if (const int status = check(*params); status != MAMBA_OK) return status;
  if (params->batch == 0) return MAMBA_OK;
  return dispatch(params->dtype, [&](auto t) {
    return dispatch(params->state_dtype, [&](auto s) {
      return ssd_update::launch<decltype(t), decltype(s)>(*params, static_cast<cudaStream_t>(stream));
    });
  });
}
