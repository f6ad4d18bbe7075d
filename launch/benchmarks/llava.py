"""A small LLaVA for the suites train_step, projector_step and decode: its sizes, weights and batches, and our side of them.

The sizes are a tower of 12 blocks of width 192 (224 pixels, patches of 14), of which the features after the last block but one are
used, and a Llama of 4 layers of width 256. Both sides read the same weights (HF's names, one safetensors file) and the same batches.
"""

import dataclasses
import functools
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks import pairs, torch_llava
from rad_jax.errors import UserError
from rad_jax.interop import hf_llama, tables
from rad_jax.interop.tables import Table, filler, linear, norm, patches, same, stacked
from rad_jax.interop.timm_vit import CHANNELS, unused
from rad_jax.models.llama import LlamaConfig
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig
from rad_jax.prompts import IMAGE_ID

LOSS_TOLERANCE = 1e-4  # relative; both sides in float32, sums in another order, through all steps of a run
TRAINABLE = {
    "train_step": ("params/projector/.*", "params/llm/.*"),
    "projector_step": ("params/projector/.*",),
}
SKIPPED = {
    "train_step": "tower's last block, final norm and pooler; logits of image and prompt (head and loss on the labelled positions only)",
    "projector_step": "the same",
    "decode": "tower's last block, final norm and pooler; in each step the Python of generate() and of every module",
}
VISION = VitConfig(224, 14, width=192, depth=12, heads=3, mlp_dim=768, feature_layer=-2, unroll=11)
LLM = LlamaConfig(2000, width=256, depth=4, heads=4, kv_heads=4, mlp_dim=688, unroll=4)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of model and batches; `folder` holds the weights."""

    folder: Path
    vision: VitConfig = VISION
    llm: LlamaConfig = LLM
    batch: int = 8
    before: int = 32  # text tokens ahead of the image
    after: int = 96  # behind it in training; all but the first are predicted
    asked: int = 32  # behind it in a prompt
    new_tokens: int = 64
    learning_rate: float = 1e-4
    steps: int = 100

    def rows(self, batch: int, after: int) -> dict[str, np.ndarray]:
        """tokens int32 [B, T] with one IMAGE_ID, length int32 [B], image uint8 [B, Y, X]; the same every time."""
        rng = np.random.default_rng(1)
        # Ids below 3 are special ones, and the last stands for the image on the other side.
        words = rng.integers(3, self.llm.vocab_size - 1, (batch, self.before + 1 + after)).astype(np.int32)
        words[:, self.before] = IMAGE_ID
        size = self.vision.image_size
        return {
            "tokens": words,
            "length": np.full(batch, words.shape[1], np.int32),
            "image": rng.integers(0, 256, (batch, size, size), dtype=np.uint8),
        }


def names(problem: Problem, vision: VitConfig) -> Table:
    """transformers' LLaVA with a ViT tower, by the names it has in memory."""
    c, width = vision, (vision.width,)
    heads = (c.heads, c.width // c.heads)
    layer = "layers.{}."
    block = [
        *norm("blocks/norm1", f"{layer}layernorm_before", c.width),
        *(e for p in "qkv" for e in linear(f"blocks/attn/{p}", f"{layer}attention.{p}_proj", width, heads)),
        *linear("blocks/attn/o", f"{layer}attention.o_proj", heads, width),
        *norm("blocks/norm2", f"{layer}layernorm_after", c.width),
        *linear("blocks/mlp/fc1", f"{layer}mlp.fc1", width, (c.mlp_dim,)),
        *linear("blocks/mlp/fc2", f"{layer}mlp.fc2", (c.mlp_dim,), width),
    ]
    last = [
        *norm("norm", "layernorm", c.width),
        filler("pooler.dense.weight", (c.width, c.width)),
        filler("pooler.dense.bias", width),
    ]
    stem = [
        same("cls_token", "embeddings.cls_token", (1, 1, c.width)),
        same("pos_embed", "embeddings.position_embeddings", (1, c.tokens, c.width)),
        *patches("patch_embed", "embeddings.patch_embeddings.projection", c.patch_size, CHANNELS, c.width, True),
    ]
    whole = c.feature_layer is None
    ignored = unused(c, r"layers\.", r"(?:layernorm|pooler)\.")
    tower = Table("ViT", (*stem, *stacked(block, c.blocks_used), *(last if whole else [])), ignored)
    tower = tower.under("vision/", "model.vision_tower.")
    decoder = [
        dataclasses.replace(entry, name=re.sub(r"^model\.", "model.language_model.", entry.name))
        for entry in hf_llama.table(problem.llm).under("llm/", "").entries
    ]
    projector = [
        *linear("projector/fc1", "model.multi_modal_projector.linear_1", width, (problem.llm.width,)),
        *linear("projector/fc2", "model.multi_modal_projector.linear_2", (problem.llm.width,), (problem.llm.width,)),
    ]
    return Table("LLaVA", (*tower.entries, *projector, *decoder), tower.ignored)


def make_weights(problem: Problem) -> None:
    """Random weights of all blocks in `problem.folder`, of a size that keeps activations near one."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def drawn(name: str, shape: Sequence[int]) -> np.ndarray:
        if len(shape) == 1:
            return (0.1 * rng.standard_normal(shape) + (name.endswith("weight"))).astype(np.float32)
        # Words larger than what the layers add, so that a text does not end in one word over and over.
        fan_in = 0.1 if "embed_tokens" in name else np.prod(shape[1:])
        return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    whole = names(problem, dataclasses.replace(problem.vision, feature_layer=None))
    save_file({n: drawn(n, shape) for n, shape in whole.shapes().items()}, problem.folder / torch_llava.WEIGHTS)


# ----------------------------------------------------------------------------------------------------------------------- our side


def our_config(problem: Problem, trainable: Sequence[str]) -> Any:
    """The experiment, as a file of configs/ would hold it."""
    from configs import common

    model = {"vision": dataclasses.asdict(problem.vision), "llm": dataclasses.asdict(problem.llm)}
    config = common.experiment("generative", model, tuple(trainable), {}, problem.steps, problem.batch)
    config.optimizer.update(peak_lr=problem.learning_rate, clip=1.0)
    return config


def our_weights(problem: Problem) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {"params": tables.load(names(problem, problem.vision), load_file(problem.folder / torch_llava.WEIGHTS))}


def our_training(problem: Problem, trainable: Sequence[str]) -> Callable[[], float]:
    """A step of `rad_jax.train`; gives the loss."""
    import flax.linen as nn
    import jax

    from rad_jax import optim, sharding, tasks, train

    config = our_config(problem, trainable)
    task, optimizer = tasks.make_task(config), optim.optimizer(config.optimizer, config.steps)
    mesh = sharding.make_mesh(1, 1, 1)
    batch = problem.rows(problem.batch, problem.after)
    first = problem.before + 1  # of the tokens that predict one
    at = np.arange(first, first + problem.after - 1)
    batch["target_positions"] = np.tile(at, (problem.batch, 1)).astype(np.int32)
    batch["targets"] = batch["tokens"][:, at + 1]
    batch["target_weights"] = np.ones(batch["targets"].shape, np.float32)
    with jax.set_mesh(mesh):
        state, frozen = train.initial(config, task, optimizer, our_weights(problem), mesh)
        where = jax.tree.map(lambda x: x.sharding, state)
        jitted = jax.jit(train.make_step(task, optimizer, 1), out_shardings=(where, None), donate_argnums=0)
        with nn.logical_axis_rules(sharding.RULES):
            compiled = jitted.lower(state, frozen, sharding.place_batch(batch, mesh)).compile()

    def step() -> float:
        nonlocal state
        state, numbers = compiled(state, frozen, sharding.place_batch(batch, mesh))
        jax.block_until_ready(state)
        return float(numbers["loss"])

    return step


def our_writing(problem: Problem) -> Callable[[int, int], list[list[int]]]:
    """`rad_jax.generate` of so many rows and new tokens; gives their ids."""
    import jax

    from rad_jax.generate import generate
    from rad_jax.models.llava import Llava

    model = Llava(LlavaConfig(problem.llm, problem.vision))
    variables = jax.tree.map(jax.numpy.asarray, our_weights(problem))
    prompts = functools.cache(lambda batch: problem.rows(batch, problem.asked))

    def write(batch: int, new_tokens: int) -> list[list[int]]:
        ids = generate(model, variables, prompts(batch), jax.random.key(0), max_new_tokens=new_tokens, eos_id=-1)
        return np.asarray(ids).tolist()

    return write


# ----------------------------------------------------------------------------------------------------------------------- the suites


def steps(suite: str, problem: Problem, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One optimizer step: ours and transformers', from the same weights on the same batch, over and over.

    Raises:
        UserError: the losses of the two sides differ.
    """
    problem = dataclasses.replace(problem, steps=rounds + 2)
    trainable = TRAINABLE[suite]
    sides = {"ours": pairs.Side("ours", threads, our_training, problem, trainable)}
    for attention in torch_llava.ATTENTION:
        whole = suite == "train_step"
        sides[attention] = pairs.Side(attention, threads, torch_llava.training, problem, whole, attention)
    try:
        warm = pairs.alternate(sides, 2, ())
        runs = pairs.alternate(sides, rounds, ())
    finally:
        for side in sides.values():
            side.stop()
    losses = {side: np.array([run.result for run in warm[side] + runs[side]]) for side in sides}
    apart = max(float(np.max(np.abs(losses["ours"] / losses[peer] - 1))) for peer in torch_llava.ATTENTION)
    if not apart <= LOSS_TOLERANCE:
        raise UserError(
            f"the losses of the two sides differ by {apart:.1e} relative, so their times cannot be compared."
        )
    found = pairs.row(f"{suite}, batch {problem.batch}", runs, SKIPPED[suite])
    equal = f"loss {losses['ours'][0]:.6f} -> {losses['ours'][-1]:.6f}, theirs {losses[found['peer']][0]:.6f} -> {losses[found['peer']][-1]:.6f}"
    found |= {
        "loss_difference": apart,
        "equality": f"{equal}: at most {apart:.1e} apart in {len(losses['ours'])} steps",
    }
    return [found]


def decode(problem: Problem, rounds: int, threads: int, batches: Sequence[int] = (1, 8)) -> list[dict[str, Any]]:
    """Greedy writing at each batch size: the prompt with its first token, and the tokens after it.

    Raises:
        UserError: the two sides write different tokens.
    """
    sides = {"ours": pairs.Side("ours", threads, our_writing, problem)}
    for attention in torch_llava.ATTENTION:
        sides[attention] = pairs.Side(attention, threads, torch_llava.writing, problem, attention)
    rows = []
    try:
        for batch in batches:
            for new_tokens in (1, problem.new_tokens):
                pairs.alternate(sides, 1, (batch, new_tokens))
            first = pairs.alternate(sides, rounds, (batch, 1))
            whole = pairs.alternate(sides, rounds, (batch, problem.new_tokens))
            rows += _decode_rows(problem, batch, first, whole)
    finally:
        for side in sides.values():
            side.stop()
    return rows


def _decode_rows(
    problem: Problem, batch: int, first: Mapping[str, list[pairs.Run]], whole: Mapping[str, list[pairs.Run]]
) -> list[dict[str, Any]]:
    for side, runs in whole.items():
        if any(run.result != whole["ours"][0].result for run in runs):
            raise UserError(
                f"ours and {side} write different tokens at batch {batch}, so their times cannot be compared."
            )
    rest = {side: _less(whole[side], first[side]) for side in whole}
    later = problem.new_tokens - 1
    rows = [
        pairs.row(f"decode, batch {batch}, {later} tokens", rest, SKIPPED["decode"]),
        pairs.row(f"prompt and first token, batch {batch}", first, SKIPPED["decode"]),
    ]
    for r, count in zip(rows, (later, 1), strict=True):
        r["ours_tokens_per_s"], r["peer_tokens_per_s"] = (batch * count / r[f"{side}_s"] for side in ("ours", "peer"))
        r["equality"] = (
            f"all {batch} x {problem.new_tokens} tokens equal; {r['ours_tokens_per_s']:.0f} tokens/s, theirs {r['peer_tokens_per_s']:.0f}"
        )
    return rows


def _less(whole: Sequence[pairs.Run], first: Sequence[pairs.Run]) -> list[pairs.Run]:
    """What the runs took beyond the median of the shorter ones."""
    wall, cpu = (statistics.median(run[i] for run in first) for i in (0, 1))
    return [pairs.Run(run.wall_s - wall, run.cpu_s - cpu, run.result) for run in whole]


def run(suite: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """The rows of a suite, at the sizes above."""
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(Path(folder))
        make_weights(problem)
        return decode(problem, rounds, threads) if suite == "decode" else steps(suite, problem, rounds, threads)
