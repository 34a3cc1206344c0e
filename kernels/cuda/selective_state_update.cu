// selective_state_update: checks, the choice of a tactic, launches.
#include "selective_state_update_kernel.cuh"

namespace mamba::update {
namespace {

size_t dtype_size(int dtype) { return dtype == MAMBA_F32 ? 4 : 2; }

// A lane has 16 bytes, a channel up to a warp of lanes.
bool covers_vectors(const Params& p) {
  const int v = int(16 / dtype_size(p.state_dtype)), lanes = p.d_state / v;
  return p.d_state % v == 0 && lanes >= 1 && lanes <= 32 && (lanes & (lanes - 1)) == 0 && aligned(p.state_in, 16) &&
         aligned(p.state_out, 16) && aligned(p.A, 16);
}

// Whether a lane's B and C are one access each.
bool vector_rows(const Params& p) {
  const size_t element = dtype_size(p.dtype), v = 16 / dtype_size(p.state_dtype), bytes = v * element < 16 ? v * element : 16;
  return aligned(p.B, bytes) && aligned(p.C, bytes) && p.B_batch_stride * element % bytes == 0 &&
         p.C_batch_stride * element % bytes == 0;
}

// Rows to a thread: more of them share what a channel has once, fewer fill the device at small batches. The limit lies
// between (8, 5120), fastest by one row, and (64, 1536), fastest by four.
int select(const Params& p) {
  if (!covers_vectors(p)) return 0;
  const double threads = double(p.batch) * p.dim * p.d_state * dtype_size(p.state_dtype) / 16;
  int rows = 4;
  while (rows > 1 && (threads / rows < 680.0 * sm_count() || p.batch < rows)) rows /= 2;
  return rows;
}

template <typename T, typename S, int kLanes> int launch_rows(const Params& p, int rows, cudaStream_t stream) {
  if (rows < 1) return MAMBA_ERROR_TACTIC;
  const dim3 grid(ceil_div(p.dim * kLanes, kThreads), ceil_div(p.batch, rows));
  const int group_dim = p.dim / p.ngroups;
  const bool vector = vector_rows(p);
  switch (rows) {
    case 1: return launch_early(update_kernel<T, S, kLanes, 1>, grid, dim3(kThreads), stream, p, group_dim, vector);
    case 2: return launch_early(update_kernel<T, S, kLanes, 2>, grid, dim3(kThreads), stream, p, group_dim, vector);
    case 4: return launch_early(update_kernel<T, S, kLanes, 4>, grid, dim3(kThreads), stream, p, group_dim, vector);
    default: return MAMBA_ERROR_TACTIC;
  }
}

template <typename T, typename S> int launch(const Params& p, int rows, cudaStream_t stream) {
  if (rows == 0) {
    return launch_early(generic_kernel<T, S>, dim3(ceil_div(p.dim * 8, kThreads), p.batch), dim3(kThreads), stream, p);
  }
  if (!covers_vectors(p)) return MAMBA_ERROR_TACTIC;
  switch (p.d_state * int(sizeof(S)) / 16) {
    case 1: return launch_rows<T, S, 1>(p, rows, stream);
    case 2: return launch_rows<T, S, 2>(p, rows, stream);
    case 4: return launch_rows<T, S, 4>(p, rows, stream);
    case 8: return launch_rows<T, S, 8>(p, rows, stream);
    case 16: return launch_rows<T, S, 16>(p, rows, stream);
    default: return launch_rows<T, S, 32>(p, rows, stream);
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
