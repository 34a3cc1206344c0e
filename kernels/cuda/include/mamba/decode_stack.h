/* decode_stack: one token (or several, greedily) through a whole Mamba language model at batch 1.
 *
 * The step of every layer, from the embedding to the logits: residual add, RMSNorm, in_proj, convolution, scan update,
 * gate, out_proj; at the end the last norm and the head. Weights are the checkpoint's own tensors, [out, in] and dense;
 * nothing is packed. The residual, the exchange between blocks and all sums are float32.
 *
 * Two ways of doing it:
 *  - fused: one cooperative launch for all layers and tokens, one block to a multiprocessor;
 *  - chain: four kernels a layer, for a CUDA graph; covers every shape and any batch, one token a call.
 */
#ifndef MAMBA_DECODE_STACK_H_
#define MAMBA_DECODE_STACK_H_

#include "mamba/common.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MAMBA_DECODE_MAX_LAYERS = 128 };

/* One layer. T is the dtype of the model; A, D and the bias of dt are float32. */
typedef struct {
  const void* norm;        /* T [d_model] */
  const void* in_proj;     /* T [2 d_inner, d_model]; Mamba-2: [2 d_inner + 2 ngroups d_state + nheads, d_model] */
  const void* conv_weight; /* T [conv_dim, d_conv] */
  const void* conv_bias;   /* T [conv_dim] */
  const void* x_proj;      /* T [dt_rank + 2 d_state, d_inner]; Mamba-2: NULL */
  const void* dt_proj;     /* T [d_inner, dt_rank]; Mamba-2: NULL */
  const void* out_proj;    /* T [d_model, d_inner] */
  const void* gated_norm;  /* T [d_inner]; Mamba-1: NULL */
  const float* dt_bias;    /* [d_inner]; Mamba-2: [nheads] */
  const float* A;          /* [d_inner, d_state], negative; Mamba-2: [nheads] */
  const float* D;          /* [d_inner]; Mamba-2: [nheads] */
  const void* conv_state_in; /* T [batch, conv_dim, d_conv - 1] */
  void* conv_state_out;      /* may be conv_state_in */
  const float* ssm_state_in; /* [batch, d_inner, d_state] */
  float* ssm_state_out;      /* may be ssm_state_in */
} mamba_decode_layer;

typedef struct {
  int32_t dtype;  /* mamba_dtype of weights, activations and conv states */
  int32_t family; /* 1 or 2 */
  int32_t batch, n_layer, d_model, d_inner, d_state, d_conv, dt_rank, vocab_size;
  int32_t nheads, ngroups;  /* Mamba-2 */
  int32_t residual_fp32;    /* 0: the residual is rounded to dtype after every add */
  int32_t n_forced;         /* ids that are given; the logits of all but the last are not computed */
  int32_t n_steps;          /* tokens through the model, >= n_forced; later ones are the argmax of the one before */
  int32_t tactic;           /* -1: fused where it covers the shape; 0: chain; 1: fused */
  float norm_eps, gated_norm_eps;
  const mamba_decode_layer* layers; /* host memory, n_layer of them */
  const void* embedding;            /* T [>= vocab_size, d_model] */
  const void* norm_f;               /* T [d_model] */
  const void* lm_head;              /* T [>= vocab_size, d_model] */
  const int64_t* input_ids;         /* [batch, n_forced] */
  int64_t* output_ids; /* [n_steps - n_forced + 1], the argmax of every row of logits computed; NULL: not wanted (n_steps
                          == n_forced then) */
  float* logits;       /* [batch, vocab_size], of the last step */
  void* workspace;
  size_t workspace_size;
} mamba_decode_stack_params;

/* Logits that tie go to the smaller id. The chain takes one step a call and no output_ids. */
MAMBA_API int mamba_decode_stack(const mamba_decode_stack_params* params, mamba_stream stream);
MAMBA_API size_t mamba_decode_stack_workspace(const mamba_decode_stack_params* params);
MAMBA_API int mamba_decode_stack_tactics(const mamba_decode_stack_params* params, int32_t* out, int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_DECODE_STACK_H_ */
