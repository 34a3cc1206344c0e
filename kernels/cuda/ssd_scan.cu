// ssd_scan: checks, the choice of a tactic, launches.
#include "mamba/ssd_scan.h"

#include <math.h>

#include <atomic>
#include <chrono>

#include "ssd_generic_plan.cuh"

namespace mamba {
namespace ssd {
namespace {

constexpr int kLayouts = 6;        // tried for every size; most have fewer
constexpr int kHopperLayouts = 2;  // the first ones
constexpr int kMaxGrid = 65535;

struct Device {
  int sms, shared_block, shared_sm, capability;
};

const Device& device() {
  static Device cached[64] = {};
  int id = 0;
  cudaGetDevice(&id);
  Device& d = cached[id & 63];
  if (d.sms == 0) {
    cudaDeviceGetAttribute(&d.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    cudaDeviceGetAttribute(&d.shared_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
    d.capability = 10 * major + minor;
    d.sms = sm_count();
  }
  return d;
}

// A tactic with all that its launches need.
struct Choice {
  int layout = -1;  // -1: generic
  int splits = 1;   // 0: streaming
  int heads = 1, chunk = 0, threads = 0, resident = 0, blocks_x = 0, shared = 0, state_shared = 0;
  Kernel scan = nullptr, stream = nullptr, state = nullptr;

  int tactic() const { return layout + 1 + 16 * splits; }
  // Blocks that run at once; a multiprocessor keeps 1 KB of shared memory a block for itself.
  int slots() const {
    const int by_shared = device().shared_sm / (shared + 1024);
    return device().sms * (by_shared < 1 ? 1 : by_shared < resident ? by_shared : resident);
  }
  int64_t rows(const mamba_ssd_scan_params& p) const { return static_cast<int64_t>(blocks_x) * p.batch; }
  // Streaming needs runs of at least a row.
  bool can_stream(const mamba_ssd_scan_params& p) const { return stream && p.seqlen > 0 && rows(p) >= slots(); }
};

bool multiple_of_8(int64_t a) { return a % 8 == 0; }

// The tensor-core kernels move 16 bytes at a time.
bool wide_access(const mamba_ssd_scan_params& p) {
  const void* pointers[] = {p.x, p.B, p.C, p.y, p.z};
  for (const void* at : pointers)
    if (!aligned(at, 16)) return false;
  if (!aligned(p.initial_state, 8) || !aligned(p.final_state, 8) || !aligned(p.D, 8)) return false;
  return multiple_of_8(p.x_batch_stride) && multiple_of_8(p.x_token_stride) && multiple_of_8(p.B_batch_stride) &&
         multiple_of_8(p.B_token_stride) && multiple_of_8(p.C_batch_stride) && multiple_of_8(p.C_token_stride) &&
         multiple_of_8(p.y_batch_stride) && multiple_of_8(p.y_token_stride) && multiple_of_8(p.z_batch_stride) &&
         multiple_of_8(p.z_token_stride);
}

bool find_plan(const mamba_ssd_scan_params& p, int layout, Plan* plan) {
  if (layout < kHopperLayouts) {
#ifdef MAMBA_SM90A
    return device().capability == 90 && plan_hopper(p.dtype, p.headdim, p.d_state, layout, plan);
#else
    return false;
#endif
  }
  switch (p.d_state) {
    case 16: return plan_n16(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    case 64: return plan_n64(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    case 128: return plan_n128(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    case 256: return plan_n256(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    default: return false;
  }
}

bool find_layout(const mamba_ssd_scan_params& p, int layout, Choice* out) {
  // Their scores hold log2(dt): no negative steps.
  if (p.dtype == MAMBA_F32 || !wide_access(p) || !(p.dt_min >= 0.f)) return false;
  Plan plan;
  if (!find_plan(p, layout, &plan) || plan.scan_shared > device().shared_block || plan.state_shared > device().shared_block) return false;
  out->layout = layout, out->heads = plan.heads, out->chunk = plan.chunk, out->threads = plan.threads;
  out->resident = plan.resident, out->shared = plan.scan_shared, out->state_shared = plan.state_shared;
  out->scan = plan.scan, out->stream = plan.stream, out->state = plan.state;
  out->blocks_x = ceil_div(p.nheads / p.ngroups, plan.heads) * p.ngroups;
  return true;
}

bool find_generic(const mamba_ssd_scan_params& p, Choice* out) {
  GenericPlan plan;
  if (!generic_plan(p.dtype, p.d_state, device().shared_block, &plan)) return false;
  out->layout = -1, out->chunk = plan.chunk, out->threads = plan.threads, out->resident = 2048 / plan.threads;
  out->shared = out->state_shared = plan.shared;
  out->scan = plan.scan, out->stream = nullptr, out->state = plan.state;
  out->blocks_x = ceil_div(p.headdim, plan.cols) * p.nheads;
  return true;
}

// A model of the time, in tokens of one block: whole waves of blocks, the state-only pass at its measured share of a
// full chunk, and a constant for each launch.
double cost(const mamba_ssd_scan_params& p, const Choice& c) {
  const int chunks = ceil_div(p.seqlen, c.chunk);
  const double slots = c.slots(), rows = static_cast<double>(c.rows(p));
  if (c.splits == 0) return (rows * chunks / slots + 3.0) * c.chunk;
  const int piece = ceil_div(chunks, c.splits);
  const double waves = ceil(rows * c.splits / slots);
  double total = waves * (piece + 3.0) - 2.0;
  if (c.splits > 1) {
    const double state_waves = ceil(rows * (c.splits - 1) / slots);
    total += state_waves * (0.45 * piece + 2.0) + 1.5 + 0.1 * c.splits;
  }
  return total * c.chunk;
}

// The best number of pieces (or streaming) of a layout.
void choose_splits(const mamba_ssd_scan_params& p, Choice* c, double* least) {
  const int chunks = ceil_div(p.seqlen, c->chunk);
  int best = 1;
  *least = INFINITY;
  for (int splits = c->can_stream(p) ? 0 : 1; splits <= 64 && (splits < 2 || splits * 2 <= chunks); splits++) {
    c->splits = splits;
    const double at = cost(p, *c);
    if (at < *least) *least = at, best = splits;
  }
  c->splits = best;
}

int choose(const mamba_ssd_scan_params& p, Choice* out) {
  if (p.tactic >= 0) {
    const int layout = p.tactic % 16 - 1;
    const bool found = layout < 0 ? find_generic(p, out) : find_layout(p, layout, out);
    out->splits = p.tactic / 16;
    if (!found || out->splits > kMaxGrid) return MAMBA_ERROR_TACTIC;
    if (out->splits == 0) return out->can_stream(p) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
    return out->splits == 1 || out->splits <= ceil_div(p.seqlen, out->chunk) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
  }
  double least = INFINITY;
  bool any = false;
  for (int layout = 0; layout < kLayouts; layout++) {
    Choice candidate;
    if (!find_layout(p, layout, &candidate)) continue;
    double at;
    choose_splits(p, &candidate, &at);
    if (at < least) least = at, *out = candidate, any = true;
    if (layout < kHopperLayouts) break;  // measured ahead of every other layout
  }
  if (any) return MAMBA_OK;
  if (!find_generic(p, out)) return MAMBA_ERROR_SHAPE;
  choose_splits(p, out, &least);
  return MAMBA_OK;
}

size_t state_bytes(const mamba_ssd_scan_params& p, int splits) {
  return sizeof(float) * p.batch * p.nheads * static_cast<size_t>(splits) * p.headdim * p.d_state;
}

// What a streaming block leaves for the next.
size_t handoff_bytes(const mamba_ssd_scan_params& p, const Choice& c) {
  return sizeof(float) * c.heads * static_cast<size_t>(p.headdim) * p.d_state;
}

size_t workspace_bytes(const mamba_ssd_scan_params& p, const Choice& c) {
  if (c.splits == 1) return 0;
  if (c.splits == 0) return c.slots() * (handoff_bytes(p, c) + sizeof(unsigned long long));
  return state_bytes(p, c.splits) + sizeof(float) * p.batch * p.nheads * static_cast<size_t>(c.splits);
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

ScanArgs arguments(const mamba_ssd_scan_params& p, const Choice& c) {
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
  a.dt_softplus = p.dt_softplus, a.d_per_channel = p.d_per_channel;
  a.dt_min = p.dt_min, a.dt_max = p.dt_max;
  a.blocks_x = c.blocks_x, a.splits = c.splits;
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
  if (idx >= size) return;
  Vector* at = reinterpret_cast<Vector*>(p.split_state) + head * p.splits * size + idx;
  Vector h = {};
  if (p.initial_state) h = reinterpret_cast<const Vector*>(p.initial_state)[head * size + idx];
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

int launch(const mamba_ssd_scan_params& p, const Choice& c, cudaStream_t stream) {
  const ScanArgs a = arguments(p, c);
  const auto grow = [](Kernel k, int bytes) {
    return cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
  };
  if (c.splits == 0) {
    if (!grow(c.stream, c.shared)) return MAMBA_ERROR_CUDA;
    c.stream<<<c.slots(), c.threads, c.shared, stream>>>(a);
    return launch_status();
  }
  if (!grow(c.scan, c.shared)) return MAMBA_ERROR_CUDA;
  if (c.splits > 1) {
    if (!grow(c.state, c.state_shared)) return MAMBA_ERROR_CUDA;
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
  if (!params || check(*params) != MAMBA_OK || choose(*params, &c) != MAMBA_OK) return 0;
  return workspace_bytes(*params, c);
}

extern "C" int mamba_ssd_scan_tactics(const mamba_ssd_scan_params* params, int32_t* out, int max) {
  int count = 0;
  const auto add = [&](int tactic) {
    for (int i = 0; i < count; i++)
      if (out[i] == tactic) return;
    if (count < max) out[count++] = tactic;
  };
  if (!params || check(*params) != MAMBA_OK) return 0;
  mamba_ssd_scan_params p = *params;
  p.tactic = -1;
  Choice chosen;
  if (choose(p, &chosen) != MAMBA_OK) return 0;
  add(chosen.tactic());
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
  const mamba_ssd_scan_params& p = *params;
  if (const int status = check(p); status != MAMBA_OK) return status;
  if (p.batch == 0) return MAMBA_OK;
  if (!p.A || (p.seqlen > 0 && (!p.x || !p.dt || !p.B || !p.C || !p.y))) return MAMBA_ERROR_NULL_POINTER;
  Choice c;
  if (const int status = choose(p, &c); status != MAMBA_OK) return status;
  if (c.splits != 1 && (!p.workspace || !aligned(p.workspace, 16) || p.workspace_size < workspace_bytes(p, c)))
    return MAMBA_ERROR_WORKSPACE;
  return launch(p, c, static_cast<cudaStream_t>(stream));
}
