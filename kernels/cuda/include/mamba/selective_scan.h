/* selective_scan: the Mamba-1 prefill, for every channel d of group g = d / (dim / ngroups):
 *
 *   dt_t = softplus(delta_t + delta_bias[d])                          softplus only with delta_softplus
 *   h_t  = exp(dt_t A[d]) h_{t-1} + dt_t u_t B_t                      state [d_state], float32
 *   y_t  = (C_t . h_t + D[d] u_t) silu(z_t)                           D and z optional
 *
 * Shapes, innermost dense: u, delta, z, y [batch, seqlen, dim]; B, C [batch, seqlen, ngroups, d_state];
 * A [dim, d_state], negative, natural units; states [batch, dim, d_state] float32, dense. Strides are in elements;
 * u, delta, z, B and C may be slices of wider projections. With `reverse` time runs from the last valid token to
 * the first.
 */
#ifndef MAMBA_SELECTIVE_SCAN_H_
#define MAMBA_SELECTIVE_SCAN_H_

#include "mamba/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype; /* mamba_dtype of u, delta, z, B, C, y */
  int32_t batch, seqlen, dim, ngroups, d_state;
  int32_t delta_softplus; /* flag */
  int32_t reverse;        /* flag */
  int32_t tactic;         /* -1: the measured selector */
  int32_t reserved;
  const void *u, *delta, *z, *B, *C; /* z may be NULL */
  void* y;
  const float *A, *D, *delta_bias; /* D and delta_bias [dim] may be NULL */
  const float* initial_state;      /* may be NULL: zeros */
  float* final_state;              /* may be NULL; may be the same buffer as initial_state */
  const int32_t* seq_lens;         /* may be NULL */
  int64_t u_batch_stride, u_token_stride;
  int64_t delta_batch_stride, delta_token_stride;
  int64_t z_batch_stride, z_token_stride;
  int64_t B_batch_stride, B_token_stride;
  int64_t C_batch_stride, C_token_stride;
  int64_t y_batch_stride, y_token_stride;
  void* workspace; /* mamba_selective_scan_workspace bytes, 16-byte aligned; contents do not matter */
  size_t workspace_size;
} mamba_selective_scan_params;

/* Tactic numbers are opaque; mamba_selective_scan_tactics lists those that cover the shape, the selector's choice
 * first. Every tactic gives the same bits from run to run; two tactics may differ by rounding. */
MAMBA_API int mamba_selective_scan(const mamba_selective_scan_params* params, mamba_stream stream);
MAMBA_API size_t mamba_selective_scan_workspace(const mamba_selective_scan_params* params);
MAMBA_API int mamba_selective_scan_tactics(const mamba_selective_scan_params* params, int32_t* out, int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_SELECTIVE_SCAN_H_ */
