#include "emulator.h"

#include "cuda/prefill/launch.cu"
#include "cuda/prefill/score.cuh"
