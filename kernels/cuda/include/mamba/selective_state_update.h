/* selective_state_update: one token of the Mamba-1 scan, the recurrence of selective_scan.h for seqlen 1.
 *
 * u, delta, z, y [batch, dim]; B, C [batch, ngroups, d_state], dense inside a row, with a batch stride in elements.
 * The state [batch, dim, d_state] is dense, float32, float16 or bfloat16.
 */
#ifndef MAMBA_SELECTIVE_STATE_UPDATE_H_
#define MAMBA_SELECTIVE_STATE_UPDATE_H_

#include "mamba/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype;       /* mamba_dtype of u, delta, z, B, C, y */
  int32_t state_dtype; /* mamba_dtype of the state */
  int32_t batch, dim, ngroups, d_state;
  int32_t delta_softplus; /* flag */
  int32_t tactic;         /* -1: the measured selector */
  const void *u, *delta, *z, *B, *C; /* z may be NULL */
  void* y;
  const float *A, *D, *delta_bias; /* D and delta_bias may be NULL */
  const void* state_in;
  void* state_out; /* may be state_in */
  int64_t u_batch_stride, delta_batch_stride, z_batch_stride, B_batch_stride, C_batch_stride, y_batch_stride;
} mamba_selective_state_update_params;

/* Tactics: 0 any d_state; 1, 2, 4, 8 batch rows to a thread, which shares the loads of A among them. */
MAMBA_API int mamba_selective_state_update(const mamba_selective_state_update_params* params, mamba_stream stream);
MAMBA_API size_t mamba_selective_state_update_workspace(const mamba_selective_state_update_params* params);
MAMBA_API int mamba_selective_state_update_tactics(const mamba_selective_state_update_params* params, int32_t* out,
                                                   int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_SELECTIVE_STATE_UPDATE_H_ */
