// selective_scan, tactic "segment": the lanes of a warp are segments of time, and no warp works twice on anything.
//
// A lane has kTokens tokens of two channels, kLanes lanes make a span, and a warp takes a span of the channels its lanes
// have (a unit). For each state a lane runs the recurrence from zero; a scan over the lanes, behind which the state at the
// end of the span before is put, gives every lane the state it starts from; it runs again, adds to y, and in the same loop
// makes the decays of the next state and runs that from zero. What a unit leaves of a state is what the unit of the next
// span waits for, so that these follow each other a state apart.
//
// A block owns Q units side by side for whole rows, one row of them after another; W warps take the units in turn. One
// more warp copies: it keeps a ring of N stages of a span filled and writes y, which lies in the place of z.
#pragma once

#include <climits>

#include "early_launch.cuh"
#include "selective_scan_segment_layout.cuh"

namespace mamba::scan {

// A warp waits together, and the compiler knows that it is together afterwards.
__device__ __forceinline__ void mbarrier_wait_together(const float* bar, int parity) {
  asm volatile(
      "{\n.reg .pred done, all;\n"
      "wait:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\nvote.sync.all.pred all, done, -1;\n@!all bra wait;\n}" ::"r"(
          smem_address(bar)),
      "r"(parity)
      : "memory");
}

// A round of the scan over the lanes of two channels: what a lane has behind what the lane kShift before has, if there is one.
struct Ends {
  float end[2], decay[2];
};
template <int kShift> __device__ __forceinline__ Ends from_before(const Ends& own) {
  Ends v;
#pragma unroll
  for (int c = 0; c < 2; c++) v.end[c] = __shfl_up_sync(~0u, own.end[c], kShift), v.decay[c] = __shfl_up_sync(~0u, own.decay[c], kShift);
  return v;
}
template <int kShift> __device__ __forceinline__ void combine(Ends& own, const Ends& before) {
  asm("{\n.reg .pred in;\nsetp.ge.s32 in, %8, %9;\n"
      "@in fma.rn.ftz.f32 %0, %2, %4, %0;\n@in fma.rn.ftz.f32 %1, %3, %5, %1;\n"
      "@in mul.rn.ftz.f32 %2, %2, %6;\n@in mul.rn.ftz.f32 %3, %3, %7;\n}"
      : "+f"(own.end[0]), "+f"(own.end[1]), "+f"(own.decay[0]), "+f"(own.decay[1])
      : "f"(before.end[0]), "f"(before.end[1]), "f"(before.decay[0]), "f"(before.decay[1]), "r"(int(threadIdx.x % 32)), "n"(kShift));
}

// The last lanes put down what the unit leaves of a state, and say so.
__device__ __forceinline__ void leave(float* to, uint64_t* bar, float2 end, bool last) {
  asm volatile(
      "{\n.reg .pred last;\n.reg .b64 state;\nsetp.ne.s32 last, %4, 0;\n"
      "@last st.shared.v2.f32 [%0], {%2, %3};\n@last mbarrier.arrive.shared.b64 state, [%1];\n}" ::"r"(smem_address(to)),
      "r"(smem_address(bar)), "f"(end.x), "f"(end.y), "r"(int(last))
      : "memory");
}
// Threads of some warps meet.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// One unit: `acts` and `bc` at this lane's segment, `own` at its channels of the unit's records, `from` at theirs of the
// state the span starts from, `before` at a record of the span before; `left` tokens of the row from this segment on.
template <typename T, typename L>
__device__ __forceinline__ void segment_unit(T* acts, const float* bc, float* own, const float* from, const float* before,
                                             uint64_t* ready, int parity, int left, bool use_softplus, bool has_z) {
  constexpr int kTokens = L::kTokens, kAct = L::kActivation, kWidth = L::kWidth;
  const int segment = threadIdx.x % 32 / L::kPairs;
  float dt[2][kTokens], du[2][kTokens], y[2][kTokens], sum[2] = {};
  const float2 bias = *reinterpret_cast<const float2*>(own + L::kBias), D = *reinterpret_cast<const float2*>(own + L::kSkip);
  auto pair_at = [&](const T* p) { return to_float2(*reinterpret_cast<const pair_t<T>*>(p)); };
#pragma unroll
  for (int t = 0; t < kTokens; t++) {
    const float2 d = pair_at(acts + kAct + t * kWidth), x = pair_at(acts + t * kWidth);
    dt[0][t] = time_step<T>(d.x + bias.x, use_softplus), dt[1][t] = time_step<T>(d.y + bias.y, use_softplus);
    du[0][t] = x.x, du[1][t] = x.y;
  }
  if (left < kTokens) {  // past the end of the row; what is there may be NaN
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      if (t >= left) dt[0][t] = dt[1][t] = du[0][t] = du[1][t] = 0.0f;
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; t++) {
    y[0][t] = D.x * du[0][t], y[1][t] = D.y * du[1][t];
    du[0][t] *= dt[0][t], du[1][t] *= dt[1][t];
    sum[0] += dt[0][t], sum[1] += dt[1][t];
  }
  // Decays and inputs of a state, of two states in turn; where the second pass starts; the segment from zero.
  float a[2][2][kTokens], b[2][2][kTokens], h[2];
  Ends ends;
  auto load4 = [](const float* p) { return load_vec<float, 4>(p); };
  auto decays = [&](auto& a, auto& b, const float (&A)[2], const Vec<float, 4>& B, int t) {
#pragma unroll
    for (int c = 0; c < 2; c++) a[c][t] = ex2(dt[c][t] * A[c]), b[c][t] = du[c][t] * B.v[t % 4];
  };
  auto first_pass = [&](const auto& a, const auto& b, Ends& ends, int t) {
#pragma unroll
    for (int c = 0; c < 2; c++) ends.end[c] = fmaf(a[c][t], ends.end[c], b[c][t]);
  };
  auto second_pass = [&](const auto& a, const auto& b, const Vec<float, 4>& C, int t) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      h[c] = fmaf(a[c][t], h[c], b[c][t]);
      y[c][t] = fmaf(C.v[t % 4], h[c], y[c][t]);
    }
  };
  // Scans the state whose first pass was made last, while the state before it has its second pass and, where that leaves
  // decays and inputs, the state behind it its first: a shuffle waits behind exponentials.
  auto step = [&](auto& a, auto& b, auto second, auto first, const float* C, const float* B) {
    mbarrier_wait_together(before + L::kReady, parity);
    const float2 start = *reinterpret_cast<const float2*>(from);
    float A[2] = {};
    if constexpr (first) {
      const float2 v = *reinterpret_cast<const float2*>(own + L::kRecord);
      A[0] = kLog2e * v.x, A[1] = kLog2e * v.y;
    }
    Vec<float, 4> Cs{}, Bs{};
    if constexpr (second) Cs = load4(C);
    if constexpr (first) Bs = load4(B);
    const float in[2] = {start.x, start.y};
    Ends next{}, shifted;
#pragma unroll
    for (int c = 0; c < 2; c++) ends.end[c] = fmaf(ends.decay[c], segment == 0 ? in[c] : 0.0f, ends.end[c]);
    auto tokens = [&](int t0) {  // two of them; their first pass two later, when the exponentials are there
#pragma unroll
      for (int t = t0; t < t0 + 2; t++) {
        if constexpr (second) second_pass(a, b, Cs, t);
        if constexpr (first) decays(a, b, A, Bs, t);
        if (first && t >= 2) first_pass(a, b, next, t - 2);
      }
      if (t0 % 4 == 2 && t0 + 2 < kTokens) {
        if constexpr (second) Cs = load4(C + (t0 + 2) / 4 * L::kStep);
        if constexpr (first) Bs = load4(B + (t0 + 2) / 4 * L::kStep);
      }
    };
    auto piece = [&](int k) {
      __syncwarp();
      if (2 * k < kTokens) tokens(2 * k);
      __syncwarp();
    };
    constexpr int kFirst = L::kPairs;
    shifted = from_before<kFirst>(ends), piece(0), combine<kFirst>(ends, shifted);
    shifted = from_before<2 * kFirst>(ends), piece(1), combine<2 * kFirst>(ends, shifted);
    shifted = from_before<4 * kFirst>(ends), piece(2), combine<4 * kFirst>(ends, shifted);
    shifted = from_before<8 * kFirst>(ends), piece(3), combine<8 * kFirst>(ends, shifted);
    if constexpr (L::kLanes == 32) shifted = from_before<16>(ends), piece(4), combine<16>(ends, shifted);
    const float e[2] = {__shfl_up_sync(~0u, ends.end[0], kFirst), __shfl_up_sync(~0u, ends.end[1], kFirst)};
    leave(own + L::kLeft, ready, make_float2(ends.end[0], ends.end[1]), segment == L::kLanes - 1);
#pragma unroll
    for (int k = L::kLanes == 32 ? 5 : 4; k < kTokens / 2; k++) piece(k);
    if constexpr (first) first_pass(a, b, next, kTokens - 2), first_pass(a, b, next, kTokens - 1);
#pragma unroll
    for (int c = 0; c < 2; c++) h[c] = segment == 0 ? in[c] : e[c];
    ends = next, ends.decay[0] = ex2(sum[0] * A[0]), ends.decay[1] = ex2(sum[1] * A[1]);
    own += L::kRecord, from += L::kRecord, before += L::kRecord, ready += L::kRecord / 2;
  };
  constexpr std::true_type yes{};
  constexpr std::false_type no{};
  {
    const float A[2] = {kLog2e * own[0], kLog2e * own[1]};
    ends = {};
#pragma unroll
    for (int t = 0; t < kTokens; t += 4) {
      const Vec<float, 4> B = load4(bc + t / 4 * L::kStep);
#pragma unroll
      for (int r = 0; r < 4; r++) decays(a[0], b[0], A, B, t + r), first_pass(a[0], b[0], ends, t + r);
    }
    ends.decay[0] = ex2(sum[0] * A[0]), ends.decay[1] = ex2(sum[1] * A[1]);
  }
  step(a[1], b[1], no, yes, nullptr, bc + L::kRow);
