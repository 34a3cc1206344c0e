/* causal_conv1d: depthwise causal convolution over time with a carried state and optional SiLU:
 *
 *   y[b, t, c] = act(bias[c] + sum_j weight[c, j] padded[b, t + j, c]),   padded = concat(state_in, x) over time
 *
 * x, y [batch, seqlen, channels], innermost dense, strides in elements; weight [channels, width] dense, bias [channels];
 * states [batch, channels, width - 1] dense, oldest first, of the dtype of x. A seqlen of 1 is the step.
 */
#ifndef MAMBA_CAUSAL_CONV1D_H_
#define MAMBA_CAUSAL_CONV1D_H_

#include "mamba/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype;        /* mamba_dtype of x, y and the states */
  int32_t weight_dtype; /* mamba_dtype of weight and bias: the same, or float32 */
  int32_t batch, seqlen, channels;
  int32_t width;      /* 2 to 8 */
  int32_t activation; /* 0 none, 1 SiLU */
  int32_t tactic;     /* -1: the measured selector; up to 10000: the tokens a thread takes, in a loop; 10006 and 10008:
                         6 and 8 of them without one, for 16-bit values, four taps and what loads in vectors */
  const void *x, *weight, *bias, *state_in; /* bias and state_in may be NULL */
  void *y, *state_out;                      /* state_out may be NULL, may be state_in */
  const int32_t* seq_lens;                  /* may be NULL */
  int64_t x_batch_stride, x_token_stride, y_batch_stride, y_token_stride;
} mamba_causal_conv1d_params;

MAMBA_API int mamba_causal_conv1d(const mamba_causal_conv1d_params* params, mamba_stream stream);
MAMBA_API size_t mamba_causal_conv1d_workspace(const mamba_causal_conv1d_params* params);
MAMBA_API int mamba_causal_conv1d_tactics(const mamba_causal_conv1d_params* params, int32_t* out, int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_CAUSAL_CONV1D_H_ */
