// Loads the plugin library as TensorRT would and walks its interface: creators, fields, types, shapes, formats,
// serialization, clones, and what must be refused. Needs no GPU and no TensorRT library.
//
//   plugin_host libmamba_plugins.so
#include <cstring>
#include <set>

#include "library.h"

using namespace plugin_tests;

namespace {

struct Input {
  DataType type;
  std::vector<int64_t> dims;
};

struct Case {
  const char* op;
  std::vector<Input> inputs;  // of a node with has_z (where the op has it), without ragged
  size_t state;
  bool narrow_state;
  std::vector<std::pair<const char*, int32_t>> attributes;
  std::vector<Input> outputs = {};  // where they are not the first input and the state
  size_t activation = 0, other = 1;  // two inputs of the activations' type

  std::vector<PluginField> fields() const {
    std::vector<PluginField> all;
    for (const auto& [name, value] : attributes) all.emplace_back(name, &value, PluginFieldType::kINT32, 1);
    return all;
  }
  std::vector<Input> results(const std::vector<Input>& given) const {
    return outputs.empty() ? std::vector<Input>{given[0], given[state]} : outputs;
  }
  int32_t results_count() const { return outputs.empty() ? 2 : static_cast<int32_t>(outputs.size()); }
};

constexpr DataType kF32 = DataType::kFLOAT, kF16 = DataType::kHALF, kI64 = DataType::kINT64, kI32 = DataType::kINT32;

// Two layers of a whole model: d_model 24, d_inner 48, 61 tokens in a table of 64. `packed`: the matrices are rows of int8,
// 24 or 48 values with one scale in 64 bytes.
Case stack_case(bool mamba1, bool packed = false) {
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return packed ? Input{kI32, {rows, 16}} : Input{kF16, {rows, columns}};
  };
  const int64_t inner = 48, bc = mamba1 ? 0 : 2 * 2 * 16, channels = inner + bc, heads = mamba1 ? 0 : 4;
  std::vector<Input> inputs = {{kI64, {2, 1}}};
  std::vector<Input> outputs = {{kF32, {2, 1, 61}}};
  for (int i = 0; i < 2; i++) {
    const std::vector<int64_t> ssm = mamba1 ? std::vector<int64_t>{2, inner, 16} : std::vector<int64_t>{2, 4, 12, 16};
    for (const Input& state : {Input{kF16, {2, channels, 3}}, Input{kF32, ssm}})
      inputs.push_back(state), outputs.push_back(state);
  }
  inputs.insert(inputs.end(), {{kF16, {64, 24}}, {kF16, {24}}, matrix(64, 24)});
  for (int i = 0; i < 2; i++) {
    inputs.insert(inputs.end(), {{kF16, {24}}, matrix(inner + channels + heads, 24)});
    inputs.insert(inputs.end(), {{kF16, {channels, 4}}, {kF16, {channels}}});
    std::vector<Input> rest = {{kF32, {4}}, {kF32, {4}}, {kF32, {4}}, {kF16, {inner}}};
    if (mamba1)
      rest = {{kF16, {37, inner}}, {kF16, {inner, 5}}, {kF32, {inner}}, {kF32, {inner, 16}}, {kF32, {inner}}};
    inputs.insert(inputs.end(), rest.begin(), rest.end());
    inputs.push_back(matrix(24, inner));
  }
  return {"MambaDecodeStack", inputs, 2, false,
          {{"family", mamba1 ? 1 : 2}, {"n_layer", 2}, {"dt_rank", mamba1 ? 5 : 0}, {"nheads", mamba1 ? 0 : 4},
           {"ngroups", mamba1 ? 1 : 2}, {"vocab_size", 61}, {"residual_in_fp32", 1},
           {"weight_bits", packed ? 8 : 0}},
          outputs, 1, 3};
}

