// Runs the chain kernel block by block, a thread for every thread, and compares with the recurrence in double.
#include "prelude.h"
//
#include "scan_case.h"
#include "selective_scan_chain.cuh"

namespace mamba {
int sm_count() { return 132; }
size_t max_shared_bytes() { return sizeof(scan::shared); }
}  // namespace mamba

struct Case {
  Rows rows;
  int groups, warps, copiers;
  bool few_slots;
};

template <typename T> void launch(const Case& c, const Args<T>& a) {
  const int least = mamba::ceil_div(c.warps, Chain::kTiles) + c.copiers;
  const int slots = c.few_slots ? least : chain_slots<T>({Tactic::kChain, c.groups, c.warps, c.copiers, 1});
  if (slots < least) std::abort();
  const unsigned threads = 32 * (c.groups * c.warps + c.copiers);
  const unsigned blocks = a.ngroups * mamba::ceil_div(a.group_dim, c.groups * Chain::kWidth);
  for (unsigned b = 0; b < blocks * c.rows.batch; b++) {
    std::memset(mamba::scan::shared, 0xff, sizeof mamba::scan::shared);
    std::barrier<> all(threads);
    std::vector<std::unique_ptr<emulation::Warp>> warps;
    for (unsigned w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<emulation::Warp>(32));
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; i++) {
      running.emplace_back([&, i] {
        emulation::whole_block = &all;
        emulation::thread = dim3(i), emulation::block = dim3(b % blocks, b / blocks), emulation::block_size = dim3(threads);
        emulation::warp = warps[i / 32].get(), emulation::lane = int(i % 32);
        chain_kernel<T>(a, c.groups, c.warps, slots);
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
    ok &= run<__nv_bfloat16>({{2, 90, 32, 2, true, true, true, true}, 1, 3, 2, false});
    ok &= run<__nv_bfloat16>({{1, 200, 32, 1, false, false, true, true}, 2, 2, 1, true});
    return !ok;
  }
  ok &= run<float>({{1, 100, 16, 1, false, false, true, true}, 1, 2, 1, true});
  ok &= run<float>({{2, 70, 24, 1, true, false, true, true}, 1, 3, 1, false});
  ok &= run<__nv_bfloat16>({{1, 333, 48, 1, false, true, false, true}, 3, 5, 1, true});
  ok &= run<__nv_bfloat16>({{2, 150, 64, 2, true, true, true, false}, 2, 3, 2, false});
  ok &= run<__nv_bfloat16>({{1, 1, 16, 1, false, false, true, true}, 1, 14, 2, true});
  ok &= run<__nv_bfloat16>({{1, 500, 16, 1, false, false, true, true}, 1, 14, 2, true});
  ok &= run<__half>({{1, 129, 32, 1, false, false, true, true}, 2, 1, 1, true});
  return !ok;
}
