// The PTX of the two-pass SSD kernels, in C++: barriers, copies, matrix products. A copy or product that is asynchronous on
// a GPU is done at once.
#pragma once

namespace mamba {

inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emu::smem); }

template <typename F> void with_barrier(uint64_t* bar, F change) {
  std::lock_guard<std::mutex> lock(emu::mutex);
  emu::Barrier& at = emu::barriers[smem_address(bar)];
  change(at);
  emu::settle(at);
}
inline void mbarrier_init(uint64_t* bar, int count) {
  with_barrier(bar, [&](emu::Barrier& at) { at = {count, count}; });
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* bar) {
  with_barrier(bar, [](emu::Barrier& at) { at.pending--; });
}
inline void mbarrier_expect(uint64_t* bar, int bytes) {
  with_barrier(bar, [&](emu::Barrier& at) { at.bytes += bytes, at.pending--; });
}
inline void mbarrier_arrive_after(uint64_t* bar, uint32_t) { mbarrier_arrive(bar); }
inline void mbarrier_wait(uint64_t* bar, int parity) {
  std::unique_lock<std::mutex> lock(emu::mutex);
  emu::Barrier& at = emu::barriers.at(smem_address(bar));
  emu::changed.wait(lock, [&] { return (at.phase & 1) != parity; });
}

namespace ssd {

constexpr float kMinLog2Decay = -150.f;

inline float number(__half*, uint16_t v) {
  _Float16 h;
  std::memcpy(&h, &v, 2);
  return static_cast<float>(h);
}
inline float number(__nv_bfloat16*, uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
template <typename T> float number(uint32_t v) { return number(static_cast<T*>(nullptr), static_cast<uint16_t>(v)); }
inline uint32_t bits(__half v) {
  uint16_t r;
  std::memcpy(&r, &v.x, 2);
  return r;
}
inline uint32_t bits(__nv_bfloat16 v) { return v.x; }

// Element (row or column, depth) of fragments that the lanes of a warp hold in words `first` and on, two halves a word.
template <typename T> float fragment(int line, int depth, int first) {
  const uint64_t words = emu::warp->v[line % 8 * 4 + depth % 8 / 2][first + depth / 8];
  return number<T>(static_cast<uint32_t>(words >> (line / 8 * 32) >> (depth % 2 * 16)));
}
inline uint64_t two(uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; }

template <typename T> struct Traits {
  static uint32_t pack(float low, float high) { return bits(from_float<T>(low)) | bits(from_float<T>(high)) << 16; }
  static uint32_t multiply(uint32_t a, uint32_t b) {
    return pack(number<T>(a) * number<T>(b), number<T>(a >> 16) * number<T>(b >> 16));
  }
  static float2 unpack(uint32_t v) { return {number<T>(v), number<T>(v >> 16)}; }
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::gather({two(a[0], a[1]), two(a[2], a[3]), b0, b1});
    const int row = emu::lane / 4, col = emu::lane % 4 * 2;
    for (int e = 0; e < 4; e++)
      for (int k = 0; k < 16; k++) d[e] += fragment<T>(row + e / 2 * 8, k, 0) * fragment<T>(col + e % 2, k, 2);
    emu::done();
  }
};

inline uint32_t half_at(uint32_t address) {
  uint16_t v;
  std::memcpy(&v, emu::smem + address, 2);
  return v;
}
// The address lane 8 m + row gave: row `row` of matrix m.
inline uint32_t matrix_row(int m, int row) { return static_cast<uint32_t>(emu::warp->v[8 * m + row][0]); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  emu::gather({address, 0, 0, 0});
  const int row = emu::lane % 4 * 2, col = emu::lane / 4 * 2;
  for (int m = 0; m < 4; m++) r[m] = half_at(matrix_row(m, row) + col) | half_at(matrix_row(m, row + 1) + col) << 16;
  emu::done();
}
inline void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emu::gather({address, 0, 0, 0});
  const uint32_t v[4] = {a, b, c, d};
  for (int m = 0; m < 4; m++) std::memcpy(emu::smem + matrix_row(m, emu::lane / 4) + emu::lane % 4 * 4, &v[m], 4);
  emu::done();
}
inline void ldmatrix_x4(uint32_t (&)[4], uint32_t) { std::abort(); }  // of kernels that do not run here
inline void copy_async_16(uint32_t, const void*, bool = true) { std::abort(); }
inline void store_global_16(void* at, uint4 v) { std::memcpy(at, &v, 16); }
inline void store_shared_16(uint32_t at, const uint32_t (&v)[4]) { std::memcpy(emu::smem + at, v, 16); }
inline void load_shared_16(uint32_t at, uint32_t (&v)[4]) { std::memcpy(v, emu::smem + at, 16); }

