"""Bad arguments of what decode and decode_paged have beside plain attention: windows, soft caps, sinks, several tokens,
heads of a larger model, parts of longer rows.

Every message names the argument, what it got and what it needs: `match` is a regular expression that the whole message
fulfils.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.errors import assert_refused, call, empty, int32, lists, paged, parts, qkv

import santa

PAGED = {"santa.decode_paged": santa.decode_paged, "ops.decode_paged": torch.ops.santa.decode_paged}
DECODE = {"santa.decode": santa.decode, "ops.decode": torch.ops.santa.decode}


@pytest.mark.parametrize("operator", PAGED | DECODE)
def test_the_valid_arguments_are_valid(operator, device):
    """What the cases below change one thing of."""
    base = paged(device) if operator in PAGED else qkv(device) | {"kv_lens": int32([80, 7], device)}
    out, _ = call((PAGED | DECODE)[operator], base | parts(device) | {"min_sampled_len": 0})
    assert out.isfinite().all()


class Case(NamedTuple):
    name: str
    change: Callable[[str], dict[str, Any]]  # of the device: the arguments that are wrong
    match: str


def of(argument: str, *shape: int, **options: Any) -> Callable[[str], dict[str, Any]]:
    return lambda device: {argument: empty(*shape, device=device, **options)}


def given(**others: Any) -> Callable[[str], dict[str, Any]]:
    return lambda device: others


def feature_cases() -> list[Case]:
    many = "2147483647"
    numbers = [
        *(
            ("window_left", value, rf"santa: window_left is {value}; it needs to be in \[-1, {many}\]")
            for value in (-2, 2**31)
        ),
        *(
            (
                "logits_soft_cap",
                value,
                rf"santa: logits_soft_cap is {text}; it needs to be in \[1e-30, 1e\+30\], or 0 for none",
            )
            for value, text in (
                (-1.0, "-1"),
                (1e-39, "1e-39"),
                (math.nan, "-?nan"),
                (math.inf, "inf"),
                (1e31, r"1e\+31"),
            )
        ),
        *(
            ("first_kv_head", value, rf"santa: first_kv_head is {value}; it needs to be in \[0, 2097149\]")
            for value in (-1, 2**21)
        ),
    ]
    cases = [Case(f"{name} {value}", given(**{name: value}), match) for name, value, match in numbers]
    for name, shape, axes, bad in (
        ("sinks", (4,), r"\[num_qo_heads\]", 3),
        ("levels", (2, 4), r"\[batch, num_qo_heads\]", 3),
    ):
        meaning = r"\((num_qo_heads|as in q)\)"
        cases += [
            Case(
                f"{name} float16",
                of(name, *shape),
                rf"santa: {name} is float16; it needs to be float32",
            ),
            Case(
                f"{name} rank",
                of(name, *shape, 1, dtype=torch.float32),
                rf"santa: {name} has shape .*; it needs {len(shape)} dimensions?, {axes}",
            ),
            Case(
                f"{name} size",
                of(name, *shape[:-1], bad, dtype=torch.float32),
                rf"santa: {name} has shape .*; dimension {len(shape) - 1} {meaning} is 3 and needs to be 4",
            ),
            Case(
                f"{name} stride",
                lambda device, name=name, shape=shape: {
                    name: empty(*shape[:-1], 8, dtype=torch.float32, device=device)[..., ::2]
                },
                rf"santa: {name} has strides \[.*2\]; it needs to be contiguous",
            ),
            Case(
                f"{name} on meta",
                lambda device, name=name, shape=shape: {name: empty(*shape, dtype=torch.float32, device="meta")},
                rf"santa: {name} is on meta; it needs to be on q's device, (cpu|cuda:0|cuda)",
            ),
        ]
    cases.append(
        Case(
            "levels of one token beside several",
            lambda device: {
                "q": empty(2, 3, 4, 64, device=device),
                "levels": empty(2, 4, dtype=torch.float32, device=device),
            },
            r"santa: levels has shape \[2, 4\]; it needs 3 dimensions, \[batch, q_len, num_qo_heads\]",
        )
    )
    for q_len in (0, 9):
        cases.append(
            Case(
                f"q of {q_len} tokens",
                of("q", 2, q_len, 4, 64),
                rf"santa: q has shape .*; dimension 1 \(q_len\) is {q_len} and needs to be in \[1, 8\]",
            )
        )
    return cases + part_cases()


def part_cases() -> list[Case]:
    def changed(*names: str, **others: Any) -> Callable[[str], dict[str, Any]]:
        """The arguments of parts, less some."""
        return lambda device: {name: x for name, x in parts(device).items() if name not in names} | others

    cases = [
        Case(
            "whole_lens alone",
            changed("shard_starts"),
            r"santa: whole_lens is given without shard_starts; they need each other",
        ),
        Case(
            "shard_starts alone",
            changed("whole_lens"),
            r"santa: shard_starts is given without whole_lens; they need each other",
        ),
        Case(
            "whole_lens and a window",
            changed(window_left=5),
            r"santa: window_left is 5 while whole_lens is given; it needs to be -1 then",
        ),
        Case(
            "whole_lens, proportional",
            changed(budget=0),
            r"santa: whole_lens is given with budget='proportional'; it needs budget='streaming' or 'uniform'",
        ),
        Case(
            "whole_lens, proportional by default",
            changed(sampler=0),
            r"santa: whole_lens is given with budget='proportional'; it needs budget='streaming' or 'uniform'",
        ),
        Case(
            "levels, uniform",
            changed(budget=1),
            r"santa: levels is given with budget='uniform', which has no use for them; it needs budget='streaming'",
        ),
        Case(
            "levels of whole rows, proportional",
            changed("whole_lens", "shard_starts", budget=0),
            r"santa: levels is given with budget='proportional', which has no use for them; "
            r"it needs budget='streaming'",
        ),
        Case(
            "whole_lens without levels",
            changed("levels"),
            r"santa: whole_lens is given without levels, which budget='streaming' needs to be the same for all shards",
        ),
    ]
    for name in ("whole_lens", "shard_starts"):
        cases += [
            Case(
                f"{name} int64",
                lambda device, name=name: parts(device) | {name: empty(2, dtype=torch.int64, device=device)},
                rf"santa: {name} is int64; it needs to be int32: pass {name}\.to\(torch\.int32\)",
            ),
            Case(
                f"{name} size",
                lambda device, name=name: parts(device) | {name: empty(3, device=device, dtype=torch.int32)},
                rf"santa: {name} has shape \[3\]; dimension 0 \(batch\) is 3 and needs to be 2",
            ),
            Case(
                f"{name} on meta",
                lambda device, name=name: parts(device) | {name: empty(2, device="meta", dtype=torch.int32)},
                rf"santa: {name} is on meta; it needs to be on q's device, (cpu|cuda:0|cuda)",
            ),
        ]
    return cases


@pytest.mark.parametrize("operator", PAGED | DECODE)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in feature_cases()])
def test_bad_feature(operator, device, case):
    base = paged(device) if operator in PAGED else qkv(device)
    assert_refused((PAGED | DECODE)[operator], base | case.change(device), ValueError, case.match)


def test_numbers_at_the_ends_of_their_ranges():
    """None of these is refused."""
    for accepted in [
        {"window_left": -1},
        {"window_left": 2**31 - 1},
        {"logits_soft_cap": None},
        {"logits_soft_cap": 0},
        {"logits_soft_cap": 1e30},
        {"logits_soft_cap": 1e-30},
        {"first_kv_head": 2097149},
    ]:
        call(santa.decode, qkv() | accepted)
        call(santa.decode_paged, paged() | {"max_kv_len": 2**31 - 1} | accepted)
    call(santa.decode_paged, lists() | {"max_kv_len": 80})


# Parts of rows that do not fit together are bad rows, like ranges outside the cache.
BAD_PARTS = {
    "start between tiles": {"shard_starts": [64, 0]},
    "negative start": {"shard_starts": [-128, 0]},
    "longer than the whole": {"whole_lens": [128 + 79, 1000]},
}


@pytest.mark.parametrize("operator", [*PAGED, *DECODE])
@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_do_not_fit(operator, device, name):
    base = paged(device) if operator in PAGED else qkv(device)
    arguments = base | parts(device) | {"kv_lens": int32([80, 7], device), "min_sampled_len": 0}
    arguments |= {n: torch.tensor(x, device=device, dtype=torch.int32) for n, x in BAD_PARTS[name].items()}
    if device == "cuda":
        out, lse = call((PAGED | DECODE)[operator], arguments)
        assert out[0].isnan().all() and lse[0].isnan().all() and out[1].isfinite().all()
        return
    starts, whole = (arguments[n][0].item() for n in ("shard_starts", "whole_lens"))
    assert_refused(
        (PAGED | DECODE)[operator],
        arguments,
        ValueError,
        rf"santa: row 0 has kv_lens 80 and whole_lens {whole} and shard_starts {starts}; .*shard_starts, a multiple of "
        r"128, up to whole_lens - kv_lens",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k_scale", 1.0),
        ("window_left", 3),
        ("logits_soft_cap", 2.0),
        ("sinks", torch.zeros(4)),
        ("first_kv_head", 1),
        *parts().items(),
    ],
)
def test_not_with_bernoulli_scores(name, value):
    """What decode has beside plain attention and Bernoulli scores do not have, by name."""
    q, k, v = qkv().values()
    why = "takes no float8 cache" if name == "k_scale" else "does not have it"
    with pytest.raises(ValueError, match=f"^santa: {name} is given with score='bernoulli', which {why}$"):
        santa.decode(q, k.permute(0, 2, 3, 1).contiguous(), v, score="bernoulli", **{name: value})
