"""Stochastic sparse attention for long-context LLM inference.

``santa.decode`` (also ``torch.ops.santa.decode``) computes one decode step of attention: it reads every key but only a
few value rows, drawn from the softmax distribution, and returns an unbiased estimate of the attention output.
"""

from santa import _library

_library.load()

from santa import distributed, integrations  # noqa: E402
from santa.arguments import Budget, KvLayout, Sampler, ScoreSampler  # noqa: E402
from santa.bernoulli import append_k_features, append_k_features_paged  # noqa: E402
from santa.config import SantaConfig  # noqa: E402
from santa.float8 import quantize_kv  # noqa: E402
from santa.merge import merge_state, merge_states  # noqa: E402
from santa.ops import decode, decode_paged, default_min_sampled_len  # noqa: E402
from santa.prefill import PrefillStats, prefill  # noqa: E402
from santa.proposal import ProposalKeys, append_proposal_keys, make_proposal_keys  # noqa: E402
from santa.select import Gqa, Selection, sample_select  # noqa: E402
from santa.shapes import PaddingWarning, padded_head_dim  # noqa: E402
from santa.wrapper import BatchDecodeWithPagedKVCacheWrapper  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "Budget",
    "Gqa",
    "KvLayout",
    "PaddingWarning",
    "PrefillStats",
    "ProposalKeys",
    "Sampler",
    "SantaConfig",
    "ScoreSampler",
    "Selection",
    "append_k_features",
    "append_k_features_paged",
    "append_proposal_keys",
    "decode",
    "decode_paged",
    "default_min_sampled_len",
    "distributed",
    "integrations",
    "make_proposal_keys",
    "merge_state",
    "merge_states",
    "padded_head_dim",
    "prefill",
    "quantize_kv",
    "sample_select",
]
