/* ssd_state_update: one token of Mamba-2, the recurrence of ssd_scan.h for seqlen 1.
 *
 * x, y, z [batch, nheads, headdim]; dt [batch, nheads]; B, C [batch, ngroups, d_state], dense inside a row, with a
 * batch stride in elements. The state [batch, nheads, headdim, d_state] is dense, float32, float16 or bfloat16.
 */
#ifndef MAMBA_SSD_STATE_UPDATE_H_
#define MAMBA_SSD_STATE_UPDATE_H_

#include "mamba/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype;       /* mamba_dtype of x, dt, B, C, z, y */
  int32_t state_dtype; /* mamba_dtype of the state */
  int32_t batch, nheads, headdim, ngroups, d_state;
  int32_t dt_softplus;   /* flag */
  int32_t d_per_channel; /* flag: D is [nheads, headdim] instead of [nheads] */
  int32_t tactic;        /* -1: the measured selector */
  float dt_min, dt_max;  /* 0 and INFINITY: no limits */
  const void *x, *dt, *B, *C, *z; /* z may be NULL */
  void* y;
  const float *A, *D, *dt_bias; /* A [nheads]; D and dt_bias [nheads] may be NULL */
  const void* state_in;
  void* state_out; /* may be state_in */
  int64_t x_batch_stride, dt_batch_stride, B_batch_stride, C_batch_stride, z_batch_stride, y_batch_stride;
} mamba_ssd_state_update_params;

/* Tactics: 0 any d_state; 1 and up give 1, 2, 4, ... state rows to each thread's registers at a time. */
MAMBA_API int mamba_ssd_state_update(const mamba_ssd_state_update_params* params, mamba_stream stream);
MAMBA_API size_t mamba_ssd_state_update_workspace(const mamba_ssd_state_update_params* params);
MAMBA_API int mamba_ssd_state_update_tactics(const mamba_ssd_state_update_params* params, int32_t* out, int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_SSD_STATE_UPDATE_H_ */
