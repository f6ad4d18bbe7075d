"""Near duplicates: one film scaled, compressed or brightened anew is known again, two films are not; on all pairs and on the counts."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from data import likeness
from data.phantom.study import study
from rad_jax import images


def compressed(film, quality=75):
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def scaled(film):
    shape = (film.shape[1] * 2 // 3, film.shape[0] * 2 // 3)
    return np.asarray(Image.fromarray(film).resize(shape, Image.Resampling.BICUBIC))


def brightened(film):
    return np.clip(film.astype(int) + 8, 0, 255).astype(np.uint8)


def apart(a, b):
    return int(np.bitwise_count(likeness.look(a) ^ likeness.look(b)).sum())


def test_real_films(real):
    films = [images.load_short(path, 518)[0] for path in sorted((real / "images" / "nih").iterdir())[:12]]
    for change in (compressed, scaled, brightened):
        assert np.mean([apart(film, change(film)) <= likeness.NEAR for film in films]) >= 0.75, change
    assert min(apart(a, b) for a, b in itertools.combinations(films, 2)) > likeness.NEAR


def test_studies_of_different_patients_differ():
    films = [study(0, patient, 0, 112).image for patient in range(12)]
    assert min(apart(a, b) for a, b in itertools.combinations(films, 2)) > likeness.NEAR


@pytest.mark.parametrize("count", [0, 1, 2, 120])
def test_pairs_equal_those_of_all_comparisons(count):
    rng = np.random.default_rng(1)
    looks = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    for number in range(max(count // 2, 1), count):  # flips of 0 to 11 bits of an earlier one
        bits = np.unpackbits(looks[rng.integers(max(count // 2, 1))])
        bits[rng.choice(256, number % 12, replace=False)] ^= 1
        looks[number] = np.packbits(bits)
    looks = np.unique(looks, axis=0)
    distance = np.bitwise_count(looks[:, None] ^ looks[None]).sum(-1)
    expected = np.argwhere(np.triu(distance <= likeness.NEAR, 1))
    np.testing.assert_array_equal(likeness.near_pairs(looks), expected)
    if count == 120:
        assert len(expected) > 20


def test_the_earliest_is_named():
    looks = np.zeros((6, 32), np.uint8)
    looks[1] = 255
    looks[3, 0] = 1  # one bit from films 0, 2 and 5
    looks[4] = 255
    assert likeness.earlier(looks).tolist() == [-1, -1, 0, 0, 1, 0]
    assert likeness.earlier(looks[:0]).tolist() == []
