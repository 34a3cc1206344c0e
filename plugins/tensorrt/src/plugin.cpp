#include "plugin.h"

#include <algorithm>
#include <utility>

#include "guard.h"
#include "log.h"
#include "workspace.h"

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace mamba_plugin {
namespace {

constexpr int kMaxTactics = 8;  // offered to the builder: the kernels list theirs best guess first

Type type_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return Type::kFloat32;
    case DataType::kHALF: return Type::kFloat16;
    case DataType::kBF16: return Type::kBFloat16;
    case DataType::kINT32: return Type::kInt32;
    case DataType::kINT64: return Type::kInt64;
    case DataType::kINT8: return Type::kInt8;
    case DataType::kBOOL: return Type::kBool;
    case DataType::kFP8: return Type::kFloat8;
    default: return Type::kOther;
  }
}

Tensor tensor_of(DataType type, const nvinfer1::Dims& dims) {
  const int32_t rank = std::max<int32_t>(0, dims.nbDims);
  return {type_of(type), std::vector<int64_t>(dims.d, dims.d + rank)};
}

template <typename Pick>
std::vector<Tensor> tensors_of(const DynamicPluginTensorDesc* in, int32_t count, Pick dims) {
  std::vector<Tensor> tensors;
  for (int32_t i = 0; i < count; i++) tensors.push_back(tensor_of(in[i].desc.type, dims(in[i])));
  return tensors;
}

// Tactics as TensorRT sees them: 0 is its own default, 1 the kernels' choice by shape, from 2 on a kernel's tactic.
int32_t tactic_to_trt(int32_t tactic) { return tactic + 2; }
int32_t tactic_from_trt(int32_t tactic) { return tactic <= 1 ? -1 : tactic - 2; }

// A tactic timed at one length is right for lengths near it; one token is served by another kernel than many.
bool near(int64_t length, int64_t tuned) {
  return (length == 1) == (tuned == 1) && length <= 2 * tuned && tuned <= 2 * length;
}

}  // namespace

Plugin::Plugin(const Attributes& attributes, std::string node)
    : attributes_(attributes), matcher_(std::make_shared<Matcher>(attributes)), node_(std::move(node)),
      kernel_(attributes.op().make(attributes)),
      sized_for_gpu_(gpu_present()) {}

Plugin::Plugin(const Plugin& other)
    : IPluginV3(), IPluginV3OneCore(), IPluginV3OneBuild(), IPluginV3OneRuntime(), attributes_(other.attributes_),
      matcher_(other.matcher_), node_(other.node_), kernel_(other.kernel_->clone()), inputs_(other.inputs_),
      tuned_{other.tuned_[0], other.tuned_[1]}, sized_for_gpu_(other.sized_for_gpu_), tactic_(other.tactic_),
      launch_tactic_(other.launch_tactic_), launch_workspace_(other.launch_workspace_), ready_(other.ready_) {}

void Plugin::restore(int32_t tuned_batch, int32_t tuned_seqlen, bool sized_for_gpu) {
  tuned_[0] = tuned_batch, tuned_[1] = tuned_seqlen, sized_for_gpu_ = sized_for_gpu;
}

int32_t Plugin::fail(const std::string& text) const noexcept {
  return guarded(-1, [&] {
    log_error(std::string(attributes_.op().name) + " '" + node_ + "': " + text);
    return -1;
  });
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&] { return new Plugin(*this); });
}

