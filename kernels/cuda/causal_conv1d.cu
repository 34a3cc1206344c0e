// causal_conv1d: checks, the choice of a tactic, launches.
#include "causal_conv1d_kernel.cuh"

#include <algorithm>

#include "mamba/causal_conv1d.h"

namespace mamba::conv {
namespace {

using Params = mamba_causal_conv1d_params;

size_t dtype_size(int dtype) { return dtype == MAMBA_F32 ? 4 : 2; }

bool vectors(const Params& p) {
  const int64_t e = int64_t(dtype_size(p.dtype));
  return aligned(p.x, 16) && aligned(p.y, 16) && p.channels * e % 16 == 0 && p.x_batch_stride * e % 16 == 0 &&
         p.x_token_stride * e % 16 == 0 && p.y_batch_stride * e % 16 == 0 && p.y_token_stride * e % 16 == 0;
}

constexpr int kVector = 4;  // channels a thread takes: eight bytes of 16-bit values, so that many threads are resident
constexpr int kPiece = 10000;  // added to the 6 or 8 tokens of piece_kernel; tactics up to it are conv_kernel's tokens

// What models have, and what piece_kernel is there for.
bool has_pieces(const Params& p) {
  return p.dtype != MAMBA_F32 && p.width == 4 && p.seqlen > 1 && ceil_div(p.seqlen, 6 * kWarps) <= 65535 && vectors(p);
}

bool covers(const Params& p, int tactic) {
  if (tactic > kPiece) return has_pieces(p) && (tactic == kPiece + 6 || tactic == kPiece + 8);
  return tactic >= 1 && ceil_div(p.seqlen, tactic * kWarps) <= 65535;
}

// Tokens a thread takes, by measured times: more of them read the width - 1 before less often, fewer fill the device.
// In a few waves of blocks a thread does best without a loop; in many, other blocks hide what a loop waits for.
int select(const Params& p) {
  const double columns = double(p.batch) * ceil_div(p.channels, vectors(p) ? 32 * kVector : 32) * 32;
  const auto fill = [&](int tokens) { return columns * ceil_div(p.seqlen, tokens) / sm_count(); };  // threads
  const bool pieces = has_pieces(p);
  if (pieces && fill(12) >= 256 && fill(8) < 6000) return kPiece + (fill(8) < 1400 ? 6 : 8);
  const int tokens = fill(16) >= 4096 && !pieces ? 16 : fill(12) >= 256 ? 12 : 4;
  return std::max({tokens, p.width - 1, ceil_div(p.seqlen, 65535 * kWarps)});
}

template <typename T, int K, int V> int launch(const Params& p, cudaStream_t stream) {
  constexpr int kAhead = 4;
  const int tactic = p.tactic > 0 ? p.tactic : select(p);
  const int tokens = tactic > kPiece ? tactic - kPiece : std::max(tactic, K - 1);
  const Args args{p.x, p.weight, p.bias, p.state_in, p.y, p.state_out, p.seq_lens, p.x_batch_stride, p.x_token_stride,
                  p.y_batch_stride, p.y_token_stride, p.seqlen, p.channels, tokens, p.activation,
                  p.weight_dtype != p.dtype, aligned(p.weight, 16) && aligned(p.bias, 16),
                  aligned(p.state_in, 16) && aligned(p.state_out, 16)};
  if (p.seqlen == 1) {
    const dim3 grid(ceil_div(p.channels, kStepThreads * V), p.batch);
    return launch_early(step_kernel<T, K, V>, grid, dim3(kStepThreads), stream, args);
  }
  const dim3 grid(ceil_div(p.channels, 32 * V), ceil_div(p.seqlen, tokens * kWarps), p.batch);
  const dim3 block(32, kWarps);
  if constexpr (sizeof(T) == 2 && K == 4 && V == kVector) {
    if (tactic == kPiece + 6) return launch_early(piece_kernel<T, K, V, 6>, grid, block, stream, args);
    if (tactic == kPiece + 8) return launch_early(piece_kernel<T, K, V, 8>, grid, block, stream, args);
  }
  return launch_early(conv_kernel<T, K, V, kAhead>, grid, block, stream, args);
}

template <typename T, int K> int launch_width(const Params& p, cudaStream_t stream) {
  if (!vectors(p)) return launch<T, K, 1>(p, stream);
  return launch<T, K, kVector>(p, stream);
}

template <typename T> int launch_type(const Params& p, cudaStream_t stream) {
  switch (p.width) {
    case 2: return launch_width<T, 2>(p, stream);
    case 3: return launch_width<T, 3>(p, stream);
    case 4: return launch_width<T, 4>(p, stream);
    case 5: return launch_width<T, 5>(p, stream);
    case 6: return launch_width<T, 6>(p, stream);
    case 7: return launch_width<T, 7>(p, stream);
    case 8: return launch_width<T, 8>(p, stream);
    default: return MAMBA_ERROR_SHAPE;
  }
}

int check(const Params& p) {
  if (!p.x || !p.weight || !p.y) return MAMBA_ERROR_NULL_POINTER;
  if (p.weight_dtype != p.dtype && p.weight_dtype != MAMBA_F32) return MAMBA_ERROR_DTYPE;
  if (p.batch < 1 || p.batch > 65535 || p.seqlen < 1 || p.channels < 1 || p.width < 2 || p.width > 8) {
    return MAMBA_ERROR_SHAPE;
  }
  return p.tactic < 0 || covers(p, p.tactic) ? MAMBA_OK : MAMBA_ERROR_TACTIC;
}

}  // namespace
}  // namespace mamba::conv

extern "C" int mamba_causal_conv1d(const mamba_causal_conv1d_params* params, mamba_stream stream) {
  using namespace mamba;
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  const int status = conv::check(*params);
  if (status != MAMBA_OK) return status;
  return dispatch(params->dtype, [&](auto t) {
    return conv::launch_type<decltype(t)>(*params, static_cast<cudaStream_t>(stream));
  });
}

extern "C" size_t mamba_causal_conv1d_workspace(const mamba_causal_conv1d_params*) { return 0; }

extern "C" int mamba_causal_conv1d_tactics(const mamba_causal_conv1d_params* params, int32_t* out, int max) {
  using namespace mamba::conv;
  if (!params || max < 1 || check(*params) != MAMBA_OK) return 0;
  out[0] = select(*params);
  int count = 1;
  for (int tactic : {4, 8, 12, 16, 32, kPiece + 6, kPiece + 8}) {
    if (count < max && tactic != out[0] && covers(*params, tactic)) out[count++] = tactic;
  }
  return count;
}
