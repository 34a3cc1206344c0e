// Chooses the instruction set when the library is first used.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mamba {

#define MAMBA_DECLARE(isa)   \
  namespace isa {            \
  extern const Kernels table; \
  }
#if defined(__x86_64__)
MAMBA_DECLARE(avx512)
MAMBA_DECLARE(avx2)
#endif
MAMBA_DECLARE(base)

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("MAMBA_ORT_ISA");
  const auto allowed = [wanted](const Kernels& k) { return wanted == nullptr || std::strcmp(wanted, k.name) == 0; };
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && allowed(avx512::table)) return avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed(avx2::table)) return avx2::table;
#endif
  return base::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mamba
