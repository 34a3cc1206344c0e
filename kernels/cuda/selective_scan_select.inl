// The selector: microseconds of each tactic from figures measured on an H200 (kernels/NOTES-selective-scan.md), scaled
// to the multiprocessors of this device. Only the order matters. It runs at every call: no allocation, no driver calls.

// Blocks of the chain: groups of 16 channels, warps a group, copying warps, and what was measured: nanoseconds per token
// of a block that has a multiprocessor to itself. The last one fits where shared memory is small.
struct ChainBlock {
  int groups, warps, copiers;
  double token_ns;
};
constexpr ChainBlock kChainBlocks[] = {{1, 14, 2, 18.7}, {2, 7, 2, 36.4}, {3, 5, 1, 49.6}, {1, 8, 2, 22.5}};

double waves(const Params& p, int width, int pieces) {
  const double blocks = double(p.batch) * p.ngroups * ceil_div(p.dim / p.ngroups, width) * pieces;
  return std::ceil(blocks / sm_count());
}

double channel_us(const Params& p, int pieces) {
  // One or two blocks of 128 channels on a multiprocessor wait for latency, more for the special-function unit.
  const double n = waves(p, 128, pieces), token_ns = n <= 1 ? 190 : n <= 2 ? 215 : 105.5 * n;
  const double us = 1e-3 * p.seqlen / pieces * token_ns;
  return pieces == 1 ? 4 + us : 12 + 1.65 * us + (0.9 + 0.008 * pieces) * pieces;
}

double chain_us(const Params& p, const ChainBlock& b) {
  return 6 + 1e-3 * p.seqlen * b.token_ns * waves(p, 16 * b.groups, 1);
}

// The tactics that cover the shape, fastest first.
struct Candidates {
  Tactic tactic[16];
  double us[16];
  int count = 0;

  explicit Candidates(const Params& p) {
    add(p, {Tactic::kChannel, 1, 4, 0, 1}, channel_us(p, 1));
    const int columns = p.batch * p.ngroups * ceil_div(p.dim / p.ngroups, 128);
    for (int n = 2; n <= 5; n++) {
      const int pieces = std::min(512, n * sm_count() / columns);
      if (pieces > 1 && p.seqlen / pieces >= 32) add(p, {Tactic::kChannel, 1, 4, 0, pieces}, channel_us(p, pieces));
    }
    for (const ChainBlock& b : kChainBlocks) add(p, {Tactic::kChain, b.groups, b.warps, b.copiers, 1}, chain_us(p, b));
    add(p, {Tactic::kChannel, 0, 4, 0, 1}, 1e18);
    add(p, {Tactic::kGeneric, 0, 8, 0, 1}, 1e19);
  }
  void add(const Params& p, const Tactic& t, double cost) {
    if (!covers(p, t)) return;
    int i = count++;
    for (; i > 0 && us[i - 1] > cost; i--) us[i] = us[i - 1], tactic[i] = tactic[i - 1];
    us[i] = cost, tactic[i] = t;
  }
};

Tactic select(const Params& p) { return Candidates(p).tactic[0]; }
