"""What the layers of one step have in common: rows with one new token for santa, all others for FlashAttention."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .cache import bytes_of_codes
from .compat import watch_runners
from .decode import DecodeRows
from .requests import StepRows
from .settings import check_engine, describe, least_prompt

logger = logging.getLogger("vllm.santa")


@dataclass
class SantaMetadata:
    """Attributes of the whole step, named as FlashAttention's, and its two parts.

    Attributes:
        decode: the first `num_decodes` rows, which have one new token each; None if there is none.
        prefill: FlashAttention's own metadata of the other rows, as if they were alone; None if there is none.
        prompt: first and last token, exclusive, of the row with the most new tokens, if they are enough to tell the
            statistics of proposal keys.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    max_seq_len: int
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_decodes: int
    decode: DecodeRows | None
    prefill: FlashAttentionMetadata | None
    prompt: tuple[int, int] | None = None


def max_rows(vllm_config: Any) -> int:
    """Most rows that a decode step has, those that pad a CUDA graph included."""
    graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, graph)


class SantaMetadataBuilder(FlashAttentionMetadataBuilder):
    """Splits each step, and keeps row seeds where captured CUDA graphs find them.

    Raises:
        ValueError, TypeError: settings, or an engine, that the backend refuses (settings.py).
        RuntimeError: a vLLM whose model runners do not have the methods that row seeds need.
    """

    # The parent's says that graphs of mixed batches may be captured too. Ours are of one new token per row.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings = check_engine(vllm_config)
        # Rows with one new token come first.
        self._init_reorder_batch_threshold(1)
        # vLLM 0.33 refreshes FlashAttention's schedule between drafted tokens; here there is none to refresh.
        self.supports_draft_decode_metadata_update = False
        self._max_model_len = vllm_config.model_config.max_model_len
        self._row_seeds = torch.zeros(max_rows(vllm_config), dtype=torch.int64, device=device)
        self._written: tuple[int, ...] = ()
        watch_runners()
        logger.info("santa: %d attention layers decode with %s", len(layer_names), describe(settings))
        self._least_prompt = least_prompt(vllm_config.scheduler_config)
        layers = vllm_config.compilation_config.static_forward_context
        self._keeps_codes = settings.keys == "proposal" and self._log_codes(kv_cache_spec, layer_names, layers)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any
    ) -> SantaMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("santa: causal is not True; the backend has causal attention alone")
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=1)
        prefill = None
        if num_prefills > 0:
            part = common if num_decodes == 0 else _without_rows(common, num_decodes, num_decode_tokens)
            prefill = super().build(0, part, fast_build, **kwargs)
        rows = min(num_decodes, num_decode_tokens)
        decode = None
        if rows > 0:
            decode = DecodeRows(
                page_table=common.block_table_tensor[:rows],
                kv_lens=common.seq_lens[:rows],
                row_seeds=self._seeds_on_device(rows),
                max_kv_len=common.max_seq_len,
            )
        return SantaMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            num_decodes=rows,
            decode=decode,
            prefill=prefill,
            prompt=None if prefill is None else self._prompt(common),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> SantaMetadata:
        # The graph has to hold for the longest rows that there will be.
        longest = max(common_attn_metadata.max_seq_len, self._max_model_len)
        return self.build(0, common_attn_metadata.replace(max_seq_len=longest))

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _prompt(self, common: Any) -> tuple[int, int] | None:
        if not self._keeps_codes or common.max_query_len < self._least_prompt:
            return None
        starts = common.query_start_loc_cpu
        row = int(starts.diff().argmax())
        first, last = starts[row : row + 2].tolist()
        return (first, last) if last - first >= self._least_prompt else None

    def _log_codes(self, spec: Any, layer_names: list[str], layers: Mapping[str, Any]) -> bool:
        """Say how much of the cache is proposal keys; returns whether any is."""
        count = sum(layers[name].impl.keeps_codes(name) for name in layer_names if name in layers)
        if count > 0:
            codes = bytes_of_codes(spec.block_size, spec.num_kv_heads, spec.head_size)
            logger.info(
                "santa: %d of them keep proposal keys, %d of the %d bytes of each block",
                *(count, codes, spec.page_size_bytes),
            )
        return count > 0

    def _seeds_on_device(self, rows: int) -> Tensor:
        """Row seeds of the step, copied where the batch has changed. A graph that is replayed reads them in place."""
        seeds = StepRows.row_seeds[: len(self._row_seeds)]
        if seeds != self._written:
            host = torch.tensor(seeds, dtype=torch.int64, pin_memory=self._row_seeds.is_cuda)
            self._row_seeds[: len(seeds)].copy_(host, non_blocking=True)
            self._written = seeds
        return self._row_seeds[:rows]


def _without_rows(common: Any, rows: int, tokens: int) -> Any:
    """The step without its first rows, which have as many tokens."""
    return common.replace(
        query_start_loc=common.query_start_loc[rows:] - tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[rows:] - tokens,
        seq_lens=common.seq_lens[rows:],
        num_reqs=common.num_reqs - rows,
        num_actual_tokens=common.num_actual_tokens - tokens,
        block_table_tensor=common.block_table_tensor[rows:],
        slot_mapping=common.slot_mapping[tokens:],
        **{
            name: value[rows:]
            for name in ("seq_lens_cpu_upper_bound", "is_prefilling")
            if (value := getattr(common, name, None)) is not None
        },
    )
