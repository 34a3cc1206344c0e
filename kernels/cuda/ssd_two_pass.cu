// The launches of the two-pass SSD scan.
#include "early_launch.cuh"
#include "ssd_plan.cuh"
#include "ssd_two_pass_plan.cuh"
#include "tensor_map.cuh"

#include <math.h>

#include <atomic>

namespace mamba {
namespace ssd {
namespace {

// What one pair of launches takes at most.
struct Part {
  int rows, chunks;  // of the batch, of a row
  Part(const ScanArgs& a, int launches) {
    const int all = ceil_div(a.seqlen, kTwoPassChunk);
    rows = ceil_div(a.batch, launches < a.batch ? launches : a.batch);
    chunks = ceil_div(all, launches <= a.batch ? 1 : ceil_div(launches, a.batch));
  }
  size_t images(const ScanArgs& a) const { return static_cast<size_t>(rows) * a.nheads * chunks; }
};

// What the launches keep in the workspace.
struct Workspace {
  size_t carry, decays, ends, bytes;  // where they begin
  Workspace(const ScanArgs& a, const TwoPassPlan& plan, int launches, const TwoPassCut& cut) {
    const Part part(a, launches);
    const size_t rows = static_cast<size_t>(part.rows) * a.nheads, state = sizeof(float) * rows * a.headdim * a.d_state;
    carry = part.images(a) * plan.image;
    ends = carry + (launches > a.batch ? state : 0);
    decays = ends + state * (cut.pieces - 1);
    bytes = decays + (cut.pieces > 1 ? sizeof(float) * rows * (part.chunks + 1) : 0);
  }
};

// Whether the second pass over so many chunks reads far more than the L2 cache holds. Measured on an H200 with 80 heads: from 64
// chunks on, not yet with 32.
bool beyond_cache(const ScanArgs& a, int64_t chunks) { return chunks * a.nheads >= 30 * sm_count(); }

// Heads a block of the second pass: whole waves of blocks, each block with its start. Beyond the cache several waves, so that the
// first of them finds what the first pass left last; memory is busy then, whatever a block's start takes.
int heads_per_block(const ScanArgs& a, int64_t chunks) {
  const int heads = a.nheads / a.ngroups;
  const bool waves = beyond_cache(a, chunks);
  const int from = !waves ? 1 : heads < 12 ? heads : 12, to = waves && heads > 16 ? 16 : heads;
  int best = 1;
  double least = 1e30;
  for (int n = from; n <= to; n++) {
    const int64_t blocks = chunks * a.ngroups * ceil_div(heads, n);
    const double cost = static_cast<double>(ceil_div64(blocks, sm_count())) * (n + (waves ? 0.5 : 2.0));
    if (cost < least) least = cost, best = n;
  }
  return best;
}

// Which kernel of the first pass: the one of more blocks where the device runs all of them at once.
int more_blocks(const TwoPassPlan& plan, int64_t rows) { return rows * plan.states[1].blocks_per_head <= sm_count(); }

// In clocks, to compare the ways to cut rows into so many pieces. Measured on an H200: a chunk of the first pass. Guessed: what a
// cut adds to the second, 1 KB through the L2 cache and a product C h that is waited for.
double chunk_clocks(const TwoPassPlan::States& states) { return states.warpgroups > 1 ? 1900 : 1500; }
constexpr double kCacheClocks = 0.3, kProductClocks = 400;

// In us, to compare numbers of pieces: the first pass and what cutting adds. Fitted to what was measured on an H200, 32 shapes
// and up to four pieces each. The first pass: as many chunks as follow each other, or the traffic of all; a block that starts
// where another one ended has nothing under way at first. Of equal runs about half cut a row.
struct CutTime {
  static constexpr double kStart = 2.4;
  double chunk, all, product, end;  // end: of a row's final state
  CutTime(const ScanArgs& a, const TwoPassPlan& plan, const TwoPassPlan::States& states) {
    const bool wide = plan.wide;
    chunk = wide ? 2.75 : states.warpgroups > 1 ? 0.84 : 0.6, product = wide ? 0.7 : 0.2;
    end = !a.final_state ? 0 : wide ? 0.1 : 0.053;
    all = 0.0087 * plan.image / 16384;
  }
  double whole(int64_t rows, int chunks, int64_t slots) const {
    const int64_t waves = rows / slots, rest = rows % slots;
    const double starts = kStart * fmax(0, static_cast<double>(rows) / slots - 1);
    return chunks * (waves * fmax(chunk, all * slots) + (rest > 0 ? fmax(chunk, all * rest) : 0)) + starts;
  }
  double cut(const ScanArgs& a, int64_t chunks, double longest, int later, int heads, bool runs) const {
    const double ends = end * a.batch * a.nheads * (0.7 + 0.3 * later);
    return fmax(chunk * longest, all * chunks) + 0.9 + 0.2 * later + product * (runs ? 0.5 : later) * heads + ends;
  }
};

// Describes [batch, seqlen, parts * columns] to the copy engine, in tiles of `rows` tokens x 64 columns, which end where a part ends
// if they are padded.
bool describe(CUtensorMap* map, int dtype, const void* at, int columns, int parts, bool padded, const ScanArgs& a, int64_t token,
              int64_t batch, cuuint32_t rows = kTwoPassChunk) {
  if (a.seqlen == 1) token = static_cast<int64_t>(parts) * columns;  // strides of a single row or token may be anything
  if (a.batch == 1) batch = token * a.seqlen;
  const cuuint64_t width = columns, seqlen = a.seqlen, rest = parts, rows_of_batch = a.batch;
  const cuuint64_t token_bytes = 2 * static_cast<cuuint64_t>(token), batch_bytes = 2 * static_cast<cuuint64_t>(batch);
  const cuuint64_t whole[] = {width * rest, seqlen, rows_of_batch}, whole_stride[] = {token_bytes, batch_bytes};
  const cuuint64_t of_part[] = {width, seqlen, rest, rows_of_batch}, of_part_stride[] = {token_bytes, 2 * width, batch_bytes};
  const cuuint64_t *size = padded ? of_part : whole, *stride = padded ? of_part_stride : whole_stride;
  const cuuint32_t box[] = {64, rows, 1, 1};
  const auto type = dtype == MAMBA_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return describe_tensor(map, type, at, padded ? 4 : 3, size, stride, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Every launch may start while the kernel before it ends: both passes wait for that where they must.
int launch(TwoPassKernel kernel, dim3 grid, int threads, int shared, const TwoPassArgs& args, cudaStream_t stream) {
  if (!allow_shared(kernel, shared)) return MAMBA_ERROR_CUDA;
  return launch_early(kernel, grid, dim3(threads), shared, stream, args);
}

}  // namespace

bool allow_shared(const void* kernel, int bytes) {
  static std::atomic<uint64_t> known[256];
  static std::atomic<int> allowed[256];  // one kernel may be launched with more than before: its bytes depend on d_state
  int device = 0;
  cudaGetDevice(&device);
  const uint64_t key = (static_cast<uint64_t>(reinterpret_cast<uintptr_t>(kernel)) << 6 | (device & 63)) + 1;
  for (uint64_t i = 0, at = key * 0x9e3779b97f4a7c15ull >> 56; i < 256; i++, at = (at + 1) % 256) {
    uint64_t found = 0;
    if (!known[at].compare_exchange_strong(found, key) && found != key) continue;
    if (allowed[at].load() >= bytes) return true;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) return false;
    allowed[at].store(bytes);
    return true;
  }
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
}

bool cut_two_pass(const ScanArgs& a, const TwoPassPlan& plan, int pieces, TwoPassCut* cut) {
  const int chunks = ceil_div(a.seqlen, kTwoPassChunk), later = pieces - 1, sms = sm_count();
  const int64_t rows = static_cast<int64_t>(a.batch) * a.nheads;
  *cut = TwoPassCut();
  if (pieces == 1) {
    const TwoPassPlan::States& states = plan.states[more_blocks(plan, rows)];
    cut->time = CutTime(a, plan, states).whole(rows, chunks, sms / states.blocks_per_head);
    return true;
  }
  if (later > kMaxLater || pieces > chunks) return false;
  // Of a multiprocessor in the second pass, one behind the other.
  const int each = heads_per_block(a, static_cast<int64_t>(chunks) * a.batch);
  const int64_t blocks = static_cast<int64_t>(chunks) * a.batch * a.ngroups * ceil_div(a.nheads / a.ngroups, each);
  const int heads = each * static_cast<int>(ceil_div64(blocks, sms));
  double least = INFINITY, longest = 0;
  for (int kind = 0; kind < 2; kind++) {
    const TwoPassPlan::States& states = plan.states[kind];
    for (int together = 1; together <= chunks; together++) {
      if ((rows + ceil_div64(rows * later, together)) * states.blocks_per_head > sms) continue;
      for (int rest = 1; rest * later < chunks; rest++) {
        const int first = chunks - rest * later;
        // Between two pieces a block has no chunk on its way for a while.
        const double most = fmax(first, together * (rest + 0.5) - 0.5);
        double copies = 0;
        for (int chunk = first + 1; chunk < chunks; chunk++) copies += ceil_div(chunk - first, rest);
        const double ends = 8.0 * a.headdim * a.d_state * later;
        const double clocks = chunk_clocks(states) * most + kProductClocks * later * heads +
                              kCacheClocks / 1024 * rows * (copies * plan.image + ends);
        if (clocks >= least) continue;
        least = clocks, longest = most;
        cut->pieces = pieces, cut->first = first, cut->rest = rest, cut->together = together, cut->states = kind;
      }
      break;  // more pieces a block only take longer
    }
    // More rows than blocks: equal runs, so that none is longer than the others. Halves that overlap must be cut in one place.
    if (pieces > 2 || a.overlap() || rows * states.blocks_per_head < sms) continue;
    const int64_t run = ceil_div64(rows * chunks, sms / states.blocks_per_head), cuts = ceil_div64(rows * chunks, run) - 1;
    const double each = 0.5 * (chunks - 1) * plan.image + 8.0 * a.headdim * a.d_state;
    const double most = run + 0.5 * ceil_div64(run, chunks);
    const double clocks = chunk_clocks(states) * most + kProductClocks * 0.5 * heads + kCacheClocks / 1024 * cuts * each;
    if (clocks >= least) continue;
    least = clocks, longest = most;
    cut->pieces = 2, cut->first = cut->rest = chunks, cut->together = 1, cut->run = static_cast<int>(run);
    cut->states = kind;
  }
  if (cut->pieces > 1) cut->time = CutTime(a, plan, plan.states[cut->states]).cut(a, rows * chunks, longest, later, heads, cut->run > 0);
  return cut->pieces > 1;
}

size_t two_pass_workspace(const ScanArgs& a, const TwoPassPlan& plan, int launches, const TwoPassCut& cut) {
  return Workspace(a, plan, launches, cut).bytes;
}

int two_pass_launch(const ScanArgs& a, int dtype, const TwoPassPlan& plan, int launches, const TwoPassCut& cut, void* workspace,
                    cudaStream_t stream) {
  const Part part(a, launches);
  const Workspace at(a, plan, launches, cut);
  uint8_t* memory = static_cast<uint8_t*>(workspace);
  const int all = ceil_div(a.seqlen, kTwoPassChunk);
  TwoPassArgs args = {};
  args.scan = a, args.states = workspace;
  args.carry = reinterpret_cast<float*>(memory + at.carry);
  args.decays = reinterpret_cast<float*>(memory + at.decays), args.ends = reinterpret_cast<float*>(memory + at.ends);
  args.later = cut.pieces - 1, args.rest = cut.rest, args.together = cut.together, args.run = cut.run;
  const int heads = a.nheads >> a.halves;
  if (dtype != MAMBA_F32 &&
      !(describe(&args.x, dtype, a.x, a.width, heads, plan.padded, a, a.x_token, a.x_batch) &&
        describe(&args.B, dtype, a.B, a.d_state, a.ngroups, plan.padded, a, a.B_token, a.B_batch) &&
        describe(&args.C, dtype, a.C, a.d_state, a.ngroups, plan.padded, a, a.C_token, a.C_batch) &&
        describe(&args.y, dtype, a.y, a.width, heads, plan.padded, a, a.y_token, a.y_batch, 16)))
    return MAMBA_ERROR_CUDA;
  for (int batch = 0; batch < a.batch; batch += part.rows) {
    for (int chunk = 0; chunk < all; chunk += part.chunks) {
      const int rows = part.rows < a.batch - batch ? part.rows : a.batch - batch;
      args.rows = rows, args.batch0 = batch, args.chunk0 = chunk, args.chunks = part.chunks < all - chunk ? part.chunks : all - chunk;
      const int64_t heads = static_cast<int64_t>(rows) * a.nheads;
      const bool is_cut = args.later > 0;
      const int64_t blocks = !is_cut       ? a.nheads  // for every row of the batch
                             : cut.run > 0 ? ceil_div64(heads * args.chunks, cut.run)
                                           : heads + ceil_div64(heads * args.later, cut.together);
      const TwoPassPlan::States& states = plan.states[is_cut ? cut.states : more_blocks(plan, heads)];
      const dim3 grid(blocks * states.blocks_per_head, is_cut ? 1 : rows);
      args.first = cut.first;
      const int64_t row_chunks = static_cast<int64_t>(args.chunks) * rows;
      args.group_blocks = ceil_div(a.nheads / a.ngroups, heads_per_block(a, row_chunks));
      args.late_first = beyond_cache(a, row_chunks);
      int status = launch(states.kernels[is_cut], grid, states.threads, states.shared, args, stream);
      if (status != MAMBA_OK) return status;
      status = launch(plan.outputs[is_cut], dim3(args.chunks * rows * a.ngroups * args.group_blocks), plan.threads, plan.shared, args,
                      stream);
      if (status != MAMBA_OK) return status;
    }
  }
  return launch_status();
}

}  // namespace ssd
}  // namespace mamba
