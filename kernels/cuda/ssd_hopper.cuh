// The warpgroups of the SSD scan for Hopper (sm_90a): the arithmetic of ssd_scan_kernel.cuh on warpgroup matrix
// instructions.
//
// A block has one warpgroup for each of two heads and one that loads tiles and turns dt into decays, three chunks
// ahead at most. A consumer keeps its head's state as accumulators [headdim][d_state] and a 16-bit copy of it in
// shared memory for y = C h; C and B come straight from the loaded tiles, x weighted through registers. The
// warpgroups meet only through the barriers of the loads, so one's arithmetic overlaps another's matrix products.
#pragma once

#include "ssd_chunk.cuh"
#include "ssd_wgmma.cuh"

namespace mamba {
namespace ssd {

template <typename T_, int kState_, int kHeads_>
struct HopperLayout : Layout<T_, 64, kState_, 16, kHeads_, 64> {
  using Base = Layout<T_, 64, kState_, 16, kHeads_, 64>;
  static constexpr int kConsumers = Base::kThreads, kProducers = 128, kThreads = kConsumers + kProducers;
  static constexpr int kStages = 3;
  // At most 65,536 in all.
  static constexpr int kConsumerRegisters = kHeads_ == 2 ? 216 : 160, kProducerRegisters = kHeads_ == 2 ? 72 : 32;
  // With registers to spare, C h is started before the scores are decayed.
  static constexpr bool kEarly = kHeads_ == 2;
  static constexpr int kTile = 64 * 64 * 2;                       // 64 tokens (or headdim) x 64
  static constexpr int kStateTiles = kState_ / 64;
  static constexpr int kStage = (2 * kStateTiles + kHeads_) * kTile;  // C, B, x of every head
  static constexpr int kCopies = kStages * kStage;                // 16-bit copies of the states follow the stages
  static constexpr int kDecayAt = kCopies + kHeads_ * kStateTiles * kTile;
  static constexpr int kConstantAt = kDecayAt + kStages * Base::kDecays;
  static constexpr int kBarrierAt = kConstantAt + 64;
  static constexpr int kShared = kBarrierAt + 2 * kStages * 8;
};

template <typename L>
struct HopperShared {
  uint8_t* base;
  __device__ uint32_t stage(int s) const { return smem_address(base) + s * L::kStage; }
  __device__ uint32_t C(int s) const { return stage(s); }
  __device__ uint32_t B(int s) const { return stage(s) + L::kStateTiles * L::kTile; }
  __device__ uint32_t x(int s, int head) const { return stage(s) + (2 * L::kStateTiles + head) * L::kTile; }
  __device__ uint32_t state(int head) const { return smem_address(base) + L::kCopies + head * L::kStateTiles * L::kTile; }
  __device__ Decays<L> decays(int s) const { return {reinterpret_cast<float*>(base + L::kDecayAt + s * L::kDecays)}; }
  __device__ HeadConstants<L> constants() const { return {reinterpret_cast<float*>(base + L::kConstantAt)}; }
  __device__ uint64_t* full(int s) const { return reinterpret_cast<uint64_t*>(base + L::kBarrierAt) + s; }
  __device__ uint64_t* empty(int s) const { return reinterpret_cast<uint64_t*>(base + L::kBarrierAt) + L::kStages + s; }
};

// Counts chunks over all items of a block: the stage and the parity of its barriers.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ int chunks_of(const Item& at, int chunk) {
  return at.limit() > at.begin ? (at.limit() - at.begin + chunk - 1) / chunk : 0;
}

// ---- the producer warpgroup ----------------------------------------------------------------------

template <typename L, bool kStateOnly>
struct HopperProducer {
  using T = typename L::T;
  struct Loader {  // what load_tile and DecayWarp need to know, for the producer's threads
    using T = typename L::T;
    static constexpr int kThreads = L::kProducers, kChunk = L::kChunk, kHeads = L::kHeads, kWarps = 4;
  };

