// Scratch memory of one call on a device, from the provider's arena. It goes back once the launch is in the stream, which
// orders its reuse.
#pragma once

#include "api.h"

namespace mamba::ort {

class Workspace {
 public:
  Workspace(const Context& context, std::size_t bytes) : api_(context.api()) {
    if (bytes == 0) return;
    check(api_, api_.KernelContext_GetAllocator(context.get(), context.memory_of(0), &allocator_));
    memory_ = allocator_->Alloc(allocator_, bytes);
    if (memory_ == nullptr) {
      api_.ReleaseAllocator(allocator_);
      throw Error("out of device memory");
    }
  }
  ~Workspace() {
    if (memory_ == nullptr) return;
    allocator_->Free(allocator_, memory_);
    api_.ReleaseAllocator(allocator_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

}  // namespace mamba::ort
