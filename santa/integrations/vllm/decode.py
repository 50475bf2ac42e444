"""What one layer does in a decode step, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from santa.arguments import KvLayout
from santa.config import SantaConfig
from santa.proposal import ProposalKeys, make_proposal_keys

from .cache import LayerCache

# Of the cache that only a measurement of memory sees.
_PROFILED_PAGE_SIZE = 256


@dataclass(frozen=True)
class DecodeRows:
    """The rows of a step that have one new token, the same for all layers.

    Attributes:
        page_table: int32 [rows, max_pages], vLLM's block table.
        kv_lens: int32 [rows], the new token's key included; 0 in rows that pad a CUDA graph.
        row_seeds: int64 [rows].
        max_kv_len: bound of kv_lens that the host knows; of a CUDA graph, for all its replays.
    """

    page_table: Tensor
    kv_lens: Tensor
    row_seeds: Tensor
    max_kv_len: int


@dataclass(frozen=True)
class DecodeLayer:
    """What a layer has of its own.

    Attributes:
        num_samples, sampler, budget, min_sampled_len, seed, sm_scale, window_left, logits_soft_cap, first_kv_head: as
            in `santa.decode_paged`, with integers for enums.
        proposes: steps draw by proposal keys.
    """

    num_samples: int
    sampler: int
    budget: int | None
    min_sampled_len: int | None
    seed: int
    sm_scale: float
    window_left: int
    logits_soft_cap: float
    first_kv_head: int
    proposes: bool

    @classmethod
    def of(
        cls,
        config: SantaConfig,
        index: int,
        *,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
        first_kv_head: int = 0,
        has_codes: bool = True,
    ) -> DecodeLayer:
        """Layer `index` of a model with these settings: its stream is seed + index.

        has_codes: whether the layer can have proposal keys, if the settings ask for them.
        """
        return cls(
            num_samples=config.samples_in_layer(index),
            sampler=int(config.sampler),
            budget=None if config.budget is None else int(config.budget),
            min_sampled_len=config.min_sampled_len,
            seed=config.seed + index,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            first_kv_head=first_kv_head,
            proposes=config.proposes(index) and has_codes,
        )

    def run(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        cache: LayerCache,
        rows: DecodeRows,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        sinks: Tensor | None = None,
        proposal: ProposalKeys | None = None,
    ) -> None:
        """Attention of one new token per row, into out and lse. Rows without keys give 0 and -inf.

        Args:
            out: [rows, num_qo_heads, head_dim], q's dtype, contiguous.
            lse: float32 [rows, num_qo_heads].
            q: [rows, num_qo_heads, head_dim], bfloat16 or float16.
            cache: q's dtype, or float8_e4m3fn with k_scale and v_scale, float32 [] or [1].
            sinks: float32 [num_qo_heads].
            proposal: of the cache, where the layer `proposes`.

        Raises:
            ValueError: as `santa.decode_paged`.
        """
        # The operator itself: its typed function checks in every layer of every step what is settled here.
        decode = torch.ops.santa.decode_paged_out if proposal is None else torch.ops.santa.decode_proposal_paged_out
        decode(
            out,
            lse,
            q,
            cache.k,
            cache.v,
            **({} if proposal is None else proposal.tensors()),
            page_table=rows.page_table,
            kv_lens=rows.kv_lens,
            max_kv_len=rows.max_kv_len,
            num_samples=self.num_samples,
            sampler=self.sampler,
            budget=self.budget,
            kv_layout=int(KvLayout.NHD),
            sm_scale=self.sm_scale,
            seed=self.seed,
            row_seeds=rows.row_seeds,
            min_sampled_len=self.min_sampled_len,
            k_scale=k_scale,
            v_scale=v_scale,
            window_left=self.window_left,
            logits_soft_cap=self.logits_soft_cap,
            sinks=sinks,
            first_kv_head=self.first_kv_head,
        )

    def claim_memory(self, q: Tensor, num_kv_heads: int, cache_dtype: torch.dtype, rows: int, max_kv_len: int) -> None:
        """A step over `rows` rows without keys: takes the memory that as many rows of up to max_kv_len keys would, and
        gives it back, so that who measures the peak finds it.

        Args:
            q: [any, num_qo_heads, head_dim], of whose shape, dtype and device a step would be.
        """
        num_qo_heads, head_dim = q.shape[1:]
        pages = -(-max_kv_len // _PROFILED_PAGE_SIZE)
        int32 = {"dtype": torch.int32, "device": q.device}
        none = torch.zeros(1, **int32)
        page = q.new_zeros(1, _PROFILED_PAGE_SIZE, num_kv_heads, head_dim).to(cache_dtype)
        proposal = make_proposal_keys(page, none, page_table=none[:, None]) if self.proposes else None
        out = q.new_empty(rows, num_qo_heads, head_dim)
        self.run(
            out,
            out.new_empty(rows, num_qo_heads, dtype=torch.float32),
            torch.zeros_like(out),
            LayerCache(page, page),
            DecodeRows(
                page_table=torch.zeros(rows, pages, **int32),
                kv_lens=torch.zeros(rows, **int32),
                row_seeds=torch.zeros(rows, dtype=torch.int64, device=q.device),
                max_kv_len=max_kv_len,
            ),
            proposal=proposal,
        )
