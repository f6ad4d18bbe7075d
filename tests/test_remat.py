"""What the backward pass keeps and what it computes again changes no number."""

import jax
import numpy as np
import pytest

from rad_jax import tasks
from rad_jax.models.layers import REMAT_POLICIES
from rad_jax.state import split

SLOW = {"full", "dots"}
POLICIES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in REMAT_POLICIES]


class Setting:
    """Stage 3 with a remat policy: its gradient function and arguments."""

    def __init__(self, training, policy):
        self.config = training.config("stage3")
        self.config.model.lora.dropout = 0.5  # a mask that is drawn again must be the same mask
        for part in ("vision", "llm"):
            self.config.model[part].remat = policy
        task = tasks.make_task(self.config)
        trainable, frozen = split(training.variables(self.config), self.config.trainable)
        self.function = lambda trainable, batch: task.value_and_grad(trainable, frozen, batch, jax.random.key(0), 1)
        self.arguments = trainable, training.batch(self.config)

    def run(self):
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return jax.jit(self.function, compiler_options=options)(*self.arguments)

    def products(self):
        """How many matrix products one layer's forward and backward pass have."""
        return str(jax.make_jaxpr(self.function)(*self.arguments)).count("dot_general")


@pytest.fixture(scope="module")
def plain(training):
    return Setting(training, "none").run()


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradients(training, plain, policy):
    """float32 in another order, relative to the largest entry of a leaf."""
    found = Setting(training, policy).run()
    np.testing.assert_allclose(found.loss_sum, plain.loss_sum, rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(found.grads), jax.tree.leaves(plain.grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), 1e-3))


def test_products_that_are_computed_again(training):
    """Per layer: seven projections, two products of each of their adapters but one, and two in the attention.

    "minimal" repeats only what XLA's attention keeps no name for, the scores; "attention" also gate, up and o, and their adapters' second
    products; "full" everything but the last product of all, whose result no gradient needs.
    """
    count = {policy: Setting(training, policy).products() for policy in ("none", "minimal", "attention", "full")}
    assert count["none"] < count["minimal"] < count["attention"] < count["full"]
    assert count["minimal"] - count["none"] <= 2
