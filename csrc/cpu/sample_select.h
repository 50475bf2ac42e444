#pragma once

#include "select_params.h"

namespace santa::cpu {

// Chooses the key blocks of every head. The workspace of p is not used.
void sample_select(const SampleSelectParams& p);

}  // namespace santa::cpu
