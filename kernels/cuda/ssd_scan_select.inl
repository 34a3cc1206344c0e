// Which kernels serve a call of ssd_scan; included by ssd_scan.cu only.

constexpr int kLayouts = 6;        // tried for every size; most have fewer
constexpr int kHopperLayouts = 2;  // the first ones
constexpr int kTwoPass = 6;        // the layout after all others
constexpr int kTwoPassCut = 7;     // the same with rows cut in time
constexpr int kMaxGrid = 65535;

struct Device {
  int sms, shared_block, shared_sm, capability;
};

const Device& device() {
  static Device cached[64] = {};
  int id = 0;
  cudaGetDevice(&id);
  Device& d = cached[id & 63];
  if (d.sms == 0) {
    cudaDeviceGetAttribute(&d.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    cudaDeviceGetAttribute(&d.shared_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
    d.capability = 10 * major + minor;
    d.sms = sm_count();
  }
  return d;
}

// A tactic with all that its launches need.
struct Choice {
  int layout = -1;  // -1: generic
  int splits = 1;   // 0: streaming; pairs of launches of the two-pass kernels, or pieces of their rows
  int heads = 1, chunk = 0, threads = 0, resident = 0, blocks_x = 0, shared = 0, state_shared = 0;
  Kernel scan = nullptr, stream = nullptr, state = nullptr;
  TwoPassPlan two_pass = {};
  TwoPassCut cut;

  int launches() const { return layout == kTwoPass ? splits : 1; }
  int tactic() const { return layout + 1 + 16 * splits; }
  // Blocks that run at once; a multiprocessor keeps 1 KB of shared memory a block for itself.
  int slots() const {
    const int by_shared = device().shared_sm / (shared + 1024);
    return device().sms * (by_shared < 1 ? 1 : by_shared < resident ? by_shared : resident);
  }
  int64_t rows(const Call& p) const { return static_cast<int64_t>(blocks_x) * p.batch; }
  // Streaming needs runs of at least a row.
  bool can_stream(const Call& p) const { return stream && p.seqlen > 0 && rows(p) >= slots(); }
};

bool multiple_of_8(int64_t a) { return a % 8 == 0; }

// The tensor-core kernels move 16 bytes at a time.
bool wide_access(const Call& p) {
  const void* pointers[] = {p.x, p.B, p.C, p.y, p.z};
  for (const void* at : pointers)
    if (!aligned(at, 16)) return false;
  if (!aligned(p.initial_state, 8) || !aligned(p.final_state, 8) || !aligned(p.D, 8)) return false;
  return multiple_of_8(p.x_batch_stride) && multiple_of_8(p.x_token_stride) && multiple_of_8(p.B_batch_stride) &&
         multiple_of_8(p.B_token_stride) && multiple_of_8(p.C_batch_stride) && multiple_of_8(p.C_token_stride) &&
         multiple_of_8(p.y_batch_stride) && multiple_of_8(p.y_token_stride) && multiple_of_8(p.z_batch_stride) &&
         multiple_of_8(p.z_token_stride);
}

bool find_plan(const Call& p, int layout, Plan* plan) {
  if (p.halves > 0 && layout >= kHopperLayouts) return false;
  if (layout < kHopperLayouts) {
#ifdef MAMBA_SM90A
    return device().capability == 90 && plan_hopper(p.dtype, p.headdim, p.d_state, layout, plan);
#else
    return false;
#endif
  }
  switch (p.d_state) {
    case 16: return plan_n16(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    case 64: return plan_n64(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    case 128: return plan_n128(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    case 256: return plan_n256(p.dtype, p.headdim, layout - kHopperLayouts, plan);
    default: return false;
  }
}

bool find_layout(const Call& p, int layout, Choice* out) {
  // Their scores hold log2(dt): no negative steps.
  if (p.dtype == MAMBA_F32 || !wide_access(p) || !(p.dt_min >= 0.f)) return false;
  Plan plan;
  if (!find_plan(p, layout, &plan) || plan.scan_shared > device().shared_block || plan.state_shared > device().shared_block) return false;
  out->layout = layout, out->heads = plan.heads, out->chunk = plan.chunk, out->threads = plan.threads;
  out->resident = plan.resident, out->shared = plan.scan_shared, out->state_shared = plan.state_shared;
  out->scan = plan.scan, out->stream = plan.stream, out->state = plan.state;
  out->blocks_x = ceil_div(p.nheads / p.ngroups, plan.heads) * p.ngroups;
  return true;
}

bool find_generic(const Call& p, Choice* out) {
  GenericPlan plan;
  if (!generic_plan(p.dtype, p.d_state, device().shared_block, &plan)) return false;
  out->layout = -1, out->chunk = plan.chunk, out->threads = plan.threads, out->resident = 2048 / plan.threads;
  out->shared = out->state_shared = plan.shared;
  out->scan = plan.scan, out->stream = nullptr, out->state = plan.state;
  out->blocks_x = ceil_div(p.headdim, plan.cols) * p.nheads;
  return true;
}

// The copy engine wants rows and tokens that do not lie on top of each other.
bool copyable(const Call& p) {
  if (p.dtype == MAMBA_F32) return true;
  const int64_t rows[] = {p.x_batch_stride, p.B_batch_stride, p.C_batch_stride, p.y_batch_stride};
  const int64_t tokens[] = {p.x_token_stride, p.B_token_stride, p.C_token_stride, p.y_token_stride};
  for (int i = 0; i < 4; i++)
    if ((p.batch > 1 && rows[i] <= 0) || (p.seqlen > 1 && tokens[i] <= 0)) return false;
  return true;
}

bool has_two_pass(int dtype, int headdim, int d_state, TwoPassPlan* plan = nullptr) {
#ifdef MAMBA_SM90A
  TwoPassPlan none;
  return device().capability == 90 && plan_two_pass(dtype, headdim, d_state, plan ? plan : &none);
#else
  return false;
#endif
}

bool find_two_pass(const Call& p, Choice* out) {
  if (p.seqlen == 0 || !wide_access(p) || !copyable(p) || !(p.dt_min >= 0.f)) return false;
  if (!has_two_pass(p.dtype, p.headdim, p.d_state, &out->two_pass)) return false;
  out->layout = kTwoPass, out->chunk = kTwoPassChunk;
  return true;
}

// Pairs of launches: as few as keep the copies of the states within 128 MB. (More of them, for the L2 cache's sake, took
// longer at every length measured.)
int two_pass_pieces(const Call& p, const Choice& c) {
  const int64_t row = ceil_div64(p.seqlen, kTwoPassChunk) * p.nheads * c.two_pass.image, most = 128 << 20;
  if (row <= most) return static_cast<int>(ceil_div64(p.batch, most / row));
  return p.batch * static_cast<int>(ceil_div64(row, most));
}

ScanArgs arguments(const Call& p, const Choice& c);

// Rows cut into `pieces`: in one pair of launches only. The second pass makes the final state 16 bytes at a time.
bool cut_rows(const Call& p, int pieces, Choice* c) {
  if (pieces < 2 || two_pass_pieces(p, *c) > 1 || !aligned(p.final_state, 16)) return false;
  if (!cut_two_pass(arguments(p, *c), c->two_pass, pieces, &c->cut)) return false;
  c->layout = kTwoPassCut, c->splits = pieces;
  return true;
}

// Rows as they are, or cut into as many pieces as promise the least time. Where every row has a block of its own, a cut that promises
// 7 % or less of the first pass was measured slower (48 heads at 2,048 tokens, 80 at 8,192).
void choose_cut(const Call& p, Choice* c) {
  TwoPassCut whole;
  if (two_pass_pieces(p, *c) > 1 || !cut_two_pass(arguments(p, *c), c->two_pass, 1, &whole)) return;
  double least = whole.time;
  const Choice uncut = *c;
  for (int pieces = 2; pieces <= kMaxLater + 1; pieces++) {
    Choice candidate = uncut;
    if (!cut_rows(p, pieces, &candidate)) continue;
    const double at = candidate.cut.time / (candidate.cut.run > 0 ? 1 : 0.93);
    if (at < least) least = at, *c = candidate;
  }
}

// A model of the time, in tokens of one block: whole waves of blocks, the state-only pass at its measured share of a
// full chunk, and a constant for each launch.
double cost(const Call& p, const Choice& c) {
  const int chunks = ceil_div(p.seqlen, c.chunk);
  const double slots = c.slots(), rows = static_cast<double>(c.rows(p));
  if (c.splits == 0) return (rows * chunks / slots + 3.0) * c.chunk;
  const int piece = ceil_div(chunks, c.splits);
  const double waves = ceil(rows * c.splits / slots);
  double total = waves * (piece + 3.0) - 2.0;
  if (c.splits > 1) {
    const double state_waves = ceil(rows * (c.splits - 1) / slots);
    total += state_waves * (0.45 * piece + 2.0) + 1.5 + 0.1 * c.splits;
  }
  return total * c.chunk;
}

// The best number of pieces (or streaming) of a layout.
void choose_splits(const Call& p, Choice* c, double* least) {
  const int chunks = ceil_div(p.seqlen, c->chunk);
  int best = 1;
  *least = INFINITY;
  for (int splits = c->can_stream(p) ? 0 : 1; splits <= 64 && (splits < 2 || splits * 2 <= chunks); splits++) {
    c->splits = splits;
    const double at = cost(p, *c);
    if (at < *least) *least = at, best = splits;
  }
  c->splits = best;
}

// Microseconds on an H200 of one pass over pairs of heads, by chunks of 64 tokens, and of two passes, by chunks of 128, for 16-bit
// types; fitted to 32 shapes of headdim 64, d_state 128 and 0.01 to 5 million tokens of a head. Only their order matters.
double one_pass_us(const Call& p) {
  const double rows = double(p.batch) * p.ngroups * ceil_div(p.nheads / p.ngroups, 2), chunks = ceil_div(p.seqlen, 64);
  const double blocks = rows / device().sms;  // of a multiprocessor; from one on they go on over the ends of rows
  return blocks < 1 ? 2.42 * (chunks + 3) : 2.7 * (blocks * chunks + 3);
}
double two_pass_us(const Call& p) {
  const double rows = double(p.batch) * p.nheads / device().sms;  // of a multiprocessor
  const int of_row = ceil_div(p.seqlen, kTwoPassChunk);
  const double chunks = rows * of_row, starts = of_row > 1 ? 0 : fmax(0, rows - 1);  // longer rows are cut into equal runs
  return 5.5 + chunks * (chunks < 30 ? 2.87 : 3.16) + 1.8 * starts;
}

// Where half of the two-pass kernels' tiles or more would be padding (headdim 32, d_state 16), other tensor-core kernels are faster
// as soon as they stream: on an H200 146 us instead of 192 for (8, 80, 2048) of 16 states, 307 instead of 410 for (8, 160, 2048) of
// headdim 32; but 111 and 99, 241 and 207 for half as many rows.
bool half_padding(const Call& p, const Choice& c) {
  return p.dtype != MAMBA_F32 && 4 * p.headdim * p.d_state <= c.two_pass.image;
}
bool any_streams(const Call& p) {
  for (int layout = kHopperLayouts; layout < kLayouts; layout++)
    if (Choice c; find_layout(p, layout, &c) && c.can_stream(p)) return true;
  return false;
}

int find_choice(const Call& p, Choice* out) {
  if (p.tactic >= 0) {
    const int layout = p.tactic % 16 - 1;
    const bool found = layout < 0                                        ? find_generic(p, out)
                       : layout == kTwoPass || layout == kTwoPassCut ? find_two_pass(p, out)
                                                                     : layout < kLayouts && find_layout(p, layout, out);
    if (layout == kTwoPassCut) return found && cut_rows(p, p.tactic / 16, out) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
    out->splits = p.tactic / 16;
    if (found && layout == kTwoPass)
      return out->splits > 0 && out->splits <= p.batch * ceil_div(p.seqlen, out->chunk) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
    if (!found || out->splits > kMaxGrid) return MAMBA_ERROR_TACTIC;
    if (out->splits == 0) return out->can_stream(p) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
    return out->splits == 1 || out->splits <= ceil_div(p.seqlen, out->chunk) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
  }
  Choice hopper;
  const bool one_pass = find_layout(p, 0, &hopper);
  if ((!one_pass || two_pass_us(p) < one_pass_us(p)) && find_two_pass(p, out) && !(half_padding(p, *out) && any_streams(p))) {
    out->splits = two_pass_pieces(p, *out);
    choose_cut(p, out);
    return MAMBA_OK;
  }
  double least = INFINITY;
  bool any = false;
  for (int layout = 0; layout < kLayouts; layout++) {
    Choice candidate;
    if (!find_layout(p, layout, &candidate)) continue;
    double at;
    choose_splits(p, &candidate, &at);
    if (at < least) least = at, *out = candidate, any = true;
    if (layout < kHopperLayouts) break;  // measured ahead of every other layout
  }
  if (any) return MAMBA_OK;
  if (!find_generic(p, out)) return MAMBA_ERROR_SHAPE;
  choose_splits(p, out, &least);
  return MAMBA_OK;
}

// find_choice, remembered: it takes longer than a launch, and a call needs it twice.
int choose(const Call& p, Choice* out) {
  struct Key {
    int32_t known, device, dtype, batch, seqlen, nheads, headdim, width, ngroups, d_state, tactic, covered;
  };
  struct Entry {
    Key key;
    Choice choice;
    int status;
  };
  thread_local Entry entries[8] = {};
  thread_local int next = 0;
  Key key = {1, 0, p.dtype, p.batch, p.seqlen, p.nheads, p.headdim, p.width, p.ngroups, p.d_state, p.tactic, 0};
  cudaGetDevice(&key.device);
  key.covered = (wide_access(p) && p.dt_min >= 0.f ? 1 : 0) + (copyable(p) ? 2 : 0);
  key.covered += (p.final_state ? 4 : 0) + (aligned(p.final_state, 16) ? 8 : 0);
  for (const Entry& entry : entries) {
    if (memcmp(&entry.key, &key, sizeof(key)) != 0) continue;
    *out = entry.choice;
    return entry.status;
  }
  Entry& entry = entries[next];
  next = (next + 1) % 8;
  entry.choice = Choice();
  entry.status = find_choice(p, &entry.choice);
  entry.key = key;
  *out = entry.choice;
  return entry.status;
}
