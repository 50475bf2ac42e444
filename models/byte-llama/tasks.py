"""The text and the retrieval task behind the byte-llama model.

The text is the source code of Python's own standard library, taken from the interpreter that runs
this file, so nothing has to be downloaded. The task plants key lines in that text and asks for one
of them much later::

    # key tango-4821 is 73019
    ... thousands of bytes of ordinary source code, and other key lines ...
    # recall tango-4821 is 73019

A prompt ends right after ``is`` and a space; the answer is five random digits and a line feed.
Tokens are bytes: the token id of a byte is its value. Byte 0 separates documents.

Training (``train.py``), evaluation (``evaluate.py``) and the tests share this module. It needs
NumPy; PyTorch is imported only by :func:`retrieval_batch`.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = [
    "ANSWER_LEN",
    "KIND_ANSWER",
    "KIND_NOISE",
    "KIND_TEXT",
    "SEPARATOR",
    "WORDS",
    "Corpus",
    "key_line",
    "load_corpus",
    "question",
    "retrieval_batch",
    "retrieval_prompt",
    "training_batch",
]

SEPARATOR = 0
"""The byte between two documents; also the model's bos and eos token id."""

ANSWER_LEN = 6
"""Bytes in an answer: five digits and a line feed."""

KIND_TEXT, KIND_NOISE, KIND_ANSWER = 0, 1, 2
"""What a training byte is: text, a random byte nobody can predict, or part of an answer."""

WORDS = tuple(
    b"""
    acorn amber anvil apple arrow aspen atlas badge bagel basil beach berry birch bison blaze bloom
    bread brick brook cabin camel candy cargo cedar chalk cider cliff cloud cobra comet coral crane
    crown daisy delta diver eagle ember fable ferry flame flint frost ghost glade globe grape grove
    harbor hazel heron honey igloo ivory jelly jewel karma koala lemon lilac lotus lunar mango maple
    marsh medal melon metro minty mirth mocha moose navel noble north oasis ocean olive onion opera
    orbit otter panda pearl pecan piano pilot plume polar prism quail quartz quilt radio raven ridge
    river robin royal sable salsa scarf shell sigma slate solar spice spruce storm sugar swift table
    tango tiger topaz torch tulip ultra umber vapor velvet viola vista wagon waltz wheat zebra
    """.split()
)
"""The words keys start with."""

_SKIPPED_DIRS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "lib2to3"}
)
_NEWLINE = 10
_HELDOUT_ONE_IN = 20


@dataclass(frozen=True)
class Corpus:
    """Text as ``uint8`` arrays, split by file into a training part and a held-out part."""

    train: np.ndarray
    heldout: np.ndarray
    train_files: tuple[str, ...]
    heldout_files: tuple[str, ...]


def _topics_text(source: str) -> str:
    """The documentation in ``pydoc_data/topics.py`` as plain text: the values of its one dict."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return "\n\n".join(topics[name] for name in sorted(topics)) + "\n"
    return source


def load_corpus(root: str | Path | None = None) -> Corpus:
    """Read the standard library's sources under ``root`` (default: this interpreter's).

    Files are read in the order of their relative paths. Test suites, codec tables and installed
    packages are left out. About one file in twenty is held out; which one depends on its relative
    path alone, so a file held out under one Python version is never trained on under another.
    """
    base = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    names: dict[bool, list[str]] = {False: [], True: []}
    paths = ((path.relative_to(base), path) for path in base.rglob("*.py"))
    for relative, path in sorted(pair for pair in paths if not _SKIPPED_DIRS.intersection(pair[0].parts)):
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if relative.as_posix() == "pydoc_data/topics.py":
            source = _topics_text(source)
        if not source.strip():
            continue
        data = source.replace("\0", "").rstrip("\n").encode() + b"\n"
        name = relative.as_posix()
        heldout = zlib.crc32(name.encode()) % _HELDOUT_ONE_IN == 0
        parts[heldout].append(data)
        names[heldout].append(name)
    if not parts[False] or not parts[True]:
        raise FileNotFoundError(f"no Python sources to read under {base}")
    joined = {split: np.frombuffer(bytes([SEPARATOR]).join(parts[split]), np.uint8) for split in parts}
    return Corpus(joined[False], joined[True], tuple(names[False]), tuple(names[True]))


def key_line(key: bytes, value: bytes) -> bytes:
    """The line that plants a key, ``b"# key tango-4821 is 73019\\n"``."""
    return b"# key %s is %s\n" % (key, value)


def question(key: bytes) -> bytes:
    """The line that asks for a key, up to its answer, ``b"# recall tango-4821 is "``."""
    return b"# recall %s is " % key


def _pairs(rng: np.random.Generator, count: int) -> list[tuple[bytes, bytes]]:
    """``count`` pairs of a key, all keys distinct, and a value of five random digits."""
    keys = rng.choice(len(WORDS) * 10_000, size=count, replace=False).tolist()
    values = rng.integers(0, 100_000, size=count).tolist()
    return [
        (b"%s-%04d" % (WORDS[key // 10_000], key % 10_000), b"%05d" % value)
        for key, value in zip(keys, values, strict=True)
    ]


def _text_slice(text: np.ndarray, length: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A random slice that ends with a whole line, and the offsets in it at which a line starts.

    Offsets 0 and ``length`` count as line starts, so that there is always one.
    """
    if length > len(text):
        raise ValueError(f"the text has {len(text)} bytes, fewer than the {length} asked for")
    end = int(rng.integers(length, len(text) + 1))
    # Step back to the end of a line; near the start of the text there may be none, so cut there.
    while end > length and text[end - 1] != _NEWLINE:
        end -= 1
    part = text[end - length : end]
    starts = np.flatnonzero(part == _NEWLINE) + 1
    return part.tobytes(), np.concatenate(([0], starts)) if length else np.zeros(1, np.int64)


