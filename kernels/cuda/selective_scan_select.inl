// The selector: a cost model in multiprocessor cycles, fitted to measurements (kernels/NOTES-selective-scan.md).

// Cycles of the whole scan under a tactic; only differences matter.
double cost(const Params& p, const Tactic& t) {
  const double sms = sm_count(), L = p.seqlen;
  const int group_dim = p.dim / p.ngroups;
  if (t.kernel == Tactic::kChannel) {
    const double warps = double(p.batch) * p.ngroups * ceil_div(group_dim, 128) * 4;
    const double per_quarter = std::ceil(warps / (4 * sms));
    return 3000 + L * 165 * std::max(per_quarter, 2.5);
  }
  const int g = t.kernel == Tactic::kChain4 ? 4 : 8;
  const double blocks = double(p.batch) * t.pieces * p.ngroups * ceil_div(group_dim, t.groups * g);
  const double per_channel = g == 4 ? 54 + 10.0 / t.groups : 48 + 5.0 / t.groups;
  const double hop = 200.0 * g / 64;  // cycles per token that the chain itself needs
  const double token = std::max(t.groups * g * per_channel / 32 , hop);
  const double passes = t.pieces > 1 ? 1.8 : 1.0;
  return 4000 * (t.pieces > 1 ? 2 : 1) + passes * std::ceil(blocks / sms) * std::ceil(L / t.pieces) * token;
}

std::vector<Tactic> candidates(const Params& p) {
  std::vector<Tactic> all;
  if (p.d_state == kState) all.push_back({Tactic::kChannel, 0, 4, 1});
  if (covers_chain(p)) {
    const int group_dim = p.dim / p.ngroups;
    for (int kernel : {Tactic::kChain4, Tactic::kChain8}) {
      const int g = kernel == Tactic::kChain4 ? 4 : 8, most = kernel == Tactic::kChain4 ? 8 : 10;
      for (int k = 1; k <= std::min(most, ceil_div(group_dim, g)); k++) {
        const int warps = std::max(2, std::min(12, ceil_div(p.seqlen, 64 / g)));
        for (int pieces : {1, 2, 3, 4, 6, 8, 16, 32}) {
          if (pieces > 1 && p.seqlen / pieces < 256) break;
          all.push_back({kernel, k, warps, pieces});
        }
      }
    }
  }
  if (all.empty()) all.push_back({Tactic::kGeneric, 0, 8, 1});
  std::stable_sort(all.begin(), all.end(), [&](const Tactic& x, const Tactic& y) { return cost(p, x) < cost(p, y); });
  if (p.d_state == kState) all.push_back({Tactic::kGeneric, 0, 8, 1});
  return all;
}

Tactic select(const Params& p) { return candidates(p).front(); }
