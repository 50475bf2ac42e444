"""Tensor parallelism: two processes, each with half of the heads, do what one does."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("transformers", minversion="5.17.0")

from helpers.models import NEW_TOKENS, NUM_LAYERS, PADDING, FakeAttention, generate, generate_batch, make_prompt
from helpers.models import make_model as make
from transformers import LlamaForCausalLM, PreTrainedModel

import santa
from santa.integrations.transformers import attach, parallel, record_rows_read
from santa.integrations.transformers.parallel import first_kv_head_of

RANKS = 2
# The vocabulary is spread as well, until 5.19 in equal parts.
SHAPE: dict[str, Any] = {"num_key_value_heads": 4, "vocab_size": 98}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], list(range(20, 60))]
CONFIGS = {
    "exact": santa.SantaConfig(num_samples=0),
    **{
        name: santa.SantaConfig(num_samples=3, min_sampled_len=0, seed=40, **fields)
        for name, fields in {
            "grouped": {"sampler": "grouped"},
            "systematic": {"sampler": "systematic"},
            "multinomial": {"sampler": "multinomial"},
            "proportional": {"budget": "proportional"},
            "four tokens": {"max_sampled_q_len": 4},
        }.items()
    },
}


def run(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Tokens and logits of a generation, and the V rows that each head of each step read."""
    attach(model, CONFIGS[name])
    prompt = {key: x.to(model.device) for key, x in make_prompt(padding=PADDING).items()}
    options: dict[str, Any] = {}
    if name == "four tokens":
        prompt = {key: x[:1].repeat(1, 2) for key, x in prompt.items()}
        options = {"prompt_lookup_num_tokens": 3}
    with record_rows_read(model) as record:
        tokens, logits = generate(model, prompt, **options)
    rows = [torch.stack(steps) for steps in record.rows_read.values()]  # [steps, batch, num_kv_heads] of each layer
    return {"tokens": tokens.cpu(), "logits": logits.float().cpu(), "rows_read": torch.stack(rows).cpu()}


def run_paged(model: PreTrainedModel, name: str) -> tuple[Any, Any]:
    attach(model, CONFIGS[name], paged=True)
    return generate_batch(model, PROMPTS)


def distribute(model: PreTrainedModel) -> PreTrainedModel:
    """As `from_pretrained` does with a `DistributedConfig`, of a model that is there already."""
    from transformers.distributed import DistributedConfig

    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=RANKS, tp_plan="auto"))
    return type(model).maybe_distribute_model(model, config, mesh)


def work(rank: int, directory: str, device: str) -> None:
    """What each process does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    try:
        model = distribute(prepared(device))
        found: dict[str, Any] = {name: run(model, name) for name in CONFIGS}
        found["paged"] = {name: run_paged(model, name) for name in ("exact", "grouped")}
        attention = model.model.layers[0].self_attn
        found["place"] = getattr(attention, parallel._PLACE_ATTRIBUTE)
        found["first_kv_head"] = first_kv_head_of(attention, 2)
        # As if every process had the first heads of the model.
        for layer in model.model.layers:
            setattr(layer.self_attn, parallel._PLACE_ATTRIBUTE, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("santa.integrations.transformers.note_place", lambda module: None)
            found["without"] = run(model, "grouped")
        if device == "cpu" and importlib.util.find_spec("accelerate"):
            from_disk = LlamaForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32, tp_plan="auto")
            found["from_pretrained"] = run(from_disk.eval(), "grouped")
        torch.save(found, f"{directory}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def prepared(device: str) -> PreTrainedModel:
    model = make(**SHAPE)
    return model.to(device, torch.bfloat16) if device == "cuda" else model


def start(directory: Path, device: str) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":  # Transformers takes the GPU where there is one
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        mp.spawn(work, (str(directory), device), nprocs=RANKS)
    return [torch.load(directory / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes on the CPU has found."""
    directory = tmp_path_factory.mktemp("ranks")
    make(**SHAPE).save_pretrained(directory / "model")
    return start(directory, "cpu")


def assert_heads_draw_the_same(found: dict[str, Any], one: dict[str, Any], rank: int) -> None:
    """Tokens equal those of one process; so do logits, to rounding, and each head's rows."""
    assert torch.equal(found["tokens"], one["tokens"])
    torch.testing.assert_close(found["logits"], one["logits"], rtol=1e-4, atol=1e-4)
    heads = slice(2 * rank, 2 * rank + 2)
    assert found["rows_read"].shape[:2] == one["rows_read"].shape[:2] and found["rows_read"].shape[-1] == 2
    assert torch.equal(found["rows_read"], one["rows_read"][..., heads])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_two_processes_do_what_one_does(ranks: list[dict[str, Any]], name: str) -> None:
    one = run(make(**SHAPE), name)
    for rank, found in enumerate(ranks):
        assert found["place"] == (rank, RANKS) and found["first_kv_head"] == 2 * rank
        assert_heads_draw_the_same(found[name], one, rank)
    if name != "exact":
        assert (one["logits"] - run(make(**SHAPE), "exact")["logits"]).abs().max() > 0.1
        assert one["rows_read"].shape[0] == NUM_LAYERS and one["rows_read"].min() > 0
    if name in ("grouped", "systematic"):
        assert one["rows_read"].shape[1] == NEW_TOKENS - 1
        assert len(one["rows_read"].unique()) > 3