def retrieval_prompt(
    context_len: int,
    rng: np.random.Generator,
    *,
    text: np.ndarray,
    num_pairs: int = 24,
    depth: float | None = None,
) -> tuple[bytes, bytes]:
    """One question about a key planted in ``text``: the prompt and the answer that continues it.

    Args:
        context_len: length of prompt and answer together, in bytes.
        rng: source of the text slice, the pairs, their places and the choice of the asked pair.
        text: where the surrounding text is cut from, usually ``load_corpus().heldout``.
        num_pairs: number of planted pairs; all but one are distractors.
        depth: where the asked pair stands, from 0 (start of the context) to 1 (just before the
            question), at the nearest line start. ``None`` draws it uniformly, like the others.
    """
    if num_pairs < 1:
        raise ValueError("num_pairs must be at least 1")
    pairs = _pairs(rng, num_pairs)
    asked = int(rng.integers(num_pairs))
    lines = [key_line(*pair) for pair in pairs]
    ask = question(pairs[asked][0])
    room = context_len - sum(map(len, lines)) - len(ask) - ANSWER_LEN
    if room < 0:
        raise ValueError(f"{num_pairs} pairs and a question do not fit in {context_len} bytes")
    body, starts = _text_slice(text, room, rng)
    depths = rng.random(num_pairs)
    if depth is not None:
        depths[asked] = depth
    cuts = starts[np.minimum((depths * len(starts)).astype(np.int64), len(starts) - 1)]
    pieces, done = [], 0
    for index in np.argsort(depths, kind="stable"):
        pieces += [body[done : cuts[index]], lines[index]]
        done = cuts[index]
    prompt = b"".join([*pieces, body[done:], ask])
    return prompt, pairs[asked][1] + b"\n"


def retrieval_batch(
    context_len: int,
    count: int,
    seed: int,
    *,
    text: np.ndarray,
    num_pairs: int = 24,
    depth: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` prompts of equal length and their answers, as token ids on the CPU.

    Returns ``prompts`` [count, context_len - ANSWER_LEN] and ``answers`` [count, ANSWER_LEN], both
    int64. Prompt ``i`` depends on ``(seed, i)`` alone, so a larger batch starts with the same ones.
    """
    import torch

    rows = [
        b"".join(
            retrieval_prompt(
                context_len, np.random.default_rng((seed, index)), text=text, num_pairs=num_pairs, depth=depth
            )
        )
        for index in range(count)
    ]
    tokens = np.frombuffer(b"".join(rows), np.uint8).reshape(count, context_len)
    ids = torch.from_numpy(tokens.astype(np.int64))
    return ids[:, :-ANSWER_LEN], ids[:, -ANSWER_LEN:]


def _training_sequence(
    text: np.ndarray, length: int, rng: np.random.Generator
) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Text with key lines and questions in it, and (start, stop, kind) for each byte not text."""
    # Log-uniform number of pairs: few in some sequences, a question every hundred bytes in others.
    count = int(np.exp(rng.uniform(np.log(4), np.log(max(5, length // 72)))))
    pairs = _pairs(rng, count)
    planted = rng.random(count)
    # Half of the sequences ask at the end, the others ask for each key anywhere after it.
    at_the_end = rng.random() < 0.5
    later = rng.random(count)
    asked = 1 + later if at_the_end else planted + (1 - planted) * later
    events = sorted(
        [(at, 0, *pair) for at, pair in zip(planted.tolist(), pairs, strict=True)]
        + [(at, 1, *pair) for at, pair in zip(asked.tolist(), pairs, strict=True)]
    )
    size = sum(len(key_line(*pair)) + len(question(pair[0])) + ANSWER_LEN for pair in pairs)
    body, starts = _text_slice(text, length - size, rng)
    pieces: list[bytes] = []
    marks: list[tuple[int, int, int]] = []
    done = total = 0
    for at, is_question, key, value in events:
        cut = int(starts[int(at * len(starts))]) if at < 1 else len(body)
        head = question(key) if is_question else key_line(key, b"")[:-1]
        tail = value + b"\n"
        pieces += [body[done:cut], head, tail]
        total += cut - done
        done = cut
        if not is_question:  # " is " closes the head, so the key ends four bytes before it does
            marks.append((total + len(head) - 4 - len(key), total + len(head) - 4, KIND_NOISE))
        total += len(head)
        marks.append((total, total + len(value), KIND_ANSWER if is_question else KIND_NOISE))
        total += len(tail)
    pieces.append(body[done:])
    return b"".join(pieces), marks


def training_batch(
    text: np.ndarray, length: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` training sequences: their bytes and the kind of each byte, uint8 [count, length].

    Each sequence holds between 4 and ``length // 72`` keys and asks for each key once, either
    anywhere after it or in one block at the end.
    """
    tokens = np.empty((count, length), np.uint8)
    kinds = np.zeros((count, length), np.uint8)
    for row in range(count):
        data, marks = _training_sequence(text, length, rng)
        tokens[row] = np.frombuffer(data, np.uint8)
        for start, stop, kind in marks:
            kinds[row, start:stop] = kind
    return tokens, kinds
