"""The random numbers of csrc/core: Philox, and the streams that an identity selects."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from helpers.core import core, int64s, kv_lens, uint32s
from helpers.properties import for_all
from helpers.statistics import chi_square_z
from hypothesis import example
from hypothesis import strategies as st


def philox_model(counter, key):
    """Philox4x32-10 in Python integers, from the paper's equations (Salmon et al., SC 2011, section 4.2)."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 % 2**32, (p0 >> 32) ^ x3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that Random123 ships (kat_vectors, philox4x32 10)."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert core.philox4x32_10(words[0], words[1]) == words[2]
    assert philox_model(words[0], words[1]) == words[2]


@for_all(st.lists(uint32s, min_size=4, max_size=4), st.lists(uint32s, min_size=2, max_size=2))
def test_philox_equals_its_equations(counter, key):
    assert core.philox4x32_10(counter, key) == philox_model(counter, key)


@for_all(int64s, int64s, kv_lens, uint32s.filter(lambda head: head < 2**31), uint32s, uint32s)
def test_stream_is_the_documented_function(seed, row_seed, position, head, segment, draw):
    """A seed reproduces its draws in every release, so the function is pinned: the identity is hashed into a
    key, and the counter is (draw, segment, 0, 0)."""
    seed_bits, row_bits = seed % 2**64, row_seed % 2**64
    identity = (row_bits % 2**32, row_bits >> 32, position, head)
    key = philox_model(identity, (seed_bits % 2**32, seed_bits >> 32))[:2]
    low, high = philox_model((draw, segment, 0, 0), key)[:2]
    stream = core.RandomStream(seed=seed, row_seed=row_seed, position=position, head=head)
    assert stream.key == key
    assert stream.bits(segment=segment, draw=draw) == (high << 32 | low)


@for_all(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@example(2**64 - 1, 2**64 - 1)
def test_mul_high(a, b):
    assert core.mul_high(a, b) == a * b >> 64


def bits_along(axis: str, count: int) -> np.ndarray:
    """The 64-bit numbers met by counting up one component of the identity, the others fixed."""
    if axis == "draw":
        return core.RandomStream(seed=1, position=32768).bits_of(segment=0, first=0, count=count)
    if axis == "segment":
        stream = core.RandomStream(seed=1, position=32768)
        return np.array([stream.bits(segment, 0) for segment in range(count)], dtype=np.uint64)
    identities = ({"position": 1000, axis: i} for i in range(count))
    return np.array([core.RandomStream(**identity).bits(0, 0) for identity in identities], dtype=np.uint64)


AXES = ["seed", "row_seed", "position", "head", "segment", "draw"]


@pytest.mark.parametrize("axis", AXES)
def test_bits_are_uniform(axis):
    """Every byte of 2^15 consecutive numbers, and the pairs of top nibbles of neighbours, by chi-square with
    255 degrees of freedom: consecutive steps of a request (position + 1) are as good as independent. 9
    statistics an axis, 54 in all, each above 5 sigma with probability 3e-7, or below -5 (too even) as rarely:
    false alarm 4e-5 over the choice of seeds."""
    bits = bits_along(axis, 2**15)
    statistics = {f"byte {i}": chi_square_z((bits >> np.uint64(8 * i)).astype(np.uint8), 256) for i in range(8)}
    top = (bits >> np.uint64(60)).astype(np.int64)
    statistics["serial pairs"] = chi_square_z(top[0::2] * 16 + top[1::2], 256)
    assert all(abs(z) < 5 for z in statistics.values()), statistics


@pytest.mark.parametrize(
    ("component", "width"),
    [("seed", 64), ("row_seed", 64), ("position", 31), ("head", 31), ("segment", 32), ("draw", 32)],
)
def test_each_bit_of_the_identity_changes_the_draw(component, width):
    """Flipping any one bit of the identity changes about half of the 64 bits. A binomial (64, 1/2) is outside
    [8, 56] with probability 8e-11: false alarm 2e-8 over all 254 bits. A component that is ignored, cut short
    or mixed in without hashing gives 0 to 2 changed bits."""

    def bits(**identity):
        where = {"segment": identity.pop("segment", 0), "draw": identity.pop("draw", 0)}
        return core.RandomStream(**identity).bits(**where)

    base = bits()
    for bit in range(width):
        value = 1 << bit if bit < 63 else -(2**63)
        changed = bin(base ^ bits(**{component: value})).count("1")
        assert 8 <= changed <= 56, f"{component} bit {bit}: {changed} of 64 bits changed"


@pytest.mark.parametrize("component", ["seed", "row_seed", "position", "head", "segment"])
def test_streams_are_independent(component):
    """The same draws of two streams that differ by one in one component agree in half of their bits. 2^12
    draws of 64 bits: the share is 0.5 with deviation 0.5 / 512. Five tests at 5 sigma, two-sided: false alarm
    3e-6."""
    count = 2**12

    def bits(value):
        segment = value if component == "segment" else 0
        identity = {"position": 4096, **({} if component == "segment" else {component: value})}
        return core.RandomStream(**identity).bits_of(segment=segment, first=0, count=count)

    agree = np.unpackbits((~(bits(7) ^ bits(8))).view(np.uint8)).mean()
    assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(64 * count), agree


def test_components_of_the_identity_are_not_mixed_up():
    """(seed 1, row seed 2) is not (2, 1), and so on: 2 to each pair of components, all different keys."""
    identities = [
        dict.fromkeys(pair, 0) | {pair[0]: low, pair[1]: high}
        for pair in itertools.combinations(["seed", "row_seed", "position", "head"], 2)
        for low, high in [(1, 2), (2, 1)]
    ]
    assert len({tuple(core.RandomStream(**identity).key) for identity in identities}) == len(identities)
