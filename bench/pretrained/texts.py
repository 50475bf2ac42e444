"""Texts and retrieval tasks, from what every Python has: the sources of its standard library, and the language
reference that `help()` shows. They depend on its version and on the seed alone.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

# More characters than any token of these texts has on average.
_CHARACTERS_PER_TOKEN = 8


def reference_text() -> str:
    """The language reference, topic by topic."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def source_text() -> str:
    """The modules of the standard library, without packages."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace").strip() for file in files)


def texts(tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [count, length]: sources and language reference in turn, from places spread evenly and shifted at
    random. They overlap only where a corpus is too short for so many."""
    rng = random.Random(seed)
    corpora = [source_text(), reference_text()]
    rows = []
    for index in range(count):
        corpus = corpora[index % 2]
        of_kind = -(-count // 2)
        needed = min(_CHARACTERS_PER_TOKEN * length, len(corpus))
        start = int((len(corpus) - needed) * (index // 2 + rng.random()) / of_kind)
        start = corpus.find("\n", start) + 1
        ids = tokenizer(corpus[start : start + needed])["input_ids"]
        if len(ids) < length:
            raise ValueError(f"texts of this Python have {len(ids)} tokens; length is {length}")
        rows.append(ids[:length])
    return torch.tensor(rows)


@dataclass(frozen=True)
class Puzzle:
    """Lines that are hidden in a text, in this order; a question behind it, and the answer that has to follow."""

    lines: list[str]
    question: str
    answer: str


_CITIES = (
    "Amsterdam",
    "Berlin",
    "Cairo",
    "Dublin",
    "Geneva",
    "Helsinki",
    "Jakarta",
    "Lisbon",
    "Madrid",
    "Oslo",
    "Paris",
    "Rome",
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_WORDS = ("apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket")
NUM_KEYS = 8
# Of the word asked for, and of each of two others.
MOST_FREQUENT, LESS_FREQUENT = 24, 2


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _needles(rng: random.Random, count: int) -> Puzzle:
    facts = [f"The secret number of {city} is" for city in rng.sample(_CITIES, count)]
    numbers = [_number(rng) for _ in facts]
    asked = rng.randrange(count)
    lines = [f"{fact} {number}." for fact, number in zip(facts, numbers, strict=True)]
    return Puzzle(lines, facts[asked], f" {numbers[asked]}")


def _tracking(rng: random.Random) -> Puzzle:
    name, other = rng.sample(_LETTERS, 2)
    number = _number(rng)
    lines = [f"Variable {name} is {number}.", f"Variable {other} is equal to variable {name}."]
    question = f"Question: what number is variable {other}?\nAnswer: "
    return Puzzle(lines, question + f"Variable {other} is equal to variable {name}, which is", f" {number}")


def _frequent_word(rng: random.Random) -> Puzzle:
    often, *others = rng.sample(_WORDS, 3)
    words = [often] * MOST_FREQUENT + others * LESS_FREQUENT
    rng.shuffle(words)
    question = "Of all coded words, the most frequent one: the coded word is"
    return Puzzle([f"The coded word is {word}." for word in words], question, f" {often}")


PUZZLES: dict[str, Callable[[random.Random], Puzzle]] = {
    "one needle": lambda rng: _needles(rng, 1),
    f"{NUM_KEYS} needles": lambda rng: _needles(rng, NUM_KEYS),
    "variable tracking": _tracking,
    "frequent word": _frequent_word,
}


@dataclass(frozen=True)
class Prompts:
    """Prompts with their answers, all of one length.

    tokens: ids [count, length], which end with the answer's last token.
    answer_lens: tokens of each answer.
    decoded: the last so many tokens are question and answer, at least, of every row: those that are decoded.
    tasks: name of each row's task.
    sources: where the answer's tokens stand in each row's text, if they stand there once; else None.
    """

    tokens: torch.Tensor
    answer_lens: list[int]
    decoded: int
    tasks: list[str]
    sources: list[int | None]


def hide(puzzle: Puzzle, tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random) -> tuple[list[int], int]:
    """Token ids of a text with the puzzle in it, `length` with the question and the answer, and how many of them these
    two are. Its lines go to places at random, none within the last tenth."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tail = encode(f"\n\n{puzzle.question}") + encode(puzzle.answer)
    lines = [encode(f"\n{line}\n") for line in puzzle.lines]
    beginning = tokenizer("")["input_ids"]
    room = length - len(tail) - sum(map(len, lines)) - len(beginning)
    if room < 1:
        raise ValueError(f"length is {length}; the puzzle alone has {length - room} tokens")
    corpus = reference_text()
    start = corpus.find("\n", rng.randrange(len(corpus) - _CHARACTERS_PER_TOKEN * length)) + 1
    hay = encode(corpus[start : start + _CHARACTERS_PER_TOKEN * length])[:room]
    ids, last = beginning, 0
    for place, line in zip(sorted(rng.randrange(room * 9 // 10 + 1) for _ in lines), lines, strict=True):
        ids = ids + hay[last:place] + line
        last = place
    return ids + hay[last:] + tail, len(tail)


def prompts(tokenizer: PreTrainedTokenizerBase, tasks: list[str], count: int, length: int, seed: int) -> Prompts:
    """`count` prompts of each of the tasks, names of PUZZLES."""
    rows, answer_lens, tails, sources = [], [], [], []
    for task in tasks:
        for index in range(count):
            rng = random.Random(f"{seed} {task} {index}")
            puzzle = PUZZLES[task](rng)
            ids, tail = hide(puzzle, tokenizer, length, rng)
            rows.append(ids)
            tails.append(tail)
            answer_lens.append(len(tokenizer(puzzle.answer, add_special_tokens=False)["input_ids"]))
            sources.append(_only_place(ids[-answer_lens[-1] :], ids[:-tail]))
    return Prompts(torch.tensor(rows), answer_lens, max(tails), [task for task in tasks for _ in range(count)], sources)


def _only_place(part: list[int], ids: list[int]) -> int | None:
    places = [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]
    return places[0] if len(places) == 1 else None
