// selective_scan: argument checks, the tactics that cover a shape, the measured selector.
#include <algorithm>
#include <cmath>

#include "selective_scan_chain_layout.cuh"

namespace mamba::scan {
namespace {

using Params = mamba_selective_scan_params;

int check(const Params& p) {
  if (!p.u || !p.delta || !p.A || !p.B || !p.C || !p.y) return MAMBA_ERROR_NULL_POINTER;
  if (p.dtype < MAMBA_F32 || p.dtype > MAMBA_BF16) return MAMBA_ERROR_DTYPE;
  if (p.batch < 1 || p.batch > 65535 || p.seqlen < 1 || p.dim < 1 || p.ngroups < 1 || p.dim % p.ngroups != 0 ||
      p.d_state < 1 || p.d_state > 256) {
    return MAMBA_ERROR_SHAPE;
  }
  return MAMBA_OK;
}

size_t dtype_size(int dtype) { return dtype == MAMBA_F32 ? 4 : 2; }

// Whether a tensor's rows (any batch, token) start at multiples of `bytes`.
bool rows_aligned(const void* p, int64_t batch_stride, int64_t token_stride, size_t element, size_t bytes) {
  return p == nullptr || (aligned(p, bytes) && batch_stride * int64_t(element) % int64_t(bytes) == 0 &&
                          token_stride * int64_t(element) % int64_t(bytes) == 0);
}
bool activations_aligned(const Params& p, size_t bytes) {
  const size_t e = dtype_size(p.dtype);
  return rows_aligned(p.u, p.u_batch_stride, p.u_token_stride, e, bytes) &&
         rows_aligned(p.delta, p.delta_batch_stride, p.delta_token_stride, e, bytes) &&
         rows_aligned(p.z, p.z_batch_stride, p.z_token_stride, e, bytes) &&
         rows_aligned(p.y, p.y_batch_stride, p.y_token_stride, e, bytes) &&
         (p.dim / p.ngroups) * e % bytes == 0;
}
bool bc_aligned(const Params& p) {
  const size_t e = dtype_size(p.dtype);
  return rows_aligned(p.B, p.B_batch_stride, p.B_token_stride, e, 16) &&
         rows_aligned(p.C, p.C_batch_stride, p.C_token_stride, e, 16);
}

bool covers_chain(const Params& p, const Tactic& t) {
  const int states = chain_states(p.d_state);
  if (t.kernel == Tactic::kLinked && (!linked_warps(states, t.warps) || compute_major() < 9)) return false;
  if (!chain_lanes(states, chain_lanes_of(t.kernel)) || !bc_aligned(p) || t.pieces != 1 || t.groups < 1 || t.warps < 1 ||
      t.copiers < 1) {
    return false;
  }
  auto fits = [&](auto layout) {
    const size_t run = layout.kRun * dtype_size(p.dtype);  // bytes copied at once, by accesses of 16 at most
    return activations_aligned(p, std::min<size_t>(16, run)) && p.dim / p.ngroups % layout.kRun == 0 &&
           t.groups <= layout.kMostGroups && t.groups * t.warps + t.copiers <= layout.kMostWarps &&
           layout.slots(t) >= layout.least_slots(t);
  };
  return p.dtype == MAMBA_F32 ? with_chain<float>(t, p.d_state, fits) : with_chain<__half>(t, p.d_state, fits);
}

bool covers(const Params& p, const Tactic& t);

int channel_rows(const Params& p) { return p.batch * p.ngroups * ceil_div(p.dim / p.ngroups, kChannelWidth); }

// The workspace, where rows are in pieces: so many channels' states; behind them turns, or a sum of dt for every channel.
size_t workspace_channels(const Params& p, const Tactic& t) {
  return t.in_turn() ? size_t(channel_rows(p)) * kChannelWidth : size_t(p.batch) * t.pieces * p.dim;
}

#include "selective_scan_select.inl"

template <typename T> Args<T> make_args(const Params& p, const Tactic& tactic) {
  Args<T> a{};
  a.u = static_cast<const T*>(p.u), a.delta = static_cast<const T*>(p.delta), a.z = static_cast<const T*>(p.z);
  a.B = static_cast<const T*>(p.B), a.C = static_cast<const T*>(p.C), a.y = static_cast<T*>(p.y);
  a.A = p.A, a.D = p.D, a.bias = p.delta_bias, a.h0 = p.initial_state, a.hT = p.final_state, a.seq_lens = p.seq_lens;
  a.u_stride = {p.u_batch_stride, p.u_token_stride}, a.delta_stride = {p.delta_batch_stride, p.delta_token_stride};
  a.z_stride = {p.z_batch_stride, p.z_token_stride}, a.y_stride = {p.y_batch_stride, p.y_token_stride};
  a.B_stride = {p.B_batch_stride, p.B_token_stride}, a.C_stride = {p.C_batch_stride, p.C_token_stride};
  a.seqlen = p.seqlen, a.dim = p.dim, a.ngroups = p.ngroups, a.group_dim = p.dim / p.ngroups, a.d_state = p.d_state;
  a.softplus = p.delta_softplus, a.reverse = p.reverse;
  a.vec = activations_aligned(p, 16) && bc_aligned(p);
  a.pieces = tactic.pieces;
  a.piece_len = ceil_div(ceil_div(p.seqlen, tactic.pieces), 16) * 16;
  a.piece_state = static_cast<float*>(p.workspace);
  a.piece_dt = a.piece_state + workspace_channels(p, tactic) * p.d_state;
  if (tactic.in_turn()) a.turns = reinterpret_cast<int*>(a.piece_dt);
  return a;
}

template <typename T> int run(const Params& p, const Tactic& tactic, cudaStream_t stream) {
  const Args<T> args = make_args<T>(p, tactic);
  switch (tactic.kernel) {
    case Tactic::kGeneric: return launch_generic(args, tactic, p.batch, stream);
    case Tactic::kChannel: return launch_channel(args, tactic, p.batch, stream);
    default: return launch_chain(args, tactic, p.batch, stream);
  }
}

Tactic chosen(const Params& p) { return p.tactic < 0 ? select(p) : Tactic::from(p.tactic); }

bool covers(const Params& p, const Tactic& t) {
  switch (t.kernel) {
    case Tactic::kGeneric: return t.pieces >= 1 && !t.copiers;
    case Tactic::kChannel: return p.d_state == kState && t.pieces >= 1;
    case Tactic::kChain:
    case Tactic::kChain4:
    case Tactic::kChain8:
    case Tactic::kLinked: return covers_chain(p, t);
    default: return false;
  }
}

size_t workspace_of(const Params& p, const Tactic& t) {
  if (t.pieces == 1) return 0;
  const size_t channels = workspace_channels(p, t);
  return channels * p.d_state * sizeof(float) + (t.in_turn() ? (1 + size_t(channel_rows(p))) * sizeof(int) : channels * sizeof(float));
}

}  // namespace
}  // namespace mamba::scan

