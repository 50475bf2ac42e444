"""csrc/core as the test-only module `santa_core_test`, and what its tests draw from."""

from __future__ import annotations

import build_test_module
from hypothesis import strategies as st

core = build_test_module.build()

MULTINOMIAL, STRATIFIED, SYSTEMATIC, GROUPED = (
    core.Sampler.MULTINOMIAL,
    core.Sampler.STRATIFIED,
    core.Sampler.SYSTEMATIC,
    core.Sampler.GROUPED,
)
SORTED = [STRATIFIED, SYSTEMATIC, GROUPED]
MAX_TOTAL = 2**32 - 1  # what Draws promises to take: a total of 32 bits
MAX_DRAWS = 2**31 - 1  # and R < 2^31; num_samples and gqa_group_size at their limits need 2^30

int64s = st.integers(-(2**63), 2**63 - 1)
uint32s = st.integers(0, 2**32 - 1)
kv_lens = st.integers(0, 2**31 - 1)
totals = st.one_of(st.integers(1, 100), st.integers(1, MAX_TOTAL), st.just(2**31), st.just(MAX_TOTAL))
small_budgets = st.integers(1, 600)
budgets = st.one_of(st.integers(1, 5000), st.integers(1, MAX_DRAWS), st.sampled_from([2**20, 2**20 * 1024, MAX_DRAWS]))
streams = st.builds(core.RandomStream, int64s, int64s, kv_lens, st.integers(0, 2**16))


def make_draws(sampler, stream, num_draws, total, segment=0):
    return core.Draws(sampler=sampler, stream=stream, segment=segment, num_draws=num_draws, total=total)