const char* Plugin::getPluginName() const noexcept { return attributes_.op().name; }
const char* Plugin::getPluginVersion() const noexcept { return kVersion; }
const char* Plugin::getPluginNamespace() const noexcept { return kNamespace; }

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nb_inputs, const DynamicPluginTensorDesc*,
                                int32_t nb_outputs) noexcept {
  return guarded(-1, [&] {
    if (nb_outputs != getNbOutputs()) {
      return fail("the node has " + std::to_string(nb_outputs) + " outputs, not " + std::to_string(getNbOutputs()));
    }
    Sizes declared, best;
    std::string wrong = matcher_->match(tensors_of(in, nb_inputs, [](auto& d) { return d.desc.dims; }), &declared);
    if (!wrong.empty()) return fail(wrong);
    inputs_ = tensors_of(in, nb_inputs, [](auto& d) { return d.opt; });
    wrong = matcher_->match(inputs_, &best);
    if (!wrong.empty()) return fail(wrong);
    tuned_[0] = best.at('B'), tuned_[1] = best.at('L');
    return 0;
  });
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs, const DataType* input_types,
                                   int32_t nb_inputs) const noexcept {
  return guarded(-1, [&] {
    const size_t expected = input_specs().size();
    if (nb_outputs != getNbOutputs() || nb_inputs < 0 || static_cast<size_t>(nb_inputs) != expected) {
      return fail("the node has " + std::to_string(nb_inputs) + " inputs and " + std::to_string(nb_outputs) +
                  " outputs, its attributes ask for " + std::to_string(expected) + " and " +
                  std::to_string(getNbOutputs()));
    }
    for (const OutputSpec& output : matcher_->signature().outputs)
      *output_types++ = output.columns ? DataType::kFLOAT : input_types[output.like];
    return 0;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nb_inputs, const nvinfer1::DimsExprs*,
                                int32_t, nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                                nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(-1, [&] {
    if (nb_outputs != getNbOutputs() || static_cast<size_t>(nb_inputs) != input_specs().size()) {
      return fail("the node has " + std::to_string(nb_inputs) + " inputs and " + std::to_string(nb_outputs) +
                  " outputs");
    }
    for (const OutputSpec& output : matcher_->signature().outputs) {
      *outputs = inputs[output.like];
      if (output.columns) outputs->d[outputs->nbDims++] = builder.constant(output.columns);
      outputs++;
    }
    return 0;
  });
}

bool Plugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out, int32_t nb_inputs,
                                       int32_t nb_outputs) noexcept {
  return guarded(false, [&] {
    if (pos < 0 || pos >= nb_inputs + nb_outputs) return false;
    const PluginTensorDesc& desc = in_out[pos].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const Signature& signature = matcher_->signature();
    if (pos >= nb_inputs) {
      if (pos - nb_inputs >= getNbOutputs()) return false;
      const OutputSpec& output = signature.outputs[static_cast<size_t>(pos - nb_inputs)];
      return desc.type == (output.columns ? DataType::kFLOAT : in_out[output.like].desc.type);
    }
    // Of the others only those before `pos` are decided; the activations' own type is.
    const auto activation = std::min(signature.activation, static_cast<size_t>(pos));
    return matcher_->type_allowed(static_cast<size_t>(pos), type_of(desc.type), type_of(in_out[activation].desc.type));
  });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t nb_inputs, const DynamicPluginTensorDesc*,
                                int32_t) const noexcept {
  return guarded<size_t>(0, [&]() -> size_t {
    Sizes sizes;
    const std::vector<Tensor> largest = tensors_of(in, nb_inputs, [](auto& d) { return d.max; });
    const std::string wrong = matcher_->match(largest, &sizes);
    if (!wrong.empty()) {
      fail(wrong);
      return 0;
    }
    return workspace_bound(*kernel_, sizes, largest, sized_for_gpu_, 0);
  });
}

std::vector<int32_t> Plugin::tactics_at_optimum() {
  Sizes sizes;
  if (!gpu_present() || !matcher_->match(inputs_, &sizes).empty()) return {};
  if (kernel_->set_shapes(sizes, inputs_) != MAMBA_OK) return {};
  const size_t bound = workspace_bound(*kernel_, sizes, inputs_, sized_for_gpu_, 0);
  std::vector<int32_t> found = {-1};
  for (const int32_t tactic : kernel_->tactics()) {
    if (kernel_->workspace(tactic) <= bound && found.size() < kMaxTactics) found.push_back(tactic);
  }
  return found.size() > 2 ? found : std::vector<int32_t>{};  // with one kernel there is nothing to time
}

int32_t Plugin::getNbTactics() noexcept {
  return guarded(0, [&] { return static_cast<int32_t>(tactics_at_optimum().size()); });
}

int32_t Plugin::getValidTactics(int32_t* tactics, int32_t nb_tactics) noexcept {
  return guarded(-1, [&] {
    const std::vector<int32_t> found = tactics_at_optimum();
    if (found.size() != static_cast<size_t>(nb_tactics)) return fail("the number of tactics changed");
    std::transform(found.begin(), found.end(), tactics, tactic_to_trt);
    return 0;
  });
}

const char* Plugin::getTimingCacheID() noexcept {
  return guarded<const char*>(nullptr, [&] {
    cache_id_ = "mamba-" MAMBA_PLUGIN_ID;
    for (const double value : attributes_.values()) cache_id_ += "," + std::to_string(value);
    return cache_id_.c_str();
  });
}

int32_t Plugin::setTactic(int32_t tactic) noexcept {
  tactic_ = tactic_from_trt(tactic);
  ready_ = false;
  return 0;
}

// Sets launch_tactic_ and launch_workspace_ for the shape the kernel has been given.
int Plugin::choose_tactic(const Sizes& sizes) {
  const auto take = [&](int tactic) {
    const size_t need = kernel_->workspace(tactic);
    if (need > 0 && need > workspace_bound(*kernel_, sizes, inputs_, sized_for_gpu_, need)) return false;
    launch_tactic_ = tactic, launch_workspace_ = need;
    return true;
  };
  const bool timed_here = near(sizes['B'], tuned_[0]) && (sizes['L'] < 0 || near(sizes['L'], tuned_[1]));
  const std::vector<int32_t> valid = kernel_->tactics();
  if (tactic_ >= 0 && timed_here && std::find(valid.begin(), valid.end(), tactic_) != valid.end() && take(tactic_))
    return MAMBA_OK;
  // The kernels' own choice comes first in their list. It is made here once, not at every launch.
  if (std::any_of(valid.begin(), valid.end(), take) || take(-1)) return MAMBA_OK;
  return MAMBA_ERROR_WORKSPACE;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t nb_inputs, const PluginTensorDesc*,
                              int32_t) noexcept {
  return guarded(-1, [&] {
    ready_ = false;
    std::vector<Tensor> inputs;
    for (int32_t i = 0; i < nb_inputs; i++) inputs.push_back(tensor_of(in[i].type, in[i].dims));
    Sizes sizes;
    const std::string wrong = matcher_->match(inputs, &sizes);
    if (!wrong.empty()) return fail(wrong);
    inputs_ = std::move(inputs);
    int status = kernel_->set_shapes(sizes, inputs_);
    if (status == MAMBA_OK) status = choose_tactic(sizes);
    if (status != MAMBA_OK) return fail(mamba_status_string(status));
    ready_ = true;
    return 0;
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(-1, [&] {
    if (!ready_ && onShapeChange(in, static_cast<int32_t>(input_specs().size()), out, getNbOutputs()) != 0) return -1;
    if (!inputs || !outputs) return fail("no buffers were given");
    if (launch_workspace_ > 0 && !workspace)
      return fail("the workspace is null, " + std::to_string(launch_workspace_) + " bytes are needed");
    int status = kernel_->launch(inputs, outputs, launch_tactic_, workspace, launch_workspace_, stream);
    if (status == MAMBA_ERROR_TACTIC)  // chosen for buffers aligned as TensorRT's are, and these are not
      status = kernel_->launch(inputs, outputs, -1, workspace, launch_workspace_, stream);
    if (status == MAMBA_OK) return 0;
    for (size_t i = 0; i < input_specs().size() && status == MAMBA_ERROR_NULL_POINTER; i++)
      if (!inputs[i]) return fail("input " + input_specs()[i].name + " has no buffer");
    return fail(mamba_status_string(status));
  });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return guarded<const nvinfer1::PluginFieldCollection*>(nullptr, [&] {
    using nvinfer1::PluginFieldType;
    const std::vector<AttributeSpec>& specs = attributes_.op().attributes;
    fields_.clear();
    field_ints_.assign(specs.size(), 0);
    field_floats_.assign(specs.size(), 0.0F);
    for (size_t i = 0; i < specs.size(); i++) {
      const double value = attributes_.values()[i];
      field_floats_[i] = static_cast<float>(value);
      if (specs[i].is_float) {
        fields_.emplace_back(specs[i].name, &field_floats_[i], PluginFieldType::kFLOAT32, 1);
      } else {
        field_ints_[i] = static_cast<int32_t>(value);
        fields_.emplace_back(specs[i].name, &field_ints_[i], PluginFieldType::kINT32, 1);
      }
    }
    field_device_ = sized_for_gpu_ ? 1 : 0;
    fields_.emplace_back(kVersionField, kVersion, PluginFieldType::kCHAR, 1);
    fields_.emplace_back(kTunedField, tuned_, PluginFieldType::kINT32, 2);
    fields_.emplace_back(kDeviceField, &field_device_, PluginFieldType::kINT32, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
  });
}

}  // namespace mamba_plugin
