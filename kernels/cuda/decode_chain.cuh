// Decode layer by layer: four kernels a layer, every one a fused matrix-vector product, meant for a CUDA graph.
// Covers every shape and any batch (blockIdx.y). Kernels overlap with their predecessors where the device can: each lets
// the next one start at once, and the first weights, states and norms are there before the wait for the activations.
#pragma once

#include "decode_plan.cuh"

namespace mamba::decode {

size_t chain_workspace(const Params& p);
template <typename T> int launch_chain(const Params& p, cudaStream_t stream);

}  // namespace mamba::decode
