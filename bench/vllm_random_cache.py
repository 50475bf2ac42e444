"""A KV connector for bench_vllm.py: every block of vLLM's cache holds random numbers, and prompts count as computed.

vLLM loads it by name, in the process that runs the model and in the one that schedules.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

# Of blocks whose random numbers are made at once.
_BLOCKS_AT_ONCE = 1024


class RandomCacheConnector(DecodeBenchConnector):
    """vLLM's DecodeBenchConnector, which gives each request blocks of its own and computes the last token of its prompt
    alone. It would fill these with one number, and 8-bit ones with zeros; here all blocks hold N(0, 1) from the start.

    Requests whose kv_transfer_params has "prefill" are computed as ever.
    """

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        for cache in kv_caches.values():
            for blocks in cache.split(_BLOCKS_AT_ONCE):
                if blocks.dtype == torch.uint8:  # 8-bit floats, to vLLM
                    numbers = torch.randn(blocks.shape, dtype=torch.bfloat16, device=blocks.device)
                    blocks.view(torch.float8_e4m3fn).copy_(numbers)
                else:
                    blocks.normal_()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if (request.kv_transfer_params or {}).get("prefill"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
