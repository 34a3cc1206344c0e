// The selector: microseconds of each tactic from figures measured on an H200 (kernels/NOTES-selective-scan.md), scaled
// to the multiprocessors of this device. Only the order matters. It runs at every call: no allocation, no driver calls.

// Blocks of the chain: the states of their kernel, its lanes a channel (linked: four, and a block on two multiprocessors), groups of
// 32 / lanes channels, warps a group, copying warps, and what was measured: microseconds to start and nanoseconds per token
// of a block that has a multiprocessor (linked: two) to itself. The last of each number of states but 256 fits where shared
// memory is small.
struct ChainBlock {
  int states, kernel, groups, warps, copiers;
  double start_us, token_ns;
  int channels() const { return groups * 32 / chain_lanes_of(kernel); }
};
constexpr int kLanes2 = Tactic::kChain, kLanes4 = Tactic::kChain4, kLanes8 = Tactic::kChain8, kLinked = Tactic::kLinked;
constexpr ChainBlock kChainBlocks[] = {
    {16, kLanes2, 1, 14, 2, 4.0, 16.6},  {16, kLanes2, 2, 7, 2, 4.2, 31.0},   {16, kLanes2, 3, 5, 1, 4.3, 43.1},
    {16, kLanes2, 4, 3, 1, 3.0, 60.7},   {16, kLanes2, 5, 3, 1, 3.8, 71.5},   {16, kLanes4, 2, 7, 2, 3.4, 16.4},
    {16, kLanes4, 3, 5, 1, 3.4, 23.2},   {16, kLanes4, 4, 3, 2, 3.9, 32.5},   {16, kLanes4, 5, 3, 1, 4.4, 38.3},
    {16, kLanes4, 7, 2, 1, 5.0, 56.0},   {16, kLanes4, 1, 14, 2, 3.2, 9.3},   {16, kLanes4, 1, 8, 2, 2.5, 10.9},
    {16, kLanes8, 1, 10, 2, 1.8, 11.5},  {16, kLanes8, 3, 5, 1, 2.7, 22.6},   {16, kLinked, 3, 4, 1, 3.6, 12.6},
    {16, kLinked, 1, 8, 2, 3.7, 6.4},    {16, kLanes2, 1, 8, 2, 2.8, 19.6},

    {8, kLanes4, 2, 7, 2, 3.3, 10.7},    {8, kLanes4, 1, 8, 2, 2.8, 7.2},     {8, kLanes4, 3, 4, 2, 3.6, 16.7},
    {8, kLanes4, 4, 3, 2, 4.1, 21.6},    {8, kLanes4, 5, 3, 1, 3.8, 24.9},    {8, kLinked, 3, 4, 1, 3.3, 9.0},
    {8, kLanes4, 7, 2, 1, 5.0, 36.4},    {8, kLanes4, 2, 5, 2, 3.2, 12.6},

    {32, kLanes8, 3, 4, 2, 4.3, 31.2},   {32, kLanes8, 1, 10, 2, 3.0, 18.2}, {32, kLanes8, 2, 7, 2, 4.3, 22.5},
    {32, kLanes4, 2, 7, 2, 5.5, 28.8},   {32, kLanes4, 3, 5, 1, 5.6, 41.7},   {32, kLanes4, 5, 3, 1, 7.6, 66.8},
    {32, kLanes4, 4, 3, 2, 6.3, 55.0},   {32, kLanes8, 1, 6, 1, 2.7, 27.4},

    {64, kLanes8, 3, 4, 2, 5.5, 50.1},   {64, kLanes8, 2, 7, 2, 4.2, 35.6},   {64, kLanes8, 1, 10, 2, 4.1, 29.3},
    {64, kLanes4, 2, 6, 2, 7.6, 55.6},   {64, kLanes8, 5, 3, 1, 5.4, 72.5},   {64, kLanes4, 3, 4, 2, 7.2, 80.2},
    {64, kLanes8, 1, 6, 1, 1.9, 52.1},

    {128, kLanes8, 3, 4, 2, 6.6, 84.8},  {128, kLanes8, 2, 6, 2, 6.5, 61.0},  {128, kLanes8, 1, 8, 2, 5.2, 52.4},
    {128, kLanes8, 4, 3, 2, 6.9, 111.2}, {128, kLanes8, 5, 2, 1, 6.5, 153.2}, {128, kLanes8, 1, 3, 1, 4.7, 106.0},

    {256, kLanes8, 3, 2, 2, 13.3, 224.7}, {256, kLanes8, 2, 3, 2, 13.5, 156.1}, {256, kLanes8, 4, 2, 2, 9.6, 246.9},
    {256, kLanes8, 5, 2, 1, 0.7, 341.6},
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

// How many tokens the first pass looks back at depends on the data: here 1,125 in full (float32: 1,500), a few states further.
// Where a piece is shorter, all pieces before it count. The first pass has places for three blocks of a multiprocessor.
double side_by_side_us(const Params& p, int blocks, int pieces) {
  const double tokens = double(p.seqlen) / pieces, seen = std::min(1.0, (p.dtype == MAMBA_F32 ? 1500 : 1125) / tokens);
  const double token_ns = blocks > 4 ? 95 * blocks : blocks == 4 ? 405 : together_ns(blocks);
  const double passes = blocks == 2 ? 1.23 + 0.58 * seen : 1.14 + 0.68 * seen;
  return 25 + 0.2 * pieces * seen + 1e-3 * token_ns * tokens * passes;
}

// Where blocks take several lots, one after the other, only the first starts; another costs 1 us.
double chain_us(const Params& p, const ChainBlock& b, const Tactic& t) {
  const int blocks = p.batch * p.ngroups * ceil_div(p.dim / p.ngroups, b.channels());
  const double row_us = 1e-3 * p.seqlen * b.token_ns;
  const double rounds = std::ceil(double(blocks) / (b.kernel == kLinked ? sm_count() / 2 : sm_count()));
  auto several = [&](auto layout) { return layout.in_lots(t, blocks, p.seqlen, p.seq_lens); };
  const bool lots = p.dtype == MAMBA_F32 ? with_chain<float>(t, b.states, several) : with_chain<__half>(t, b.states, several);
  return lots ? b.start_us + rounds * (row_us + 1) - 1 : (b.start_us + row_us) * rounds;
}

// Blocks of whole rows of the tactic generic.
int64_t generic_rows(const Params& p) {
  const int channels = kGenericThreads / generic_lanes(p.d_state);
  return int64_t(p.batch) * p.ngroups * ceil_div(p.dim / p.ngroups, channels);
}

// Pieces of a row of the tactic generic, three blocks to a multiprocessor, or twelve pieces. Measured with 6 to 192 blocks of whole
// rows: (1, 1536, 2048) of 128 states, 96 blocks, 849 us whole, 498 in 5 pieces, 440 in 12; with 192 nothing is gained.
int generic_pieces(const Params& p) {
  const int64_t blocks = generic_rows(p), once = generic_blocks(generic_lanes(p.d_state)) * sm_count() / blocks;  // that run at once
  const int64_t pieces = std::min<int64_t>({once < 6 ? 12 : once, p.seqlen / 24, 64});
  return 10 * blocks > 13 * sm_count() || pieces < 3 ? 1 : int(pieces);
}

// In pieces. Fitted to what was measured from 8 to 256 states and 64 to 5,120 channels: a channel's token with a block to every
// multiprocessor (more gain little), and half a microsecond for every piece that a later one looks at.
double generic_us(const Params& p, int pieces) {
  const int channels = kGenericThreads / generic_lanes(p.d_state);
  const double blocks = double(generic_rows(p)) * pieces, busy = std::min(blocks, double(sm_count()));
  const double ns = (0.0061 + 0.0008 * p.d_state) * std::pow(std::max(1.0, p.d_state / 64.0), 0.45) * 132;
  return 15 + 0.5 * pieces + 1e-3 * ns * blocks * channels * p.seqlen / pieces / busy;
}

// The tactics that cover the shape, fastest first.
struct Candidates {
  Tactic tactic[40];
  double us[40];
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
    const int states = chain_states(p.d_state);
    for (const ChainBlock& b : kChainBlocks) {
      const Tactic t{b.kernel, b.groups, b.warps, b.copiers, 1};
      if (b.states == states) add(p, t, chain_us(p, b, t));
    }
    add(p, {Tactic::kGeneric, 0, 8, 0, 1}, 1e19);
    if (p.d_state != kState) add_pieces(p);
  }
  // generic in pieces; with fewer too, for callers with a small workspace, though fewer were always slower.
  void add_pieces(const Params& p) {
    const int most = generic_pieces(p);
    const double least_us = generic_us(p, most);
    for (int pieces = most; pieces > 2; pieces /= 2) add(p, {Tactic::kGeneric, 0, 8, 0, pieces}, least_us * most / pieces);
  }
  void add(const Params& p, const Tactic& t, double cost) {
    if (!covers(p, t)) return;
    int i = count++;
    for (; i > 0 && us[i - 1] > cost; i--) us[i] = us[i - 1], tactic[i] = tactic[i - 1];
    us[i] = cost, tactic[i] = t;
  }
};

Tactic select(const Params& p) { return Candidates(p).tactic[0]; }
