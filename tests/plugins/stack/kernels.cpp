// The C interface of decode_stack on the host: the reference in double stands for the kernels.
#include <cstring>

#include "stack_reference.h"

namespace {

size_t needed(const mamba_decode_stack_params& p) { return 64 * static_cast<size_t>(p.batch); }

}  // namespace

extern "C" const char* mamba_status_string(int status) {
  return status == MAMBA_ERROR_WORKSPACE ? "workspace missing or too small" : "a failure";
}
extern "C" size_t mamba_decode_stack_workspace(const mamba_decode_stack_params* p) { return needed(*p); }

// As on a GPU: fused for one row and a d_model of whole eights, the chain for any.
extern "C" int mamba_decode_stack_tactics(const mamba_decode_stack_params* p, int32_t* out, int max) {
  int count = 0;
  if (max < 2 || p->d_state > 256 || (p->weight_bits && p->dtype == MAMBA_F32)) return 0;
  if (p->batch == 1 && p->d_model % 8 == 0) out[count++] = 1;
  out[count++] = 0;
  return count;
}

extern "C" int mamba_decode_stack(const mamba_decode_stack_params* p, mamba_stream) {
  if (!p->workspace || p->workspace_size < needed(*p)) return MAMBA_ERROR_WORKSPACE;
  std::memset(p->workspace, 0xa5, p->workspace_size);
  plugin_tests::reference_stack(*p);
  return MAMBA_OK;
}