  __device__ static void load(const ScanArgs& p, const Item& at, const HopperShared<L>& shared, int s, int token0) {
    constexpr int kPieces = L::kState / 8;
    const int rows = at.limit() - token0;
    const int64_t t = token0, group = at.group * L::kState;
    const T* B = static_cast<const T*>(p.B) + at.batch * p.B_batch + t * p.B_token + group;
    load_tile<Loader, kPieces, 64>(shared.B(s), B, p.B_token, rows, kPieces);
    const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + t * p.x_token;
#pragma unroll
    for (int head = 0; head < L::kHeads; head++)
      if (head < at.heads) load_tile<Loader, 8, 64>(shared.x(s, head), x + p.column(at.head0 + head), p.x_token, rows, 8);
    if constexpr (!kStateOnly) {
      const T* C = static_cast<const T*>(p.C) + at.batch * p.C_batch + t * p.C_token + group;
      load_tile<Loader, kPieces, 64>(shared.C(s), C, p.C_token, rows, kPieces);
    }
  }

  // Loads the chunks of one item; `sum` collects the log2 decay of this warp's head.
  __device__ static void run(const ScanArgs& p, const Item& at, const HopperShared<L>& shared, Ring<L::kStages>& ring,
                             float& sum) {
    const HeadConstants<L> constants = shared.constants();
    asm volatile("bar.sync 1, %0;" ::"n"(L::kProducers) : "memory");
    constants.load(p, at);
    asm volatile("bar.sync 1, %0;" ::"n"(L::kProducers) : "memory");
    const int chunks = chunks_of(at, L::kChunk);
    DecayWarp<Loader> decay_warp;
    decay_warp.total[0] = 0.f;
    sum = 0.f;
    Ring<L::kStages> before = ring;
#pragma unroll 1
    for (int i = 0; i < chunks; i++) {
      const int token0 = at.begin + i * L::kChunk;
      decay_warp.fetch(p, at, token0);
      mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      load(p, at, shared, ring.stage, token0);
      cp_async_commit();
      const HeadConstants<Loader> own{constants.base};
      decay_warp.store(p, at, token0, own, Decays<Loader>{shared.decays(ring.stage).base});
      sum += decay_warp.total[0];
      if (i > 0) {
        cp_async_wait<1>();
        fence_async_proxy();
        mbarrier_arrive(shared.full(before.stage));
      }
      before = ring;
      ring.next();
    }
    if (chunks > 0) {
      cp_async_wait<0>();
      fence_async_proxy();
      mbarrier_arrive(shared.full(before.stage));
    }
  }
};

// ---- a consumer warpgroup ------------------------------------------------------------------------

template <typename L>
struct HopperConsumer {
  using T = typename L::T;
  using Rows = Tile<64>;
  static constexpr int kSteps = L::kState / 16;  // of depth, over d_state
  int head;                                      // within the block
  int warp;                                      // within the warpgroup
  float D;                                       // of the head, 0 if there is none or one a channel
  WarpState<L> h;

  __device__ __forceinline__ void barrier() const {
    asm volatile("bar.sync %0, 128;" ::"r"(head + 2) : "memory");
  }

  // The 16-bit copy of the state, rows of headdim, that y = C h reads.
  __device__ __forceinline__ void publish_state(uint32_t copy) {
    barrier();  // every warp is done with the copy before
    const uint32_t rows = copy + warp * 16 * Rows::kRowBytes + Rows::lane_16x16();
#pragma unroll
    for (int n = 0; n < WarpState<L>::kN; n += 2) {
      float(&a)[4] = h.v[0][n];
      float(&b)[4] = h.v[0][n + 1];
      store_matrix_x4(Rows::along(rows, n % 8) + n / 8 * L::kTile, Traits<T>::pack(a[0], a[1]), Traits<T>::pack(a[2], a[3]),
                      Traits<T>::pack(b[0], b[1]), Traits<T>::pack(b[2], b[3]));
    }
    fence_async_proxy();
    barrier();
  }

