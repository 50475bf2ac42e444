"""Proposal keys: a decode loop over a growing cache that reads 4 bits of each key, and K and V where rows are drawn."""

import torch

import santa

k, v = torch.randn(2, 1, 2048, 2, 64)  # [batch, max_kv_len, num_kv_heads, head_dim]
v += 1.0
lens = torch.tensor([2000], dtype=torch.int32)  # a prompt
proposal = santa.make_proposal_keys(k, lens)
for step in range(3):
    q, new = torch.randn(1, 8, 64), torch.randn(1, 1, 2, 64)  # of the next token
    k[:, 2000 + step], v[:, 2000 + step] = new[:, 0], torch.randn(1, 2, 64) + 1.0
    santa.append_proposal_keys(proposal, new, lens[:, None])
    lens += 1
    options = {"kv_lens": lens, "num_samples": 64, "min_sampled_len": 0, "return_rows_read": True}
    out, lse, rows = santa.decode(q, k, v, proposal=proposal, **options)
    exact, _ = santa.decode(q, k, v, kv_lens=lens, num_samples=0)
    print(f"{rows.tolist()} rows of {lens.item()} read, error {(out - exact).norm() / exact.norm():.1%}")
