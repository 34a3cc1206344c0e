// Second pass of the SSD scan for Hopper: what a block's stages hold, and the warps that fill them.
#pragma once

#include "ssd_two_pass.cuh"

namespace mamba {
namespace ssd {

// Shared memory of so many stages, of which `late` lie where B was and are filled once the scores are made.
constexpr int outputs_bytes(int states, int stage, int each, int fixed, int stages, int late) {
  const int behind = late * stage > states ? late * stage : states;
  return states + (stages - late) * stage + behind + stages * each + fixed;
}

template <typename T_, int kHeadDim_, int kState_, bool kPadded_>
struct OutputsLayout : TwoPass<T_, kHeadDim_, kState_, kPadded_> {
  using Base = TwoPass<T_, kHeadDim_, kState_, kPadded_>;
  static constexpr int kProducers = 128, kConsumers = 256, kThreads = kProducers + kConsumers;
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static constexpr int kInput = Base::kParts * Base::kHeadTiles * kTileBytes;  // x of one head
  static constexpr int kStage = kInput + Base::kParts * Base::kHeadTiles * Base::kStateTile;
  static constexpr int kStates = Base::kParts * Base::kStateTiles * kTileBytes;  // C or B
  static constexpr int kOut = sizeof(T_) == 2 ? kTileBytes : 0;  // where y of 64 columns is put in order
  static constexpr int kTable = (2 * 128 + 8 + 4) * 4 + 4 * (64 + 128) * (Base::kParts == 2 ? 4 : 2);  // bytes of a DecayTable
  static constexpr int kMost = 232448, kFixed = kOut + 192;
  static constexpr int kStages = outputs_bytes(kStates, kStage, kTable, kFixed, 4, 0) <= kMost ? 4 : 2;
  static constexpr int kLate = outputs_bytes(kStates, kStage, kTable, kFixed, kStages, 0) <= kMost ? 0 : 1;
  static constexpr int kEarly = kStages - kLate;
  static constexpr int kDecayWarps = kStages < 3 ? kStages : 3;  // more would wait for a phase behind the next
  // C, early stages, B or the late stage.
  static constexpr int kStageAt = kStates, kSourceAt = kStageAt + kEarly * kStage;
  static constexpr int kTableAt = outputs_bytes(kStates, kStage, 0, 0, kStages, kLate) + kOut, kOutAt = kTableAt - kOut;
  static constexpr int kBarrierAt = kTableAt + kStages * kTable, kCarriedAt = kBarrierAt + (2 + 4 * kStages) * 8;
  static constexpr int kShared = kBarrierAt + 192;
  static_assert(kShared <= kMost, "does not fit");

  // The phase of a stage's barrier to wait for before the i-th tile: a late stage is given back once more.
  __device__ __forceinline__ static int free_parity(int i) { return (i / kStages + (i % kStages >= kEarly) + 1) & 1; }
};

// float16 has few exponents: C B^T is kept divided by 64, and the decays of its columns, times dt, multiplied by it.
template <typename T>
struct ScoreScale {
  static constexpr float kScores = 1.f, kColumns = 1.f;
};
template <>
struct ScoreScale<__half> {
  static constexpr float kScores = 1 / 64.f, kColumns = 64.f;
};

// The decays of one head in a chunk, exp except for `sum` and `source`.
template <typename T>
struct DecayTable {
  float* base;
  __device__ float* sum() const { return base; }           // log2, from the start of the token's 16 up to and with it
  __device__ float* source() const { return base + 128; }  // the same less log2 dt
  __device__ float& before(int block) const { return base[256 + block]; }  // from the chunk's start to that of block 0 to 7
  __device__ float& skip() const { return base[264]; }                     // D
  // Block `block` of 16 in half `half`: from token s to the block's start, times dt, for the tokens before it.
  __device__ float* columns(int half, int block) const { return base + 268 + (half ? 256 + block * 128 : block * 64); }
  // The same for 16-bit inputs, in pairs: of 32 tokens a lane of four has two pairs of the first 16, 8 tokens apart, then two of
  // the others.
  __device__ uint4* pairs(int half, int block) const {
    return reinterpret_cast<uint4*>(base + 268) + (half ? 32 + block * 16 : block * 8);
  }

