// Reads the vector types and DD_KERNEL for the one instruction set that DD_ISA and DD_LANES name; each_isa.h includes
// this file once for every set.

#include "common/vec.h"
#include "common/vec_math.h"
#include "common/vec_memory.h"
#include DD_KERNEL
