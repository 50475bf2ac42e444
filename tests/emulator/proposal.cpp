#include "emulator.h"

#include "cuda/proposal/launch.cu"
#include "cuda/proposal/one_pass.cuh"