#pragma unroll 1
  for (int n = 0; n < kState - 2; n += 2) {
    step(a[0], b[0], yes, yes, bc + L::kToC, bc + 2 * L::kRow);
    step(a[1], b[1], yes, yes, bc + L::kToC + L::kRow, bc + 3 * L::kRow);
    bc += 2 * L::kRow;
  }
  step(a[0], b[0], yes, no, bc + L::kToC, nullptr);
#pragma unroll
  for (int t = 0; t < kTokens; t += 4) {
    const Vec<float, 4> C = load4(bc + L::kToC + L::kRow + t / 4 * L::kStep);
#pragma unroll
    for (int r = 0; r < 4; r++) second_pass(a[1], b[1], C, t + r);
  }
  T* out = acts + 2 * kAct;
#pragma unroll
  for (int t = 0; t < kTokens; t++) {
    float2 v = make_float2(y[0][t], y[1][t]);
    if (has_z) {
      const float2 z = pair_at(out + t * kWidth);
      v.x *= silu(z.x), v.y *= silu(z.y);
    }
    *reinterpret_cast<pair_t<T>*>(out + t * kWidth) = from_float2<T>(v.x, v.y);
  }
}

// What a block has to do, one span after another: those of a row of its units, then those of its next row of units. Stages of
// the ring go round with them.
template <typename T, typename L> struct Spans {
  const Args<T>& p;
  const int items, width, stages;
  int item, b, group, c0, channels, tokens, span = 0, count, stage = 0, lap = 0;

  __device__ __forceinline__ Spans(const Args<T>& p, int items, int width, int stages)
      : p(p), items(items), width(width), stages(stages), item(blockIdx.x) {
    look();
  }
  __device__ __forceinline__ void look() {
    const int of_group = ceil_div(p.group_dim, width), of_row = p.ngroups * of_group, in_row = item % of_row;
    b = item / of_row, group = in_row / of_group, c0 = group * p.group_dim + in_row % of_group * width;
    channels = min(width, (group + 1) * p.group_dim - c0);
    tokens = row_length(p, b), count = max(1, ceil_div(tokens, L::kSpan));
  }
  __device__ __forceinline__ bool left() const { return item < items; }
  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, lap ^= 1;
    if (++span < count) return;
    span = 0, item += gridDim.x;
    if (item < items) look();
  }
  __device__ __forceinline__ int first_token() const { return span * L::kSpan; }
};