inline void let_next_start() {}
inline void wait_for_previous() {}
inline void fence_async_proxy() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending> void wgmma_wait() {}
template <typename Registers> void pin(Registers&) {}
template <int kKeep, bool kMore> void set_registers() {}

inline void landed(uint64_t* bar, int bytes) {
  with_barrier(bar, [&](emu::Barrier& at) { at.bytes -= bytes; });
}
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
template <bool kPadded>
inline void tensor_load(uint32_t dst, const CUtensorMap& map, int col, int part, int token, int batch, uint64_t* bar) {
  for (int r = 0; r < 128; r++)
    for (int c = 0; c < 64; c++) {
      uint16_t v = 0;
      if (token + r < map.tokens && col + c < map.columns)
        std::memcpy(&v, map.at(col + c, part, token + r, batch), 2);
      std::memcpy(emu::smem + swizzled(dst + r * 128 + c * 2), &v, 2);
    }
  landed(bar, 128 * 128);
}
template <bool kPadded>
inline void tensor_store(const CUtensorMap& map, uint32_t src, int col, int part, int token, int batch) {
  for (int r = 0; r < 16 && token + r < map.tokens; r++)
    for (int c = 0; c < 64 && col + c < map.columns; c++)
      std::memcpy(map.at(col + c, part, token + r, batch), emu::smem + swizzled(src + r * 128 + c * 2), 2);
}
inline void bulk_load(uint32_t dst, const void* src, int bytes, uint64_t* bar) {
  mbarrier_expect(bar, bytes);
  std::memcpy(emu::smem + dst, src, bytes);
  landed(bar, bytes);
}
inline void bulk_store(void* dst, uint32_t src, int bytes) { std::memcpy(dst, emu::smem + src, bytes); }
inline void prefetch_map(const CUtensorMap&) {}
inline void bulk_commit() {}
inline void bulk_wait_read() {}
template <int kPending> void bulk_wait() {}

inline uint64_t descriptor(uint32_t address, uint32_t tile_bytes = 0) {
  return address >> 4 | static_cast<uint64_t>(tile_bytes >> 4) << 16;
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

template <typename T> struct Wgmma {
  // Element (line, depth) of an operand in shared memory; down: depth goes down the rows.
  static float at(uint64_t from, int line, int depth, bool down) {
    const uint32_t start = static_cast<uint32_t>(from & 0x3fff) << 4, tile = static_cast<uint32_t>(from >> 16 & 0x3fff) << 4;
    return number<T>(half_at(swizzled(down ? start + depth * 128 + line % 64 * 2 + line / 64 * tile : start + line * 128 + depth * 2)));
  }
  template <int kN, typename A> static void product(float (&d)[kN][4], A a, uint64_t b, bool down, bool add) {
    const int row = threadIdx.x % 128 / 32 * 16 + emu::lane / 4, col = emu::lane % 4 * 2;
    for (int n = 0; n < kN; n++)
      for (int e = 0; e < 4; e++) {
        float sum = add ? d[n][e] : 0.f;
        for (int k = 0; k < 16; k++) sum += a(row + e / 2 * 8, k) * at(b, n * 8 + col + e % 2, k, down);
        d[n][e] = sum;
      }
  }
  template <int kN> static void rows_rows(float (&d)[kN][4], uint64_t a, uint64_t b, bool add) {
    product(d, [&](int row, int k) { return at(a, row, k, false); }, b, false, add);
  }
  template <int kN> static void rows_columns(float (&d)[kN][4], uint64_t a, uint64_t b, bool add) {
    product(d, [&](int row, int k) { return at(a, row, k, false); }, b, true, add);
  }
  template <int kN> static void columns_columns(float (&d)[kN][4], uint64_t a, uint64_t b, bool add) {
    product(d, [&](int row, int k) { return at(a, row, k, true); }, b, true, add);
  }
  template <int kN> static void regs_columns(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b) {
    emu::gather({two(a[0], a[1]), two(a[2], a[3]), 0, 0});
    product(d, [](int row, int k) { return fragment<T>(row % 16, k, 0); }, b, true, true);
    emu::done();
  }
};

}  // namespace ssd
}  // namespace mamba
