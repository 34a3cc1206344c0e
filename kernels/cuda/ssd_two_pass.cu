// The launches of the two-pass SSD scan.
#include "early_launch.cuh"
#include "ssd_plan.cuh"
#include "ssd_two_pass_plan.cuh"

#include <atomic>

namespace mamba {
namespace ssd {
namespace {

// What one pair of launches takes at most.
struct Part {
  int rows, chunks;  // of the batch, of a row
  Part(const ScanArgs& a, int pieces) {
    const int all = ceil_div(a.seqlen, kTwoPassChunk);
    rows = ceil_div(a.batch, pieces < a.batch ? pieces : a.batch);
    chunks = ceil_div(all, pieces <= a.batch ? 1 : ceil_div(pieces, a.batch));
  }
  size_t images(const ScanArgs& a) const { return static_cast<size_t>(rows) * a.nheads * chunks; }
};

// Heads a block: whole waves of blocks, each block with its start.
int heads_per_block(const ScanArgs& a, int64_t chunks) {
  const int heads = a.nheads / a.ngroups;
  int best = 1;
  double least = 1e30;
  for (int n = 1; n <= heads; n++) {
    const int64_t blocks = chunks * a.ngroups * ceil_div(heads, n);
    const double cost = static_cast<double>(ceil_div64(blocks, sm_count())) * (n + 2.0);
    if (cost < least) least = cost, best = n;
  }
  return best;
}

// Describes [batch, seqlen, columns] to the copy engine, in tiles of 128 tokens x 64 columns.
bool describe(CUtensorMap* map, int dtype, const void* at, int columns, const ScanArgs& a, int64_t token, int64_t batch) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const bool ok = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) == cudaSuccess &&
                    found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (!encode) return false;
  if (a.seqlen == 1) token = columns;  // strides of a single row or token may be anything
  if (a.batch == 1) batch = token * a.seqlen;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(a.seqlen), static_cast<cuuint64_t>(a.batch)};
  const cuuint64_t stride[] = {2 * static_cast<cuuint64_t>(token), 2 * static_cast<cuuint64_t>(batch)};
  const cuuint32_t box[] = {64, kTwoPassChunk, 1}, step[] = {1, 1, 1};
  const auto type = dtype == MAMBA_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(map, type, 3, const_cast<void*>(at), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
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

size_t two_pass_workspace(const ScanArgs& a, const TwoPassPlan& plan, int pieces) {
  const Part part(a, pieces);
  const size_t carry = pieces > a.batch ? sizeof(float) * part.rows * a.nheads * static_cast<size_t>(a.headdim) * a.d_state : 0;
  return part.images(a) * plan.image + carry;
}

int two_pass_launch(const ScanArgs& a, int dtype, const TwoPassPlan& plan, int pieces, void* workspace, cudaStream_t stream) {
  const Part part(a, pieces);
  const int all = ceil_div(a.seqlen, kTwoPassChunk);
  TwoPassArgs args = {};
  args.scan = a, args.states = workspace;
  args.carry = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + part.images(a) * plan.image);
  if (dtype != MAMBA_F32 &&
      !(describe(&args.x, dtype, a.x, a.nheads * a.headdim, a, a.x_token, a.x_batch) &&
        describe(&args.B, dtype, a.B, a.ngroups * a.d_state, a, a.B_token, a.B_batch) &&
        describe(&args.C, dtype, a.C, a.ngroups * a.d_state, a, a.C_token, a.C_batch)))
    return MAMBA_ERROR_CUDA;
  for (int batch = 0; batch < a.batch; batch += part.rows) {
    for (int chunk = 0; chunk < all; chunk += part.chunks) {
      const int rows = part.rows < a.batch - batch ? part.rows : a.batch - batch;
      args.rows = rows, args.batch0 = batch, args.chunk0 = chunk, args.chunks = part.chunks < all - chunk ? part.chunks : all - chunk;
      const bool many = static_cast<int64_t>(rows) * a.nheads * plan.states[1].blocks_per_head <= sm_count();
      const TwoPassPlan::States& states = plan.states[many ? 1 : 0];
      args.group_blocks = ceil_div(a.nheads / a.ngroups, heads_per_block(a, static_cast<int64_t>(args.chunks) * rows));
      int status = launch(states.kernel, dim3(a.nheads * states.blocks_per_head, rows), states.threads, states.shared, args,
                          stream);
      if (status != MAMBA_OK) return status;
      status = launch(plan.outputs, dim3(args.chunks * rows * a.ngroups * args.group_blocks), plan.threads, plan.shared, args, stream);
      if (status != MAMBA_OK) return status;
    }
  }
  return launch_status();
}

}  // namespace ssd
}  // namespace mamba
