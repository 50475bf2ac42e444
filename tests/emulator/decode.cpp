#include "emulator.h"

#include "cuda/decode/launch.cu"
#include "cuda/decode/stages.cuh"
