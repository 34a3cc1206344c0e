// The selector: microseconds of each tactic from figures measured on an H200 (kernels/NOTES-selective-scan.md), scaled
// to the multiprocessors of this device. Only the order matters.

// Nanoseconds per token of a block that has a multiprocessor to itself, by groups.
double block_token_ns(const Tactic& t) {
  static const double chain4[] = {13, 16, 20, 27, 32, 37}, chain8[] = {20, 31, 34, 46, 52, 64};
  switch (t.kernel) {
    case Tactic::kChain4: return chain4[std::min(t.groups, 6) - 1] * (t.warps < 12 ? 1.15 : 1.0);
    case Tactic::kChain8: return chain8[std::min(t.groups, 6) - 1] * (t.warps < 12 ? 1.15 : 1.0);
    default: return 0;
  }
}

double cost_us(const Params& p, const Tactic& t) {
  const double sms = sm_count();
  const int group_dim = p.dim / p.ngroups;
  if (t.kernel == Tactic::kChannel) {
    // One or two blocks of 128 channels on a multiprocessor wait for latency, more for the special-function unit.
    const double blocks = double(p.batch) * p.ngroups * ceil_div(group_dim, 128) * t.pieces;
    const double n = std::ceil(blocks / sms), token_ns = n <= 1 ? 190 : n <= 2 ? 215 : 105.5 * n;
    const double len = double(p.seqlen) / t.pieces;
    return t.pieces == 1 ? 4 + 1e-3 * len * token_ns : 12 + 1.65e-3 * len * token_ns + (0.9 + 0.008 * t.pieces) * t.pieces;
  }
  const int width = (t.kernel == Tactic::kChain4 ? 4 : 8) * t.groups;
  const double blocks = double(p.batch) * t.pieces * p.ngroups * ceil_div(group_dim, width);
  const double rounds = std::ceil(blocks / sms), passes = t.pieces > 1 ? 1.8 : 1.0;
  return 6 * (t.pieces > 1 ? 1.8 : 1.0) + 1e-3 * passes * rounds * (double(p.seqlen) / t.pieces) * block_token_ns(t);
}

std::vector<Tactic> candidates(const Params& p) {
  std::vector<Tactic> all;
  auto add = [&](const Tactic& t) {
    if (covers(p, t)) all.push_back(t);
  };
  add({Tactic::kChannel, 1, 4, 1});
  const int group_dim = p.dim / p.ngroups;
  const int columns = p.batch * p.ngroups * ceil_div(group_dim, 128);
  for (int n = 2; n <= 5; n++) {
    const int pieces = std::min(512, n * sm_count() / columns);
    if (pieces > 1 && p.seqlen / pieces >= 32) add({Tactic::kChannel, 1, 4, pieces});
  }
  for (int pieces : {1, 2, 4, 8, 16}) {
    if (pieces > 1 && p.seqlen / pieces < 256) break;
    for (int kernel : {Tactic::kChain4, Tactic::kChain8}) {
      const int g = kernel == Tactic::kChain4 ? 4 : 8;
      for (int k = 1; k <= std::min(6, ceil_div(group_dim, g)); k++) {
        const int warps = std::max(2, std::min(12, ceil_div(p.seqlen, 64 / g)));
        for (int w : {warps, warps / 2}) {
          if (w >= 2) add({kernel, k, w, pieces});
        }
      }
    }
  }
  std::stable_sort(all.begin(), all.end(), [&](const Tactic& x, const Tactic& y) { return cost_us(p, x) < cost_us(p, y); });
  add({Tactic::kChannel, 0, 4, 1});
  add({Tactic::kGeneric, 0, 8, 1});
  return all;
}

Tactic select(const Params& p) { return candidates(p).front(); }
