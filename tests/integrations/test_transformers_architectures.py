"""Every causal architecture of the installed Transformers: equal to its eager attention, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

import transformers
from helpers.architectures import (
    NO_STATIC_CACHE,
    NOT_TRIED,
    PAD,
    PARTLY,
    REFUSED,
    SAMPLE,
    SDPA_IS_THE_TRUTH,
    SELECTING,
    VOCAB,
    architectures,
    make_tiny,
    support_table,
)
from packaging.version import Version
from transformers import PreTrainedModel

import santa
from santa.integrations.transformers import attach, report

PROMPT_LEN, NEW_TOKENS, PADDING = 12, 4, 4
TRIED = [name for name in architectures() if name not in NOT_TRIED]
DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"


@torch.no_grad()
def logits_of(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Of a greedy generation, [2, NEW_TOKENS, VOCAB]; the second row is padded on the left."""
    input_ids = torch.randint(2, VOCAB, (2, PROMPT_LEN), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, :PADDING], attention_mask[1, :PADDING] = PAD, 0
    result = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **options,
    )
    return torch.stack(result.logits, dim=1)


@pytest.mark.parametrize(
    "model_type", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in TRIED]
)
def test_equal_to_eager_or_refused(model_type: str, decode_calls: list[dict[str, Any]]) -> None:
    model = make_tiny(model_type)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            attach(model, santa.SantaConfig(num_samples=0))
        return
    if model_type in SDPA_IS_THE_TRUTH:
        model.set_attn_implementation("sdpa")
    caches = [{}] if model_type in NO_STATIC_CACHE else [{}, {"cache_implementation": "static"}]
    expected = [logits_of(model, **cache) for cache in caches]
    for cache, logits in zip(caches, expected, strict=True):
        attach(model, santa.SantaConfig(num_samples=0))
        decode_calls.clear()
        error = (logits_of(model, **cache) - logits).abs().max()
        assert error < 1e-3 * logits.std()
        is_partly = any("head_dim" in layer.reason for layer in report(model).with_status("other"))
        assert is_partly == (model_type in PARTLY)
        assert bool(decode_calls) == (model_type not in SELECTING or model_type == "minimax_m3_vl_text")
        # What santa computed is what the model used: with one draw per head the same run is far off.
        if decode_calls:
            attach(model, santa.SantaConfig(num_samples=1, min_context=0))
            assert report(model).with_status("sampled")
            assert (logits_of(model, **cache) - logits).abs().max() > 10 * error + 1e-3 * logits.std()


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="the lists are those of 5.24")
def test_the_lists_are_of_the_architectures_there_are() -> None:
    known = set(architectures())
    assert len(SAMPLE) == 25
    for names in (SAMPLE, REFUSED, NOT_TRIED, SELECTING, NO_STATIC_CACHE, SDPA_IS_THE_TRUTH):
        assert set(names) <= known
    assert not set(REFUSED) & set(NOT_TRIED)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="the table is that of 5.24")
def test_the_docs_have_the_table() -> None:
    assert support_table() in DOCS.read_text()
