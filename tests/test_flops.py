"""FLOPs by formula: against published formulas, against the released sizes, and against what the compiler made of the real step."""

import dataclasses

import pytest

from configs import stage1, stage2, stage3
from rad_jax import flops, tasks
from rad_jax.models.llava import LlavaConfig

ROW = flops.Lengths(text=257, targets=200, padded_text=257, padded_targets=200)
BASE, ADAPTERS, PATCHES = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 159_907_840, 1369  # LoRA: the released files'
TOKENS = 257 - 1 + PATCHES


def parts(config, lengths=ROW):
    return flops.training(tasks.model_config(config), config.trainable, lengths, config.batch_size)


def test_frozen_decoder_with_adapters_is_4_n_and_6_n():
    found = parts(stage3.get_config())
    assert found["llm"].needed == 4 * BASE * TOKENS
    assert found["llm"].trained == 6 * BASE * TOKENS
    assert found["lora"].needed == 6 * ADAPTERS * TOKENS
    assert found["head"].needed == 4 * 4096 * 32000 * 200
    assert found["vision"].needed == found["vision"].forward  # no gradient goes into the frozen tower
    assert found["projector"].needed == 4 * 768 * 4096 * PATCHES + 6 * 4096**2 * PATCHES  # nor through its first layer


def test_causal_attention_is_half_the_square():
    """PaLM (appendix B) counts 12 L N H S per token for forward and backward over the whole square."""
    assert parts(stage3.get_config())["llm attention"].needed == 12 * 32 * 4096 * TOKENS * TOKENS / 2


def test_the_projector_alone_needs_the_gradient_of_the_whole_decoder():
    two, three = parts(stage2.get_config()), parts(stage3.get_config())
    assert two["llm"].needed == three["llm"].needed
    assert "lora" not in two


def test_a_projector_of_one_matrix():
    config = stage2.get_config()
    config.model.projector = "linear"
    # Nothing before it learns.
    assert parts(config)["projector"].needed == 4 * 768 * 4096 * PATCHES


def test_towers_that_learn_are_6_n():
    found = parts(stage1.get_config(), flops.Lengths(100, 0, 256, 0))
    block = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert found["vision"].needed == 6 * block * 1370 + 4 * 14 * 14 * 3 * 768 * 1369
    assert found["text"].needed == 6 * block * 100
    assert found["text"].executed == (6 + 2) * block * 256  # padding, and all of it once more for remat
    assert found["pairs"].needed == 6 * 512 * 1024
    # GradCache: the towers once more, without gradient.
    cached = flops.training(tasks.model_config(stage1.get_config()), (".*",), flops.Lengths(100, 0, 256, 0), 1024, 4)
    assert cached["text"].executed == found["text"].executed + 2 * block * 256
    assert cached["vision"].needed == found["vision"].needed


def test_padding_is_computed_and_not_needed():
    padded = dataclasses.replace(ROW, padded_text=ROW.padded_text + 128)
    config = stage3.get_config()
    config.model.llm.remat = "none"
    real, more = parts(config)["llm"], parts(config, padded)["llm"]
    assert real.needed == more.needed == real.executed
    assert more.executed == real.executed * (TOKENS + 128) / TOKENS


@pytest.mark.parametrize("length", [1370, 1625, 1792, 2048])
def test_splash_covers_blocks_on_and_below_the_diagonal(length):
    """Counted one by one, as the kernel's mask decides it: a block is computed if any query in it may see any key in it."""
    padded = -(-length // 256) * 256
    block = padded // 2
    seen = sum(q * block + block - 1 >= k * block for q in range(2) for k in range(2))
    assert flops.splash_pairs(length, causal=True) == seen * block * block
    # An image tower's row is one block, no longer than it must be.
    padded = 1408 if length == 1370 else padded
    assert flops.splash_pairs(length, causal=False) == padded * padded


def test_generation_is_2_n_a_token():
    config = tasks.model_config(stage3.get_config())
    assert isinstance(config, LlavaConfig)
    found = flops.writing(config, ROW, 100)
    per_token = 2 * (BASE + ADAPTERS + 4096 * 32000)
    assert found["decode"].forward == 100 * (per_token + 4 * 32 * 4096 * (TOKENS + 50))
    one_head = 2 * 4096 * 32000
    training = parts(stage3.get_config())
    expected = sum(training[name].forward for name in ("vision", "vision attention", "projector", "llm", "lora"))
    assert found["prefill"].forward == pytest.approx(expected + training["llm attention"].forward + one_head)