std::vector<Case> cases() {
  const std::vector<Input> scan = {{kF16, {2, 24, 32}}, {kF16, {2, 24, 32}}, {kF32, {32, 16}}, {kF16, {2, 24, 1, 16}},
                                   {kF16, {2, 24, 1, 16}}, {kF32, {32}}, {kF32, {32}}, {kF32, {2, 32, 16}},
                                   {kF16, {2, 24, 32}}};
  const std::vector<Input> ssd = {{kF16, {2, 24, 4, 16}}, {kF16, {2, 24, 4}}, {kF32, {4}}, {kF16, {2, 24, 2, 32}},
                                  {kF16, {2, 24, 2, 32}}, {kF32, {4}}, {kF32, {4}}, {kF32, {2, 4, 16, 32}},
                                  {kF16, {2, 24, 4, 16}}};
  const auto one_token = [](std::vector<Input> inputs) {
    for (Input& input : inputs)
      if (input.dims.size() > 1 && input.dims[1] == 24) input.dims[1] = 1;
    return inputs;
  };
  return {{"MambaCausalConv1d", {{kF16, {2, 24, 32}}, {kF16, {32, 4}}, {kF16, {32}}, {kF16, {2, 32, 3}}}, 3, false, {}},
          {"MambaSelectiveScan", scan, 7, false, {{"has_z", 1}}},
          {"MambaSelectiveStateUpdate", one_token(scan), 7, true, {{"has_z", 1}}},
          {"MambaSsdScan", ssd, 7, false, {{"has_z", 1}}},
          {"MambaSsdStateUpdate", one_token(ssd), 7, true, {{"has_z", 1}}},
          stack_case(true),
          stack_case(false),
          stack_case(true, true),
          stack_case(false, true)};
}

std::vector<DynamicPluginTensorDesc> describe(const Case& c, const std::vector<Input>& inputs) {
  std::vector<Input> all = inputs;
  for (const Input& result : c.results(inputs)) all.push_back(result);
  std::vector<DynamicPluginTensorDesc> descs;
  for (const Input& input : all) {
    DynamicPluginTensorDesc desc{};
    desc.desc.type = input.type, desc.desc.format = TensorFormat::kLINEAR, desc.desc.dims = dims_of(input.dims);
    desc.min = desc.opt = desc.max = desc.desc.dims;
    descs.push_back(desc);
  }
  return descs;
}

void walk_types(const Case& c, IPluginV3OneBuild* build, const std::string& op) {
  std::vector<DataType> types;
  for (const Input& input : c.inputs) types.push_back(input.type);
  std::vector<DataType> out(static_cast<size_t>(c.results_count()), DataType::kINT8);
  const auto count = static_cast<int32_t>(types.size());
  check(build->getOutputDataTypes(out.data(), c.results_count(), types.data(), count) == 0, op + " output types");
  const std::vector<Input> results = c.results(c.inputs);
  for (size_t i = 0; i < out.size(); i++) check(out[i] == results[i].type, op + " type of output " + std::to_string(i));
  check(build->getOutputDataTypes(out.data(), c.results_count(), types.data(), count - 1) != 0,
        op + " takes an input too few");
  check_message({op, "layer.7", "inputs"}, op + " input too few");
}

void walk_formats(const Case& c, IPluginV3OneBuild* build, const std::string& op) {
  const auto count = static_cast<int32_t>(c.inputs.size()), results = c.results_count();
  auto descs = describe(c, c.inputs);
  for (int32_t pos = 0; pos < count + results; pos++) {
    const auto at = std::to_string(pos);
    check(build->supportsFormatCombination(pos, descs.data(), count, results), op + " refuses its own type at " + at);
    auto other = descs;
    other[static_cast<size_t>(pos)].desc.type = DataType::kINT8;
    check(!build->supportsFormatCombination(pos, other.data(), count, results), op + " takes int8 at " + at);
    other = descs;
    other[static_cast<size_t>(pos)].desc.format = TensorFormat::kCHW32;
    check(!build->supportsFormatCombination(pos, other.data(), count, results), op + " takes CHW32 at " + at);
  }
  for (const DataType type : {kF32, kF16, DataType::kBF16}) {
    auto other = descs;
    other[c.activation].desc.type = type;
    check(build->supportsFormatCombination(static_cast<int32_t>(c.activation), other.data(), count, results),
          op + " refuses a float type");
  }
  auto mixed = descs;
  mixed[c.other].desc.type = kF32;
  check(!build->supportsFormatCombination(static_cast<int32_t>(c.other), mixed.data(), count, results),
        op + " mixes activation types");
  auto narrow = descs;
  narrow[c.state].desc.type = kF16;
  const bool takes = build->supportsFormatCombination(static_cast<int32_t>(c.state), narrow.data(), count, results);
  check(takes == (c.narrow_state || c.inputs[c.state].type == kF16), op + " 16-bit state");
}

