/* ssd_scan: the Mamba-2 prefill (state-space dual form), for every head h with its group g = h / (nheads / ngroups):
 *
 *   dt_t = clamp(softplus(dt_t + dt_bias[h]), dt_min, dt_max)         softplus only with dt_softplus
 *   h_t  = exp(dt_t A[h]) h_{t-1} + dt_t x_t B_t^T                    state [headdim, d_state], float32
 *   y_t  = (h_t C_t + D x_t) silu(z_t)                                D and z optional
 *
 * Shapes, innermost first dense: x, y, z [batch, seqlen, nheads, headdim]; dt [batch, seqlen, nheads];
 * B, C [batch, seqlen, ngroups, d_state]; states [batch, nheads, headdim, d_state] float32, dense.
 * Strides are in elements; x, B and C may be slices of one convolution output.
 */
#ifndef MAMBA_SSD_SCAN_H_
#define MAMBA_SSD_SCAN_H_

#include "mamba/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype; /* mamba_dtype of x, dt, B, C, z, y */
  int32_t batch, seqlen, nheads, headdim, ngroups, d_state;
  int32_t dt_softplus;   /* flag */
  int32_t d_per_channel; /* flag: D is [nheads, headdim] instead of [nheads] */
  int32_t tactic;        /* -1: the measured selector */
  float dt_min, dt_max;  /* 0 and INFINITY: no limits */
  const void *x, *dt, *B, *C, *z; /* z may be NULL */
  void* y;
  const float *A, *D, *dt_bias;  /* A [nheads]; D and dt_bias [nheads] may be NULL */
  const float* initial_state;    /* may be NULL: zeros */
  float* final_state;            /* may be NULL; may be the same buffer as initial_state */
  const int32_t* seq_lens;       /* may be NULL */
  int64_t x_batch_stride, x_token_stride;
  int64_t dt_batch_stride, dt_token_stride;
  int64_t B_batch_stride, B_token_stride;
  int64_t C_batch_stride, C_token_stride;
  int64_t z_batch_stride, z_token_stride;
  int64_t y_batch_stride, y_token_stride;
  void* workspace; /* mamba_ssd_scan_workspace bytes, 16-byte aligned; contents do not matter */
  size_t workspace_size;
} mamba_ssd_scan_params;

/* A tactic is 1 + layout + 16 * pieces; layout -1 is the generic kernel (any size, FFMA), the others use tensor cores and
 * differ in heads per block and chunk length. The sequence is cut into `pieces`, with a state-only pass over all but the
 * last; with 0 pieces every block takes an equal run of chunks, over the ends of rows (only where there are more rows
 * than blocks). Layout 6 (Hopper) takes batch and sequence in `pieces`, each in two passes over chunks of 128 tokens; layout 7
 * is the same in one go, with every row cut into `pieces` that the first pass takes side by side. They cover headdim to 128 and
 * d_state to 256 (float32: 128), multiples of 8; other devices have tensor-core kernels for headdim 32, 64, 80, 128 and
 * d_state 16, 64, 128, 256 in 16 bits.
 * mamba_ssd_scan_tactics lists those that cover the shape, the selector's choice first. */
MAMBA_API int mamba_ssd_scan(const mamba_ssd_scan_params* params, mamba_stream stream);
MAMBA_API size_t mamba_ssd_scan_workspace(const mamba_ssd_scan_params* params);
MAMBA_API int mamba_ssd_scan_tactics(const mamba_ssd_scan_params* params, int32_t* out, int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_SSD_SCAN_H_ */
