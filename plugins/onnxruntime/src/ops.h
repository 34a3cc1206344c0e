// The ops of the domain `mamba`: names, inputs, attributes, and a call of one as the kernels' arguments.
#pragma once

#include "api.h"
#include "cpu/kernels.h"

namespace mamba::ort {

enum class Op { conv, selective_scan, selective_update, ssd_scan, ssd_update };

inline bool is_update(Op op) { return op == Op::selective_update || op == Op::ssd_update; }
inline bool is_ssd(Op op) { return op == Op::ssd_scan || op == Op::ssd_update; }

const char* name_of(Op op);
// Inputs that are always there, and all that the op can have.
std::size_t required_inputs(Op op);
std::size_t inputs_of(Op op);
// The type of an input or output of the op for activations of type T.
ONNXTensorElementDataType input_type(Op op, std::size_t index, ONNXTensorElementDataType T);
ONNXTensorElementDataType output_type(Op op, std::size_t index, ONNXTensorElementDataType T);

struct Attributes {
  bool activation = true, softplus = true, has_z = false, reverse = false, ragged = false;
  float dt_min = 0.0f, dt_max = 3.4028234663852886e38f;
};

Attributes read_attributes(Op op, const OrtApi& api, const OrtKernelInfo* info);

// The arguments of one call. Checks every shape and makes the outputs; throws Error.
Scan scan_arguments(Op op, const Attributes& attributes, const Context& context);
Conv conv_arguments(const Attributes& attributes, const Context& context);

}  // namespace mamba::ort
