#include "emulator.h"

#include "cuda/bernoulli/score_bf16.cu"
#include "cuda/bernoulli/score_fp16.cu"
