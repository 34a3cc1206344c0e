#pragma once
#include "cuda_runtime.h"
using CUtensorMap = emu::Map;
