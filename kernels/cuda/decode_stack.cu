// decode_stack, the host's side: plans, checks, launches.
#include "decode_chain.cuh"
#include "decode_launch.cuh"

namespace mamba::decode {
namespace {

enum Tactic { kChain = 0, kFused = 1 };

int larger(int a, int b) { return a > b ? a : b; }
int log2_of(int n) {
  int k = 0;
  while (2 << k <= n) k++;
  return k;
}

// Bytes of a row, and the rows of a slot that fill a tile on tensor cores.
template <typename T> int row_bytes(const Params& p, int bits, int width) {
  return bits ? packing_of(p, width, bits).row_bytes : width * int(sizeof(T));
}
template <typename T> int least_rows(int bits, int width) {
  return sizeof(T) == 2 ? 16 / segments_of(stepped_width(bits, width)) : 1;
}

// Bytes of a slot that suits such matrices; 0: none does. Its rows are a power of two, for tensor cores enough to fill a tile.
template <typename T> int slot_for(const Params& p, int bits) {
  const int model = row_bytes<T>(p, bits, p.d_model), inner = row_bytes<T>(p, bits, p.d_inner);
  const int wanted = sizeof(T) == 2 ? 24576 : 12288;
  if (sizeof(T) == 2 && !bits && (p.d_model % 64 || p.d_inner % 64)) return 0;
  const int rows = larger(least_rows<T>(bits, p.d_inner), larger(wanted / inner, 1));
  const int bytes = larger(inner << log2_of(rows), model * least_rows<T>(bits, p.d_model));
  return bits && model <= wanted ? larger(bytes, model << log2_of(wanted / model)) : bytes;
}

// The products of matrices of `bits`.
template <typename T> void set_shapes(const Params& p, const Plan& plan, int bits, int in_most, int out_most, Shape* shapes) {
  const int shift_model = log2_of(plan.slot_bytes / row_bytes<T>(p, bits, p.d_model));
  const int shift_inner = log2_of(plan.slot_bytes / row_bytes<T>(p, bits, p.d_inner));
  shapes[kIn] = shape_of<T>(p, bits, in_most, p.d_model, shift_model, 1, false);
  shapes[kOut] = shape_of<T>(p, bits, out_most, p.d_inner, shift_inner, 2, false);
  shapes[kHead] = shape_of<T>(p, bits, ceil_div(p.vocab_size, plan.blocks), p.d_model, shift_model, 0, true);
}

template <typename T> bool make_plan(const Params& p, Plan& plan) {
  const int es = sizeof(T), mamba1 = p.family == 1, groups = mamba1 ? 1 : p.ngroups;
  const int dt_width = mamba1 ? p.dt_rank : 0;
  if (p.batch != 1 || p.n_layer > MAMBA_DECODE_MAX_LAYERS) return false;
  if (p.d_model % 8 || p.d_inner % 8 || p.d_state % 4 || dt_width % 2 || p.d_conv < 2 || p.d_conv > kMaxConv) return false;
  plan = Plan{};
  plan.unit = 2;
  while (plan.unit * dt_width * es % 16) plan.unit *= 2;
  if (p.d_inner % plan.unit) return false;
  const int units = p.d_inner / plan.unit;
  plan.blocks = sm_count() < kMostBlocks ? sm_count() : kMostBlocks;
  for (int most : {units, p.d_model, p.vocab_size}) plan.blocks = most < plan.blocks ? most : plan.blocks;
  plan.x_rows = (mamba1 ? p.dt_rank : p.nheads) + 2 * groups * p.d_state;
  if (plan.x_rows % 2) return false;
  plan.channels_most = ceil_div(units, plan.blocks) * plan.unit;
  plan.x_offset = units % plan.blocks;  // the leftovers of channels, x_rows and out_proj go to different blocks
  plan.out_offset = (plan.blocks - p.d_model % plan.blocks) % plan.blocks;

  const bool mixed = model_bits(p) == kMixed;
  plan.slot_bytes = slot_for<T>(p, p.weight_bits);
  if (!plan.slot_bytes) return false;
  if (mixed) plan.slot_bytes = larger(plan.slot_bytes, slot_for<T>(p, 8));
  const int row_channel = dt_width * es + p.d_state * 4;
  plan.slot_channels = mamba1 ? plan.slot_bytes / row_channel / plan.unit * plan.unit : plan.channels_most;
  if (plan.slot_channels < plan.unit) return false;
  const int x_most = ceil_div(plan.x_rows, plan.blocks), out_most = ceil_div(p.d_model, plan.blocks);
  const int in_most = 2 * plan.channels_most + (mamba1 ? 0 : x_most);
  set_shapes<T>(p, plan, p.weight_bits, in_most, out_most, plan.shapes);
  set_shapes<T>(p, plan, mixed ? 8 : p.weight_bits, in_most, out_most, plan.wide);
  plan.held = 1, plan.partials = 2 * kWarps;
  for (const Shape* of : {plan.shapes, plan.wide}) {
    plan.held = plan.held && of[kIn].held && of[kOut].held;
    plan.partials = larger(plan.partials, larger(in_most * of[kIn].terms, out_most * of[kOut].terms));
  }
  if (plan.held) plan.partials = (kHeldRows + 1) * kHeldTerms;
  plan.partials = ceil_div(plan.partials, 4) * 4;
  plan.x_stride = (plan.channels_most * es / 4) | 1;
  plan.words_x = mamba1 ? ceil_div(plan.x_rows, 4) * 16 : plan.x_rows;
  plan.words_y = p.d_inner / (es == 2 ? 2 : 1);
  plan.words_hidden = p.d_model;
  plan.words_best = 2 * plan.blocks;

  const Carve& c = plan.at = carve<T>(p, plan);
  const size_t most = max_shared_bytes();
  if (c.ring + 3 * size_t(plan.slot_bytes) > most) return false;
  const size_t slots = (most - c.ring) / plan.slot_bytes;
  plan.slots = int(slots < 64 ? slots : 64);
  plan.flight = larger(1, 49152 / plan.slot_bytes);
  plan.shared_bytes = c.ring + size_t(plan.slots) * plan.slot_bytes;
  return true;
}

bool aligned_weights(const Params& p) {
  bool ok = aligned(p.embedding, 16) && aligned(p.norm_f, 16) && aligned(p.lm_head, 16);
  for (int i = 0; i < p.n_layer; i++) {
    const Layer& l = p.layers[i];
    const void* both[] = {l.norm, l.in_proj, l.out_proj, l.ssm_state_in, l.ssm_state_out};
    const void* first[] = {l.x_proj, l.dt_proj, l.A};
    for (const void* w : both) ok &= aligned(w, 16);
    if (p.family == 1) {
      for (const void* w : first) ok &= aligned(w, 16);
    } else {
      ok &= aligned(l.gated_norm, 16);
    }
  }
  return ok;
}

int check(const Params& p) {
  if (!p.layers || !p.embedding || !p.norm_f || !p.lm_head || !p.input_ids) return MAMBA_ERROR_NULL_POINTER;
  if (p.dtype < MAMBA_F32 || p.dtype > MAMBA_BF16) return MAMBA_ERROR_DTYPE;
  if (p.batch < 1 || p.batch > 65535 || p.n_layer < 1 || p.d_model < 1 || p.d_inner < 1 || p.d_state < 1 || p.d_conv < 2 ||
      p.vocab_size < 1 || p.n_forced < 1 || p.n_steps < p.n_forced) {
    return MAMBA_ERROR_SHAPE;
  }
  if (p.family == 2) {
    if (p.nheads < 1 || p.ngroups < 1 || p.d_inner % p.nheads || p.nheads % p.ngroups) return MAMBA_ERROR_SHAPE;
  } else if (p.family != 1 || p.dt_rank < 1) {
    return MAMBA_ERROR_SHAPE;
  }
  if (p.n_steps > p.n_forced && !p.output_ids) return MAMBA_ERROR_NULL_POINTER;
  if (const int status = check_integers(p); status != MAMBA_OK) return status;
  for (int i = 0; i < p.n_layer; i++) {
    const Layer& l = p.layers[i];
    const void* both[] = {l.norm,    l.in_proj, l.conv_weight,   l.conv_bias,      l.out_proj,     l.dt_bias,
                          l.A,       l.D,       l.conv_state_in, l.conv_state_out, l.ssm_state_in, l.ssm_state_out};
    for (const void* w : both) {
      if (!w) return MAMBA_ERROR_NULL_POINTER;
    }
    if (p.family == 1 ? !l.x_proj || !l.dt_proj : !l.gated_norm) return MAMBA_ERROR_NULL_POINTER;
  }
  return MAMBA_OK;
}

template <typename F> int with_type(const Params& p, F&& f) {
  return dispatch(p.dtype, [&](auto t) { return f(t); });
}

bool covers_fused(const Params& p, Plan& plan) {
  return aligned_weights(p) && with_type(p, [&](auto t) { return int(make_plan<decltype(t)>(p, plan)); }) == 1;
}
bool covers_chain(const Params& p) {
  bool ok = p.n_steps == 1 && !p.output_ids;
  for (int i = 0; p.weight_bits && i < p.n_layer; i++) {
    ok &= aligned(p.layers[i].in_proj, 16) && aligned(p.layers[i].out_proj, 16);
  }
  return ok && (!p.weight_bits || aligned(p.lm_head, 16));
}

// Where both can, one step of a wide Mamba-2 is faster as a chain: on an H200, 1.77 ms against 1.94 at 2560 x 64, but 0.22 against
// 0.16 at 768 x 24 (kernels/bench/RESULTS-decode.md). Mamba-1 and integers are faster fused at both.
bool prefers_chain(const Params& p) { return p.family == 2 && !p.weight_bits && p.d_model >= 2048 && covers_chain(p); }

}  // namespace
}  // namespace mamba::decode