  // This lane's weights for block `to` of half `half`.
  __device__ __forceinline__ void put(int half, int to, float4 w) const {
    const int lane = threadIdx.x & 31;
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<float4*>(columns(half, to))[lane] = w;
    } else {
      constexpr float kScale = ScoreScale<T>::kColumns;
      uint32_t* out = reinterpret_cast<uint32_t*>(pairs(half, to)) + lane / 8 * 16 + lane % 2 * 8 + lane / 4 % 2 * 2 + lane / 2 % 2;
      out[0] = Traits<T>::pack(w.x * kScale, w.y * kScale), out[4] = Traits<T>::pack(w.z * kScale, w.w * kScale);
    }
  }

  __device__ __forceinline__ void make(const ChunkDecay<T>& d, float D) const {
    const int lane = threadIdx.x & 31, block = lane % 16 / 4, half = lane / 16;
    const float first = __shfl_sync(0xffffffffu, d.half, 0), end = d.before + d.total;
    reinterpret_cast<float4*>(sum())[lane] = make_float4(d.sum[0], d.sum[1], d.sum[2], d.sum[3]);
    reinterpret_cast<float4*>(source())[lane] =
        make_float4(d.sum[0] - lg2(d.dt[0]), d.sum[1] - lg2(d.dt[1]), d.sum[2] - lg2(d.dt[2]), d.sum[3] - lg2(d.dt[3]));
    if (lane == 0) skip() = D;
    if (lane % 4 == 0) before(lane / 4) = ex2(d.before + (half ? first : 0.f));
#pragma unroll
    for (int to = 0; to < 4; to++) {
      const float low = __shfl_sync(0xffffffffu, d.before, 4 * to), high = __shfl_sync(0xffffffffu, d.before, 16 + 4 * to);
      if (half == 0 && block < to) put(0, to, d.weights(low - end));
      if (half == 0 || block < to) put(1, to, d.weights(high - end + (half ? 0.f : first)));
    }
  }
};

template <typename L>
struct OutputsShared {
  uint8_t* base;
  __device__ uint32_t C() const { return smem_address(base); }
  __device__ uint32_t B() const { return C() + L::kSourceAt; }
  __device__ uint32_t x(int s) const { return C() + L::kStageAt + s * L::kStage; }
  __device__ uint32_t state(int s) const { return x(s) + L::kInput; }
  __device__ uint32_t out(int warp) const { return C() + L::kOutAt + warp * 2048; }
  __device__ DecayTable<typename L::T> table(int s) const { return {reinterpret_cast<float*>(base + L::kTableAt + s * L::kTable)}; }
  __device__ uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(base + L::kBarrierAt) + i; }
  __device__ uint64_t* ready() const { return barrier(0); }   // C and B
  __device__ uint64_t* landed() const { return barrier(1); }  // x whose padding must be cleared
  __device__ uint64_t* x_full(int s) const { return barrier(2 + s); }  // and the decays
  __device__ uint64_t* state_full(int s) const { return barrier(2 + L::kStages + s); }
  __device__ uint64_t* empty(int s) const { return barrier(2 + 2 * L::kStages + s); }
  // States are a ring of their own: a head behind a cut has more than one.
  __device__ uint64_t* state_empty(int s) const { return barrier(2 + 3 * L::kStages + s); }
  // What is left of C h of state s where the head's next one begins; 0: it is the head's last.
  __device__ float& carried(int s) const { return reinterpret_cast<float*>(base + L::kCarriedAt)[s]; }
};

struct OutputsItem {
  int batch, head0, heads, group;
  int step;                // from a head to the next
  int chunk;               // of this launch
  int token0, limit, end;  // first token, valid tokens of the row, end of this chunk
  int row;                 // of heads of this launch, the first
};

// Fills the ring of states, by one thread; where images end in kRest columns, which threads copy, by a warp. Behind a cut a
// chunk's copy lacks what is left of the state at the piece's start; the copy there, if it is not the first piece's end, lacks what
// is left of the one before. The earliest comes first: the consumers multiply y by what is left of it before they add the next.
template <typename L, bool kCut>
struct StateLoader {
  int item = 0;           // of the ring, the next
  float left[kMaxLater];  // of the copy at the start of later piece i: at its end, or before the chunk; 0: it is not needed

