// What stands below "asynchronous copies and barriers" in common.cuh, and the PTX of the decode kernel.
namespace mamba {
template <int kBytes> void cp_async(void* to, const void* from, bool valid = true) {
  static const char zeros[kBytes] = {};
  if (!valid) from = zeros;
  if (reinterpret_cast<uintptr_t>(to) % kBytes || (valid && reinterpret_cast<uintptr_t>(from) % kBytes)) {
    std::fprintf(stderr, "cp.async: not aligned\n"), std::abort();
  }
  std::memset(to, 0xff, kBytes);  // it may be overwritten from now on, and is NaN until the copy lands
  emulation::current->open.push_back({to, from, kBytes});
}
inline void cp_async_commit() {
  emulation::current->groups.push_back(std::move(emulation::current->open));
  emulation::current->open.clear();
}
template <int kPending> void cp_async_wait() { emulation::finish_groups(kPending); }
inline void mbarrier_init(uint64_t* bar, int arrivals) { emulation::of(bar) = {int16_t(arrivals), int16_t(arrivals), 0, 0}; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* bar) { emulation::arrive(bar); }
inline void mbarrier_expect(uint64_t* bar, int bytes) { emulation::expect(bar, bytes); }
inline void mbarrier_wait(uint64_t* bar, int parity) {
  emulation::wait_until([&] { return emulation::of(bar).phase != unsigned(parity); });
}
inline void __syncthreads() { emulation::block_barrier(0, int(emulation::block_size.x)); }

// mma.m16n8k16: lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of the result.
template <typename T> void emulated_mma(float (&c)[4], const uint32_t (&words)[6]) {
  const emulation::Meet& m = emulation::gather(~0u, words, 6, 'm');
  auto value = [&](int lane, int word, int half) {
    const uint16_t bits = uint16_t(m.out[lane][word] >> (16 * half));
    T v;
    std::memcpy(&v, &bits, 2);
    return to_float(v);
  };
  const int g = emulation::current->lane / 4, t = emulation::current->lane % 4;
  for (int k = 0; k < 16; k++) {
    const int half = k % 2, part = k / 8, owner = k % 8 / 2;  // of the four lanes of a row or column
    for (int i = 0; i < 4; i++) {
      const float a = value(g * 4 + owner, 2 * part + i / 2, half);
      const float b = value((2 * t + i % 2) * 4 + owner, 4 + part, half);
      if (a != 0.0f || b != b) c[i] += a * b;
      else c[i] += 0.0f * b;
    }
  }
}
}  // namespace mamba
