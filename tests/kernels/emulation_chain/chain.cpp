// Runs the chain kernel block by block (a cluster's together), a thread for every thread, and compares with the recurrence in double.
#include "prelude.h"
//
#include "selective_scan_chain_lots.cuh"

#include "rows.h"

namespace mamba {
int sm_count() { return 132; }
int compute_major() { return 9; }
size_t max_shared_bytes() { return emulation::kShared; }
}  // namespace mamba

using namespace mamba::scan;

struct Case {
  int lanes, batch, tokens, dim, ngroups, groups, warps, copiers;
  bool few_slots, ragged, reverse, z, state;
  int d_state = kState;
  unsigned blocks = 0;  // that take all lots
  Rows rows() const {
    Rows r{batch, tokens, dim, ngroups, ragged, reverse, z, state};
    r.d_state = d_state;
    return r;
  }
};

// Runs the blocks of a grid `together` at a time.
template <typename F> void run_blocks(unsigned blocks, dim3 grid, unsigned threads, unsigned together, F&& kernel) {
  for (unsigned first = 0; first < blocks; first += together) {
    std::memset(emulation::memory, 0xff, sizeof emulation::memory);
    std::barrier<> cluster(together * threads);
    emulation::whole_cluster = &cluster;
    std::vector<std::unique_ptr<std::barrier<>>> whole;
    std::vector<std::unique_ptr<emulation::Warp>> warps;
    std::vector<std::thread> running;
    for (unsigned rank = 0; rank < together; rank++) whole.push_back(std::make_unique<std::barrier<>>(threads));
    for (unsigned w = 0; w < together * threads / 32; w++) warps.push_back(std::make_unique<emulation::Warp>(32));
    for (unsigned i = 0; i < together * threads; i++) {
      running.emplace_back([&, i] {
        const unsigned b = first + i / threads;
        emulation::rank = int(i / threads), emulation::whole_block = whole[i / threads].get();
        emulation::thread = dim3(i % threads);
        emulation::block = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        emulation::block_size = dim3(threads), emulation::grid_size = grid;
        emulation::warp = warps[i / 32].get(), emulation::lane = int(i % 32);
        kernel();
      });
    }
    for (auto& t : running) t.join();
  }
}

template <typename T, int kLanes, int kN, int kLinked, bool kEarly>
void launch(const Chain<T, kLanes, kN, kLinked, kEarly>& layout, const Case& c, const Args<T>& a, const Boxes& boxes) {
  constexpr int kBlocks = Chain<T, kLanes, kN, kLinked>::kBlocks;
  const Tactic t{0, c.groups, c.warps, c.copiers, 1};
  const int least = layout.least_slots(t, c.blocks > 0);
  const int filled = std::max(mamba::ceil_div(c.tokens, layout.kSpan * kBlocks), least);  // as at a launch
  const int slots = c.few_slots ? least : std::min(layout.slots(t), c.blocks ? 16 : filled);
  if (slots < least) std::abort();
  const unsigned threads = 32 * (c.groups * c.warps + c.copiers);
  const unsigned columns = kBlocks * c.ngroups * mamba::ceil_div(a.group_dim, c.groups * layout.kWidth), lots = columns * c.batch;
  if constexpr (Chain<T, kLanes, kN, kLinked, kEarly>::kLots) {
    if (c.blocks > 0) {
      if (mamba::ceil_div(c.tokens, 16) < c.warps || c.ragged) std::abort();
      run_blocks(c.blocks, dim3(c.blocks), threads, 1, [&] { chain_lots_kernel<T, kLanes>(a, boxes, c.groups, c.warps, slots, lots); });
      return;
    }
  }
  run_blocks(lots, dim3(columns / c.ngroups, c.batch, c.ngroups), threads, kBlocks,
             [&] { chain_kernel<T, kLanes, kN, kLinked, kEarly>(a, boxes, c.groups, c.warps, slots); });
}

constexpr int kLinkedLanes = 42;  // as `lanes` of a case: four, two blocks of a cluster

int kernel_of(int lanes) {
  return lanes == kLinkedLanes ? Tactic::kLinked : lanes == 2 ? Tactic::kChain : lanes == 4 ? Tactic::kChain4 : Tactic::kChain8;
}

