#include "creator.h"

#include <cstring>

#include "guard.h"
#include "log.h"
#include "plugin.h"

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace mamba_plugin {
namespace {

// Reads one number of a field. False when the field holds something else.
bool read_number(const PluginField& field, int32_t index, double* value) {
  if (!field.data || index >= field.length) return false;
  switch (field.type) {
    case PluginFieldType::kINT32: *value = static_cast<const int32_t*>(field.data)[index]; return true;
    case PluginFieldType::kINT64: *value = static_cast<double>(static_cast<const int64_t*>(field.data)[index]); return true;
    case PluginFieldType::kFLOAT32: *value = static_cast<const float*>(field.data)[index]; return true;
    case PluginFieldType::kFLOAT64: *value = static_cast<const double*>(field.data)[index]; return true;
    default: return false;
  }
}

struct Restored {
  double batch = 0, seqlen = 0, for_gpu = 1;
};

// Empty when the field says `expected`, with or without a final zero.
std::string read_text(const PluginField& field, const std::string& name, const std::string& expected) {
  if (field.type != PluginFieldType::kCHAR || field.length < 0 || (field.length > 0 && !field.data))
    return "attribute " + name + " is not a string";
  std::string text(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
  text = text.substr(0, text.find('\0'));
  return text == expected ? "" : "attribute " + name + " = \"" + text + "\": this library has \"" + expected + "\" alone";
}

std::string read_field(const PluginField& field, Attributes* attributes, Restored* restored) {
  const std::string name = field.name ? field.name : "";
  if (name == kVersionField) return read_text(field, name, kVersion);
  if (name == kNamespaceField) return read_text(field, name, kNamespace);
  if (name == kTunedField)
    return read_number(field, 0, &restored->batch) && read_number(field, 1, &restored->seqlen) ? "" : "field " + name + " is damaged";
  if (name == kDeviceField) return read_number(field, 0, &restored->for_gpu) ? "" : "field " + name + " is damaged";
  const std::vector<AttributeSpec>& specs = attributes->op().attributes;
  for (size_t i = 0; i < specs.size(); i++) {
    if (name != specs[i].name) continue;
    double value = 0.0;
    const bool integer = field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
    if (field.length != 1 || integer == specs[i].is_float || !read_number(field, 0, &value))
      return "attribute " + name + " is not one " + (specs[i].is_float ? "float" : "int");
    return attributes->set(i, value);
  }
  return "unknown attribute " + name;
}

}  // namespace

Creator::Creator(const OpSpec& op) : op_(op) {
  for (const AttributeSpec& spec : op.attributes)
    fields_.emplace_back(spec.name, nullptr, spec.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

const char* Creator::getPluginVersion() const noexcept { return kVersion; }
const char* Creator::getPluginNamespace() const noexcept { return kNamespace; }

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
    const std::string node = name ? name : "";
    Attributes attributes(op_);
    Restored restored;
    for (int32_t i = 0; fields && i < fields->nbFields; i++) {
      const std::string wrong = read_field(fields->fields[i], &attributes, &restored);
      if (!wrong.empty()) {
        log_error(std::string(op_.name) + " '" + node + "': " + wrong);
        return nullptr;
      }
    }
    auto plugin = std::make_unique<Plugin>(attributes, node);
    if (restored.batch > 0)
      plugin->restore(static_cast<int32_t>(restored.batch), static_cast<int32_t>(restored.seqlen), restored.for_gpu > 0);
    return plugin.release();
  });
}

const std::vector<Creator*>& creators() {
  static const std::vector<Creator*> all = [] {
    std::vector<Creator*> made;
    for (const OpSpec* op : all_ops()) made.push_back(new Creator(*op));  // never freed: TensorRT keeps pointers
    return made;
  }();
  return all;
}

}  // namespace mamba_plugin