  // The last columns of an image, of which a lane has kPieces times 16 bytes: asked for, and put in their place of a tile.
  static constexpr int kPieces = L::kState * L::kRest * 2 / 16 / 32;
  struct Rest {
    uint4 piece[kPieces > 0 ? kPieces : 1];
  };
  __device__ __forceinline__ static Rest fetch_rest(const TwoPassArgs& args, int row, int chunk) {
    const uint8_t* image = static_cast<const uint8_t*>(args.states) + (static_cast<int64_t>(row) * args.chunks + chunk) * L::kImage;
    Rest rest;
#pragma unroll
    for (int i = 0; i < kPieces; i++) rest.piece[i] = __ldcg(reinterpret_cast<const uint4*>(image + L::kWideImage) + threadIdx.x + 32 * i);
    return rest;
  }
  __device__ __forceinline__ static void place_rest(uint32_t state, const Rest& rest) {
    constexpr int kOfRow = L::kRest > 0 ? L::kRest / 8 : 1;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int at = threadIdx.x + 32 * i;
      const uint32_t v[4] = {rest.piece[i].x, rest.piece[i].y, rest.piece[i].z, rest.piece[i].w};
      store_shared_16(state + L::kWideTiles * L::kStateTile + Tile<64>::offset(at / kOfRow, at % kOfRow), v);
    }
    fence_async_proxy();
    __syncwarp();
  }

  // For head i, before `load`.
  __device__ __forceinline__ void fetch(const TwoPassArgs& args, const OutputsItem& at, int i) {
    if constexpr (!kCut) return;
    const int row = at.row + i * at.step;
    const float* from = args.decays + static_cast<int64_t>(row) * (args.chunks + 1);
    const RowCut cut(args, row);
    const int later = cut.later(at.chunk);
#pragma unroll
    for (int piece = 0; piece < kMaxLater; piece++) left[piece] = piece < later ? __ldcg(from + cut.end(piece, at.chunk)) : 1.f;
    float rest = 1.f;
#pragma unroll
    for (int piece = kMaxLater - 1; piece >= 0; piece--) {
      rest *= left[piece];
      if (rest == 0.f || piece >= later) left[piece] = 0.f;
    }
  }
  // `rest`: of the head's image, asked for before, where rows are not cut.
  __device__ __forceinline__ void load(const TwoPassArgs& args, const OutputsItem& at, const OutputsShared<L>& shared, int i,
                                       const Rest& rest) {
    const int row = at.row + i * at.step;
    const uint8_t* images = static_cast<const uint8_t*>(args.states) + static_cast<int64_t>(row) * args.chunks * L::kImage;
    const bool leads = L::kRest == 0 || threadIdx.x == 0;
    if constexpr (!kCut) {
      const int slot = i % L::kStages;
      if constexpr (L::kRest > 0) place_rest(shared.state(slot), rest);
      if (leads) bulk_load(shared.state(slot), images + static_cast<int64_t>(at.chunk) * L::kImage, L::kWideImage, shared.state_full(slot));
      return;
    }
    const RowCut cut(args, row);
    const auto add = [&](int chunk, float carried) {
      const int slot = item % L::kStages;
      const uint8_t* image = images + static_cast<int64_t>(chunk) * L::kImage;
      mbarrier_wait(shared.state_empty(slot), L::free_parity(item++));
      if constexpr (L::kRest > 0) place_rest(shared.state(slot), fetch_rest(args, row, chunk));
      if (!leads) return;
      shared.carried(slot) = carried;
      bulk_load(shared.state(slot), image, L::kWideImage, shared.state_full(slot));
    };
#pragma unroll
    for (int piece = 0; piece < kMaxLater; piece++)
      if (left[piece] != 0.f) add(cut.start(piece), left[piece]);
    add(at.chunk, 0.f);
  }
};

