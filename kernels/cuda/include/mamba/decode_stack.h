/* decode_stack: one token (or several, greedily) through a whole Mamba language model at batch 1.
 *
 * The step of every layer, from the embedding to the logits: residual add, RMSNorm, in_proj, convolution, scan update,
 * gate, out_proj; at the end the last norm and the head. Weights are the checkpoint's own tensors, [out, in] and dense;
 * nothing is packed, unless they are integers (below). The residual, the exchange between blocks and all sums are float32.
 *
 * Two ways of doing it:
 *  - fused: one cooperative launch for all layers and tokens, one block to a multiprocessor;
 *  - chain: four kernels a layer, for a CUDA graph; covers every shape and any batch, one token a call.
 *
 * Integer weights: with weight_bits 8 or 4, in_proj, out_proj, lm_head and, if wanted, the embedding hold rows of integers q that stand for
 * scale * (q - zero), one scale (and zero) to `group_size` neighbours of a row; everything else stays as it is, T being float16
 * or bfloat16. Of 8 bits q is signed and zero is 0; of 4 bits q is 0 to 15 and zero is 8, or a whole number from 0 to 15 if
 * zero_points is set. Where weight_bits is 4, single matrices may be of 8 bits (the fields named *_bits), in the same groups.
 * A row of K values is a multiple of 64 bytes long, an odd one, and aligned to 16:
 *   K * bits / 8 bytes of integers, itself a multiple of 64 bytes;
 *   the scales of the row's groups, T; then their zero points, T, if there are; then padding.
 * 64 bytes hold 64 or 128 values, 32 at a time, as tensor cores take them. Byte 16 t + i belongs to lane t (0 to 3), which has
 * values 8 t to 8 t + 7 of every 32: of 8 bits the h-th 32 in bytes 8 h to 8 h + 7 of the lane's, in the order 0 2 1 3 4 6 5 7;
 * of 4 bits the h-th 32 in bytes 4 h to 4 h + 3, in the order 0 2 4 6 1 3 5 7 from the lowest bits on.
 */
#ifndef MAMBA_DECODE_STACK_H_
#define MAMBA_DECODE_STACK_H_

#include "mamba/common.h"

#ifdef __CUDACC__
#define MAMBA_HOST_DEVICE __host__ __device__
#else
#define MAMBA_HOST_DEVICE
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { MAMBA_DECODE_MAX_LAYERS = 128 };

/* Scales of a row of `width` integers. */
MAMBA_HOST_DEVICE static inline int32_t mamba_decode_scales(int32_t group_size, int32_t width) {
  return group_size ? (width + group_size - 1) / group_size : 1;
}

/* Bytes of a row of `width` integers of `bits` with `scales` scales and zero points. */
MAMBA_HOST_DEVICE static inline int32_t mamba_decode_row_bytes(int32_t bits, int32_t width, int32_t scales) {
  return ((width * bits / 8 + 2 * scales + 63) / 64 | 1) * 64;
}

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
  int32_t in_proj_bits, out_proj_bits; /* of integers: 0: weight_bits; 8 */
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
  const void* embedding;            /* T [>= vocab_size, d_model], or rows of integers (embedding_packed) */
  const void* norm_f;               /* T [d_model] */
  const void* lm_head;              /* T [>= vocab_size, d_model] */
  const int64_t* input_ids;         /* [batch, n_forced] */
  int64_t* output_ids; /* [n_steps - n_forced + 1], the argmax of every row of logits computed; NULL: not wanted (n_steps
                          == n_forced then) */
  float* logits;       /* [batch, vocab_size], of the last step */
  void* workspace;
  size_t workspace_size;
  int32_t weight_bits; /* 0: in_proj, out_proj and lm_head are T; 8 or 4: integers */
  int32_t group_size;  /* values that share a scale: a power of two from 32 on; 0: the whole row */
  int32_t zero_points; /* 4 bits: whether groups have zero points of their own */
  int32_t head_bits;   /* as in_proj_bits */
  int32_t embedding_packed; /* 1: the embedding is rows of integers as the head is; a row of it stands for T */
} mamba_decode_stack_params;

/* Logits that tie go to the smaller id. The chain takes one step a call and no output_ids. */
MAMBA_API int mamba_decode_stack(const mamba_decode_stack_params* params, mamba_stream stream);
MAMBA_API size_t mamba_decode_stack_workspace(const mamba_decode_stack_params* params);
MAMBA_API int mamba_decode_stack_tactics(const mamba_decode_stack_params* params, int32_t* out, int max);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_DECODE_STACK_H_ */
