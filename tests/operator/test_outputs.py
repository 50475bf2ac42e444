"""out and lse of the caller's: decode_out and decode_paged_out, and the paged operator inside PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import SAMPLED, dtypes_of, make_qkv, working_dtype
from helpers.paged import FORMS, PagedCache, assert_same_bits

import santa

OPTIONS = [("grouped", "streaming", 0)] + [(*combination, 32) for combination in SAMPLED]
LENS = [700, 300]


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}")
def options(request):
    sampler, budget, num_samples = request.param
    return {"sampler": sampler, "budget": budget, "num_samples": num_samples, "min_sampled_len": 0}


def inputs(device, q_len=None, dtype=None):
    dtype = working_dtype(device) if dtype is None else dtype
    tokens = 1 if q_len is None else q_len
    q, k, v = make_qkv(2, tokens * 8, 2, LENS[0], 64, dtype=dtype, device=device)
    return q if q_len is None else q.unflatten(1, (q_len, 8)), k, v


class Contiguous:
    """santa.decode of two rows, its torch.ops operators and their arguments."""

    names = ("k", "v")

    def __init__(self, device, q_len=None, dtype=None):
        self.q, k, v = inputs(device, q_len, dtype)
        kv_lens = torch.tensor(LENS, dtype=torch.int32, device=device)
        self.arguments = {"k": k, "v": v, "kv_lens": kv_lens}
        self.function, self.op, self.op_out = santa.decode, torch.ops.santa.decode, torch.ops.santa.decode_out

    @property
    def positional(self):
        return (self.q, *(self.arguments[name] for name in self.names))

    @property
    def keywords(self):
        return {name: x for name, x in self.arguments.items() if name not in self.names}

    def outputs(self, fill=math.nan):
        lse = torch.full(self.q.shape[:-1], fill, dtype=torch.float32, device=self.q.device)
        return torch.full_like(self.q, fill, memory_format=torch.contiguous_format), lse

    def run(self, **options):
        return self.function(*self.positional, **self.keywords, **options)


class Paged(Contiguous):
    """santa.decode_paged of the same rows."""

    names = ("k_cache", "v_cache")
    form = "table"

    def __init__(self, device, q_len=None, dtype=None):
        self.q, k, v = inputs(device, q_len, dtype)
        self.arguments = PagedCache(k, v, 16, lens=LENS).arguments(self.form)
        self.arguments["kv_layout"] = 0  # as the operators take it
        self.function = santa.decode_paged
        self.op, self.op_out = torch.ops.santa.decode_paged, torch.ops.santa.decode_paged_out


class PagedLists(Paged):
    form = "csr"


CALLS = {"decode": Contiguous, "decode_paged": Paged, "decode_paged, lists": PagedLists}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


# Written in place -----------------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("q_len", [None, 1, 3])
def test_written_and_returned(device, call, options, q_len):
    """The tensors given are what comes back, and they hold what comes back without them."""
    for dtype in dtypes_of(device):
        c = call(device, q_len, dtype)
        expected = c.run(return_rows_read=True, **options)
        out, lse = c.outputs()
        versions = out._version, lse._version
        actual = c.run(out=out, lse=lse, return_rows_read=True, **options)
        assert actual[0] is out and actual[1] is lse and len(actual) == 3
        assert_same_bits(actual, expected)
        assert out._version > versions[0] and lse._version > versions[1]
        own = c.outputs()
        assert c.op_out(*own, *c.positional, **c.keywords, **integers(options)) is None
        assert_same_bits(own, expected[:2])


def integers(options):
    """As the operators take them."""
    return options | {
        "sampler": int(santa.Sampler[options["sampler"].upper()]),
        "budget": int(santa.Budget[options["budget"].upper()]),
    }


def test_part_of_a_larger_tensor(device, call, options):
    """Rows of a buffer that is there for more, and nothing of it beside them is written."""
    c = call(device)
    expected = c.run(**options)
    buffer, lse_buffer = torch.full((6, 8, 64), 7.0, dtype=c.q.dtype, device=device), torch.full((6, 8), 7.0)
    lse_buffer = lse_buffer.to(device)
    c.run(out=buffer[2:4], lse=lse_buffer[2:4], **options)
    assert_same_bits((buffer[2:4], lse_buffer[2:4]), expected)
    others = [0, 1, 4, 5]
    assert (buffer[others] == 7).all() and (lse_buffer[others] == 7).all()


def test_every_element_is_written(device, call):
    """By empty rows as well."""
    c = call(device)
    if "kv_lens" in c.arguments:
        c.arguments["kv_lens"] = torch.tensor([0, 300], dtype=torch.int32, device=device)
    else:
        c.arguments["kv_indptr"] = torch.tensor([0, 0, 19], dtype=torch.int32, device=device)
    out, lse = c.run(out=(given := c.outputs())[0], lse=given[1], num_samples=0)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and out.isfinite().all() and lse[1].isfinite().all()


def test_head_dim_that_is_padded(device):
    """out is as wide as v, whatever is computed."""
    q, k, v = make_qkv(1, 4, 2, 50, 80, dtype=working_dtype(device), device=device)
    with pytest.warns(santa.PaddingWarning):
        expected = santa.decode(q, k, v, num_samples=0)
    out, lse = torch.empty_like(q), torch.empty(1, 4, device=device)
    with pytest.warns(santa.PaddingWarning):
        actual = santa.decode(q, k, v, num_samples=0, out=out, lse=lse)
    assert actual[0] is out and actual[1] is lse and out.shape == (1, 4, 80)
    assert_same_bits(actual, expected)
    with (
        pytest.warns(santa.PaddingWarning),
        pytest.raises(ValueError, match=r"^santa: out is .*\[1, 4, 96\]; it needs"),
    ):
        santa.decode(q, k, v, num_samples=0, out=out.new_empty(1, 4, 96), lse=lse)


@pytest.mark.parametrize("outside", [False, True])
def test_inference_tensors(device, call, outside):
    """Made in inference mode, and written there or elsewhere."""
    c = call(device)
    expected = c.run()
    with torch.inference_mode():
        out, lse = c.outputs()
        if not outside:
            c.run(out=out, lse=lse)
    if outside:
        c.run(out=out, lse=lse)
    assert_same_bits((out, lse), expected)


@pytest.mark.parametrize("change", ["device", "strides"])
@pytest.mark.filterwarnings("ignore::santa.PaddingWarning")
def test_bad_output_of_a_head_dim_that_is_padded(device, change):
    q, k, v = make_qkv(1, 4, 2, 50, 80, dtype=working_dtype(device), device=device)
    out, lse = torch.empty_like(q), torch.empty(1, 4, device=device)
    out = out.to("meta") if change == "device" else torch.cat([out, out], dim=-1)[..., ::2]
    with pytest.raises(ValueError, match=f"^santa: out {'is on meta' if change == 'device' else 'has strides'}"):
        santa.decode(q, k, v, out=out, lse=lse)


def test_autocast(device, call):
    """What is given has the dtype of autocast, as what is made has."""
    c = call(device, dtype=torch.bfloat16)
    expected = c.run()
    out, lse = c.outputs()
    c.q = c.q.float()
    with torch.autocast(device, torch.bfloat16):
        c.run(out=out, lse=lse)
    assert_same_bits((out, lse), expected)


@pytest.mark.gpu
def test_output_off_16_bytes_is_refused_on_cuda():
    q, k, v = make_qkv(1, 4, 2, 50, 64, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view_as(q)
    with pytest.raises(ValueError, match=r"^santa: out starts at an address that is no multiple of 16 bytes"):
        santa.decode(q, k, v, out=out, lse=torch.empty(1, 4, device="cuda"))


# Errors -------------------------------------------------------------------------------------------------


def bad_outputs(device, q_len=None):
    """name -> (out, lse, message), for q [2, 8, 64] or [2, q_len, 8, 64] in the working dtype."""
    dtype = working_dtype(device)
    other = torch.bfloat16
    name, wrong = (str(x).removeprefix("torch.") for x in (dtype, other))
    shape = (2, 8, 64) if q_len is None else (2, q_len, 8, 64)
    axes = r"\[batch, num_qo_heads, head_dim\]" if q_len is None else r"\[batch, q_len, num_qo_heads, head_dim\]"

    def out(*sizes, **o):
        return torch.zeros(*sizes, **{"dtype": dtype, "device": device} | o)

    def lse(*sizes, **o):
        return torch.zeros(*sizes, **{"device": device} | o)

    right, right_lse = out(*shape), lse(*shape[:-1])
    short = [n - 1 if dim == len(shape) - 2 else n for dim, n in enumerate(shape)]
    rank = len(shape)
    return {
        "out dtype": (
            out(*shape, dtype=other),
            right_lse,
            f"out is {wrong}; it needs to be {name}, q's dtype",
        ),
        "out rank": (out(8, 64), right_lse, rf"out has shape \[8, 64\]; it needs {rank} dimensions, {axes}"),
        "out shape": (
            out(*short),
            right_lse,
            rf"out has shape .*; dimension {rank - 2} \(as in q\) is 7 and needs to be 8",
        ),
        "out batch": (
            out(3, *shape[1:]),
            right_lse,
            r"out has shape .*; dimension 0 \(as in q\) is 3 and needs to be 2",
        ),
        "out strides": (
            out(*shape[:-1], 128)[..., ::2],
            right_lse,
            r"out has strides \[.*, 128, 2\]; it needs to be contiguous",
        ),
        "out device": (
            out(*shape, device="meta"),
            right_lse,
            f"out is on meta; it needs to be on q's device, {device}(:0)?",
        ),
        "lse dtype": (right, lse(*shape[:-1], dtype=torch.float64), "lse is float64; it needs to be float32"),
        "lse rank": (right, lse(*shape), rf"lse has shape .*; it needs {rank - 1} dimensions, \[batch.*num_qo_heads\]"),
        "lse shape": (
            right,
            lse(*short[:-1]),
            rf"lse has shape .*; dimension {rank - 2} \(as in q\) is 7 and needs to be 8",
        ),
        "lse strides": (
            right,
            lse(*shape[:-2], 16)[..., ::2],
            r"lse has strides \[.*2\]; it needs to be contiguous",
        ),
        "lse device": (
            right,
            lse(*shape[:-1], device="meta"),
            f"lse is on meta; it needs to be on q's device, {device}(:0)?",
        ),
    }


@pytest.mark.parametrize("name", bad_outputs("cpu"))
@pytest.mark.parametrize("q_len", [None, 3])
def test_bad_output(device, call, name, q_len):
    out, lse, message = bad_outputs(device, q_len)[name]
    c = call(device, q_len)
    with pytest.raises(ValueError, match=f"^santa: {message}$"):
        c.run(out=out, lse=lse)
    with pytest.raises((ValueError, RuntimeError), match=f"santa: {message}"):
        c.op_out(out, lse, *c.positional, **c.keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_output_on_another_device(call, name, here, there):
    c = call(here)
    outputs = dict(zip(("out", "lse"), c.outputs(), strict=True))
    with pytest.raises(ValueError, match=f"^santa: {name} is on {there}; it needs to be on q's device, {here}$"):
        c.run(**outputs | {name: outputs[name].to(there)})


def test_both_or_neither(device, call):
    c = call(device)
    out, lse = c.outputs()
    with pytest.raises(ValueError, match=r"^santa: out is given without lse; they need each other$"):
        c.run(out=out)
    with pytest.raises(ValueError, match=r"^santa: lse is given without out; they need each other$"):
        c.run(lse=lse)
    for name in ("out", "lse"):
        with pytest.raises(TypeError, match=f"^santa: {name} is a list; it needs to be a torch.Tensor or None$"):
            c.run(**{"out": out, "lse": lse} | {name: [0.0]})


def test_not_with_bernoulli_scores(device):
    q, k, v = inputs(device)
    out, lse = torch.empty_like(q), torch.empty(2, 8, device=device)
    features = k.permute(0, 2, 3, 1).contiguous()
    with pytest.raises(ValueError, match=r"^santa: out is given with score='bernoulli', which does not have it$"):
        santa.decode(q, features, v, score="bernoulli", out=out, lse=lse)


# Inside PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, 32])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("variant", ["op", "op_out"])
def test_opcheck(device, call, num_samples, features, variant):
    c = call(device, q_len=3 if features else None)
    options = {"num_samples": num_samples, "min_sampled_len": 0, "seed": 3}
    if features:
        rows_read = torch.zeros(2, 2, dtype=torch.int32, device=device)
        sinks = torch.zeros(8, device=device)
        options |= {"window_left": 100, "logits_soft_cap": 3.0, "sinks": sinks, "rows_read": rows_read}
    arguments = c.positional if variant == "op" else (*c.outputs(fill=0.0), *c.positional)
    # NaN pages stay as they are; torch's check of the schema compares inputs with themselves.
    for name in c.names:
        c.arguments[name].nan_to_num_(nan=1.0)
    torch.library.opcheck(getattr(c, variant).default, arguments, c.keywords | options)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("q_len", [None, 3])
def test_compile_fullgraph(device, call, given, q_len):
    """The bits of the eager call; numbers that change compile once."""
    c = call(device, q_len)

    def step(q, positional, keywords, out, lse, seed):
        options = {"num_samples": 32, "min_sampled_len": 0, "return_rows_read": True, "seed": seed, "window_left": 300}
        if given:
            options |= {"out": out, "lse": lse}
        out, lse, rows = c.function(q * 2, *positional, **keywords, **options)
        return out + 1, lse, rows

    backend = "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in (3, 4, 5):
        own, other = c.outputs(), c.outputs()
        actual = compiled(c.q, c.positional[1:], c.keywords, *own, seed)
        expected = step(c.q, c.positional[1:], c.keywords, *other, seed)
        assert_same_bits(actual, expected)
        assert_same_bits(own, other)


def test_compile_does_not_recompile_for_numbers(device, call):
    c = call(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def step(seed, window_left, first_kv_head):
        numbers = {"seed": seed, "window_left": window_left, "first_kv_head": first_kv_head}
        if call is not Contiguous:
            numbers["max_kv_len"] = 700 + first_kv_head
        return c.run(num_samples=16, min_sampled_len=0, **numbers)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for numbers in ((2, 16, 2), (3, 17, 3), (100, 640, 40), (12345, 33, 9)):
        assert torch.equal(compiled(*numbers), step(*numbers))
    assert counter.frame_count == 1


def test_export(device):
    """Of any number of pages, in the cache and of a row."""
    c = Paged(device)
    names = ("k_cache", "v_cache", "page_table", "kv_lens")

    class Step(torch.nn.Module):
        def forward(self, q, k_cache, v_cache, page_table, kv_lens):
            return santa.decode_paged(
                q, k_cache, v_cache, page_table=page_table, kv_lens=kv_lens, num_samples=32, min_sampled_len=0
            )

    pages, width = (torch.export.Dim(name, min=2, max=100000) for name in ("pages", "width"))
    shapes = ({}, {0: pages}, {0: pages}, {1: width}, {})
    example = (c.q, *(c.arguments[name] for name in names))
    program = torch.export.export(Step(), example, dynamic_shapes=shapes, strict=False)
    wider = PagedCache(*inputs(device)[1:], 16, lens=[650, 300], spare=9).arguments()
    other = (c.q, *(wider[name] for name in names))
    assert_same_bits(program.module()(*other), Step()(*other))


def test_gradients(device, call):
    """Outputs that are made raise in backward(). Those that are given raise at once: nothing could raise later."""
    c = call(device)
    expected = c.run()
    c.q.requires_grad_()
    out, _ = c.run()
    assert torch.equal(out, expected[0])
    name = "decode" if call is Contiguous else "decode_paged"
    with pytest.raises(RuntimeError, match=f"^santa: {name} has no backward pass"):
        out.sum().backward()
    given = c.outputs()
    with pytest.raises(RuntimeError, match=f"^santa: {name}_out has no backward pass and no forward derivative"):
        c.run(out=given[0], lse=given[1])
    assert given[0].isnan().all(), "it is refused before anything is written"
    with torch.no_grad():
        assert_same_bits(c.run(out=given[0], lse=given[1]), expected)
    c.q.requires_grad_(False)
    with pytest.raises(RuntimeError, match=f"^santa: {name}_out has no backward pass"):
        c.run(out=given[0].requires_grad_(), lse=given[1])


def test_gradients_of_sinks_and_levels(device, call):
    c = call(device)
    for option in ("sinks", "levels"):
        shape = (8,) if option == "sinks" else (2, 8)
        out, _ = c.run(**{option: torch.zeros(shape, device=device, requires_grad=True)})
        with pytest.raises(RuntimeError, match=r"^santa: decode(_paged)? has no backward pass"):
            out.sum().backward()


@pytest.mark.parametrize("given", [False, True])
def test_vmap(device, call, given):
    """An operator of several rows needs none, and says so."""
    c = call(device)
    name = ("decode" if call is Contiguous else "decode_paged") + ("_out" if given else "")
    out, lse = (torch.stack([x, x]) for x in c.outputs())

    def run(q, out, lse):
        return c.function(q, *c.positional[1:], **c.keywords, **({"out": out, "lse": lse} if given else {}))

    with pytest.raises(RuntimeError, match=f"^santa: {name} cannot run under vmap; it takes a batch itself"):
        torch.func.vmap(run)(torch.stack([c.q, c.q]), out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_writes_what_was_given(form, options):
    c = (Paged if form == "table" else PagedLists)("cuda")
    out, lse = c.outputs()
    c.run(out=out, lse=lse, **options)
    expected = out.clone(), lse.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.run(out=out, lse=lse, **options)
    for x in (out, lse):
        x.fill_(math.nan)
    graph.replay()
    assert_same_bits((out, lse), expected)
