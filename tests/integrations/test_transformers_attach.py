"""What `attach` takes, refuses and reports."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.architectures import make_tiny
from helpers.models import SHAPE, VOCAB, generate, make_model, make_prompt
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import santa
from santa.integrations.transformers import attach, record_rows_read, report

EXACT = santa.SantaConfig(num_samples=0)
SAMPLED = santa.SantaConfig(num_samples=2, min_sampled_len=0)


def statuses(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.status for layer in report(model).layers}


# The report -------------------------------------------------------------------------------------------------


def test_report_of_a_model_that_samples_in_some_layers() -> None:
    model = attach(make_model(), santa.SantaConfig(num_samples=2, min_sampled_len=0, layers=[1]))
    assert statuses(model) == {"model.layers.0.self_attn": "exact", "model.layers.1.self_attn": "sampled"}
    assert repr(report(model)) == (
        "santa in LlamaForCausalLM: 1 sampled, 1 exact, 0 not santa's\n"
        "  sampled      LlamaAttention, layer 1\n"
        "  exact        LlamaAttention, layer 0: layers leaves it out"
    )


def test_report_follows_the_model() -> None:
    model = make_model()
    assert set(statuses(model).values()) == {"other"}
    assert "its configuration says attn_implementation='sdpa'" in repr(report(model))
    attach(model, EXACT)
    assert set(statuses(model).values()) == {"exact"} and "num_samples is 0" in repr(report(model))
    model.set_attn_implementation("sdpa")
    assert set(statuses(model).values()) == {"other"}


def test_report_of_many_layers_is_short() -> None:
    model = make_model(num_hidden_layers=7)
    attach(model, santa.SantaConfig(num_samples=2, min_sampled_len=0, layers=[0, 1, 2, 4, 6]))
    assert "LlamaAttention, layers 0-2, 4, 6" in repr(report(model))
    assert "LlamaAttention, layers 3, 5: layers leaves it out" in repr(report(model))


@pytest.mark.parametrize(
    ("context", "settings", "reason"),
    [
        (8192, {}, "never samples: its context ends at 8192 tokens, and min_sampled_len is 8192"),
        (512, {"min_sampled_len": 1024}, "its context ends at 512 tokens, and min_sampled_len is 1024"),
        (131072, {"num_samples": 8192}, "its context ends at 131072 tokens, and min_sampled_len is 131072"),
    ],
)
def test_settings_that_never_sample_warn_and_are_reported(context: int, settings: dict[str, int], reason: str) -> None:
    model = make_model(max_position_embeddings=context)
    with pytest.warns(UserWarning, match="no layer samples with these settings"):
        attach(model, santa.SantaConfig(**{"num_samples": 128} | settings))
    assert report(model).with_status("sampled") == () and reason in repr(report(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, santa.SantaConfig(num_samples=8, min_sampled_len=0))
        attach(model, EXACT)
        attach(make_model(max_position_embeddings=32768), santa.SantaConfig(num_samples=128))


def test_a_window_that_never_samples_is_reported() -> None:
    model = make_model("mistral", max_position_embeddings=32768)
    with pytest.warns(UserWarning, match="no layer samples"):
        attach(model, santa.SantaConfig(num_samples=128))
    assert "its window of 12 keys is shorter than min_sampled_len, 8192" in repr(report(model))


# Which layers -------------------------------------------------------------------------------------------------


def test_a_model_without_any_layer_for_santa_is_refused() -> None:
    shape = dict(d_model=64, d_kv=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=VOCAB)
    model = T5ForConditionalGeneration(T5Config(**shape)).eval()
    message = (
        r"model is a T5ForConditionalGeneration; .* T5Attention \(1\) adds a position bias to its attention logits"
    )
    with pytest.raises(ValueError, match=message):
        attach(model, EXACT)
    assert model.config._attn_implementation != "santa"


def make_llava() -> PreTrainedModel:
    torch.manual_seed(0)
    text = SHAPE | {"model_type": "llama"}
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()


@pytest.mark.parametrize("before", [{"text_config": "sdpa"}, {"text_config": "eager"}, "eager", "santa"])
def test_the_text_model_is_switched_whatever_the_outer_configuration_says(
    before: str | dict[str, str], decode_calls: list[dict[str, Any]]
) -> None:
    model = make_llava()
    model.set_attn_implementation("santa")
    model.set_attn_implementation(before)
    attach(model, EXACT)
    generate(model, make_prompt())
    assert decode_calls
    assert [layer.module_class for layer in report(model).with_status("exact")] == ["LlamaAttention"] * 2


def test_a_vision_tower_keeps_its_own_attention() -> None:
    model = make_llava()
    model.set_attn_implementation("eager")
    attach(model, EXACT)
    tower = model.model.vision_tower
    assert tower.config._attn_implementation == "eager"
    (layer,) = report(model).with_status("other")
    assert layer.module_class == "CLIPAttention" and "is_causal" in layer.reason
    model.set_attn_implementation("sdpa")
    assert not report(model).with_status("exact")


class ChoosingAttention(nn.Module):
    """Attends to even keys alone where it can say so with a mask, which it believes of two names."""

    is_causal = True
    head_dim = 64

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation in ("eager", "sdpa"):
            attention_mask = attention_mask & (torch.arange(attention_mask.shape[-1]) % 2 == 0)
        attend = AttentionInterface().get_interface(self.config._attn_implementation, None)
        return attend(self, hidden_states, hidden_states, hidden_states, attention_mask)[0]


def test_a_model_that_chooses_by_the_implementations_name_is_refused() -> None:
    model = make_model()
    model.model.layers[0].self_attn = ChoosingAttention(model.config)
    # The other layer shares its configuration, and so the name.
    message = r"ChoosingAttention computes something else unless the implementation is called 'sdpa'"
    with pytest.raises(ValueError, match=rf"ChoosingAttention \(1\) {message}; LlamaAttention \(1\) {message}"):
        attach(model, EXACT)


def test_head_dims_that_stay_refused_are_refused_by_attach() -> None:
    with pytest.raises(ValueError, match=r"LlamaAttention \(2\) has head_dim 80; it needs one of \(64, .*256\)"):
        attach(make_model(head_dim=80), EXACT)
    unequal = make_tiny("deepseek_v3", qk_nope_head_dim=128, v_head_dim=128)
    with pytest.raises(ValueError, match=r"DeepseekV3Attention \(2\) has head_dim 192 with values of 128; it needs"):
        attach(unequal, EXACT)


def test_a_layer_of_an_unsupported_head_dim_is_left_to_sdpa(decode_calls: list[dict[str, Any]]) -> None:
    model = make_tiny("gemma4_unified_text")
    prompt = make_prompt()
    tokens, logits = generate(model, prompt)
    with pytest.warns(UserWarning, match=r"(?s)layers that are left to Transformers: 1\n.*has head_dim 512"):
        attach(model, EXACT)
    assert [layer.reason.partition(";")[0] for layer in report(model).with_status("other")] == ["has head_dim 512"]
    santa_tokens, santa_logits = generate(model, prompt)
    assert torch.equal(tokens, santa_tokens) and decode_calls
    torch.testing.assert_close(santa_logits, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))
    with pytest.raises(ValueError, match=r"layers has \[1\]; it needs to name .* that santa can run, which are \[0\]"):
        attach(model, santa.SantaConfig(layers=[1]))


# Attention weights ----------------------------------------------------------------------------------------------


def test_attention_weights_are_refused() -> None:
    model, prompt = attach(make_model(), EXACT), make_prompt()
    message = r"output_attentions is True; it needs to be False.*set_attn_implementation\(\"eager\"\)"
    with pytest.raises(NotImplementedError, match=message):
        model(**prompt, output_attentions=True)
    with pytest.raises(NotImplementedError, match=message):
        generate(model, prompt, output_attentions=True)
    eager = make_model()
    eager.set_attn_implementation("eager")
    eager.config.output_attentions = True
    with pytest.raises(ValueError, match="LlamaAttention has output_attentions=True in its configuration"):
        attach(eager, EXACT)


# Wrappers, names, pickles -----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A wrapper that Transformers knows nothing of, two levels deep, as PEFT's are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), Adapter])
def test_wrappers_are_unwrapped(wrap: Any) -> None:
    model = make_model()
    wrapper = wrap(model)
    assert attach(wrapper, EXACT) is wrapper
    assert statuses(wrapper) == statuses(model) and set(statuses(model).values()) == {"exact"}
    with record_rows_read(wrapper) as record:
        generate(model, make_prompt())
    assert record.share() == 1.0


def test_a_data_parallel_model_runs() -> None:
    model, prompt = make_model(), make_prompt()
    expected = model(**prompt).logits
    torch.testing.assert_close(attach(nn.DataParallel(model), EXACT)(**prompt).logits, expected, rtol=1e-3, atol=1e-3)


def test_what_is_no_model_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"model is the string 'org/name'; .*from_pretrained\('org/name'\)"):
        attach("org/name")
    with pytest.raises(TypeError, match="model is a Linear that holds 0 Transformers models"):
        attach(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model is a ModuleList that holds 2 Transformers models \['0', '1'\]"):
        attach(nn.ModuleList([make_model(), make_model()]))
    with pytest.raises(TypeError, match=r"model is a SimpleNamespace; .*: pass its \.model"):
        attach(types.SimpleNamespace(model=make_model()))
    for function in (report, lambda model: record_rows_read(model).__enter__()):
        with pytest.raises(TypeError, match="model is a dict; it needs to be a Transformers model"):
            function({})


def test_a_pickled_model_runs_in_a_process_that_has_not_heard_of_santa(tmp_path: Path) -> None:
    model, prompt = attach(make_model(), SAMPLED), make_prompt()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, prompt)))
    tokens, _ = generate(model, prompt)
    code = (
        "import pickle, sys\n"
        "model, prompt = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(model.generate(**prompt, max_new_tokens=10, do_sample=False)[:, 19:].tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pickle"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().splitlines()[-1] == str(tokens.tolist())


def test_a_copied_model_keeps_its_settings() -> None:
    model = attach(make_model(), SAMPLED)
    assert torch.equal(generate(copy.deepcopy(model), make_prompt())[0], generate(model, make_prompt())[0])


def test_importing_the_integration_is_enough_for_the_name() -> None:
    code = (
        "import santa.integrations.transformers\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1,\n"
        "                     num_attention_heads=1)\n"
        "print(LlamaForCausalLM._from_config(config, attn_implementation='santa').config._attn_implementation)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "santa"


# Settings -----------------------------------------------------------------------------------------------------------


def test_min_context_is_another_name_for_min_sampled_len() -> None:
    config = santa.SantaConfig(min_context=7)
    assert config == santa.SantaConfig(min_sampled_len=7) and config.min_context == config.min_sampled_len == 7
    assert santa.SantaConfig(min_context=None) == santa.SantaConfig()
    with pytest.raises(TypeError, match="min_context is 7 beside min_sampled_len; they are two names of one setting"):
        santa.SantaConfig(min_context=7, min_sampled_len=8)


def test_integers_of_numpy_are_integers() -> None:
    config = santa.SantaConfig(
        num_samples=np.int64(3),
        seed=np.uint32(7),
        min_sampled_len=np.int32(0),
        num_draws=np.int16(2),
        layers=np.arange(2),
        sampler=np.int64(2),
    )
    assert config == santa.SantaConfig(
        num_samples=3, seed=7, min_sampled_len=0, num_draws=2, layers=(0, 1), sampler="systematic"
    )
    assert {type(value) for value in (config.num_samples, config.seed, config.num_draws, *config.layers)} == {int}
    with pytest.raises(TypeError, match=r"seed is np\.True_; it needs to be an int"):
        santa.SantaConfig(seed=np.bool_(True))
    generate(attach(make_model(), santa.SantaConfig(num_samples=np.int64(2), min_context=np.int64(0))), make_prompt())


def test_the_model_class_is_kept() -> None:
    assert isinstance(attach(make_model(), EXACT), LlamaForCausalLM)
