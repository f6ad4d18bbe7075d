"""Splitting, joining and choosing variables by path."""

from typing import Any

import numpy as np
import pytest

from rad_jax.errors import UserError
from rad_jax.state import join, select, split, table

TREE: dict[str, Any] = {
    "params": {
        "vision": {"blocks": {"fc": np.zeros((3, 2, 4))}, "cls_token": np.zeros((1, 1, 2))},
        "projector": {"fc1": {"kernel": np.zeros((2, 5)), "bias": np.zeros(5)}},
    },
    "lora": {"llm": {"a": np.zeros((2, 3))}},
}


def test_split_by_path():
    trainable, frozen = split(TREE, ("params/projector/.*", "lora/.*"))
    assert trainable == {"params": {"projector": TREE["params"]["projector"]}, "lora": TREE["lora"]}
    assert frozen == {"params": {"vision": TREE["params"]["vision"]}}


def test_pattern_must_match_the_whole_path():
    with pytest.raises(UserError, match="no variable matches 'params/projector'"):
        split(TREE, ("params/projector",))


def test_every_pattern_must_match_something():
    with pytest.raises(UserError, match=r"'params/llm/\.\*'.*the first are \['lora/llm/a'"):
        split(TREE, ("lora/.*", "params/llm/.*"))


def test_join_takes_the_later_of_two():
    one = {"params": {"a": 1, "b": {"c": 2}}}
    assert join(one, {"params": {"b": {"c": 3}}, "lora": {"d": 4}}) == {
        "params": {"a": 1, "b": {"c": 3}},
        "lora": {"d": 4},
    }
    assert one == {"params": {"a": 1, "b": {"c": 2}}}
    assert join() == {}


def test_join_undoes_split():
    assert join(*split(TREE, ("lora/.*",))) == TREE


def test_select_cuts_a_tower_to_the_blocks_that_are_used():
    base = {"params": {"vision": {"blocks": {"fc": np.arange(24.0).reshape(3, 2, 4)}}}}
    wanted = {"params": {"vision": {"blocks": {"fc": np.zeros((2, 2, 4))}}}}
    found = select(base, wanted)["params"]["vision"]["blocks"]["fc"]
    np.testing.assert_array_equal(found, base["params"]["vision"]["blocks"]["fc"][:2])


def test_select_takes_only_what_the_model_has():
    assert select(TREE, {"lora": {"llm": {"a": np.zeros((2, 3)), "b": np.zeros(1)}}}) == {"lora": TREE["lora"]}


@pytest.mark.parametrize("shape", [(4, 2, 4), (3, 2, 5), (3, 2)])
def test_select_refuses_other_shapes(shape):
    """Also a tower with fewer blocks than are used."""
    wanted = {"params": {"vision": {"blocks": {"fc": np.zeros(shape)}}}}
    with pytest.raises(UserError, match=r"params/vision/blocks/fc is \(3, 2, 4\) in the base but .* in this config"):
        select(TREE, wanted)


def test_select_cuts_nothing_but_blocks():
    with pytest.raises(UserError, match="params/projector/fc1/bias is"):
        select(TREE, {"params": {"projector": {"fc1": {"bias": np.zeros(4)}}}})


def test_table_counts_by_component():
    rows = [line.split() for line in table(*split(TREE, ("params/projector/.*", "lora/.*"))).splitlines()]
    assert rows == [
        ["trainable", "frozen"],
        ["params/projector", "15", "0"],
        ["lora/llm", "6", "0"],
        ["params/vision", "0", "26"],
        ["total", "21", "26"],
    ]
