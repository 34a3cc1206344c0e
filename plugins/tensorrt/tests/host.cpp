// Loads the plugin library as TensorRT would and walks its interface: creators, fields, types, shapes, formats,
// serialization, clones, and what must be refused. Needs no GPU and no TensorRT library.
//
//   plugin_host libmamba_plugins.so
#include <cstring>

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
  bool gate, narrow_state;
};

constexpr DataType kF32 = DataType::kFLOAT, kF16 = DataType::kHALF;

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
  return {{"MambaCausalConv1d", {{kF16, {2, 24, 32}}, {kF16, {32, 4}}, {kF16, {32}}, {kF16, {2, 32, 3}}}, 3, false, false},
          {"MambaSelectiveScan", scan, 7, true, false},
          {"MambaSelectiveStateUpdate", one_token(scan), 7, true, true},
          {"MambaSsdScan", ssd, 7, true, false},
          {"MambaSsdStateUpdate", one_token(ssd), 7, true, true}};
}

std::vector<DynamicPluginTensorDesc> describe(const Case& c, const std::vector<Input>& inputs) {
  std::vector<Input> all = inputs;
  all.push_back(inputs[0]);
  all.push_back(inputs[c.state]);
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
  DataType out[2] = {DataType::kINT8, DataType::kINT8};
  const auto count = static_cast<int32_t>(types.size());
  check(build->getOutputDataTypes(out, 2, types.data(), count) == 0, op + " output types");
  check(out[0] == c.inputs[0].type && out[1] == c.inputs[c.state].type, op + " output types' values");
  check(build->getOutputDataTypes(out, 2, types.data(), count - 1) != 0, op + " takes an input too few");
  check_message({op, "layer.7", "inputs"}, op + " input too few");
}

void walk_formats(const Case& c, IPluginV3OneBuild* build, const std::string& op) {
  const auto count = static_cast<int32_t>(c.inputs.size());
  auto descs = describe(c, c.inputs);
  for (int32_t pos = 0; pos < count + 2; pos++) {
    const auto at = std::to_string(pos);
    check(build->supportsFormatCombination(pos, descs.data(), count, 2), op + " refuses its own type at " + at);
    auto other = descs;
    other[static_cast<size_t>(pos)].desc.type = DataType::kINT8;
    check(!build->supportsFormatCombination(pos, other.data(), count, 2), op + " takes int8 at " + at);
    other = descs;
    other[static_cast<size_t>(pos)].desc.format = TensorFormat::kCHW32;
    check(!build->supportsFormatCombination(pos, other.data(), count, 2), op + " takes CHW32 at " + at);
  }
  for (const DataType type : {kF32, kF16, DataType::kBF16}) {
    auto other = descs;
    other[0].desc.type = type;
    check(build->supportsFormatCombination(0, other.data(), count, 2), op + " refuses a float type");
  }
  auto mixed = descs;
  mixed[1].desc.type = kF32;
  check(!build->supportsFormatCombination(1, mixed.data(), count, 2), op + " mixes activation types");
  auto narrow = descs;
  narrow[c.state].desc.type = kF16;
  const bool takes = build->supportsFormatCombination(static_cast<int32_t>(c.state), narrow.data(), count, 2);
  check(takes == (c.narrow_state || c.inputs[c.state].type == kF16), op + " 16-bit state");
}

void walk_configure(const Case& c, IPluginV3OneBuild* build, const std::string& op) {
  const auto count = static_cast<int32_t>(c.inputs.size());
  auto good = describe(c, c.inputs);
  check(build->configurePlugin(good.data(), count, good.data() + count, 2) == 0, op + " configure");
  auto dynamic = good;
  for (size_t i = 0; i < c.inputs.size(); i++)
    if (c.inputs[i].dims[0] == 2) dynamic[i].desc.dims.d[0] = -1;
  check(build->configurePlugin(dynamic.data(), count, dynamic.data() + count, 2) == 0, op + " configure, dynamic batch");
  build->getWorkspaceSize(good.data(), count, good.data() + count, 2);
  g_log.clear();
  auto inputs = c.inputs;
  inputs[c.state].dims.back() += 1;
  auto bad = describe(c, inputs);
  check(build->configurePlugin(bad.data(), count, bad.data() + count, 2) != 0, op + " takes a state of the wrong shape");
  check_message({op, "layer.7", "state", "expected"}, op + " wrong state");
  inputs = c.inputs;
  inputs[c.state].type = DataType::kINT8;
  bad = describe(c, inputs);
  check(build->configurePlugin(bad.data(), count, bad.data() + count, 2) != 0, op + " takes a state of int8");
  check_message({op, "layer.7", "state", "int8", "expected", "float"}, op + " wrong type");
  check(build->configurePlugin(good.data(), count, good.data() + count, 3) != 0, op + " takes a third output");
  check_message({op, "layer.7", "3 outputs"}, op + " outputs");
  inputs = c.inputs;
  inputs[0].dims.pop_back();
  bad = describe(c, inputs);
  check(build->configurePlugin(bad.data(), count, bad.data() + count, 2) != 0, op + " takes an input of the wrong rank");
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
  check(runtime_of(plugin)->onShapeChange(descs.data(), count, descs.data() + count, 2) != 0, op + " wrong batch");
  check_message({op, "state"}, op + " wrong batch");
  check(runtime_of(plugin)->enqueue(descs.data(), descs.data() + count, nullptr, nullptr, nullptr, nullptr) != 0,
        op + " enqueues what it has refused");
  g_log.clear();
}

void walk(const Case& c, IPluginCreatorV3One* creator) {
  const std::string op = c.op;
  check(std::string(creator->getPluginVersion()) == "1", op + " version");
  check(std::string(creator->getPluginNamespace()).empty(), op + " namespace");
  const int32_t yes = 1;
  std::vector<PluginField> fields;
  if (c.gate) fields.emplace_back("has_z", &yes, PluginFieldType::kINT32, 1);
  std::unique_ptr<IPluginV3> plugin = make(creator, fields);
  check(plugin != nullptr, op + " create");
  if (!plugin) return;
  IPluginV3OneBuild* build = build_of(plugin.get());
  check(build->getNbOutputs() == 2, op + " outputs");
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
  check(library.size() == cases().size(), "number of creators");
  for (const Case& c : cases()) {
    const std::string op = c.op;
    IPluginCreatorV3One* creator = library.find(op);
    check(creator != nullptr, "no creator for " + op);
    check(!library.find(op, "2"), op + " has a version 2");
    check(!library.find(op, "1", "other"), op + " lies in another namespace too");
    if (creator) walk(c, creator);
  }
  return report();
}
