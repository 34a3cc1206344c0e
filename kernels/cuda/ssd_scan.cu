// ssd_scan: checks, the choice of a tactic, launches.
#include "mamba/ssd_scan.h"

#include <math.h>
#include <string.h>

#include <atomic>
#include <chrono>

#include "ssd_generic_plan.cuh"
#include "ssd_two_pass_plan.cuh"

namespace mamba {
namespace ssd {
namespace {

// What was asked for, as the kernels see it.
struct Call : mamba_ssd_scan_params {
  int width = 0, halves = 0;  // see ScanArgs
  bool overlap() const { return halves && width < 128; }
  size_t state_bytes() const { return sizeof(float) * batch * (nheads >> halves) * static_cast<size_t>(width) * d_state; }
};

#include "ssd_scan_select.inl"

// Heads of 72 to 128 columns as pairs of heads of 64, where these have the faster kernels and there is none for so many: the
// columns of a head share its step and decay, no more. The halves of fewer than 128 overlap.
Call as_seen(const mamba_ssd_scan_params& params) {
  Call p = {params};
  p.width = p.headdim;
  if (p.headdim > 64 && p.headdim <= 128 && multiple_of_8(p.headdim) && !has_two_pass(p.dtype, p.headdim, p.d_state) &&
      has_two_pass(p.dtype, 64, p.d_state))
    p.headdim = 64, p.nheads *= 2, p.halves = 1;
  return p;
}

size_t state_bytes(const Call& p, int splits) {
  return sizeof(float) * p.batch * p.nheads * static_cast<size_t>(splits) * p.headdim * p.d_state;
}

// What a streaming block leaves for the next.
size_t handoff_bytes(const Call& p, const Choice& c) {
  return sizeof(float) * c.heads * static_cast<size_t>(p.headdim) * p.d_state;
}

// What the kernels keep in the workspace.
size_t scratch_bytes(const Call& p, const Choice& c) {
  if (c.layout >= kTwoPass) return two_pass_workspace(arguments(p, c), c.two_pass, c.launches(), c.cut);
  if (c.splits == 1) return 0;
  if (c.splits == 0) return c.slots() * (handoff_bytes(p, c) + sizeof(unsigned long long));
  return state_bytes(p, c.splits) + sizeof(float) * p.batch * p.nheads * static_cast<size_t>(c.splits);
}

// Where overlapping halves begin, if final_state is in the place of initial_state: one half may be done before the other begins.
size_t initial_at(const Call& p, const Choice& c) { return (scratch_bytes(p, c) + 255) / 256 * 256; }

size_t workspace_bytes(const Call& p, const Choice& c) {
  return p.overlap() ? initial_at(p, c) + p.state_bytes() : scratch_bytes(p, c);
}

int check(const mamba_ssd_scan_params& p) {
  if (p.dtype != MAMBA_F32 && p.dtype != MAMBA_F16 && p.dtype != MAMBA_BF16) return MAMBA_ERROR_DTYPE;
  if (p.batch < 0 || p.seqlen < 0 || p.nheads <= 0 || p.headdim <= 0 || p.ngroups <= 0 || p.d_state <= 0 ||
      p.nheads % p.ngroups != 0 || p.batch > kMaxGrid)
    return MAMBA_ERROR_SHAPE;
  return MAMBA_OK;
}

// A number that scratch memory does not hold by accident, another for every launch (splitmix64).
unsigned long long new_ticket() {
  static std::atomic<unsigned long long> count{static_cast<unsigned long long>(
      std::chrono::steady_clock::now().time_since_epoch().count())};
  unsigned long long v = count.fetch_add(0x9e3779b97f4a7c15ull);
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return (v ^ (v >> 31)) | 1;
}

ScanArgs arguments(const Call& p, const Choice& c) {
  ScanArgs a = {};
  a.x = p.x, a.dt = p.dt, a.B = p.B, a.C = p.C, a.z = p.z, a.y = p.y;
  a.A = p.A, a.D = p.D, a.dt_bias = p.dt_bias, a.initial_state = p.initial_state, a.final_state = p.final_state;
  a.seq_lens = p.seq_lens;
  a.x_batch = p.x_batch_stride, a.x_token = p.x_token_stride;
  a.dt_batch = p.dt_batch_stride, a.dt_token = p.dt_token_stride;
  a.B_batch = p.B_batch_stride, a.B_token = p.B_token_stride;
  a.C_batch = p.C_batch_stride, a.C_token = p.C_token_stride;
  a.z_batch = p.z_batch_stride, a.z_token = p.z_token_stride;
  a.y_batch = p.y_batch_stride, a.y_token = p.y_token_stride;
  a.batch = p.batch, a.seqlen = p.seqlen, a.nheads = p.nheads, a.headdim = p.headdim;
  a.ngroups = p.ngroups, a.d_state = p.d_state;
  a.dt_softplus = p.dt_softplus, a.d_per_channel = p.d_per_channel, a.width = p.width, a.halves = p.halves;
  a.dt_min = p.dt_min, a.dt_max = p.dt_max;
  a.blocks_x = c.blocks_x, a.splits = c.splits;
  if (c.layout >= kTwoPass) return a;
  if (c.splits == 0) {
    a.handed = static_cast<unsigned long long*>(p.workspace);
    a.handoff = reinterpret_cast<float*>(a.handed + c.slots());
    a.ticket = new_ticket();
  }
  if (c.splits > 1) {
    a.split_state = static_cast<float*>(p.workspace);
    a.split_decay = a.split_state + state_bytes(p, c.splits) / sizeof(float);
  }
  return a;
}

// Turns the ends of the pieces, each computed from zero, into the states the pieces begin with.
template <typename Vector>
__global__ void ssd_combine_kernel(ScanArgs p) {
  constexpr int kWidth = sizeof(Vector) / sizeof(float);
  const int64_t size = static_cast<int64_t>(p.headdim) * p.d_state / kWidth;
  const int64_t idx = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, head = blockIdx.y + blockIdx.z * p.nheads;
  const Vector* initial = reinterpret_cast<const Vector*>(p.initial_state);
  if (idx >= size) return;
  Vector* at = reinterpret_cast<Vector*>(p.split_state) + head * p.splits * size + idx;
  Vector h = {};
  if (initial) h = initial[p.state_at(blockIdx.z, blockIdx.y) / kWidth + idx];
  float* state = reinterpret_cast<float*>(&h);
  constexpr int kAhead = 8;
  for (int first = 0; first < p.splits; first += kAhead) {
    Vector end[kAhead] = {};
    float decay[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (first + i >= p.splits - 1) continue;
      end[i] = at[(first + i) * size];
      decay[i] = ex2(p.split_decay[head * p.splits + first + i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (first + i >= p.splits) break;
      at[(first + i) * size] = h;
      if (first + i == p.splits - 1) break;
      const float* add = reinterpret_cast<const float*>(&end[i]);
#pragma unroll
      for (int k = 0; k < kWidth; k++) state[k] = fmaf(decay[i], state[k], add[k]);
    }
  }
}

int launch(const Call& p, const Choice& c, cudaStream_t stream) {
  ScanArgs a = arguments(p, c);
  const auto from = reinterpret_cast<uintptr_t>(p.initial_state), to = reinterpret_cast<uintptr_t>(p.final_state);
  const size_t state = p.state_bytes();
  if (p.overlap() && from && to && from < to + state && to < from + state) {
    void* copy = static_cast<uint8_t*>(p.workspace) + initial_at(p, c);
    if (cudaMemcpyAsync(copy, p.initial_state, state, cudaMemcpyDeviceToDevice, stream) != cudaSuccess) return MAMBA_ERROR_CUDA;
    a.initial_state = static_cast<float*>(copy);
  }
  if (c.layout >= kTwoPass) return two_pass_launch(a, p.dtype, c.two_pass, c.launches(), c.cut, p.workspace, stream);
  if (c.splits == 0) {
    if (!allow_shared(c.stream, c.shared)) return MAMBA_ERROR_CUDA;
    c.stream<<<c.slots(), c.threads, c.shared, stream>>>(a);
    return launch_status();
  }
  if (!allow_shared(c.scan, c.shared)) return MAMBA_ERROR_CUDA;
  if (c.splits > 1) {
    if (!allow_shared(c.state, c.state_shared)) return MAMBA_ERROR_CUDA;
    c.state<<<dim3(c.blocks_x, c.splits - 1, p.batch), c.threads, c.state_shared, stream>>>(a);
    const int size = p.headdim * p.d_state, wide = size % 4 == 0 && aligned(p.initial_state, 16) ? 4 : 1;
    const dim3 grid(ceil_div(size / wide, 128), p.nheads, p.batch);
    if (wide == 4)
      ssd_combine_kernel<float4><<<grid, 128, 0, stream>>>(a);
    else
      ssd_combine_kernel<float><<<grid, 128, 0, stream>>>(a);
  }
  c.scan<<<dim3(c.blocks_x, c.splits, p.batch), c.threads, c.shared, stream>>>(a);
  return launch_status();
}

}  // namespace
}  // namespace ssd
}  // namespace mamba

using namespace mamba;
using namespace mamba::ssd;

extern "C" size_t mamba_ssd_scan_workspace(const mamba_ssd_scan_params* params) {
  Choice c;
  if (!params || check(*params) != MAMBA_OK) return 0;
  const Call p = as_seen(*params);
  return choose(p, &c) == MAMBA_OK ? workspace_bytes(p, c) : 0;
}

extern "C" int mamba_ssd_scan_tactics(const mamba_ssd_scan_params* params, int32_t* out, int max) {
  int count = 0;
  const auto add = [&](int tactic) {
    for (int i = 0; i < count; i++)
      if (out[i] == tactic) return;
    if (count < max) out[count++] = tactic;
  };
  if (!params || check(*params) != MAMBA_OK) return 0;
  Call p = as_seen(*params);
  p.tactic = -1;
  Choice chosen;
  if (choose(p, &chosen) != MAMBA_OK) return 0;
  add(chosen.tactic());
  if (Choice c; find_two_pass(p, &c)) {
    const int best = two_pass_pieces(p, c), most = p.batch * ceil_div(p.seqlen, c.chunk);
    for (const int pieces : {best, 1, (best + 1) / 2, 2 * best}) {
      c.splits = pieces;
      if (pieces > 0 && pieces <= most) add(c.tactic());
    }
    for (int pieces = 2; pieces <= kMaxLater + 1; pieces++)
      if (cut_rows(p, pieces, &c)) add(c.tactic());
  }
  for (int layout = -1; layout < kLayouts; layout++) {
    Choice c;
    if (!(layout < 0 ? find_generic(p, &c) : find_layout(p, layout, &c))) continue;
    double least;
    choose_splits(p, &c, &least);
    const int best = c.splits, chunks = ceil_div(p.seqlen, c.chunk);
    for (const int splits : {best, 0, 1, best - 1, best + 1, 2 * best}) {
      c.splits = splits;
      if (splits == 0 ? c.can_stream(p) : splits == 1 || (splits > 1 && splits <= chunks)) add(c.tactic());
    }
  }
  return count;
}

extern "C" int mamba_ssd_scan(const mamba_ssd_scan_params* params, mamba_stream stream) {
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  if (const int status = check(*params); status != MAMBA_OK) return status;
  const Call p = as_seen(*params);
  if (p.batch == 0) return MAMBA_OK;
  if (!p.A || (p.seqlen > 0 && (!p.x || !p.dt || !p.B || !p.C || !p.y))) return MAMBA_ERROR_NULL_POINTER;
  Choice c;
  if (const int status = choose(p, &c); status != MAMBA_OK) return status;
  if (workspace_bytes(p, c) > 0 && (!p.workspace || !aligned(p.workspace, 16) || p.workspace_size < workspace_bytes(p, c)))
    return MAMBA_ERROR_WORKSPACE;
  return launch(p, c, static_cast<cudaStream_t>(stream));
}