// The final state of rows that were cut, from the ends of their pieces: a block has a share of that of its heads, as one range
// for its producers, each with kBatch times 16 bytes under way.
template <typename L>
__device__ __forceinline__ void finish_state(const TwoPassArgs& args, const OutputsItem& at) {
  constexpr int kBatch = L::kParts == 2 ? 2 : 4, kThreads = L::kProducers;
  const int size = L::columns(args.scan) * L::states(args.scan) / 4;
  const int valid = valid_chunks(args, at.limit);
  const int later = args.run > 0 ? 1 : RowCut(args, at.row).later(valid);  // of a row at most
  if (!args.scan.final_state || later == 0) return;
  const unsigned begin = size * at.chunk / args.chunks, share = size * (at.chunk + 1) / args.chunks - begin;
  const float4* ends = reinterpret_cast<const float4*>(args.ends);
  const auto head_of = [&](int row) { return at.head0 + row - at.row; };
  const auto state_of = [&](int row) {
    return reinterpret_cast<float4*>(args.scan.final_state + args.scan.state_at(at.batch, head_of(row)));
  };
  // What lies in both halves of a head is made by the first of them.
  const int shared_by_halves = (128 - args.scan.width) * (L::states(args.scan) / 4);
  wait_for_previous();
#pragma unroll 1
  for (unsigned idx0 = threadIdx.x; idx0 < at.heads * share; idx0 += kBatch * kThreads) {
    float4 v[kBatch];
    int row[kBatch], place[kBatch];  // in the head's state
    bool cut[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const unsigned idx = idx0 + b * kThreads, head = idx / share;
      row[b] = at.row + head * at.step, place[b] = begin + idx - head * share;
      cut[b] = head < at.heads && (args.run == 0 || RowCut(args, row[b]).later(valid) > 0);
      if ((head_of(row[b]) & args.scan.halves) && place[b] < shared_by_halves) cut[b] = false;
      if (cut[b]) v[b] = __ldcg(state_of(row[b]) + place[b]);
    }
#pragma unroll 1
    for (int piece = 0; piece < later; piece++) {
      const int end = min(args.first + (piece + 1) * args.rest, valid);
      float4 add[kBatch];
      float decay[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++)
        if (cut[b]) {
          decay[b] = __ldcg(args.decays + row[b] * (args.chunks + 1) + end);
          add[b] = __ldcg(ends + (row[b] * args.later + piece) * size + place[b]);
        }
#pragma unroll
      for (int b = 0; b < kBatch; b++)
        if (cut[b]) {
          v[b].x = fmaf(decay[b], v[b].x, add[b].x), v[b].y = fmaf(decay[b], v[b].y, add[b].y);
          v[b].z = fmaf(decay[b], v[b].z, add[b].z), v[b].w = fmaf(decay[b], v[b].w, add[b].w);
        }
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++)
      if (cut[b]) state_of(row[b])[place[b]] = v[b];
  }
}