  // Decays and masks the products C B^T into A fragments; the diagonal block of this warp's rows carries D and is
  // kept as two 16-bit values, `low` being the second.
  __device__ __forceinline__ void decay_scores(const float (&products)[8][4], const float* sum, const float* source, float D,
                                               uint32_t (&scores)[4][4], uint32_t (&low)[4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = (lane & 3) * 2;
    const float sum_lo = sum[warp * 16 + g], sum_hi = sum[warp * 16 + g + 8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int r = 0; r < 4; r++) scores[j][r] = 0;
      if (j > warp) continue;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 from = *reinterpret_cast<const float2*>(source + j * 16 + half * 8 + c);
        const float(&v)[4] = products[2 * j + half];
        float v0 = v[0] * ex2(sum_lo - from.x), v1 = v[1] * ex2(sum_lo - from.y);
        float v2 = v[2] * ex2(sum_hi - from.x), v3 = v[3] * ex2(sum_hi - from.y);
        if (j == warp) {
          const int past = half * 8 + c - g;  // column less row, for v0
          v0 = past > 0 ? 0.f : past == 0 ? v0 + D : v0;
          v1 = past > -1 ? 0.f : past == -1 ? v1 + D : v1;
          v2 = past > 8 ? 0.f : past == 8 ? v2 + D : v2;
          v3 = past > 7 ? 0.f : past == 7 ? v3 + D : v3;
        }
        const uint32_t p01 = Traits<T>::pack(v0, v1), p23 = Traits<T>::pack(v2, v3);
        scores[j][2 * half] = p01, scores[j][2 * half + 1] = p23;
        if (j == warp) {
          const float2 h01 = Traits<T>::unpack(p01), h23 = Traits<T>::unpack(p23);
          low[2 * half] = Traits<T>::pack(v0 - h01.x, v1 - h01.y);
          low[2 * half + 1] = Traits<T>::pack(v2 - h23.x, v3 - h23.y);
        }
      }
    }
  }

