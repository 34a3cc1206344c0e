// Runs the tactic "channel" through the op's own entry, a fiber for every thread, and compares with the recurrence in double.
#include "common.cuh"
#include "rows.h"

namespace mamba {
int sm_count() { return 1; }
int compute_major() { return 9; }
size_t max_shared_bytes() { return 232448; }
inline uint32_t smem_address(const void*) { std::abort(); }  // the chain's, which does not run here
}  // namespace mamba

static size_t places;  // blocks that run at once
static unsigned seed;  // of the order of blocks and warps
static std::vector<std::vector<emulation::Ended>> launches;
template <typename... P, typename... A>
void launch_emulated(void (*kernel)(P...), dim3 grid, int threads, int bytes, cudaStream_t, const A&... arguments) {
  if (!emulation::run(grid, threads, bytes, seed++, [&] { kernel(arguments...); }, places)) {
    std::printf("WRONG: a launch did not come to its end, or wrote behind its shared memory\n"), std::fflush(stdout), std::_Exit(1);
  }
  launches.push_back(emulation::ended);
}

#include "selective_scan_channel.cu"
//
#include "selective_scan.cu"

namespace mamba::scan {
template <typename T> int launch_chain(const Args<T>&, const Tactic&, int, cudaStream_t) { return MAMBA_ERROR_TACTIC; }
template <typename T> int launch_generic(const Args<T>&, const Tactic&, int, cudaStream_t) { return MAMBA_ERROR_TACTIC; }
}  // namespace mamba::scan

using namespace mamba::scan;

template <typename T> Params parameters(const Rows& r, const Args<T>& a, const Tactic& tactic) {
  Params p{};
  p.dtype = std::is_same_v<T, float> ? MAMBA_F32 : std::is_same_v<T, __half> ? MAMBA_F16 : MAMBA_BF16;
  p.batch = r.batch, p.seqlen = a.seqlen, p.dim = a.dim, p.ngroups = a.ngroups, p.d_state = a.d_state;
  p.delta_softplus = a.softplus, p.reverse = a.reverse, p.tactic = tactic.code();
  p.u = a.u, p.delta = a.delta, p.z = a.z, p.B = a.B, p.C = a.C, p.y = a.y, p.A = a.A, p.D = a.D, p.delta_bias = a.bias;
  p.initial_state = a.h0, p.final_state = a.hT, p.seq_lens = a.seq_lens;
  p.u_batch_stride = a.u_stride.batch, p.u_token_stride = a.u_stride.token;
  p.delta_batch_stride = a.delta_stride.batch, p.delta_token_stride = a.delta_stride.token;
  p.z_batch_stride = a.z_stride.batch, p.z_token_stride = a.z_stride.token;
  p.B_batch_stride = a.B_stride.batch, p.B_token_stride = a.B_stride.token;
  p.C_batch_stride = a.C_stride.batch, p.C_token_stride = a.C_stride.token;
  p.y_batch_stride = a.y_stride.batch, p.y_token_stride = a.y_stride.token;
  return p;
}

