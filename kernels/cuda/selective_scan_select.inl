// The selector: microseconds of each tactic from figures measured on an H200 (kernels/NOTES-selective-scan.md), scaled
// to the multiprocessors of this device. Only the order matters. It runs at every call: no allocation, no driver calls.

// Blocks of the chain: the kernel (lanes a channel), groups of 32 / lanes channels, warps a group, copying warps, and what
// was measured: microseconds to start and nanoseconds per token of a block that has a multiprocessor to itself. The last
// one fits where shared memory is small.
struct ChainBlock {
  int kernel, groups, warps, copiers;
  double start_us, token_ns;
  int lanes() const { return 2 << (kernel - Tactic::kChain); }
};
constexpr ChainBlock kChainBlocks[] = {
    {Tactic::kChain, 1, 14, 2, 4.8, 18.0},  {Tactic::kChain, 2, 7, 2, 4.8, 34.5},  {Tactic::kChain, 3, 5, 1, 4.8, 47.5},
    {Tactic::kChain4, 2, 7, 2, 4.6, 17.7},  {Tactic::kChain4, 3, 5, 1, 4.6, 27.0}, {Tactic::kChain4, 5, 3, 1, 4.6, 41.2},
    {Tactic::kChain4, 1, 14, 2, 4.2, 10.9}, {Tactic::kChain4, 1, 8, 2, 3.8, 12.0}, {Tactic::kChain8, 1, 10, 2, 3.4, 11.35},
    {Tactic::kChain8, 3, 5, 1, 3.1, 21.2},  {Tactic::kChain, 1, 8, 2, 4.8, 22.5},
};

// Nanoseconds a token takes blocks of the tactic channel, of which a multiprocessor has `blocks` at once (0 to 4): started
// together; and started one by one, when they wait for the special-function unit at different times.
double together_ns(double blocks) {
  constexpr double kNs[] = {0, 131, 201, 297, 385};
  const int n = std::min(4, int(std::ceil(blocks)));
  return kNs[n];
}
double apart_ns(double blocks) {
  constexpr double kNs[] = {0, 131, 190, 264, 342};
  const int n = std::min(3, int(blocks));
  return kNs[n] + (blocks - n) * (kNs[n + 1] - kNs[n]);
}

double whole_rows_us(const Params& p) {
  const double blocks = double(channel_rows(p)) / sm_count(), full = std::floor(blocks / 4);
  return 5 + 1e-3 * p.seqlen * (full * together_ns(4) + together_ns(blocks - 4 * full));
}

// A hand-over costs 3.6 us, or 2.2 where there are more places than rows, so that the next block is there already. At the
// end, and where places wait, a multiprocessor has fewer blocks than its share.
double in_turn_us(const Params& p, int places, int pieces) {
  const double blocks = double(channel_rows(p)) / sm_count(), running = std::min<double>(blocks, places);
  const double uneven = 0.4 + 0.9 * (places - running), token_ns = apart_ns(running);
  return 5 + 1e-3 * p.seqlen * token_ns * (blocks / running + uneven / pieces) +
         (blocks < places ? 2.2 : 3.6) * pieces * blocks / running;
}

// How many tokens the first pass looks back at depends on the data: about 1,500 in full, a few states further. Where a piece is
// shorter, all pieces before it count.
double side_by_side_us(const Params& p, int blocks, int pieces) {
  const double tokens = double(p.seqlen) / pieces, seen = std::min(1.0, 1500 / tokens);
  const double second = 1e-3 * tokens * (blocks > 4 ? apart_ns(3) / 3 * blocks : together_ns(blocks));
  return (blocks > 4 ? 75 : 5) + 0.5 * pieces * seen + second * (1.25 + 0.7 * seen);
}

double chain_us(const Params& p, const ChainBlock& b) {
  const double blocks = double(p.batch) * p.ngroups * ceil_div(p.dim / p.ngroups, 32 / b.lanes() * b.groups);
  return b.start_us + 1e-3 * p.seqlen * b.token_ns * std::ceil(blocks / sm_count());
}

// Pieces of a row of the tactic generic, three blocks to a multiprocessor, or twelve pieces. Measured with 6 to 192 blocks of whole
// rows: (1, 1536, 2048) of 128 states, 96 blocks, 849 us whole, 498 in 5 pieces, 440 in 12; with 192 nothing is gained.
int generic_pieces(const Params& p) {
  const int lanes = generic_lanes(p.d_state), channels = kGenericThreads / lanes;
  const int64_t blocks = int64_t(p.batch) * p.ngroups * ceil_div(p.dim / p.ngroups, channels);
  const int64_t once = generic_blocks(lanes) * sm_count() / blocks;  // pieces that run at once
  const int64_t pieces = std::min<int64_t>({once < 6 ? 12 : once, p.seqlen / 24, 64});
  return 10 * blocks > 13 * sm_count() || pieces < 3 ? 1 : int(pieces);
}

// The tactics that cover the shape, fastest first.
struct Candidates {
  Tactic tactic[32];
  double us[32];
  int count = 0;

  explicit Candidates(const Params& p) {
    add(p, {Tactic::kChannel, 0, 0, 0, 1}, whole_rows_us(p));
    for (int places = 2; places <= 4 && channel_rows(p) > sm_count(); places++) {
      for (int pieces = 4; pieces <= 16 && p.seqlen / pieces >= 2 * 16; pieces *= 2) {
        add(p, {Tactic::kChannel, 0, 0, places, pieces}, in_turn_us(p, places, pieces));
      }
    }
    for (int blocks : {2, 3, 4, 6}) {
      const int pieces = std::min(1023, blocks * sm_count() / channel_rows(p));
      if (pieces > 1 && p.seqlen / pieces >= 2 * 16) {
        add(p, {Tactic::kChannel, 0, 0, 0, pieces}, side_by_side_us(p, blocks, pieces));
      }
    }
    for (const ChainBlock& b : kChainBlocks) add(p, {b.kernel, b.groups, b.warps, b.copiers, 1}, chain_us(p, b));
    add(p, {Tactic::kGeneric, 0, 8, 0, 1}, 1e19);
    // Fewer pieces too, for callers with a small workspace.
    for (int pieces = generic_pieces(p); pieces > 2 && p.d_state != kState; pieces /= 2) {
      add(p, {Tactic::kGeneric, 0, 8, 0, pieces}, 1e18 / pieces);
    }
  }
  void add(const Params& p, const Tactic& t, double cost) {
    if (!covers(p, t)) return;
    int i = count++;
    for (; i > 0 && us[i - 1] > cost; i--) us[i] = us[i - 1], tactic[i] = tactic[i - 1];
    us[i] = cost, tactic[i] = t;
  }
};

Tactic select(const Params& p) { return Candidates(p).tactic[0]; }