  // y += the low parts of the diagonal scores times x: one block a warp, so not worth warpgroup products.
  __device__ __forceinline__ void add_low_scores(float (&y)[8][4], const uint32_t (&low)[4], uint32_t x_tile) {
    const uint32_t rows = x_tile + warp * 16 * Rows::kRowBytes + Rows::lane_16x16();
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, Rows::along(rows, n));
      Traits<T>::mma(y[n], low, x[0], x[1]);
      Traits<T>::mma(y[n + 1], low, x[2], x[3]);
    }
  }

  // A fragments of (x weight)^T: this warp's 16 rows of headdim, all 64 tokens.
  __device__ __forceinline__ void weigh_input(uint32_t x_tile, const float* to_end, uint32_t (&a)[4][4]) {
    const int lane = threadIdx.x & 31;
    const uint32_t rows = Rows::along(x_tile + Rows::lane_16x16(), warp * 2);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, rows + j * 16 * Rows::kRowBytes);
      const float* weights = to_end + j * 16 + (lane & 3) * 2;
      const float2 w0 = *reinterpret_cast<const float2*>(weights), w8 = *reinterpret_cast<const float2*>(weights + 8);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float2 w = (r & 1) ? w8 : w0, f = Traits<T>::unpack(x[r]);
        a[j][(r & 1) * 2 + (r >> 1)] = Traits<T>::pack(f.x * w.x, f.y * w.y);
      }
    }
  }

  __device__ __forceinline__ void update_state(const uint32_t (&weighted)[4][4], uint32_t B_tile) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      Wgmma<T>::regs_columns(h.v[0], weighted[j], descriptor(B_tile + j * 16 * Rows::kRowBytes, L::kTile));
    wgmma_commit();
  }

  // This warp's 16 rows of y through the same rows of the x tile, which no one reads any more.
  __device__ __forceinline__ void store(const ScanArgs& p, const float (&y)[8][4], T* out, int rows, uint32_t x_tile) {
    const int lane = threadIdx.x & 31;
    const uint32_t to = x_tile + warp * 16 * Rows::kRowBytes;
#pragma unroll
    for (int n = 0; n < 8; n += 2)
      store_matrix_x4(Rows::along(to + Rows::lane_16x16(), n), Traits<T>::pack(y[n][0], y[n][1]), Traits<T>::pack(y[n][2], y[n][3]),
                      Traits<T>::pack(y[n + 1][0], y[n + 1][1]), Traits<T>::pack(y[n + 1][2], y[n + 1][3]));
    __syncwarp();
    const int row = lane >> 3, piece = lane & 7;
    T* at = out + (warp * 16 + row) * p.y_token + piece * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint4 v;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(to + Rows::offset(row + 4 * i, piece)));
      if (warp * 16 + row + 4 * i < rows) store_global_16(at, v);
      at += 4 * p.y_token;
    }
  }

  // D of every channel, and the gate: both from global memory, in the accumulators' layout.
  __device__ __forceinline__ void finish(const ScanArgs& p, float (&y)[8][4], const T* x, const T* z, const float* D, int rows) {
    const int lane = threadIdx.x & 31, col = (lane & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = warp * 16 + half * 8 + (lane >> 2);
      if (t >= rows) continue;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float &a = y[n][half * 2], &b = y[n][half * 2 + 1];
        if (D) {
          const float2 f = Traits<T>::unpack(*reinterpret_cast<const uint32_t*>(x + t * p.x_token + n * 8 + col));
          a = fmaf(D[n * 8 + col], f.x, a), b = fmaf(D[n * 8 + col + 1], f.y, b);
        }
        if (z) {
          const float2 f = Traits<T>::unpack(*reinterpret_cast<const uint32_t*>(z + t * p.z_token + n * 8 + col));
          a *= silu(f.x), b *= silu(f.y);
        }
      }
    }
  }

  // d = C times rows of `other`: B for the scores, the state's copy for y.
  __device__ __forceinline__ void times_C(float (&d)[8][4], uint32_t C_tile, uint32_t other) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      const uint32_t skip = k / 4 * L::kTile + k % 4 * 32;
      Wgmma<T>::rows_rows(d, descriptor(C_tile + skip), descriptor(other + skip), k > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void chunk(const ScanArgs& p, const Item& at, const HopperShared<L>& shared, int s, int token0) {
    const Decays<L> decays = shared.decays(s);
    const uint32_t x_tile = shared.x(s, head), copy = shared.state(head);
    const int column = p.column(at.head0 + head), rows = at.limit() - token0;
    uint32_t scores[4][4], low[4] = {};
    float y[8][4];
    {
      float products[8][4];
      times_C(products, shared.C(s), shared.B(s));
      if constexpr (L::kEarly) {
        times_C(y, shared.C(s), copy);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(products);
      decay_scores(products, decays.sum(head), decays.source(head), D, scores, low);
    }

    if constexpr (!L::kEarly) times_C(y, shared.C(s), copy);
    uint32_t weighted[4][4];
    weigh_input(x_tile, decays.to_end(head), weighted);
    h.scale(decays.from_start(head)[L::kChunk - 1]);
    const int g = (threadIdx.x & 31) >> 2;
    const float from_lo = decays.from_start(head)[warp * 16 + g], from_hi = decays.from_start(head)[warp * 16 + g + 8];
    wgmma_wait<0>();
    pin(y);
#pragma unroll
    for (int n = 0; n < 8; n++) y[n][0] *= from_lo, y[n][1] *= from_lo, y[n][2] *= from_hi, y[n][3] *= from_hi;

    pin(scores), pin(y), pin(weighted), pin(h.v[0]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++)
      Wgmma<T>::regs_columns(y, scores[j], descriptor(x_tile + j * 16 * Rows::kRowBytes, L::kTile));
    wgmma_commit();
    update_state(weighted, shared.B(s));
    wgmma_wait<0>();
    pin(y), pin(h.v[0]);
    add_low_scores(y, low, x_tile);
    publish_state(copy);  // its barrier: every warp is done with x

    const int64_t t = token0;
    if (p.z || p.d_per_channel) {
      const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch + t * p.x_token + column;
      const T* z = p.z ? static_cast<const T*>(p.z) + at.batch * p.z_batch + t * p.z_token + column : nullptr;
      finish(p, y, x, z, p.D && p.d_per_channel ? p.D + column : nullptr, rows);
    }
    store(p, y, static_cast<T*>(p.y) + at.batch * p.y_batch + t * p.y_token + column, rows, x_tile);
  }

  __device__ __forceinline__ void state_chunk(const HopperShared<L>& shared, int s) {
    const Decays<L> decays = shared.decays(s);
    uint32_t weighted[4][4];
    weigh_input(shared.x(s, head), decays.to_end(head), weighted);
    h.scale(decays.from_start(head)[L::kChunk - 1]);
    pin(weighted), pin(h.v[0]);
    wgmma_fence();
    update_state(weighted, shared.B(s));
    wgmma_wait<0>();
    pin(h.v[0]);
  }
};

}  // namespace ssd
}  // namespace mamba
