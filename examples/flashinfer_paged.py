"""Code written for FlashInfer's paged decode: one plan for a step, one run per layer; values sampled, then exact."""

import torch

import santa

page_size, lens = 16, [16000, 9000]
pages = [-(-length // page_size) for length in lens]
indptr = torch.tensor([0, pages[0], sum(pages)], dtype=torch.int32)
indices = torch.randperm(sum(pages), dtype=torch.int32)
last_page_len = torch.tensor([(length - 1) % page_size + 1 for length in lens], dtype=torch.int32)
kv_cache = 1.0 + torch.randn(2, sum(pages), 2, page_size, 4, 128)  # [layers, num_pages, 2, page_size, heads, head_dim]

wrapper = santa.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))  # it needs no workspace, but its device
wrapper.plan(indptr, indices, last_page_len, 16, 4, 128, page_size, q_data_type=torch.float32, num_samples=128)
for layer in range(2):
    q = torch.randn(2, 16, 128)  # [batch, num_qo_heads, head_dim]
    out = wrapper.run(q, kv_cache[layer], seed=layer)  # a seed for each layer: errors are independent
    exact, lse = wrapper.run(q, kv_cache[layer], num_samples=0, return_lse=True)  # lse is to base 2, as FlashInfer's
    print(f"layer {layer}: out is off by {(out - exact).norm() / exact.norm():.1%}")
