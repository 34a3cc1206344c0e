// Runs the ring kernel cluster by cluster, a thread for every thread, and compares with the recurrence in double.
#include "prelude.h"
//
#include "scan_case.h"
#include "selective_scan_ring.cuh"

namespace mamba {
int sm_count() { return 132; }
size_t max_shared_bytes() { return sizeof(emulation::Shared); }
}  // namespace mamba

struct Case {
  Rows rows;
  int groups, warps, blocks;
};

template <typename T> void launch(const Case& c, const Args<T>& a) {
  const unsigned threads = 32 * c.groups * c.warps, blocks = c.blocks;
  const unsigned clusters = a.ngroups * mamba::ceil_div(a.group_dim, c.groups * Ring<T>::kWidth);
  for (unsigned i = 0; i < clusters * c.rows.batch; i++) {
    std::vector<emulation::Shared> shared(blocks);
    std::memset(shared.data(), 0xff, blocks * sizeof shared[0]);
    std::barrier<> all(threads * blocks);
    std::vector<std::unique_ptr<std::barrier<>>> whole;
    std::vector<std::unique_ptr<emulation::Warp>> warps;
    std::vector<std::thread> running;
    for (unsigned r = 0; r < blocks; r++) whole.push_back(std::make_unique<std::barrier<>>(threads));
    for (unsigned w = 0; w < blocks * threads / 32; w++) warps.push_back(std::make_unique<emulation::Warp>(32));
    emulation::windows = shared.data();
    for (unsigned j = 0; j < threads * blocks; j++) {
      running.emplace_back([&, j] {
        const unsigned rank = j / threads;
        emulation::whole_block = whole[rank].get(), emulation::whole_cluster = &all;
        emulation::rank = int(rank), emulation::cluster_blocks = int(blocks), emulation::shared = shared[rank].bytes;
        emulation::thread = dim3(j % threads), emulation::block = dim3(i % clusters * blocks + rank, i / clusters);
        emulation::block_size = dim3(threads);
        emulation::warp = warps[j / 32].get(), emulation::lane = int(j % 32);
        ring_kernel<T>(a, c.groups, c.warps);
      });
    }
    for (auto& t : running) t.join();
  }
}

template <typename T> bool run(const Case& c) {
  Tensors<T> t;
  launch(c, arguments(c.rows, t));
  return right(c.rows, t);
}

int main(int count, char**) {
  bool ok = true;
  if (count > 1) {  // the few for a sanitizer
    ok &= run<__nv_bfloat16>({{2, 90, 32, 2, true, true, true, true}, 1, 2, 2});
    ok &= run<__nv_bfloat16>({{1, 200, 64, 1, false, false, true, true}, 2, 1, 2});
    return !ok;
  }
  ok &= run<float>({{1, 100, 32, 1, false, false, true, true}, 1, 2, 1});
  ok &= run<float>({{2, 70, 40, 1, true, false, true, true}, 1, 3, 2});
  ok &= run<__nv_bfloat16>({{1, 333, 96, 1, false, true, false, true}, 3, 2, 2});
  ok &= run<__nv_bfloat16>({{2, 150, 64, 2, true, true, true, false}, 2, 2, 4});
  ok &= run<__nv_bfloat16>({{1, 1, 16, 1, false, false, true, true}, 1, 4, 4});
  ok &= run<__nv_bfloat16>({{1, 500, 16, 1, false, false, true, true}, 1, 5, 1});
  ok &= run<__half>({{3, 129, 32, 1, true, false, true, true}, 2, 1, 8});
  return !ok;
}
