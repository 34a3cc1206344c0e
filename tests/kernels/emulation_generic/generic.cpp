// The tactic "generic" behind the op's own entry, a fiber for every thread. The device is a Hopper of two multiprocessors, unless
// told.
#include "common.cuh"

static int multiprocessors = 2, major = 9;
extern "C" void set_device(int count, int compute_major) { multiprocessors = count, major = compute_major; }

namespace mamba {
int sm_count() { return multiprocessors; }
int compute_major() { return major; }
size_t max_shared_bytes() { return 232448; }
inline uint32_t smem_address(const void*) { std::abort(); }  // of kernels that do not run here
}  // namespace mamba

static unsigned seed;  // of the order of blocks and warps
template <typename... P, typename... A>
void launch_emulated(void (*kernel)(P...), dim3 grid, int threads, size_t bytes, cudaStream_t, const A&... arguments) {
  if (!emulation::run(grid, threads, int(bytes), seed++, [&] { kernel(arguments...); }, 1)) {
    std::printf("WRONG: a launch did not come to its end, or wrote behind its shared memory\n"), std::fflush(stdout), std::_Exit(1);
  }
}

#include "selective_scan_generic.cu"
//
#include "selective_scan.cu"

namespace mamba::scan {
template <typename T> int launch_chain(const Args<T>&, const Tactic&, int, cudaStream_t) { return MAMBA_ERROR_TACTIC; }
template <typename T> int launch_channel(const Args<T>&, const Tactic&, int, cudaStream_t) { return MAMBA_ERROR_TACTIC; }
}  // namespace mamba::scan
