#include "emulator.h"

#include "cuda/bernoulli/launch.cu"
#include "cuda/bernoulli/one_pass.cuh"
