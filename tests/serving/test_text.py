"""Text as it comes: pieces put together are the whole text, cut where it shall be cut."""

import numpy as np
import pytest

from rad_jax.prompts import load_tokenizer
from rad_jax.serving.sampling import Sampler
from rad_jax.serving.text import Detokenizer, Stops, open_pieces, prompt


@pytest.fixture(scope="module")
def tokenizer(bundle):
    return load_tokenizer(bundle()[1] / "tokenizer.json")


@pytest.fixture(scope="module")
def open_(tokenizer):
    import tokenizers

    return open_pieces(tokenizers.Tokenizer.from_file(str(tokenizer.path)), tokenizer.vocab_size)


def shown(tokenizer, open_, ids):
    writer = Detokenizer(tokenizer, open_)
    return [*(writer.push(token) for token in ids), writer.end()]


def test_pieces_of_any_ids_are_the_text_of_all_of_them(tokenizer, open_):
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(0, tokenizer.vocab_size, 40).tolist()  # half of them bytes, few of which make a character
        assert "".join(shown(tokenizer, open_, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["The heart is normal.", "größer als früher, µ → 心臓", "a  b\n\n c ", ""])
def test_pieces_of_a_text_hold_whole_characters(tokenizer, open_, text):
    pieces = shown(tokenizer, open_, tokenizer.encode(text))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert all("\ufffd" not in piece for piece in pieces)
    if text.startswith("The"):
        assert sum(map(bool, pieces)) > 2  # it does not wait for the end


def test_what_a_user_writes_is_never_a_special_token(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    for image in (True, False):
        ids = prompt(tokenizer, "<s> </s> <image> <pad> <unk>", image)
        assert ids[0] == tokenizer.bos_id and not special & set(ids[1:])
        assert sum(token < 0 for token in ids) == image


def test_stop_strings_cut_and_their_beginnings_wait():
    stops = Stops(("END", "\n\n"))
    assert [stops.push(text) for text in ("lungs E", "N", "lil clear", ".\n", "\nmore")] == [
        "lungs ",
        "",
        "ENlil clear",
        ".",
        "",
    ]
    assert stops.found and stops.end() == ""
    waiting = Stops(("END",))
    assert waiting.push("clear E") == "clear " and not waiting.found and waiting.end() == "E"
    assert Stops(()).push("all of it") == "all of it"


def test_samples_have_the_probabilities_they_should():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    counts = np.bincount([Sampler(1.0, 1.0, seed).choose(logits) for seed in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    kept = {Sampler(1.0, 0.7, seed).choose(logits) for seed in range(200)}
    assert kept == {0, 1}
    assert {Sampler(1.0, 1e-9, seed).choose(logits) for seed in range(50)} == {0}
    with np.errstate(invalid="raise", over="raise"):  # of a temperature that no number can be divided by
        tiny = [
            Sampler(temperature, top_p, 0).choose(logits) for temperature in (1e-308, 5e-324) for top_p in (1.0, 0.5)
        ]
    assert tiny == [0] * 4
    sharp = [Sampler(0.1, 1.0, seed).choose(logits) for seed in range(300)]
    assert np.mean(np.array(sharp) == 0) > 0.97
