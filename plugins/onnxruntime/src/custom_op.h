// An OrtCustomOp that any execution provider fills in: what it is called, its types, and what computes it.
#pragma once

#include "ops.h"

namespace mamba::ort {

// A node of a loaded graph.
struct Node {
  Op op;
  const OrtApi* api;
  Attributes attributes;
};

using Compute = void (*)(const Node& node, const Context& context);

// All the ops, for float32, float16 and bfloat16 each, added to `domain`. `provider` is null for the CPU.
void add_ops(const OrtApi& api, OrtCustomOpDomain* domain, const char* provider, Compute compute);

void compute_cpu(const Node& node, const Context& context);
void compute_cuda(const Node& node, const Context& context);  // in libraries built with CUDA

}  // namespace mamba::ort