using namespace mamba::decode;

extern "C" size_t mamba_decode_stack_workspace(const mamba_decode_stack_params* params) {
  Plan plan;
  if (!params || check(*params) != MAMBA_OK) return 0;
  const size_t fused = covers_fused(*params, plan) ? plan.words() * sizeof(Word) : 0;
  const size_t chain = covers_chain(*params) ? chain_workspace(*params) : 0;
  return fused > chain ? fused : chain;
}

extern "C" int mamba_decode_stack_tactics(const mamba_decode_stack_params* params, int32_t* out, int max) {
  Plan plan;
  if (!params || max < 2 || check(*params) != MAMBA_OK) return 0;
  int count = 0;
  if (covers_fused(*params, plan)) out[count++] = kFused;
  if (covers_chain(*params)) out[count++] = kChain;
  if (count == 2 && prefers_chain(*params)) out[0] = kChain, out[1] = kFused;
  return count;
}

extern "C" int mamba_decode_stack(const mamba_decode_stack_params* params, mamba_stream stream) {
  if (!params) return MAMBA_ERROR_NULL_POINTER;
  const Params& p = *params;
  const int status = check(p);
  if (status != MAMBA_OK) return status;
  Plan plan;
  const bool fused = p.tactic != kChain && !(p.tactic < 0 && prefers_chain(p)) && covers_fused(p, plan);
  if (p.tactic > kFused || (p.tactic == kFused && !fused) || (!fused && !covers_chain(p))) return MAMBA_ERROR_TACTIC;
  const auto s = static_cast<cudaStream_t>(stream);
  const size_t needed = fused ? plan.words() * sizeof(Word) : chain_workspace(p);
  if (!p.workspace || p.workspace_size < needed || !mamba::aligned(p.workspace, 16)) return MAMBA_ERROR_WORKSPACE;
  if (fused && p.weight_bits) return model_bits(p) == kMixed ? launch_mixed(p, plan, s) : launch_packed(p, plan, s);
  return with_type(p, [&](auto t) {
    return fused ? launch_fused<16, decltype(t)>(p, plan, s) : launch_chain<decltype(t)>(p, s);
  });
}
