"""Seeds of images: a keyed bijection of 32-bit counters, so no two images of a run ever share a seed.

torch's CPU generator uses the low 32 bits of a seed only, so a hash of (run seed, phase, index) would collide after
some 65,000 images. Instead the counter `phase (6 bits) | reserve (2 bits) | index (24 bits)` is permuted by a balanced
Feistel network with four rounds, each with its own random function of 16 bits, which makes it a pseudorandom
permutation (Luby & Rackoff 1988). The functions are tables of SHAKE-256 output, keyed by the run seed.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from builder.errors import BuilderError
from builder.phases import MAX_PHASES

INDEX_BITS, RESERVE_BITS = 24, 2
MAX_INDEX = 2**INDEX_BITS - 1
MAX_RESERVE = 2**RESERVE_BITS - 1
GRAIN_KEY = int.from_bytes(b"grain", "big")  # of the bijection from an image's seed to that of its grain
ROUNDS = 4
HALF_BITS = 16


def seed_of(run_seed: int, phase_label: int, index: int, reserve: int = 0) -> int:
    """The seed, 0..2^32-1, of image `index` of a phase; `reserve` n > 0 is its n-th replacement.

    Distinct (phase_label, index, reserve) have distinct seeds under one run seed, which may be any whole number.
    BuilderError outside label 0..63, index 0..2^24-1, reserve 0..3.
    """
    return int(seeds_of(run_seed, phase_label, index, reserve))


def seeds_of(run_seed: int, phase_labels: ArrayLike, indices: ArrayLike, reserves: ArrayLike = 0) -> NDArray[np.uint32]:
    """`seed_of` over arrays that broadcast together."""
    label = _within(phase_labels, MAX_PHASES - 1, "phase label", "a class table has at most 64 classes")
    index = _within(indices, MAX_INDEX, "index", "start another dataset with another `seed`")
    reserve = _within(reserves, MAX_RESERVE, "reserve", f"an image has {MAX_RESERVE} reserve seeds")
    counter = label << np.uint32(INDEX_BITS + RESERVE_BITS) | reserve << np.uint32(INDEX_BITS) | index
    return permute(counter, round_tables(run_seed))


def grain_seed(seed: int) -> int:
    """The seed, 0..2^32-1, of the noise that an image's grain is made of; `seed` is the image's own.

    `permute` with the round functions of GRAIN_KEY: a bijection, so distinct images have distinct grain; and other
    numbers than the latents of the same image begin with.
    """
    return int(permute(seed, round_tables(GRAIN_KEY)))


def permute(values: ArrayLike, tables: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Feistel network over values of 2b bits; `tables` [rounds, 2^b] holds the round functions, b bits each."""
    half = np.uint32(tables.shape[1].bit_length() - 1)
    values = np.asarray(values, np.uint32)
    left, right = values >> half, values & np.uint32(tables.shape[1] - 1)
    for table in tables:
        left, right = right, left ^ table[right]
    return left << half | right


@lru_cache(maxsize=16)
def round_tables(run_seed: int, half_bits: int = HALF_BITS) -> NDArray[np.uint16]:
    """The round functions [ROUNDS, 2^half_bits] of a run seed; little-endian, so the same on every machine."""
    length = 2**half_bits
    stream = hashlib.shake_256(f"builder seeds {run_seed}".encode()).digest(2 * length * ROUNDS)
    tables = np.frombuffer(stream, "<u2").astype(np.uint16).reshape(ROUNDS, length) & np.uint16(length - 1)
    tables.flags.writeable = False
    return tables


def _within(values: ArrayLike, limit: int, what: str, remedy: str) -> NDArray[np.uint32]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise BuilderError(f"{what} is of type {array.dtype}, not a whole number", "")
    outside = (array < 0) | (array > limit)
    if outside.any():
        raise BuilderError(f"{what} {array[outside].flat[0]} is outside 0..{limit}", remedy)
    return array.astype(np.uint32)