def test_without_the_number_of_the_first_head_it_would_not(ranks: list[dict[str, Any]]) -> None:
    """Guards the test above."""
    one = run(make(**SHAPE), "grouped")
    # Of the first layer in the first step: later ones depend on all heads.
    rows = [found["without"]["rows_read"][0, 0] for found in ranks]
    assert torch.equal(rows[0], one["rows_read"][0, 0, :, :2])
    assert not torch.equal(rows[1], one["rows_read"][0, 0, :, 2:])
    assert (ranks[1]["without"]["logits"] - one["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["exact", "grouped"])
def test_continuous_batching(ranks: list[dict[str, Any]], name: str) -> None:
    tokens, logprobs = run_paged(make(**SHAPE), name)
    for found in ranks:
        # The process that is handed the requests returns what came of them.
        found_tokens, found_logprobs = found["paged"][name]
        assert found_tokens == tokens
        torch.testing.assert_close(torch.tensor(found_logprobs), torch.tensor(logprobs), rtol=1e-4, atol=1e-4)


def test_a_model_that_was_loaded_in_parts(ranks: list[dict[str, Any]]) -> None:
    if "from_pretrained" not in ranks[0]:
        pytest.skip("Transformers needs accelerate to load a model in parts")
    one = run(make(**SHAPE), "grouped")
    for rank, found in enumerate(ranks):
        assert_heads_draw_the_same(found["from_pretrained"], one, rank)


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path) -> None:
    """bfloat16 rounds differently in two processes: what draws depend on may be off by that, and a few rows differ."""
    if torch.cuda.device_count() < RANKS:
        pytest.skip("needs two GPUs")
    ranks = start(tmp_path, "cuda")
    for name in ("exact", "grouped", "systematic"):
        one = run(prepared("cuda"), name)
        for rank, found in enumerate(ranks):
            assert found["place"] == (rank, RANKS)
            # Of the first decode step, before tokens can part ways.
            assert (found[name]["logits"] - one["logits"])[:, :2].abs().max() < 0.15 * one["logits"].std()
            rows, expected = (x["rows_read"][:, 0] for x in (found[name], one))
            assert (rows - expected[..., 2 * rank : 2 * rank + 2]).abs().float().mean() < 0.5
    assert (ranks[1]["without"]["logits"] - one["logits"])[:, 1].abs().max() > 0.15 * one["logits"].std()


# Which heads are here -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "config", "here", "first"),
    [
        (None, SimpleNamespace(num_key_value_heads=8), 8, 0),
        ((0, 4), SimpleNamespace(num_key_value_heads=8), 2, 0),
        ((3, 4), SimpleNamespace(num_key_value_heads=8), 2, 6),
        ((2, 3), SimpleNamespace(num_key_value_heads=8), 2, 6),  # three, three and two
        ((3, 4), SimpleNamespace(num_key_value_heads=2), 2, 0),  # every process has all
        ((1, 2), SimpleNamespace(num_attention_heads=8), 4, 4),  # as many as query heads
        ((1, 2), SimpleNamespace(num_key_value_heads=[8, 4]), 4, 4),  # not one number
        ((1, 2), SimpleNamespace(), 4, 4),
    ],
)
def test_first_kv_head(place: tuple[int, int] | None, config: SimpleNamespace, here: int, first: int) -> None:
    module = FakeAttention()
    module.config = config
    setattr(module, parallel._PLACE_ATTRIBUTE, place)
    assert first_kv_head_of(module, here) == first


class Mesh(SimpleNamespace):
    """A device mesh, of dimensions (name, size, rank)."""

    def __init__(self, *dimensions: tuple[str | None, int, int]) -> None:
        names = tuple(name for name, _, _ in dimensions)
        super().__init__(dimensions=dimensions, ndim=len(dimensions), mesh_dim_names=None if None in names else names)

    def __getitem__(self, name: str) -> Mesh:
        return Mesh(*(dimension for dimension in self.dimensions if dimension[0] == name))

    def size(self) -> int:
        return torch.Size([size for _, size, _ in self.dimensions]).numel()

    def get_local_rank(self) -> int:
        ((_, _, rank),) = self.dimensions
        return rank


@pytest.mark.parametrize(
    ("mesh", "place"),
    [
        (Mesh((None, 4, 3)), (3, 4)),  # without names there is one dimension, and it is this
        (Mesh(("tp", 4, 3)), (3, 4)),
        (Mesh(("fsdp", 2, 1), ("tp", 4, 3)), (3, 4)),
        (Mesh(("fsdp", 2, 1)), None),
        (Mesh(("fsdp", 2, 1), ("tp", 1, 0)), None),
        (Mesh((None, 1, 0)), None),
    ],
)
def test_the_mesh_of_tensor_parallelism(
    mesh: Mesh, place: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    module = FakeAttention()
    module.k_proj = torch.nn.Linear(2, 2)
    module.k_proj._hf_tp_plan, module.k_proj._hf_device_mesh = "colwise", mesh
    assert parallel.note_place(module) == place


def test_a_model_in_one_process_has_all_heads() -> None:
    model = attach(make(**SHAPE), CONFIGS["exact"])
    assert all(first_kv_head_of(layer.self_attn, 4) == 0 for layer in model.model.layers)
