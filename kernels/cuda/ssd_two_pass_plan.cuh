// How the dispatcher finds the two-pass kernels, and their arguments.
#pragma once

#include <cuda.h>

#include "ssd_chunk.cuh"

namespace mamba {
namespace ssd {

constexpr int kTwoPassChunk = 128;  // tokens

struct TwoPassArgs {
  // [columns, tokens, batch], or of padded kernels [columns of a head or group, tokens, heads or groups, batch], in tiles of 128
  // tokens x 64 columns, y of 16 x 64; unused for float32.
  CUtensorMap x, B, C, y;
  ScanArgs scan;
  void* states;  // [batch of this launch, nheads, chunks of this launch]: images of the state, see TwoPass::kImage
  float* carry;  // [batch of this launch, nheads, headdim, d_state]: states between launches
  int32_t rows, batch0;     // of the batch, of this launch
  int32_t chunk0, chunks;   // of this launch
  int32_t group_blocks;     // of the second pass: its blocks for a group and chunk
  int32_t late_first;       // of the second pass: flag, the last chunks come first
  // A row (of a head) may be cut into pieces, walked side by side by the first pass: the first starts from the state before
  // the row, those behind it from zero. The second pass adds what the pieces before left.
  int32_t first, rest;  // chunks of the first piece, of the others
  int32_t later;        // pieces of a row behind the first; 0: nothing is cut
  int32_t together;     // of these, of neighbouring rows too, that a block of the first pass takes one after the other
  int32_t run;          // not 0: blocks of the first pass take that many chunks (of a row or more) each, across the ends of rows
  float* decays;        // [batch of this launch, nheads, chunks + 1]: from the start of a later piece to that of a chunk
  float* ends;          // [batch of this launch, nheads, later, headdim, d_state]: what a later piece adds to the final state
};

constexpr int kMaxLater = 3;

using TwoPassKernel = void (*)(TwoPassArgs);

struct TwoPassPlan {
  struct States {
    TwoPassKernel kernels[2];  // for whole rows, for cut ones
    int blocks_per_head, warpgroups, threads, shared;  // warpgroups: of consumers
  } states[2];  // fewest blocks, most blocks
  TwoPassKernel outputs[2];
  int threads, shared;  // of the second pass
  int image;            // bytes
  bool wide, padded;    // wide: float32, every operand in two parts; padded: see TwoPass
};

// How the rows of a launch are cut.
struct TwoPassCut {
  int pieces = 1, first = 0, rest = 1, together = 1, run = 0;
  int states = 0;   // which kernel of the first pass
  double time = 0;  // expected, in us, of the first pass and of what cutting adds
};

// Only in builds for Hopper (MAMBA_SM90A). False if there are no such kernels.
bool plan_two_pass(int dtype, int headdim, int d_state, TwoPassPlan* plan);

// The best way to cut every row of a call into that many pieces (1: the rows as they are, with the time of one launch for
// all of them). False if there is none that the device runs at once.
bool cut_two_pass(const ScanArgs& a, const TwoPassPlan& plan, int pieces, TwoPassCut* cut);

// `launches` pairs of them: the rows of the batch, and then the sequence, are taken in parts. Rows are cut in one pair only.
size_t two_pass_workspace(const ScanArgs& a, const TwoPassPlan& plan, int launches, const TwoPassCut& cut);
int two_pass_launch(const ScanArgs& a, int dtype, const TwoPassPlan& plan, int launches, const TwoPassCut& cut, void* workspace,
                    cudaStream_t stream);

}  // namespace ssd
}  // namespace mamba
