/* Common types of the mamba kernel core: a C ABI without any framework.
 *
 * Conventions, the same for every op:
 *  - activations are channel-last, [batch, seq, channels]; the innermost stride is 1, the batch and token
 *    strides (in elements) are parameters, so a slice of a wider projection needs no copy;
 *  - the SSM state, A, D and the delta bias are float32 unless an op says otherwise; arithmetic is float32;
 *  - `seq_lens` (int32 [batch], device memory, may be NULL) gives the valid length of each right-padded row:
 *    padding is never read into a state, and outputs at padded positions are written as 0;
 *  - nothing allocates, nothing synchronizes, everything runs on the stream given; scratch memory comes from
 *    the caller, its size from the op's `_workspace` function;
 *  - a call returns a mamba_status; mamba_status_string says it in words.
 */
#ifndef MAMBA_COMMON_H_
#define MAMBA_COMMON_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MAMBA_API __declspec(dllexport)
#else
#define MAMBA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { MAMBA_F32 = 0, MAMBA_F16 = 1, MAMBA_BF16 = 2 } mamba_dtype;

typedef enum {
  MAMBA_OK = 0,
  MAMBA_ERROR_NULL_POINTER = 1,  /* a required buffer is NULL */
  MAMBA_ERROR_SHAPE = 2,         /* a dimension is out of range or two do not agree */
  MAMBA_ERROR_DTYPE = 3,         /* a dtype is not supported by the op */
  MAMBA_ERROR_WORKSPACE = 4,     /* workspace missing or too small */
  MAMBA_ERROR_TACTIC = 5,        /* no such tactic, or it does not cover this shape */
  MAMBA_ERROR_CUDA = 6,          /* a launch failed */
} mamba_status;

MAMBA_API const char* mamba_status_string(int status);

/* A cudaStream_t, without the CUDA headers. */
typedef void* mamba_stream;

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* MAMBA_COMMON_H_ */
