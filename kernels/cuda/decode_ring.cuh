// The two mechanisms of the whole-stack decode kernel.
//
// Ring: a block's weights of all phases and layers form one stream of slots that a producer warp copies into shared
// memory, as far ahead as the ring is long, while the other warps compute or wait for other blocks: memory never idles.
//
// Exchange: blocks pass vectors through global memory in words of eight bytes, four of data and four of an epoch. Who
// reads a word polls it until the epoch is the one awaited: no fence, no counter, and the wait brings the data along.
#pragma once

#include "common.cuh"

namespace mamba::decode {

// Position in the stream: the slot and how often the ring has been around (its last bit).
struct Cursor {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ void advance(int slots, int by) {
    for (slot += by; slot >= slots; slot -= slots) parity ^= 1;
  }
};

struct Ring {
  unsigned char* data;
  uint64_t *full, *empty;
  int slots, slot_bytes;

  __device__ __forceinline__ unsigned char* at(int slot) const { return data + slot * slot_bytes; }

  // One thread, before anything else; a block barrier must follow.
  __device__ void init(int consumers) const {
    for (int i = 0; i < slots; i++) {
#if __CUDA_ARCH__ >= 900
      mbarrier_init(full + i, 1);
#else
      mbarrier_init(full + i, 32);
#endif
      mbarrier_init(empty + i, consumers);
    }
    fence_mbarrier_init();
  }
  __device__ __forceinline__ void wait(const Cursor& c) const { mbarrier_wait(full + c.slot, c.parity); }
  __device__ __forceinline__ void release(int slot) const { mbarrier_arrive(empty + slot); }
};

// A stretch of memory to copy into a slot: 16-byte aligned, a multiple of 16 bytes.
struct Piece {
  const void* source = nullptr;
  int bytes = 0;
};

// The producer's side. On sm_90 and later one thread issues bulk copies; before, a warp issues 16 bytes a thread.
struct Producer {
  Ring ring;
  Cursor cursor, landed;
  int lane, ahead = 0, flight;  // slots on their way, and how many may be: more would only queue before the memory
  uint64_t policy;

  __device__ Producer(const Ring& r, int in_flight) : ring(r), lane(threadIdx.x & 31), flight(in_flight) {
#if __CUDA_ARCH__ >= 900
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  }

  // The next slot: up to three pieces, one behind the other.
  __device__ __forceinline__ void push(const Piece& a, const Piece& b = {}, const Piece& c = {}) {
    unsigned char* to = ring.at(cursor.slot);
    uint64_t* full = ring.full + cursor.slot;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      if (ahead == flight) {
        ring.wait(landed);
        landed.advance(ring.slots);
      } else {
        ahead++;
      }
      mbarrier_wait(ring.empty + cursor.slot, cursor.parity ^ 1);
      mbarrier_expect(full, a.bytes + b.bytes + c.bytes);
      if (a.bytes) copy(to, a, full);
      if (b.bytes) copy(to + a.bytes, b, full);
      if (c.bytes) copy(to + a.bytes + b.bytes, c, full);
    }
#else
    mbarrier_wait(ring.empty + cursor.slot, cursor.parity ^ 1);
    copy(to, a, full);
    copy(to + a.bytes, b, full);
    copy(to + a.bytes + b.bytes, c, full);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(smem_address(full)) : "memory");
#endif
    cursor.advance(ring.slots);
  }

 private:
  __device__ __forceinline__ void copy(unsigned char* to, const Piece& piece, uint64_t* full) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            smem_address(to)),
        "l"(piece.source), "r"(piece.bytes), "r"(smem_address(full)), "l"(policy)
        : "memory");
#else
    for (int i = lane * 16; i < piece.bytes; i += 512) cp_async<16>(to + i, static_cast<const char*>(piece.source) + i);
#endif
  }
};

// ---- exchange ------------------------------------------------------------------------------------

using Word = unsigned long long;  // data below, epoch above

__device__ __forceinline__ Word make_word(uint32_t data, uint32_t epoch) { return Word(epoch) << 32 | data; }
__device__ __forceinline__ uint32_t word_data(Word w) { return uint32_t(w); }
__device__ __forceinline__ uint32_t word_epoch(Word w) { return uint32_t(w >> 32); }

__device__ __forceinline__ void send(Word* to, uint32_t data, uint32_t epoch) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(make_word(data, epoch)) : "memory");
}
__device__ __forceinline__ void send(Word* to, float value, uint32_t epoch) { send(to, __float_as_uint(value), epoch); }

__device__ __forceinline__ ulonglong2 peek(const Word* from) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(from) : "memory");
  return v;
}

// A word that every block adds to: the number of blocks that have in the high 16 bits, the sum of their values as an integer
// in the low 48. Integers add up to the same in any order. Nobody clears a word: readers subtract what it was a layer ago.
constexpr float kSumUnit = 1.0f / (1 << 25), kSumMost = 5e11f;  // a unit; a block's most, in units: kMostBlocks of them < 2^47

// Four words to a line of 128 bytes: atomics on different lines go to different parts of the L2.
__host__ __device__ constexpr int sum_place(int i) { return i / 4 * 16 + i % 4; }

__device__ __forceinline__ void add_to_sum(Word* to, float value) {
  const float units = fminf(fmaxf(value * (1.0f / kSumUnit), -kSumMost), kSumMost);
  const Word amount = (Word(1) << 48) + Word(llrintf(units));
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(amount) : "memory");
}
// Of what came since the last time: whether it is from all blocks, and the sum then.
__device__ __forceinline__ bool sum_whole(Word since, int blocks) { return int((since + (Word(1) << 47)) >> 48) == blocks; }
__device__ __forceinline__ float sum_value(Word since, int blocks) {
  return float(static_cast<long long>(since - (Word(blocks) << 48))) * kSumUnit;
}

// Receives `words` words (an even number), two to a thread and turn; f(i, a, b) gets the data of words i and i + 1.
template <int kThreads, typename F>
__device__ __forceinline__ void receive(const Word* from, int words, uint32_t epoch, int thread, F&& f) {
  constexpr int kDepth = 4;
  const int pairs = words / 2;
  auto ready = [&](const ulonglong2& v) { return word_epoch(v.x) == epoch && word_epoch(v.y) == epoch; };
  if (pairs <= kThreads) {
    if (thread >= pairs) return;
    ulonglong2 v;
    do v = peek(from + 2 * thread);
    while (!ready(v));
    f(2 * thread, word_data(v.x), word_data(v.y));
    return;
  }
  if (thread % 32 == 0) {  // a cheap wait first: one lane's load, not four of every lane
    while (!ready(peek(from + 2 * thread))) {
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int base = thread; base < pairs; base += kDepth * kThreads) {
    ulonglong2 v[kDepth] = {};
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kDepth; i++) {
        if (base + i * kThreads < pairs) v[i] = peek(from + 2 * (base + i * kThreads));
      }
#pragma unroll
      for (int i = 0; i < kDepth; i++) {
        if (base + i * kThreads < pairs) all &= ready(v[i]);
      }
    } while (!all);
#pragma unroll
    for (int i = 0; i < kDepth; i++) {
      if (base + i * kThreads < pairs) f(2 * (base + i * kThreads), word_data(v[i].x), word_data(v[i].y));
    }
  }
}

}  // namespace mamba::decode