template <typename L, bool kCut>
__device__ __forceinline__ void outputs_produce(const TwoPassArgs& args, const OutputsItem& at, const OutputsShared<L>& shared) {
  using T = typename L::T;
  const ScanArgs& p = args.scan;
  const int rows = at.limit - at.token0, warp = threadIdx.x / 32;
  const auto free = [&](int i) { mbarrier_wait(shared.empty(i % L::kStages), L::free_parity(i)); };
  StateLoader<L, kCut> states;
  if constexpr (L::kParts == 2) {
    const int64_t t = at.token0;
    constexpr int kLow = L::kStateTiles * kTileBytes;
    const T* C = static_cast<const T*>(p.C) + at.batch * p.C_batch + t * p.C_token + at.group * L::states(p);
    const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + t * p.B_token + at.group * L::states(p);
    const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + t * p.x_token;
#pragma unroll 1
    for (int i = 0; i < L::kStateTiles; i++) {
      const int cols = L::states(p) - i * 64;
      split_tile<L::kProducers, 4, L::kPadded>(shared.C() + i * kTileBytes, kLow, C + i * 64, p.C_token, rows, cols, threadIdx.x);
      split_tile<L::kProducers, 4, L::kPadded>(shared.B() + i * kTileBytes, kLow, B + i * 64, p.B_token, rows, cols, threadIdx.x);
    }
    fence_async_proxy();
    mbarrier_arrive(shared.ready());
#pragma unroll 1
    for (int i = 0; i < at.heads; i++) {
      ChunkDecay<T> decay;
      const int head = at.head0 + i * at.step, stage = i % L::kStages;
      if (warp == 0) decay.fetch(p, at.batch, head, at.token0, at.limit);
      free(i);
#pragma unroll
      for (int k = 0; k < L::kHeadTiles; k++)
        split_tile<L::kProducers, 4, L::kPadded>(shared.x(stage) + k * kTileBytes, L::kHeadTiles * kTileBytes, x + p.column(head) + k * 64,
                                                 p.x_token, rows, L::columns(p), threadIdx.x);
      if (i == 0) wait_for_previous();
      if (threadIdx.x == 0) states.fetch(args, at, i), states.load(args, at, shared, i, {});
      if (warp == 0) {
        __syncwarp();
        decay.finish(p, head, at.token0, at.limit), shared.table(stage).make(decay, p.D && !p.d_per_channel ? p.D[p.step_head(head)] : 0.f);
      }
      fence_async_proxy();
      mbarrier_arrive(shared.x_full(stage));
    }
  } else if (warp == 0) {
    if (threadIdx.x == 0) {
      const auto group = L::group(at.group);
      mbarrier_expect(shared.ready(), 2 * L::kStates);
#pragma unroll
      for (int i = 0; i < L::kStateTiles; i++) {
        const int column = group.column + i * 64;
        tensor_load<L::kPadded>(shared.C() + i * kTileBytes, args.C, column, group.part, at.token0, at.batch, shared.ready());
        tensor_load<L::kPadded>(shared.B() + i * kTileBytes, args.B, column, group.part, at.token0, at.batch, shared.ready());
      }
    }
    const bool clear = rows < kTileRows && at.limit < p.seqlen;
    const auto load_x = [&](int i, uint64_t* bar) {  // by one thread
      const auto head = L::head(p, at.head0 + i * at.step);
      mbarrier_expect(bar, L::kInput);
#pragma unroll
      for (int k = 0; k < L::kHeadTiles; k++)
        tensor_load<L::kPadded>(shared.x(i % L::kStages) + k * kTileBytes, args.x, head.column + k * 64, head.part, at.token0, at.batch,
                                bar);
    };
    if (!clear && threadIdx.x == 0)  // as many as there are stages, before anything is waited for
      for (int i = 0; i < min(at.heads, L::kEarly); i++) load_x(i, shared.x_full(i));
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < at.heads; i++) {
      const int stage = i % L::kStages;
      uint64_t* bar = clear ? shared.landed() : shared.x_full(stage);
      if constexpr (L::kRest > 0) {
        states.fetch(args, at, i);
        typename StateLoader<L, kCut>::Rest rest;
        if constexpr (!kCut) rest = states.fetch_rest(args, at.row + i * at.step, at.chunk);
        free(i);
        if (threadIdx.x == 0 && (clear || i >= L::kEarly)) load_x(i, bar);
        states.load(args, at, shared, i, rest);
      } else {
        if (threadIdx.x == 0) states.fetch(args, at, i);
        free(i);
        if (threadIdx.x == 0) {
          if (clear || i >= L::kEarly) load_x(i, bar);
          states.load(args, at, shared, i, {});
        }
      }
      __syncwarp();
      if (clear) {
        mbarrier_wait(bar, i & 1);
        clear_rows(shared.x(stage), L::kHeadTiles, rows);
        fence_async_proxy();
        __syncwarp();  // nobody waits for `landed` any more when its next phase begins
      }
      if (clear || threadIdx.x > 0) mbarrier_arrive(shared.x_full(stage));  // if not, lane 0 has, with the bytes
    }
  } else if (warp <= L::kDecayWarps) {
#pragma unroll 1
    for (int i = warp - 1; i < at.heads; i += L::kDecayWarps) {
      ChunkDecay<T> decay;
      const int head = at.head0 + i * at.step;
      decay.fetch(p, at.batch, head, at.token0, at.limit);
      const float D = p.D && !p.d_per_channel ? p.D[p.step_head(head)] : 0.f;
      free(i);
      decay.finish(p, head, at.token0, at.limit);
      shared.table(i % L::kStages).make(decay, D);
      mbarrier_arrive(shared.x_full(i % L::kStages));
    }
  }
}

}  // namespace ssd
}  // namespace mamba
