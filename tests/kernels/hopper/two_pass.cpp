// Both passes, launched on the CPU one after the other.
#include <cstddef>

#include "ssd_two_pass_outputs.cuh"
#include "ssd_two_pass_states.cuh"

using namespace mamba;
using namespace mamba::ssd;

struct Call {
  const void *x, *dt, *B, *C, *z;
  void* y;
  const float *A, *D, *dt_bias, *initial_state;
  float* final_state;
  const int32_t* seq_lens;
  int32_t batch, seqlen, nheads, ngroups, d_state, dt_softplus, d_per_channel, width, halves;
  int32_t heads_per_block, chunks;  // of a block of the second pass; of one pair of launches
  int32_t first, rest, together;    // see TwoPassArgs; first: 0 if rows are not cut, or the run if rest is 0
};

template <typename T, int kHeadDim, int kState, int kWgs, bool kPadded> void run_as(const Call& q) {
  using States = StatesLayout<T, kHeadDim, kState, kPadded, kWgs>;
  using Outputs = OutputsLayout<T, kHeadDim, kState, kPadded>;
  const int64_t wide = (q.nheads >> q.halves) * q.width, narrow = q.ngroups * q.d_state, tokens = q.seqlen;
  TwoPassArgs a = {};
  ScanArgs& s = a.scan;
  s.x = q.x, s.dt = q.dt, s.B = q.B, s.C = q.C, s.z = q.z, s.y = q.y, s.A = q.A, s.D = q.D, s.dt_bias = q.dt_bias;
  s.initial_state = q.initial_state, s.final_state = q.final_state, s.seq_lens = q.seq_lens;
  s.x_token = s.z_token = s.y_token = wide, s.B_token = s.C_token = narrow, s.dt_token = q.nheads >> q.halves;
  s.x_batch = s.z_batch = s.y_batch = wide * tokens, s.B_batch = s.C_batch = narrow * tokens, s.dt_batch = s.dt_token * tokens;
  s.batch = q.batch, s.seqlen = q.seqlen, s.nheads = q.nheads, s.headdim = q.halves ? 64 : q.width, s.ngroups = q.ngroups, s.d_state = q.d_state;
  s.dt_softplus = q.dt_softplus, s.d_per_channel = q.d_per_channel, s.width = q.width, s.halves = q.halves, s.dt_min = 0.f, s.dt_max = INFINITY;
  a.x = {q.x, kPadded ? q.width : static_cast<int>(wide), q.seqlen, q.batch, wide, wide * tokens};
  a.B = {q.B, kPadded ? q.d_state : static_cast<int>(narrow), q.seqlen, q.batch, narrow, narrow * tokens}, a.C = a.B, a.C.base = q.C, a.y = a.x, a.y.base = q.y;
  std::vector<uint8_t> images(static_cast<size_t>(q.batch) * q.nheads * q.chunks * States::kImage, 0xff);
  std::vector<float> carry(static_cast<size_t>(q.batch) * q.nheads * kHeadDim * kState, NAN);
  const int all = ceil_div(q.seqlen, kTwoPassChunk), rows = q.batch * q.nheads;
  a.rest = q.rest, a.together = q.together, a.later = q.first ? q.rest ? ceil_div(all - q.first, q.rest) : 1 : 0;
  if (q.rest == 0) a.run = q.first, a.rest = all;
  std::vector<float> decays(static_cast<size_t>(rows) * (all + 1), NAN), ends(static_cast<size_t>(rows) * a.later * kHeadDim * kState, NAN);
  a.decays = decays.data(), a.ends = ends.data();
  a.states = images.data(), a.carry = carry.data(), a.rows = q.batch, a.group_blocks = ceil_div(q.nheads / q.ngroups, q.heads_per_block);
  for (a.chunk0 = 0; a.chunk0 < all; a.chunk0 += q.chunks) {
    a.chunks = min(q.chunks, all - a.chunk0);
    a.first = a.run ? all : q.first, a.late_first = q.heads_per_block % 2;
    const int outputs = a.chunks * q.batch * q.ngroups * a.group_blocks;
    if (a.later) {
      const int blocks = a.run ? ceil_div(rows * all, a.run) : rows + ceil_div(rows * a.later, a.together);
      emu::run(dim3(States::kSplit * blocks), States::kThreads, [&] { ssd_states_kernel<States, true>(a); });
      emu::run(dim3(outputs), Outputs::kThreads, [&] { ssd_outputs_kernel<Outputs, true>(a); });
    } else {
      emu::run(dim3(States::kSplit * q.nheads, q.batch), States::kThreads, [&] { ssd_states_kernel<States, false>(a); });
      emu::run(dim3(outputs), Outputs::kThreads, [&] { ssd_outputs_kernel<Outputs, false>(a); });
    }
  }
}

template <typename T, int kState, int kWgs> void run(const Call& q) {
  if constexpr (sizeof(T) == 2 && kState == 128) {
    if (q.width > 64 && !q.halves) return run_as<T, 80, kState, kWgs, true>(q);
  }
  if (q.width < 64 || q.d_state != kState)
    run_as<T, 64, kState, kWgs, true>(q);
  else
    run_as<T, 64, kState, kWgs, false>(q);
}

template <typename T> void run(const Call& q, int warpgroups) {
  if (q.d_state <= 64) return run<T, 64, 1>(q);
  if constexpr (sizeof(T) == 2) {
    if (q.d_state > 128) return warpgroups == 2 ? run<T, 256, 2>(q) : run<T, 256, 1>(q);
  }
  return sizeof(T) == 2 && warpgroups == 2 ? run<T, 128, sizeof(T) == 2 ? 2 : 1>(q) : run<T, 128, 1>(q);
}

extern "C" void two_pass(const Call* call, int dtype, int warpgroups) {
  if (dtype == MAMBA_F32) return run<float>(*call, warpgroups);
  return dtype == MAMBA_F16 ? run<__half>(*call, warpgroups) : run<__nv_bfloat16>(*call, warpgroups);
}
