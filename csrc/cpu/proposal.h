#pragma once

#include "proposal_params.h"

namespace santa::cpu {

// All stages, with rows proposed by the codes; throws std::invalid_argument where a row's range lies outside the cache.
void decode_proposal(const ProposalParams& p);

// Throws std::invalid_argument, before anything is written, where a position is outside the cache.
void append_proposal(const AppendProposalParams& p);

}  // namespace santa::cpu
