// Runs the segment kernel block by block, a thread for every thread, and compares with the recurrence in double.
#include "prelude.h"
//
#include "selective_scan_segment.cuh"

#include "rows.h"

namespace mamba {
int sm_count() { return 132; }
size_t max_shared_bytes() { return sizeof(scan::shared); }
}  // namespace mamba

using namespace mamba::scan;

struct Case {
  int segment, batch, tokens, dim, ngroups, units, blocks, stages;  // 0 stages: as many as fit
  bool ragged, reverse, z, state, in_place;
  Rows rows() const {
    Rows r{batch, tokens, dim, ngroups, ragged, reverse, z, state};
    r.in_place = in_place;
    return r;
  }
};

template <typename T, typename L> void launch(const Case& c, const Args<T>& a) {
  const int stages = c.stages ? c.stages : L::stages(c.units);
  if (stages < 2) std::abort();
  const int items = c.batch * c.ngroups * mamba::ceil_div(a.group_dim, c.units * L::kWidth);
  const unsigned threads = 32 * (L::kWarps + L::kCopiers), blocks = std::min(items, c.blocks);
  for (unsigned b = 0; b < blocks; b++) {
    std::memset(mamba::scan::shared, 0xff, sizeof mamba::scan::shared);
    std::barrier<> all(threads);
    emulation::whole_block = &all;
    for (auto& some : emulation::named) some = std::make_unique<std::barrier<>>(threads / 4);
    std::vector<std::unique_ptr<emulation::Warp>> warps;
    for (unsigned w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<emulation::Warp>(32));
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; i++) {
      running.emplace_back([&, i] {
        emulation::thread = dim3(i), emulation::block = dim3(b), emulation::grid = dim3(blocks);
        emulation::block_size = dim3(threads), emulation::warp = warps[i / 32].get(), emulation::lane = int(i % 32);
        segment_kernel<T, L>(a, items, c.units, stages);
      });
    }
    for (auto& t : running) t.join();
  }
}

template <typename T> bool right(const Case& c) {
  Tensors<T> t;
  const Args<T> a = arguments(c.rows(), t);
  const int kernel = c.segment == 12 ? Tactic::kSegment16 : Tactic::kSegment8;
  with_segment<T>({kernel, c.units, 0, 0, 1}, [&](auto layout) { launch<T, decltype(layout)>(c, a); });
  const Errors<T> e = errors(c.rows(), t, recurrence(c.rows(), t));
  std::printf("%s: segments of %d, %d x %d tokens, %d channels: y %.1e state %.1e padding %d\n", e.small() ? "right" : "WRONG", c.segment,
              c.batch, c.tokens, c.dim, e.y, e.state, e.padding);
  std::fflush(stdout);
  return e.small();
}

int main(int count, char**) {
  bool ok = true;
  using bf16 = __nv_bfloat16;
  if (count > 1) {  // the few for a sanitizer
    ok &= right<bf16>({12, 2, 600, 16, 2, 2, 1, 4, true, true, true, true, false});
    ok &= right<bf16>({8, 1, 300, 16, 1, 4, 1, 3, false, false, true, true, true});
    return !ok;
  }
  ok &= right<bf16>({12, 1, 1, 12, 1, 3, 132, 0, false, false, true, true, false});
  ok &= right<bf16>({12, 1, 700, 12, 1, 3, 132, 0, false, false, true, true, true});
  ok &= right<float>({12, 2, 530, 20, 1, 2, 2, 0, false, true, false, true, false});
  ok &= right<bf16>({12, 3, 600, 24, 2, 2, 1, 4, true, true, true, true, false});
  ok &= right<__half>({12, 1, 300, 40, 1, 10, 132, 2, false, false, true, false, false});
  ok &= right<bf16>({8, 1, 400, 12, 1, 3, 132, 0, false, false, true, true, false});
  ok &= right<float>({8, 2, 150, 16, 2, 2, 1, 6, true, false, true, true, true});
  ok &= right<__half>({8, 3, 300, 32, 1, 8, 1, 2, true, true, false, true, false});
  return !ok;
}
