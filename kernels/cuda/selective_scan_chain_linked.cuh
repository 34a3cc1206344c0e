// selective_scan, tactic "linked": the chain over two multiprocessors.
//
// The two blocks of a cluster have the same groups of channels and take a row's slots in turn, a slot being a tile for each warp of
// a group. So a block moves half a row, and channels fill the multiprocessors in steps half as wide. Each group has an
// inbox, where its first warp finds the states that the other block's last warp sends; warp follows warp as within a block.
#pragma once

#include "selective_scan_chain_layout.cuh"

namespace mamba::scan {

// After both all blocks of the cluster are there, and the barriers that they have set up. (A release would wait for global memory too.)
__device__ __forceinline__ void cluster_arrive() {
  fence_mbarrier_init();
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Where `p` is in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in(const void* p, int rank) {
  uint32_t at = smem_address(p);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(p)), "r"(rank));
#endif
  return at;
}
// If `sends`, two states to another block, whose barrier counts their bytes.
__device__ __forceinline__ void send_states(uint32_t to, float2 h, uint32_t bar, bool sends) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred sends;\nsetp.ne.s32 sends, %4, 0;\n"
      "@sends st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n}" ::"r"(to),
      "f"(h.x), "f"(h.y), "r"(bar), "r"(int(sends))
      : "memory");
#endif
}

constexpr int kSentBytes = 32 * sizeof(float2);  // of two states of every lane

// A lane's end of the link. The last warp of a group sends, the first receives.
template <typename L> struct Link {
  uint32_t there, there_arrived;  // the other block's inbox of the group, [kHands][32], and its barriers, [kHands]
  bool receives, sends;           // sends: this tile

  __device__ __forceinline__ void send_to(const float2* inbox, const uint64_t* arrived, int turn) {
    there = address_in(inbox, turn), there_arrived = address_in(arrived, turn);
  }
  __device__ __forceinline__ void send(int hand, float2 h) const {
    send_states(there + hand * kSentBytes, h, there_arrived + hand * int(sizeof(uint64_t)), sends);
  }
};

}  // namespace mamba::scan