void walk_configure(const Case& c, IPluginV3OneBuild* build, const std::string& op) {
  const auto count = static_cast<int32_t>(c.inputs.size()), results = c.results_count();
  auto good = describe(c, c.inputs);
  check(build->configurePlugin(good.data(), count, good.data() + count, results) == 0, op + " configure");
  auto dynamic = good;
  for (size_t i = 0; i < c.inputs.size(); i++)
    if (c.inputs[i].dims[0] == 2) dynamic[i].desc.dims.d[0] = -1;
  check(build->configurePlugin(dynamic.data(), count, dynamic.data() + count, results) == 0, op + " configure, dynamic batch");
  build->getWorkspaceSize(good.data(), count, good.data() + count, results);
  g_log.clear();
  auto inputs = c.inputs;
  inputs[c.state].dims.back() += 1;
  auto bad = describe(c, inputs);
  check(build->configurePlugin(bad.data(), count, bad.data() + count, results) != 0, op + " takes a state of the wrong shape");
  check_message({op, "layer.7", "state", "expected"}, op + " wrong state");
  inputs = c.inputs;
  inputs[c.state].type = DataType::kINT8;
  bad = describe(c, inputs);
  check(build->configurePlugin(bad.data(), count, bad.data() + count, results) != 0, op + " takes a state of int8");
  check_message({op, "layer.7", "state", "int8", "expected", "float"}, op + " wrong type");
  check(build->configurePlugin(good.data(), count, good.data() + count, results + 1) != 0, op + " takes an output too many");
  check_message({op, "layer.7", std::to_string(results + 1) + " outputs"}, op + " outputs");
  inputs = c.inputs;
  inputs[0].dims.pop_back();
  bad = describe(c, inputs);
  check(build->configurePlugin(bad.data(), count, bad.data() + count, results) != 0, op + " takes an input of the wrong rank");
  check_message({op, "layer.7", "dimensions"}, op + " wrong rank");
}

// Serialize, create anew as at run time, and serialize again: the same fields with the same values.
void walk_serialization(IPluginCreatorV3One* creator, IPluginV3* plugin, const std::string& op) {
  const PluginFieldCollection* first = runtime_of(plugin)->getFieldsToSerialize();
  check(first != nullptr, op + " fields");
  std::unique_ptr<IPluginV3> again(creator->createPlugin("layer.7", first, TensorRTPhase::kRUNTIME));
  check(again != nullptr, op + " deserialize");
  if (!again) return;
  const PluginFieldCollection* second = runtime_of(again.get())->getFieldsToSerialize();
  check(first->nbFields == second->nbFields, op + " number of fields");
  for (int32_t i = 0; i < first->nbFields; i++) {
    const PluginField &a = first->fields[i], &b = second->fields[i];
    const size_t bytes = static_cast<size_t>(a.length) * (a.type == PluginFieldType::kCHAR ? 1 : 4);
    check(a.type == b.type && a.length == b.length && std::string(a.name) == b.name && !std::memcmp(a.data, b.data, bytes),
          op + " field " + a.name);
  }
  std::unique_ptr<IPluginV3> copy(again->clone()), attached(runtime_of(again.get())->attachToContext(nullptr));
  check(copy && attached, op + " clone and attach");
  std::vector<PluginField> newer(first->fields, first->fields + first->nbFields);
  for (PluginField& field : newer)
    if (std::string(field.name) == "plugin_version") field.data = "2";
  check(!make(creator, newer), op + " takes an engine's node of version 2");
  check_message({op, "layer.7", "plugin_version", "2"}, op + " version of an engine");
}