// Moves spans, as one of some threads that share that. Of activations a thread has a column of a unit's width and every
// `rows`-th token, the same ones in every span: what it overwrites is what it has read, y of an earlier span.
template <typename T, typename L> struct Mover {
  static constexpr int kAct = L::kActivation, kWidth = L::kWidth, kBytes = kWidth * sizeof(T);
  const Args<T>& p;
  const int thread, threads, column, rows, token0, place;

  __device__ __forceinline__ Mover(const Args<T>& p, int units, int thread, int threads)
      : p(p), thread(thread), threads(threads), column(thread % units), rows(threads / units),
        token0(thread < rows * units ? thread / units : 1 << 30), place(column * 3 * kAct) {}

  // The element of a tensor at a token of the span and this column or `c`.
  __device__ __forceinline__ int64_t at(const Strides& s, const Spans<T, L>& span, int t, int c) const {
    const int token = span.first_token() + t;
    return span.b * s.batch + (p.reverse ? span.tokens - 1 - token : token) * s.token + c;
  }
  __device__ __forceinline__ bool none(const Spans<T, L>& span) const { return column * kWidth >= span.channels || token0 >= L::kSpan; }

  __device__ __forceinline__ void fill_activations(const Spans<T, L>& span, T* acts) const {
    if (none(span)) return;
    const int count = min(L::kSpan, span.tokens - span.first_token()), c = span.c0 + column * kWidth, step = p.reverse ? -rows : rows;
    const T *u = p.u + at(p.u_stride, span, token0, c), *delta = p.delta + at(p.delta_stride, span, token0, c);
    const T* z = p.z ? p.z + at(p.z_stride, span, token0, c) : nullptr;
    const uint32_t to = smem_address(acts + place);
    for (int t = token0; t < count; t += rows) {
      const uint32_t dst = to + (t + t / L::kTokens) * kBytes;
      cp_async_at<kBytes>(dst, u);
      cp_async_at<kBytes>(dst + kAct * sizeof(T), delta);
      if (p.z) cp_async_at<kBytes>(dst + 2 * kAct * sizeof(T), z);
      u += step * p.u_stride.token, delta += step * p.delta_stride.token, z += step * p.z_stride.token;
    }
  }
  __device__ __forceinline__ void write_y(const Spans<T, L>& span, const T* acts) const {
    if (none(span)) return;
    const int count = min(L::kSpan, span.tokens - span.first_token()), step = p.reverse ? -rows : rows;
    T* y = p.y + at(p.y_stride, span, token0, span.c0 + column * kWidth);
    for (int t = token0; t < count; t += rows, y += step * p.y_stride.token) {
      store_vec<T, kWidth>(y, load_vec<T, kWidth>(acts + place + 2 * kAct + (t + t / L::kTokens) * kWidth));
    }
  }
  __device__ __forceinline__ void fill_records(const Spans<T, L>& span, float* to) const {
    for (int i = thread; i < span.channels * kState; i += threads) {
      const int c = i / kState, n = i % kState, at = c / kWidth * L::kRecords + n * L::kRecord + c % kWidth;
      cp_async<4>(to + at, p.A + int64_t(span.c0) * kState + i);
      if (span.span != 0) continue;
      const float* start = p.h0 ? p.h0 + (int64_t(span.b) * p.dim + span.c0) * kState + i : p.A;
      cp_async<4>(to + at + L::kInitial, start, p.h0 != nullptr);
    }
    for (int c = thread; c < span.channels; c += threads) {
      float* dst = to + c / kWidth * L::kRecords + L::kBias + c % kWidth;
      cp_async<4>(dst, p.bias ? p.bias + span.c0 + c : p.A, p.bias != nullptr);
      cp_async<4>(dst + kWidth, p.D ? p.D + span.c0 + c : p.A, p.D != nullptr);
    }
  }
  // B and C: share i is four tokens by eight states, transposed. Eight threads in a row write 128 neighbouring bytes.
  __device__ __forceinline__ void load_share(const Spans<T, L>& span, Run<T> (&raw)[4], int i) const {
    const int quad = i % L::kLanes * (L::kTokens / 4) + i / L::kLanes % (L::kTokens / 4), eighth = i / (L::kSpan / 4);
    const int64_t step = (p.reverse ? -1 : 1) * (eighth < 2 ? p.B_stride.token : p.C_stride.token);
    const T* from = (eighth < 2 ? p.B + at(p.B_stride, span, 4 * quad, span.group * kState) : p.C + at(p.C_stride, span, 4 * quad, span.group * kState)) +
                    eighth % 2 * 8;
    const int count = span.tokens - span.first_token() - 4 * quad;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      raw[r] = Run<T>{};
      if (r < count) load_run8<T, true>(raw[r], from + r * step);  // zeros past the end of the row
    }
  }
  __device__ __forceinline__ void store_share(float* bc, const Run<T> (&raw)[4], int i) const {
    float f[4][8];
#pragma unroll
    for (int r = 0; r < 4; r++) to_floats(f[r], raw[r]);
    float* dst = bc + i / (L::kSpan / 4) * 8 * L::kRow + i % (L::kSpan / 4) * 4;
#pragma unroll
    for (int s = 0; s < 8; s++) {
      *reinterpret_cast<float4*>(dst + s * L::kRow) = make_float4(f[0][s], f[1][s], f[2][s], f[3][s]);
    }
  }
  __device__ __forceinline__ void fill_states(const Spans<T, L>& span, float* bc) const {
    constexpr int kAtOnce = sizeof(T) == 4 ? 1 : 2;
    for (int i = thread; i < L::kSpan; i += kAtOnce * threads) {
      Run<T> raw[kAtOnce][4];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        if (i + j * threads < L::kSpan) load_share(span, raw[j], i + j * threads);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        if (i + j * threads < L::kSpan) store_share(bc, raw[j], i + j * threads);
      }
    }
  }
};