extern "C" int mamba_selective_scan(const mamba_selective_scan_params* params, mamba_stream stream) {
  using namespace mamba::scan;
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  const int status = check(*params);
  if (status != MAMBA_OK) return status;
  const Tactic tactic = chosen(*params);
  if (!covers(*params, tactic)) return MAMBA_ERROR_TACTIC;
  const size_t need = workspace_of(*params, tactic);
  if (need > 0 && (!params->workspace || params->workspace_size < need)) return MAMBA_ERROR_WORKSPACE;
  return mamba::dispatch(params->dtype, [&](auto t) {
    return run<decltype(t)>(*params, tactic, static_cast<cudaStream_t>(stream));
  });
}

extern "C" size_t mamba_selective_scan_workspace(const mamba_selective_scan_params* params) {
  using namespace mamba::scan;
  return params && check(*params) == MAMBA_OK ? workspace_of(*params, chosen(*params)) : 0;
}

extern "C" int mamba_selective_scan_tactics(const mamba_selective_scan_params* params, int32_t* out, int max) {
  using namespace mamba::scan;
  if (!params || check(*params) != MAMBA_OK) return 0;
  const Candidates all(*params);
  const int count = std::min(max, all.count);
  for (int i = 0; i < count; i++) out[i] = all.tactic[i].code();
  return count;
}
