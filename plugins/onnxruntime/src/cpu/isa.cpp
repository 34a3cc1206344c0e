// All kernels for one instruction set: CMake compiles this file once for each, with its flags and MAMBA_ISA.
#include "conv.inl"
#include "update.inl"

#define MAMBA_TEXT_OF(x) #x
#define MAMBA_TEXT(x) MAMBA_TEXT_OF(x)

namespace mamba::MAMBA_ISA {

extern const Kernels table;
const Kernels table = {
    MAMBA_TEXT(MAMBA_ISA),
    {scan_tasks, scan_scratch, scan_run},
    {update_tasks, update_scratch, update_run},
    {conv_tasks, conv_scratch, conv_run},
};

}  // namespace mamba::MAMBA_ISA
