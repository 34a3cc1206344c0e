// No exception leaves a noexcept method: running out of host memory becomes an error value, not an abort.
#ifndef MAMBA_PLUGIN_GUARD_H_
#define MAMBA_PLUGIN_GUARD_H_

#include <exception>

#include "log.h"

namespace mamba_plugin {

template <typename Result, typename Body>
Result guarded(Result on_error, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    log_error(error.what());
  } catch (...) {
    log_error("unknown exception in the mamba plugin");
  }
  return on_error;
}

}  // namespace mamba_plugin
#endif  // MAMBA_PLUGIN_GUARD_H_