// What the launch tells the copy engine.
template <typename T, typename L> Boxes boxes_of(const L&, const Args<T>& a, int groups) {
  auto map = [&](const T* at, const Strides& s) {
    return CUtensorMap{(char*)at, s.token * int(sizeof(T)), s.batch * int(sizeof(T)), a.seqlen, a.dim / L::kWidth,
                       L::kSpan,  groups,                   L::kWidth,                sizeof(T)};
  };
  return {map(a.u, a.u_stride), map(a.delta, a.delta_stride), map(a.z, a.z_stride), map(a.y, a.y_stride), groups};
}

template <typename T> bool right(const Case& c, bool engine) {
  Tensors<T> t;
  const Args<T> a = arguments(c.rows(), t);
  bool runs = true;
  with_chain<T>({kernel_of(c.lanes), c.groups, c.warps, c.copiers, 1}, c.d_state, [&](auto layout) {
    const int width = layout.kWidth, groups = layout.kLinked ? c.groups : 1, box = groups * width;
    runs = !engine || (layout.kBoxes && !c.reverse && a.group_dim % width == 0 && (c.ngroups == 1 || a.group_dim % box == 0));
    if (runs) launch(layout, c, a, engine ? boxes_of<T>(layout, a, groups) : Boxes{});
  });
  if (!runs) return true;
  const Errors<T> e = errors(c.rows(), t, recurrence(c.rows(), t));
  std::printf("%s: %d lanes%s, %u blocks for lots, %d x %d tokens, %d channels, %d states: y %.1e state %.1e padding %d\n", e.small() ? "right" : "WRONG",
              c.lanes, engine ? " and the copy engine" : "", c.blocks, c.batch, c.tokens, c.dim, c.d_state, e.y, e.state, e.padding);
  return e.small();
}
template <typename T> bool right(const Case& c) { return right<T>(c, false) & right<T>(c, true); }
template <typename T> bool lots(Case c, unsigned blocks) { return c.blocks = blocks, right<T>(c); }

