// How the dispatcher finds the two-pass kernels, and their arguments.
#pragma once

#include <cuda.h>

#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

constexpr int kTwoPassChunk = 128;  // tokens

struct TwoPassArgs {
  CUtensorMap x, B, C;  // in 128 x 64 tiles of [columns, tokens, batch]; unused for float32
  ScanArgs scan;
  void* states;  // [batch of this launch, nheads, chunks of this launch]: images of the state, see TwoPass::kImage
  float* carry;  // [batch of this launch, nheads, headdim, d_state]: states between launches
  int32_t rows, batch0;     // of the batch, of this launch
  int32_t chunk0, chunks;   // of this launch
  int32_t group_blocks;     // of the second pass: its blocks for a group and chunk
};

using TwoPassKernel = void (*)(TwoPassArgs);

struct TwoPassPlan {
  struct States {
    TwoPassKernel kernel;
    int blocks_per_head, threads, shared;
  } states[2];  // fewest blocks, most blocks
  TwoPassKernel outputs;
  int threads, shared;  // of the second pass
  int image;            // bytes
};

// Only in builds for Hopper (MAMBA_SM90A). False if there are no such kernels.
bool plan_two_pass(int dtype, int headdim, int d_state, TwoPassPlan* plan);

// `pieces` pairs of launches: the rows of the batch, and then the sequence, are taken in parts.
size_t two_pass_workspace(const ScanArgs& a, const TwoPassPlan& plan, int pieces);
int two_pass_launch(const ScanArgs& a, int dtype, const TwoPassPlan& plan, int pieces, void* workspace, cudaStream_t stream);

}  // namespace ssd
}  // namespace mamba