void walk_refusals(IPluginCreatorV3One* creator, const std::string& op) {
  const std::string flag = creator->getFieldNames()->fields[0].name;
  const int32_t seven = 7;
  const float half = 0.5F;
  check(!make(creator, {{flag.c_str(), &seven, PluginFieldType::kINT32, 1}}), op + " takes " + flag + " = 7");
  check_message({op, "layer.7", flag, "7"}, op + " attribute out of range");
  check(!make(creator, {{flag.c_str(), &half, PluginFieldType::kFLOAT32, 1}}), op + " takes a float " + flag);
  check_message({op, flag, "int"}, op + " attribute of another type");
  check(!make(creator, {{"nonsense", &seven, PluginFieldType::kINT32, 1}}), op + " takes an unknown attribute");
  check_message({op, "nonsense"}, op + " unknown attribute");
  check(!make(creator, {{flag.c_str(), nullptr, PluginFieldType::kINT32, 1}}), op + " takes an attribute without data");
  check_message({op, "layer.7", flag}, op + " attribute without data");
  check(!make(creator, {{"plugin_version", "2", PluginFieldType::kCHAR, 1}}), op + " takes version 2");
  check_message({op, "layer.7", "plugin_version", "2"}, op + " version");
  check(!make(creator, {{"plugin_namespace", "other", PluginFieldType::kCHAR, 5}}), op + " takes another namespace");
  check_message({op, "layer.7", "plugin_namespace", "other"}, op + " namespace");
  check(!!make(creator, {{"plugin_version", "1", PluginFieldType::kCHAR, 2}, {"plugin_namespace", "", PluginFieldType::kCHAR, 0}}),
        op + " refuses its own version");
  g_log.clear();
}

void walk_bad_enqueue(const Case& c, IPluginV3* plugin, const std::string& op) {
  std::vector<PluginTensorDesc> descs;
  for (const DynamicPluginTensorDesc& desc : describe(c, c.inputs)) descs.push_back(desc.desc);
  descs[c.state].dims.d[0] += 1;
  const auto count = static_cast<int32_t>(c.inputs.size());
  check(runtime_of(plugin)->onShapeChange(descs.data(), count, descs.data() + count, c.results_count()) != 0, op + " wrong batch");
  check_message({op, "state"}, op + " wrong batch");
  check(runtime_of(plugin)->enqueue(descs.data(), descs.data() + count, nullptr, nullptr, nullptr, nullptr) != 0,
        op + " enqueues what it has refused");
  g_log.clear();
}