int main(int count, char**) {
  bool ok = true;
  if (count > 1) {  // the few for a sanitizer
    ok &= right<__nv_bfloat16>({2, 2, 90, 32, 2, 1, 3, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({2, 1, 200, 32, 1, 2, 2, 1, true, false, false, true, true});
    ok &= right<__nv_bfloat16>({4, 2, 90, 16, 2, 1, 3, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({4, 1, 200, 16, 1, 2, 2, 1, true, false, false, true, true});
    ok &= right<__nv_bfloat16>({kLinkedLanes, 2, 300, 16, 2, 1, 4, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({kLinkedLanes, 1, 400, 16, 1, 2, 4, 1, true, false, false, true, true});
    ok &= right<__nv_bfloat16>({8, 2, 90, 8, 2, 1, 3, 2, false, true, true, true, true});
    ok &= right<__nv_bfloat16>({8, 1, 200, 12, 1, 3, 2, 1, true, false, false, true, true});
    ok &= right<__nv_bfloat16>({4, 2, 90, 16, 2, 1, 3, 2, false, true, true, true, true, 8});
    ok &= right<__nv_bfloat16>({4, 1, 90, 16, 1, 2, 2, 1, true, false, false, true, true, 32});
    ok &= right<__nv_bfloat16>({8, 1, 70, 12, 1, 3, 2, 1, true, false, false, true, true, 128});
    ok &= lots<__nv_bfloat16>({2, 2, 90, 64, 2, 1, 3, 2, false, false, true, true, true}, 2);
    ok &= lots<__nv_bfloat16>({4, 3, 100, 24, 1, 2, 3, 1, true, false, false, true, true}, 1);
    return !ok;
  }
  ok &= right<float>({2, 1, 100, 16, 1, 1, 2, 1, true, false, false, true, true});
  ok &= right<float>({2, 2, 70, 24, 1, 1, 3, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({2, 1, 333, 48, 1, 3, 5, 1, true, false, true, false, true});
  ok &= right<__nv_bfloat16>({2, 2, 150, 64, 2, 2, 3, 2, false, true, true, true, false});
  ok &= right<__nv_bfloat16>({2, 1, 1, 16, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({2, 1, 500, 16, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__half>({2, 1, 129, 32, 1, 2, 1, 1, true, false, false, true, true});
  ok &= right<float>({4, 1, 100, 16, 1, 2, 2, 1, true, false, false, true, true});
  ok &= right<float>({4, 2, 70, 24, 1, 2, 3, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({4, 1, 333, 40, 1, 5, 3, 1, true, false, true, false, true});
  ok &= right<__nv_bfloat16>({4, 2, 150, 48, 2, 2, 3, 2, false, true, true, true, false});
  ok &= right<__nv_bfloat16>({4, 1, 1, 8, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({4, 1, 500, 8, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__half>({4, 1, 129, 16, 1, 2, 1, 1, true, false, false, true, true});
  for (int tokens : {1, 64, 65, 128, 129, 500}) {
    ok &= right<__nv_bfloat16>({kLinkedLanes, 1, tokens, 24, 1, 3, 4, 1, true, false, tokens % 2 == 0, true, true});
  }
  ok &= right<float>({kLinkedLanes, 2, 200, 24, 1, 2, 4, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({kLinkedLanes, 3, 333, 40, 1, 3, 4, 1, true, true, true, false, true});
  ok &= right<__nv_bfloat16>({kLinkedLanes, 2, 450, 48, 2, 2, 4, 2, false, true, true, true, false});
  ok &= right<__half>({kLinkedLanes, 1, 900, 8, 1, 1, 8, 2, true, false, false, true, true});
  ok &= right<float>({8, 1, 100, 12, 1, 3, 2, 1, true, false, false, true, true});
  ok &= right<float>({8, 2, 70, 20, 1, 3, 3, 1, false, true, false, true, true});
  ok &= right<__nv_bfloat16>({8, 1, 333, 24, 1, 3, 5, 1, true, false, true, false, true});
  ok &= right<__nv_bfloat16>({8, 2, 150, 32, 2, 3, 4, 2, false, true, true, true, false});
  ok &= right<__nv_bfloat16>({8, 1, 1, 4, 1, 1, 14, 2, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({8, 1, 500, 8, 1, 2, 7, 2, true, false, false, true, true});
  ok &= right<__half>({8, 1, 129, 12, 1, 3, 1, 1, true, false, false, true, true});
  ok &= right<__nv_bfloat16>({kLinkedLanes, 2, 450, 24, 1, 3, 4, 1, true, true, true, true, true, 8});
  for (int tokens : {48, 50, 64, 70, 128, 200}) {  // tiles for each of three warps, and that a slot is not full of
    ok &= lots<__nv_bfloat16>({4, 3, tokens, 32, 1, 2, 3, 1, true, false, false, true, true}, 2);
    ok &= lots<__nv_bfloat16>({2, 3, tokens, 48, 1, 2, 3, 2, true, false, false, true, true}, 2);
  }
  ok &= lots<float>({4, 2, 150, 40, 1, 2, 3, 2, false, false, true, true, true}, 3);  // the last lot of a row is narrower
  ok &= lots<float>({2, 5, 90, 40, 1, 2, 3, 2, false, false, false, false, true}, 2);
  ok &= lots<__half>({4, 4, 333, 40, 1, 5, 3, 1, true, false, false, true, false}, 1);
  ok &= lots<__nv_bfloat16>({4, 2, 150, 160, 2, 7, 2, 1, false, false, true, true, true}, 3);
  ok &= lots<__nv_bfloat16>({2, 2, 300, 96, 2, 1, 14, 2, true, false, false, true, true}, 4);
  ok &= lots<__nv_bfloat16>({4, 7, 100, 16, 1, 2, 7, 2, true, false, true, false, true}, 5);
  for (int d_state : {8, 24, 32}) {
    ok &= right<float>({4, 2, 70, 24, 1, 2, 3, 1, false, true, false, true, true, d_state});
    ok &= right<__nv_bfloat16>({4, 2, 150, 48, 2, 2, 3, 2, false, true, true, true, false, d_state});
    ok &= right<__nv_bfloat16>({4, 1, 300, 16, 1, 2, 7, 2, true, false, false, false, true, d_state});
  }
  for (int d_state : {48, 64}) {
    ok &= right<__nv_bfloat16>({4, 2, 100, 24, 1, 2, 6, 2, true, true, false, true, true, d_state});
    ok &= right<__nv_bfloat16>({8, 1, 150, 24, 2, 3, 5, 1, false, false, true, true, true, d_state});
    ok &= right<float>({8, 1, 70, 12, 1, 3, 3, 1, true, false, false, false, true, d_state});
  }
  for (int d_state : {72, 128}) {
    ok &= right<__nv_bfloat16>({8, 2, 70, 24, 2, 3, 5, 1, true, true, true, true, true, d_state});
    ok &= right<float>({8, 1, 70, 12, 1, 3, 3, 1, false, false, false, false, true, d_state});
  }
  return !ok;
}