// Hopper can give registers of the copying warps to the others, where both are warpgroups.
template <int kWarps> __device__ __forceinline__ void more_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kWarps == 8 ? 216 : 144));
#endif
}
template <int kWarps> __device__ __forceinline__ void fewer_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kWarps == 8 ? 72 : 80));
#endif
}

template <typename T, typename L>
__global__ void __launch_bounds__(32 * (L::kWarps + L::kCopiers), 1)
    segment_kernel(const __grid_constant__ Args<T> p, int items, int Q, int N) {
  constexpr int kAct = L::kActivation, kWarps = L::kWarps, kCopiers = L::kCopiers;
  extern __shared__ __align__(16) char shared[];
  const int stage_bytes = L::stage_bytes(Q), lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);  // one for all lanes, as the compiler sees too
  auto stage_bc = [&](int stage) { return reinterpret_cast<float*>(shared + stage * stage_bytes); };
  auto stage_records = [&](int stage) { return stage_bc(stage) + 2 * kState * L::kSpan; };
  auto stage_acts = [&](int stage) { return reinterpret_cast<T*>(stage_records(stage) + Q * L::kRecords); };
  uint64_t *filled = reinterpret_cast<uint64_t*>(shared + N * stage_bytes), *done = filled + N;
  for (int i = threadIdx.x; i < N * Q * kState; i += blockDim.x) {
    float* record = stage_records(i / kState / Q) + i / kState % Q * L::kRecords + i % kState * L::kRecord;
    mbarrier_init(reinterpret_cast<uint64_t*>(record + L::kReady), L::kPairs);
  }
  if (threadIdx.x < N) mbarrier_init(&filled[threadIdx.x], 2 * 32), mbarrier_init(&done[threadIdx.x], 32 * Q);
  __syncthreads();
  let_next_start();
  wait_for_previous();

  Spans<T, L> at(p, items, Q * L::kWidth, N);
  auto fill = [&](const Mover<T, L>& mover, const Spans<T, L>& span) {
    mover.fill_activations(span, stage_acts(span.stage));
    mover.fill_records(span, stage_records(span.stage));
    mover.fill_states(span, stage_bc(span.stage));
  };
  // The first spans by all warps, several a span.
  constexpr int kFirst = 4, kHelpers = (kWarps + kCopiers) / kFirst;
  const int first = min(kFirst, N);
  {
    Spans<T, L> own = at;
    for (int k = 0; k < warp % kFirst && own.left(); k++) own.next();
    if (warp % kFirst < first && own.left()) {
      fill(Mover<T, L>(p, Q, warp / kFirst * 32 + lane, kHelpers * 32), own);
      cp_async_commit();
      cp_async_wait<0>();
      meet(1 + warp % kFirst, kHelpers * 32);
      if (warp < kFirst) mbarrier_arrive(&filled[own.stage]), mbarrier_arrive(&filled[own.stage]);
    }
  }

  if (warp < kWarps) {
    more_registers<kWarps>();
    const int segment = lane / L::kPairs, pair = lane % L::kPairs * 2;
    const int warps = min(kWarps, N * Q);       // more would wait for a stage two laps ahead
    int turn = warp < warps ? warp : INT_MAX;  // the unit of a span that is this warp's next
    int prior = N - 1, ago = 1;  // stage and lap of the span before; of the first: a phase that counts as over
    for (; at.left(); prior = at.stage, ago = at.lap, at.next()) {
      for (; turn < Q; turn += warps) {
        T* acts = stage_acts(at.stage) + turn * 3 * kAct + segment * (L::kTokens + 1) * L::kWidth + pair;
        float* own = stage_records(at.stage) + turn * L::kRecords;
        const float* before = stage_records(prior) + turn * L::kRecords;
        const float* from = (at.span == 0 ? own + L::kInitial : before + L::kLeft) + pair;
        mbarrier_wait(&filled[at.stage], at.lap);
        segment_unit<T, L>(acts, stage_bc(at.stage) + segment * 4, own + pair, from, before,
                           reinterpret_cast<uint64_t*>(own + L::kReady), ago,
                           at.tokens - at.first_token() - segment * L::kTokens, p.softplus, p.z);
        if (p.hT && at.span == at.count - 1) {
          __syncwarp();
          for (int i = lane; i < L::kWidth * kState && turn * L::kWidth + i / kState < at.channels; i += 32) {
            p.hT[(int64_t(at.b) * p.dim + at.c0 + turn * L::kWidth) * kState + i] = own[i % kState * L::kRecord + L::kLeft + i / kState];
          }
        }
        mbarrier_arrive(&done[at.stage]);
      }
      if (warp < warps) turn -= Q;
    }
  } else {
    fewer_registers<kWarps>();
    // Every kCopiers-th span is this warp's. It waits for all, in order: a barrier may not be two phases behind its parity.
    Spans<T, L> behind = at;  // y of this span is to be written, N spans behind the one to be filled
    const Mover<T, L> mover(p, Q, lane, 32);
    auto fill_own = [&]() {
      if (!at.left()) return;
      fill(mover, at);
      mbarrier_arrive_copies(&filled[at.stage]);
      mbarrier_arrive(&filled[at.stage]);
    };
    int turn = warp - kWarps;  // spans until this warp's next
    for (int k = 0; k < N; k++) {
      if (turn == 0 && k >= first) fill_own();
      turn = turn == 0 ? kCopiers - 1 : turn - 1;
      if (at.left()) at.next();
    }
    for (; behind.left(); behind.next()) {
      mbarrier_wait(&done[behind.stage], behind.lap);
      if (turn == 0) mover.write_y(behind, stage_acts(behind.stage)), fill_own();
      turn = turn == 0 ? kCopiers - 1 : turn - 1;
      if (at.left()) at.next();
    }
  }
  if (!p.seq_lens) return;
  for (Spans<T, L> row(p, items, Q * L::kWidth, N); row.left(); row.next()) {
    if (row.span == 0) zero_padding(p, row.b, row.tokens, row.c0, row.c0 + row.channels);
  }
}

}  // namespace mamba::scan