// How the pieces of the first pass came to their ends, a letter for each way there is:
//   w  all of the piece for a warp's states together     n  no state left, without a state on its own
//   W  to its beginning with states on their own         N  no state left of those on their own
//   c  like W, and they closed up                        -  nothing to do: the row's last piece, or one behind it
template <typename T> std::string ends_of_pieces(const Rows& r, const Tensors<T>& t, const Args<T>& a) {
  std::string found;
  for (const emulation::Ended& e : launches[0]) {
    const Part<T> part(a, {int(e.block.y), int(e.block.x), int(e.block.z)});
    if (part.piece >= part.last) {
      found += e.barriers ? '?' : '-';
      continue;
    }
    bool left = true;
    for (int c = part.c0; c < part.c0 + part.channels; c++) {
      double dt = 0;
      for (int i = 0; i < part.tokens; i++) dt += time_step_of(r, t, size_t(part.b) * r.tokens + part.first + part.dir * i, c);
      left &= std::fabs(a.piece_dt[(size_t(part.b) * a.pieces + part.piece) * r.dim + c] / dt - 1) > 1e-3;
    }
    found += e.any ? (left ? 'N' : 'W') : left ? 'n' : 'w';
    const unsigned tiles = mamba::ceil_div(part.tokens, kTile);  // barriers: one a tile, before and after the states on their own
    if (e.any && !left && e.barriers > tiles + 2) found += 'c';
  }
  std::sort(found.begin(), found.end()), found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

template <typename T> struct Result {
  std::vector<T> y;
  std::vector<float> end;
  std::string ends;
  bool same(const Result& o) const {
    return !std::memcmp(y.data(), o.y.data(), y.size() * sizeof(T)) && !std::memcmp(end.data(), o.end.data(), end.size() * sizeof(float));
  }
};
template <typename T> bool right(const Rows& r, const Tactic& tactic, Result<T>& out) {
  Tensors<T> t;
  Params p = parameters(r, arguments(r, t), tactic);
  constexpr size_t kGuard = 64;
  const size_t need = mamba_selective_scan_workspace(&p) / sizeof(float);
  std::vector<float> workspace(need + kGuard, NAN);
  p.workspace = workspace.data(), p.workspace_size = need * sizeof(float);
  launches.clear();
  if (mamba_selective_scan(&p, nullptr) != MAMBA_OK) std::abort();
  const Args<T> a = make_args<T>(p, tactic);
  if (launches.size() > 1) out.ends = ends_of_pieces(r, t, a);
  const Errors<T> e = errors(r, t, recurrence(r, t));
  bool ok = e.small();
  for (size_t i = 0; i < kGuard; i++) ok &= workspace[need + i] != workspace[need + i];
  std::printf("%s: %d x %d tokens, %d channels, vec %d, %d pieces, %d in turn: ", ok ? "right" : "WRONG", r.batch, r.tokens, r.dim, a.vec,
              a.pieces, tactic.in_turn());
  std::printf("y %.1e state %.1e padding %d ends %s\n", e.y, e.state, e.padding, out.ends.c_str());
  std::fflush(stdout);
  out.y = t.y, out.end = t.end;
  return ok;
}

template <typename T> bool whole(const Rows& r) {
  Result<T> result;
  return places = 4, right(r, {Tactic::kChannel, 0, 0, 0, 1}, result);
}
// Bits do not depend on pieces in turn, whichever blocks draw the first tickets.
template <typename T> bool in_turn(const Rows& r, int pieces, int blocks, bool alone = false) {
  Result<T> wanted, found;
  bool ok = alone || (places = 4, right(r, {Tactic::kChannel, 0, 0, 0, 1}, wanted));
  for (int i = 0; i < 2 - alone; i++) {
    ok &= (places = size_t(blocks), right(r, {Tactic::kChannel, 0, 0, 4, pieces}, found));
    if (!alone && !found.same(wanted)) ok = false, std::printf("WRONG: not the bits of whole rows\n");
  }
  return ok;
}
template <typename T> bool side_by_side(const Rows& r, int pieces, const std::string& ends) {
  Result<T> result;
  bool ok = (places = 4, right(r, {Tactic::kChannel, 0, 0, 0, pieces}, result));
  if (ends != "any" && result.ends != ends) ok = false, std::printf("WRONG: pieces were to end with %s\n", ends.c_str());
  return ok;
}

using half = __half;
using bf16 = __nv_bfloat16;

// dt about 0.33: states with A below -0.8 are left within 256 tokens.
Rows fast(Rows r, float slowest, float spread) { return r.slowest = slowest, r.spread = spread, r.delta = -1, r; }
Rows gap(Rows r, int elements) { return r.gap = elements, r; }
Rows bare(Rows r) { return r.bare = true, r; }
// Steps of either sign, but no channel whose sum is negative: a state that grows by powers of ten is no test.
Rows no_softplus(Rows r) { return r.softplus = false, r.delta = 0.02f, r.delta_spread = 0.04f, r.bias_spread = 0.003f, r.spread = 4, r; }

Rows in_place(Rows r) { return r.in_place = true, r; }

// {batch, tokens, dim, ngroups, ragged, reverse, z, state}; widths of a group that fill blocks, and that do not.
bool whole_rows() {
  bool ok = whole<float>({3, 150, 200, 1, true, false, true, true});
  ok &= whole<float>(gap({2, 70, 130, 1, false, true, false, true}, 1));
  ok &= whole<half>({1, 333, 600, 2, false, false, true, false});
  ok &= whole<half>(gap({3, 90, 144, 1, true, true, true, true}, 8));
  ok &= whole<bf16>(in_place({3, 100, 272, 2, true, true, true, true}));
  ok &= whole<bf16>(bare({2, 129, 100, 2, false, false, false, false}));
  ok &= whole<bf16>({2, 1, 128, 1, false, false, true, true});
  return whole<float>(no_softplus({1, 200, 40, 1, false, true, true, true})) && ok;
}
bool pieces_in_turn() {
  bool ok = in_turn<float>(in_place({3, 150, 200, 1, true, false, true, true}), 4, 3);
  ok &= in_turn<float>(gap({1, 500, 130, 1, false, true, false, false}, 1), 8, 5);
  ok &= in_turn<half>({1, 333, 600, 2, false, false, true, true}, 3, 4);
  ok &= in_turn<half>(gap({3, 90, 144, 1, true, true, true, true}, 3), 16, 3);  // more pieces than tiles
  ok &= in_turn<bf16>({3, 400, 272, 2, true, true, true, true}, 5, 7);
  ok &= in_turn<bf16>(bare({2, 129, 100, 2, false, false, false, false}), 4, 100);
  ok &= in_turn<bf16>({1, 2, 128, 1, false, false, true, true}, 4, 3);
  return in_turn<float>(no_softplus({1, 200, 40, 1, false, true, true, true}), 4, 3) && ok;
}
bool pieces_side_by_side() {
  bool ok = side_by_side<float>({3, 150, 200, 1, true, false, true, true}, 4, "-w");  // too short to leave a state
  ok &= side_by_side<half>(gap({3, 90, 144, 1, true, true, true, true}, 3), 40, "-w");  // more pieces than tiles
  ok &= side_by_side<half>({1, 400, 6, 1, false, false, true, true}, 3, "Wc");  // so few channels that all are on their own
  ok &= side_by_side<float>(in_place({3, 600, 130, 1, true, false, true, true}), 12, "-Ww");  // the last may end first
  ok &= side_by_side<float>(fast({1, 3000, 200, 1, false, false, true, true}, 1e-4f, 8), 3, "Wc");
  ok &= side_by_side<bf16>(fast({1, 4500, 144, 2, false, true, true, true}, 1e-4f, 8), 2, "Wc");
  ok &= side_by_side<half>(gap(fast({3, 2000, 130, 1, true, true, false, true}, 1e-4f, 8), 1), 3, "-Wc");
  ok &= side_by_side<bf16>(fast({3, 1600, 272, 2, true, true, true, true}, 0.1f, 8), 2, "-NWc");
  ok &= side_by_side<float>(bare(fast({2, 1500, 200, 1, false, true, true, false}, 0.5f, 8)), 3, "N");
  ok &= side_by_side<half>(fast({1, 900, 600, 2, false, false, true, true}, 0.5f, 8), 2, "N");
  ok &= side_by_side<bf16>(fast({3, 1000, 128, 1, true, false, true, true}, 8, 0), 4, "-n");
  ok &= side_by_side<float>(gap(fast({2, 700, 200, 1, false, true, false, true}, 8, 0), 1), 3, "n");
  ok &= side_by_side<float>(no_softplus({1, 900, 136, 1, false, false, true, true}), 3, "w");
  return side_by_side<bf16>(no_softplus({3, 700, 272, 2, true, true, true, true}), 3, "-w") && ok;
}
template <typename T> bool random_shape(std::mt19937& random) {
  auto below = [&](int n) { return int(random() % unsigned(n)); };
  const int groups = 1 + below(2), width = below(3) ? 8 * (1 + below(20)) : 1 + below(150);
  Rows r{1 + below(3), 1 + below(below(2) ? 100 : 900), groups * width, groups, !below(2), !below(2), !below(2), !below(2)};
  if (!below(5)) r = no_softplus(r);
  else if (below(3)) r = fast(r, below(2) ? 1e-3f : 0.3f, float(1 + below(16)));
  if (!below(3)) r = gap(r, 1 + below(8));
  if (!below(4)) r = bare(r);
  r.in_place = r.state && !below(3);
  const int turns = 2 + below(15), sides = 2 + below(below(2) ? 3 : 20), blocks = 3 + below(5);
  const bool ok = in_turn<T>(r, turns, blocks);
  return side_by_side<T>(r, sides, "any") && ok;
}
bool random_shapes() {
  std::mt19937 random(1);
  bool ok = true;
  for (int i = 0; i < 25; i++) ok &= random_shape<float>(random), ok &= random_shape<half>(random), ok &= random_shape<bf16>(random);
  return ok;
}
// Few, for a sanitizer.
bool few() {
  bool ok = in_turn<bf16>({1, 90, 136, 1, false, false, true, true}, 3, 3, true);
  ok &= in_turn<float>(in_place(gap({2, 60, 20, 1, true, true, true, true}, 1)), 2, 3, true);
  ok &= side_by_side<bf16>(fast({1, 700, 128, 1, false, false, true, true}, 1e-3f, 8), 2, "Wc");
  ok &= side_by_side<float>(gap(fast({1, 700, 128, 1, false, true, false, true}, 0.7f, 8), 1), 2, "N");
  ok &= side_by_side<float>(in_place({1, 64, 20, 1, false, false, true, true}), 4, "w");
  return side_by_side<half>(fast({1, 200, 70, 1, false, false, true, true}, 8, 0), 2, "n") && ok;
}

int main(int count, char** names) {
  const std::string name = count > 1 ? names[1] : "";
  if (name == "whole") return !whole_rows();
  if (name == "in turn") return !pieces_in_turn();
  if (name == "side by side") return !pieces_side_by_side();
  if (name == "random") return !random_shapes();
  return name == "few" ? !few() : 2;
}