// Nodes of a whole model whose attributes and weights do not go together.
void walk_stack_refusals(IPluginCreatorV3One* creator) {
  struct Refusal {
    bool mamba1;
    const char* attribute;
    int32_t value;
    std::vector<std::string> words;
  };
  const std::vector<Refusal> all = {
      {true, "dt_rank", 6, {"dt_rank", "6", "expected 5"}},    {true, "ngroups", 2, {"ngroups"}},
      {true, "vocab_size", 65, {"embedding", "64", "65"}},     {true, "n_layer", 3, {"inputs", "ask for"}},
      {false, "nheads", 6, {"nheads", "6", "expected 4"}},     {false, "ngroups", 1, {"conv1d", "112", "expected 80"}},
      {false, "family", 1, {"inputs", "ask for"}}};
  for (const Refusal& refusal : all) {
    Case c = stack_case(refusal.mamba1);
    for (auto& [name, value] : c.attributes)
      if (std::string(name) == refusal.attribute) value = refusal.value;
    std::unique_ptr<IPluginV3> plugin = make(creator, c.fields());
    const auto descs = describe(c, c.inputs);
    const auto count = static_cast<int32_t>(c.inputs.size());
    g_log.clear();
    const int32_t outputs = build_of(plugin.get())->getNbOutputs();
    check(build_of(plugin.get())->configurePlugin(descs.data(), count, descs.data() + count, outputs) != 0,
          std::string("MambaDecodeStack takes ") + refusal.attribute);
    std::vector<std::string> words = refusal.words;
    words.insert(words.end(), {"MambaDecodeStack", "layer.7"});
    check_message(words, std::string("MambaDecodeStack, wrong ") + refusal.attribute);
  }
  for (const bool bits : {true, false}) {  // integers of another width, or rows where the attributes say matrices
    Case c = stack_case(true, true);
    for (auto& [name, value] : c.attributes)
      if (std::string(name) == "weight_bits") value = 0;
    if (bits) c.attributes.back().second = 8, c.inputs.back().dims[1] = 48;
    std::unique_ptr<IPluginV3> plugin = make(creator, c.fields());
    const auto descs = describe(c, c.inputs);
    const auto count = static_cast<int32_t>(c.inputs.size());
    g_log.clear();
    check(build_of(plugin.get())->configurePlugin(descs.data(), count, descs.data() + count, c.results_count()) != 0,
          "MambaDecodeStack takes any packed rows");
    const std::vector<std::string> words = bits ? std::vector<std::string>{"layers.1.out_proj", "48 words", "expected 16"}
                                                : std::vector<std::string>{"lm_head", "int32", "float16"};
    check_message(words, "MambaDecodeStack, wrong packed rows");
  }
  for (const char* name : {"layers.1.in_proj", "layers.1.A", "norm_f"}) {
    Case c = stack_case(true);
    Input& input = c.inputs[std::string(name) == "norm_f" ? 6 : std::string(name) == "layers.1.A" ? 25 : 19];
    input.dims[0] += 1;
    std::unique_ptr<IPluginV3> plugin = make(creator, c.fields());
    const auto descs = describe(c, c.inputs);
    const auto count = static_cast<int32_t>(c.inputs.size());
    check(build_of(plugin.get())->configurePlugin(descs.data(), count, descs.data() + count, c.results_count()) != 0,
          std::string("MambaDecodeStack takes any ") + name);
    check_message({"MambaDecodeStack", "layer.7", name, "expected"}, name);
  }
}

void walk(const Case& c, IPluginCreatorV3One* creator) {
  const std::string op = c.op;
  check(std::string(creator->getPluginVersion()) == "1", op + " version");
  check(std::string(creator->getPluginNamespace()).empty(), op + " namespace");
  std::unique_ptr<IPluginV3> plugin = make(creator, c.fields());
  check(plugin != nullptr, op + " create");
  if (!plugin) return;
  IPluginV3OneBuild* build = build_of(plugin.get());
  check(build->getNbOutputs() == c.results_count(), op + " outputs");
  check(build->getTimingCacheID() != nullptr, op + " timing cache id");
  walk_types(c, build, op);
  walk_formats(c, build, op);
  walk_configure(c, build, op);
  walk_serialization(creator, plugin.get(), op);
  walk_refusals(creator, op);
  walk_bad_enqueue(c, plugin.get(), op);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: plugin_host libmamba_plugins.so\n"), 2;
  const Library library(argv[1]);
  std::set<std::string> ops;
  for (const Case& c : cases()) ops.insert(c.op);
  check(library.size() == ops.size(), "number of creators");
  for (const Case& c : cases()) {
    const std::string op = c.op;
    IPluginCreatorV3One* creator = library.find(op);
    check(creator != nullptr, "no creator for " + op);
    check(!library.find(op, "2"), op + " has a version 2");
    check(!library.find(op, "1", "other"), op + " lies in another namespace too");
    if (creator) walk(c, creator);
  }
  walk_stack_refusals(library.find("MambaDecodeStack"));
  return report();
}
