/* The operands of the ONNX op MambaDecodeStack, which runs decode_stack: one table for all adapters (C++17).
 *
 * Inputs are input_ids, then the conv state and the ssm state of every layer, then the embedding, the last norm, the head
 * and the weights of every layer; outputs are the logits, then the present states. The order is that of
 * mamba_export/ops/decode_stack.py and mamba_export/fused_step.py.
 */
#ifndef MAMBA_DECODE_STACK_OPERANDS_H_
#define MAMBA_DECODE_STACK_OPERANDS_H_

#include <cstring>
#include <string>
#include <vector>

#include "mamba/decode_stack.h"

namespace mamba::stack {

struct Attribute {
  const char* name;
  bool is_float;
  double fallback, low, high;
};

inline const std::vector<Attribute>& attributes() {
  static const std::vector<Attribute> all = {
      {"family", false, 1, 1, 2},           {"n_layer", false, 1, 1, 4096},      {"dt_rank", false, 0, 0, 1 << 20},
      {"nheads", false, 0, 0, 1 << 20},     {"ngroups", false, 1, 1, 1 << 20},   {"vocab_size", false, 1, 1, 1 << 30},
      {"residual_in_fp32", false, 1, 0, 1}, {"norm_eps", true, 1e-5, 0, 1},      {"gated_norm_eps", true, 1e-5, 0, 1},
      {"weight_bits", false, 0, 0, 8},      {"group_size", false, 0, 0, 1 << 20}, {"packed_embedding", false, 0, 0, 1}};
  return all;
}

/* int64; the model's dtype, one for all; float32; int32 words of packed rows */
enum class Kind { kIds, kModel, kFloat32, kPacked };

/* `shape` has a letter for each dimension. Equal letters are equal sizes all over the node; '1' is one, 'k' is K - 1, and
 * '*' is what set_bits() says.
 *   B batch           M d_model   I d_inner   N d_state   T dt_rank   H heads   P headdim
 *   X conv channels   K d_conv    J rows of in_proj   R rows of x_proj   V, W rows of embedding and head */
struct Operand {
  std::string name;
  const char* shape;
  Kind kind;
  char columns = 0; /* of packed rows: the letter of the matrix's columns */
};

struct Weight {
  const char* name;
  const char* shape;
  Kind kind;
  std::size_t field;            /* where its pointer lies in mamba_decode_layer */
  const char* packed = nullptr; /* its shape where integers are packed; null: it never is */
};

/* Of one layer, in the order of the op's inputs. */
inline const std::vector<Weight>& weights(int family) {
  using L = mamba_decode_layer;
  static const std::vector<Weight> both = {{"norm", "M", Kind::kModel, offsetof(L, norm)},
                                           {"in_proj", "JM", Kind::kModel, offsetof(L, in_proj), "J*"},
                                           {"conv1d.weight", "XK", Kind::kModel, offsetof(L, conv_weight)},
                                           {"conv1d.bias", "X", Kind::kModel, offsetof(L, conv_bias)}};
  const auto with = [](std::vector<Weight> others) {
    others.insert(others.begin(), both.begin(), both.end());
    return others;
  };
  static const std::vector<Weight> mamba1 = with({{"x_proj", "RI", Kind::kModel, offsetof(L, x_proj)},
                                                  {"dt_proj", "IT", Kind::kModel, offsetof(L, dt_proj)},
                                                  {"dt_bias", "I", Kind::kFloat32, offsetof(L, dt_bias)},
                                                  {"A", "IN", Kind::kFloat32, offsetof(L, A)},
                                                  {"D", "I", Kind::kFloat32, offsetof(L, D)},
                                                  {"out_proj", "MI", Kind::kModel, offsetof(L, out_proj), "M*"}});
  static const std::vector<Weight> mamba2 = with({{"dt_bias", "H", Kind::kFloat32, offsetof(L, dt_bias)},
                                                  {"A", "H", Kind::kFloat32, offsetof(L, A)},
                                                  {"D", "H", Kind::kFloat32, offsetof(L, D)},
                                                  {"gated_norm", "I", Kind::kModel, offsetof(L, gated_norm)},
                                                  {"out_proj", "MI", Kind::kModel, offsetof(L, out_proj), "M*"}});
  return family == 1 ? mamba1 : mamba2;
}

/* Index of the first input that is no state: where shapes are read first. */
inline std::size_t first_weight(int n_layer) { return 1 + 2 * static_cast<std::size_t>(n_layer); }

/* All that a node has whose attributes are those of `p`. */
inline std::vector<Operand> inputs(const mamba_decode_stack_params& p) {
  const int family = p.family, n_layer = p.n_layer;
  std::vector<Operand> all = {{"input_ids", "B1", Kind::kIds}};
  for (int i = 0; i < n_layer; i++) {
    all.push_back({"conv_state_" + std::to_string(i), "BXk", Kind::kModel});
    all.push_back({"ssm_state_" + std::to_string(i), family == 1 ? "BIN" : "BHPN", Kind::kFloat32});
  }
  const auto add = [&](const std::string& name, const Weight& w) {
    if (p.weight_bits && w.packed) all.push_back({name, w.packed, Kind::kPacked, w.shape[1]});
    else all.push_back({name, w.shape, w.kind});
  };
  add("embedding", {"embedding", "VM", Kind::kModel, 0, p.embedding_packed ? "V*" : nullptr});
  all.push_back({"norm_f", "M", Kind::kModel});
  add("lm_head", {"lm_head", "WM", Kind::kModel, 0, "W*"});
  for (int i = 0; i < n_layer; i++)
    for (const Weight& w : weights(family)) add("layers." + std::to_string(i) + "." + w.name, w);
  return all;
}

/* Everything that the attributes say; `get(name)` gives the value of one. */
template <typename Get>
mamba_decode_stack_params from_attributes(Get&& get) {
  mamba_decode_stack_params p{};
  const auto whole = [&](const char* name) { return static_cast<int32_t>(get(name)); };
  p.family = whole("family"), p.n_layer = whole("n_layer"), p.dt_rank = whole("dt_rank"), p.nheads = whole("nheads");
  p.ngroups = whole("ngroups"), p.vocab_size = whole("vocab_size"), p.residual_fp32 = whole("residual_in_fp32");
  p.norm_eps = static_cast<float>(get("norm_eps")), p.gated_norm_eps = static_cast<float>(get("gated_norm_eps"));
  p.weight_bits = whole("weight_bits"), p.group_size = whole("group_size");
  p.embedding_packed = whole("packed_embedding");
  p.n_forced = p.n_steps = 1, p.tactic = -1;
  return p;
}

/* The dimensions, from the size that each letter stands for (`sizes['M']`). */
template <typename Sizes>
void set_sizes(mamba_decode_stack_params* p, const Sizes& sizes) {
  const auto size = [&](char letter) { return static_cast<int32_t>(sizes[letter]); };
  p->batch = size('B'), p->d_model = size('M'), p->d_inner = size('I'), p->d_state = size('N'), p->d_conv = size('K');
}

/* What the letters must be to each other and to the attributes: empty, or what is wrong. -1 is a size not known yet. */
template <typename Sizes>
std::string relations(const mamba_decode_stack_params& p, const Sizes& sizes) {
  struct Rule {
    const char* what;
    int64_t found, wanted;
  };
  const int64_t inner = sizes['I'], bc = 2 * int64_t{p.ngroups} * sizes['N'], heads = p.nheads;
  const bool mamba1 = p.family == 1;
  if (inner < 0 || sizes['N'] < 0) return "";
  const std::vector<Rule> rules =
      mamba1 ? std::vector<Rule>{{"attribute ngroups is", p.ngroups, 1},
                                 {"attribute dt_rank, the width of dt_proj, is", p.dt_rank, sizes['T']},
                                 {"the rows of in_proj are", sizes['J'], 2 * inner},
                                 {"the channels of conv1d are", sizes['X'], inner},
                                 {"the rows of x_proj are", sizes['R'], p.dt_rank + bc}}
             : std::vector<Rule>{{"attribute nheads, the size of A, is", heads, sizes['H']},
                                 {"the size of gated_norm is", inner, sizes['P'] < 0 ? -1 : heads * sizes['P']},
                                 {"the channels of conv1d are", sizes['X'], inner + bc},
                                 {"the rows of in_proj are", sizes['J'], 2 * inner + bc + heads}};
  for (const Rule& rule : rules) {
    if (rule.found >= 0 && rule.wanted >= 0 && rule.found != rule.wanted)
      return std::string(rule.what) + " " + std::to_string(rule.found) + ", expected " + std::to_string(rule.wanted);
  }
  if (!mamba1 && heads % p.ngroups) return "attribute ngroups does not divide nheads";
  for (const char letter : {'V', 'W'}) {
    if (sizes[letter] >= 0 && sizes[letter] < p.vocab_size)
      return std::string(letter == 'V' ? "embedding" : "lm_head") + " has " + std::to_string(sizes[letter]) +
             " rows, attribute vocab_size is " + std::to_string(p.vocab_size);
  }
  return "";
}

/* Bytes of a packed row of `bits` in such a model. */
inline int64_t packed_bytes(const mamba_decode_stack_params& p, int32_t bits, int32_t width) {
  return mamba_decode_row_bytes(bits, width, mamba_decode_scales(p.group_size, width));
}

/* Sets the bits of packed matrices in *p and in `layers`, which has room for p->n_layer: those of attribute weight_bits, unless
 * rows are as long as those of 8 bits alone. `words(i)` is the last dimension of input i, -1: not known. Returns nothing, or
 * what is wrong. */
template <typename Sizes, typename Words>
std::string set_bits(mamba_decode_stack_params* p, mamba_decode_layer* layers, const Sizes& sizes, Words&& words) {
  const std::vector<Operand> all = inputs(*p);
  int32_t embedding_bits = 0;
  std::vector<int32_t*> own = {&p->head_bits};
  if (p->weight_bits && p->embedding_packed) own.insert(own.begin(), &embedding_bits);
  for (int i = 0; i < p->n_layer; i++) own.push_back(&layers[i].in_proj_bits), own.push_back(&layers[i].out_proj_bits);
  auto next = own.begin();
  for (std::size_t i = 0; i < all.size(); i++) {
    if (all[i].kind != Kind::kPacked) continue;
    int32_t* const bits = *next++;
    *bits = 0;
    if (sizes[all[i].columns] < 0 || words(i) < 0) continue;
    const auto width = static_cast<int32_t>(sizes[all[i].columns]);
    const int64_t bytes = words(i) * 4, wanted = packed_bytes(*p, p->weight_bits, width);
    if (bytes == wanted) continue;
    if (bytes == packed_bytes(*p, 8, width)) *bits = 8;
    else
      return "input " + all[i].name + " has rows of " + std::to_string(words(i)) + " words, expected " +
             std::to_string(wanted / 4) + " for " + std::to_string(width) + " values (attributes weight_bits, group_size)";
  }
  if (own.front() == &embedding_bits && embedding_bits != p->head_bits) return "embedding and lm_head have other integers";
  return "";
}

/* Sets all pointers from the node's inputs and outputs. `layers`: room for p->n_layer, kept as long as *p is used. */
inline void bind(mamba_decode_stack_params* p, mamba_decode_layer* layers, const void* const* in, void* const* out) {
  const void* const* next = in + first_weight(p->n_layer);
  p->input_ids = static_cast<const int64_t*>(in[0]);
  p->logits = static_cast<float*>(out[0]);
  p->embedding = next[0], p->norm_f = next[1], p->lm_head = next[2];
  next += 3;
  for (int i = 0; i < p->n_layer; i++) {
    mamba_decode_layer& layer = layers[i];
    for (const Weight& w : weights(p->family))
      std::memcpy(reinterpret_cast<char*>(&layer) + w.field, next++, sizeof(const void*));
    layer.conv_state_in = in[1 + 2 * i], layer.conv_state_out = out[1 + 2 * i];
    layer.ssm_state_in = static_cast<const float*>(in[2 + 2 * i]);
    layer.ssm_state_out = static_cast<float*>(out[2 + 2 * i]);
  }
  p->layers = layers;
}

}  // namespace mamba::stack

#endif /* MAMBA_DECODE_STACK_OPERANDS_H_ */
