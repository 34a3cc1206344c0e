#pragma once

#include "mamba/common.h"
#include "ssd_plan.cuh"

namespace mamba {
namespace ssd {

struct GenericPlan {
  Kernel scan, state;
  int chunk, cols, threads, shared;
};

// False when d_state is too large for the shared memory of a block.
bool generic_plan(int dtype, int d_state, int shared_limit, GenericPlan* plan);

}  // namespace ssd
}  // namespace mamba
