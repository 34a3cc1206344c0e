// Runs the kernels of kernels/cuda on the stream of ONNX Runtime's CUDA provider. Inputs and outputs lie on the device.
#include <array>
#include <map>
#include <mutex>

#include "custom_op.h"
#include "mamba/causal_conv1d.h"
#include "mamba/selective_scan.h"
#include "mamba/selective_state_update.h"
#include "mamba/ssd_scan.h"
#include "mamba/ssd_state_update.h"
#include "workspace.h"

namespace mamba::ort {

namespace {

int32_t dtype_of(Type type) { return type == Type::f32 ? MAMBA_F32 : type == Type::f16 ? MAMBA_F16 : MAMBA_BF16; }

void check_launch(int status) {
  if (status != MAMBA_OK) throw Error(mamba_status_string(status));
}

// The kernels' choice for a shape is worth keeping: making it costs more than a launch.
struct Plan {
  int32_t tactic;
  std::size_t workspace;
};
using Key = std::array<int64_t, 9>;

template <typename Params>
Plan plan(const Key& key, Params p, int (*tactics)(const Params*, int32_t*, int), std::size_t (*workspace)(const Params*)) {
  static std::mutex mutex;
  static std::map<Key, Plan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  p.tactic = -1;
  int32_t best = -1;
  if (tactics(&p, &best, 1) == 1) p.tactic = best;
  return plans[key] = {p.tactic, workspace(&p)};
}

template <typename Params>
void launch_scan(const Context& context, const Scan& s, Params* p, int (*launch)(const Params*, mamba_stream),
                 int (*tactics)(const Params*, int32_t*, int), std::size_t (*workspace)(const Params*)) {
  // Buffers of an arena are aligned; one that is not gets a plan of its own.
  const auto misaligned = static_cast<int64_t>((reinterpret_cast<uintptr_t>(s.x) | reinterpret_cast<uintptr_t>(s.dt) |
                                                reinterpret_cast<uintptr_t>(s.B) | reinterpret_cast<uintptr_t>(s.C) |
                                                reinterpret_cast<uintptr_t>(s.z) | reinterpret_cast<uintptr_t>(s.y)) % 16);
  const Key key = {static_cast<int64_t>(s.type) * 64 + s.per_segment * 32 + (s.z != nullptr) * 16 + misaligned,
                   s.batch, s.length, s.segments, s.rows, s.groups, s.d_state, s.reverse, s.seq_lens != nullptr};
  const Plan chosen = plan(key, *p, tactics, workspace);
  const Workspace memory(context, chosen.workspace);
  p->tactic = chosen.tactic, p->workspace = memory.get(), p->workspace_size = chosen.workspace;
  check_launch(launch(p, context.stream()));
}

// What the four kernels name alike.
template <typename Params>
Params operands(const Scan& s) {
  Params p{};
  p.dtype = dtype_of(s.type), p.batch = static_cast<int32_t>(s.batch), p.ngroups = static_cast<int32_t>(s.groups);
  p.d_state = static_cast<int32_t>(s.d_state), p.tactic = -1;
  p.A = s.A, p.D = s.D, p.B = s.B, p.C = s.C, p.z = s.z, p.y = s.y;
  return p;
}

void selective(const Context& context, const Scan& s) {
  const int64_t channels = s.segments * s.rows, bc = s.groups * s.d_state;
  if (s.length == 1 && s.seq_lens == nullptr) {
    auto p = operands<mamba_selective_state_update_params>(s);
    p.state_dtype = MAMBA_F32, p.dim = static_cast<int32_t>(channels), p.delta_softplus = s.softplus;
    p.u = s.x, p.delta = s.dt, p.delta_bias = s.dt_bias, p.state_in = s.state, p.state_out = s.present;
    p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = p.y_batch_stride = channels;
    p.B_batch_stride = p.C_batch_stride = bc;
    check_launch(mamba_selective_state_update(&p, context.stream()));
    return;
  }
  auto p = operands<mamba_selective_scan_params>(s);
  p.seqlen = static_cast<int32_t>(s.length), p.dim = static_cast<int32_t>(channels);
  p.delta_softplus = s.softplus, p.reverse = s.reverse;
  p.u = s.x, p.delta = s.dt, p.delta_bias = s.dt_bias, p.initial_state = s.state, p.final_state = s.present;
  p.seq_lens = s.seq_lens;
  p.u_token_stride = p.delta_token_stride = p.z_token_stride = p.y_token_stride = channels;
  p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = p.y_batch_stride = s.length * channels;
  p.B_token_stride = p.C_token_stride = bc;
  p.B_batch_stride = p.C_batch_stride = s.length * bc;
  launch_scan(context, s, &p, mamba_selective_scan, mamba_selective_scan_tactics, mamba_selective_scan_workspace);
}

void ssd(const Context& context, const Scan& s) {
  const int64_t channels = s.segments * s.rows, bc = s.groups * s.d_state;
  if (s.reverse && s.length > 1) throw Error("reverse is not implemented on CUDA");
  const auto common = [&](auto* p) {
    p->nheads = static_cast<int32_t>(s.segments), p->headdim = static_cast<int32_t>(s.rows);
    p->dt_softplus = s.softplus, p->d_per_channel = !s.D_per_segment, p->dt_min = s.dt_min, p->dt_max = s.dt_max;
    p->x = s.x, p->dt = s.dt, p->dt_bias = s.dt_bias;
  };
  if (s.length == 1 && s.seq_lens == nullptr) {
    auto p = operands<mamba_ssd_state_update_params>(s);
    common(&p);
    p.state_dtype = MAMBA_F32, p.state_in = s.state, p.state_out = s.present;
    p.x_batch_stride = p.z_batch_stride = p.y_batch_stride = channels;
    p.dt_batch_stride = s.segments, p.B_batch_stride = p.C_batch_stride = bc;
    check_launch(mamba_ssd_state_update(&p, context.stream()));
    return;
  }
  auto p = operands<mamba_ssd_scan_params>(s);
  common(&p);
  p.seqlen = static_cast<int32_t>(s.length), p.initial_state = s.state, p.final_state = s.present, p.seq_lens = s.seq_lens;
  p.x_token_stride = p.z_token_stride = p.y_token_stride = channels;
  p.x_batch_stride = p.z_batch_stride = p.y_batch_stride = s.length * channels;
  p.dt_token_stride = s.segments, p.dt_batch_stride = s.length * s.segments;
  p.B_token_stride = p.C_token_stride = bc;
  p.B_batch_stride = p.C_batch_stride = s.length * bc;
  launch_scan(context, s, &p, mamba_ssd_scan, mamba_ssd_scan_tactics, mamba_ssd_scan_workspace);
}

void convolve(const Context& context, const Conv& c) {
  mamba_causal_conv1d_params p{};
  p.dtype = p.weight_dtype = dtype_of(c.type);
  p.batch = static_cast<int32_t>(c.batch), p.seqlen = static_cast<int32_t>(c.length);
  p.channels = static_cast<int32_t>(c.channels), p.width = static_cast<int32_t>(c.kernel);
  p.activation = c.silu, p.tactic = -1;
  p.x = c.x, p.weight = c.weight, p.bias = c.bias, p.state_in = c.state, p.y = c.y, p.state_out = c.present;
  p.seq_lens = c.seq_lens;
  p.x_token_stride = p.y_token_stride = c.channels;
  p.x_batch_stride = p.y_batch_stride = c.length * c.channels;
  check_launch(mamba_causal_conv1d(&p, context.stream()));
}

}  // namespace

void compute_cuda(const Node& node, const Context& context) {
  if (node.op == Op::conv) {
    convolve(context, conv_arguments(node.attributes, context));
    return;
  }
  const Scan scan = scan_arguments(node.op, node.attributes, context);
  is_ssd(node.op) ? ssd(context, scan) : selective(context, scan);
}

}  // namespace mamba::ort
