"""Models that say where they look: a LLaVA while it writes a word, and the tower of a contrastive model."""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rad_jax import distributed
from rad_jax.errors import UserError

PARTS = 8  # of a film's side, to be covered one after the other


@dataclass(frozen=True)
class Target:
    """A word of a text, and the boxes it should point at (empty when nobody knows), in pixels of the square that the model sees.

    record: with id, patient, question and image (PNG).
    """

    record: dict[str, Any]
    text: str
    span: tuple[int, int]
    name: str
    boxes: list[list[float]]


class Looker(abc.ABC):
    """A checkpoint of launch.train, ready to say where it looks.

    Attributes:
        image_size: of the square it sees.
        what: "llava" or "tower".
    """

    image_size: int
    what: str

    @abc.abstractmethod
    def maps(self, targets: Sequence[Target]) -> np.ndarray:
        """float32 [n, L, N, h, w] by layer and head: of a LLaVA the attention to the image when the span was about to be written, averaged
        over its tokens; of a tower the class token's attention, and as a last layer the likeness of each patch to the span's words, the
        same in every head and moved so that its least is 0."""

    def covered(self, targets: Sequence[Target]) -> np.ndarray:
        """float32 [n, h, w]: how much less likely the span becomes, in nats, when that part of the film is covered (Zeiler and Fergus 2014,
        Visualizing and Understanding Convolutional Networks): a square of twice the part's side, in the median grey around it. Of at most
        `PARTS` by `PARTS` parts, each of which is a pass through the model.

        Raises:
            UserError: of a tower, which writes nothing.
        """
        raise UserError("films are covered for a run of stage 2 or 3, which writes")

    def candidates(self, maps: np.ndarray) -> list[tuple[int, int]]:
        """(layer, head) of those of `maps` that differ: of the tower's last layer one stands for all."""
        layers, heads = maps.shape[1:3]
        alike = layers - 1 if self.what == "tower" else layers
        return [(layer, head) for layer in range(layers) for head in range(heads) if layer != alike or head == 0]

    def named(self, chosen: Sequence[tuple[int, int]], maps: np.ndarray) -> str:
        """Words for some of `candidates`, and for what comes after the last layer of `maps`: covering."""
        special = {maps.shape[1]: "covering"} | (
            {maps.shape[1] - 1: "likeness to the phrase"} if self.what == "tower" else {}
        )
        return ", ".join(special.get(layer, f"layer {layer} head {head}") for layer, head in chosen)


def open_looker(checkpoint: Path, batch_size: int) -> Looker:
    """A looker of the kind that the checkpoint is of. Raises UserError for one that sees no images."""
    import jax

    from rad_jax import prompts, sharding, tasks
    from rad_jax.checkpoint import load_run

    run = load_run(checkpoint)
    mesh = sharding.make_mesh(jax.device_count(), 1, 1)
    task, variables = tasks.restore(run, mesh)
    tokenizer = prompts.load_tokenizer(run.tokenizer_file)
    size = -(-batch_size // mesh.size) * mesh.size
    if run.config["task"] == "contrastive":
        return _Tower(task.model, variables, mesh, tokenizer, size)
    if run.config["task"] != "generative" or task.model.config.vision is None:
        raise UserError(f"{checkpoint} does not look at images: give a run of stage 1, 2 or 3.")
    return _Llava(task.model, variables, mesh, tokenizer, size)


class _Model(Looker):
    def __init__(self, model: Any, variables: Any, mesh: Any, tokenizer: Any, batch_size: int):
        self._model, self._variables, self._mesh = model, variables, mesh
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self.image_size = model.config.vision.image_size

    def _film(self, target: Target) -> np.ndarray:
        from rad_jax import images

        return images.centre_crop(images.decode_png(target.record["image"]), self.image_size)

    def _batches(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        """Rows of a full batch, the last one filled up, and those of them that are real."""
        quiet = None if distributed.first() else True
        starts = range(0, len(rows), self._batch_size)
        for start in tqdm(starts, desc="attention", unit="batch", disable=quiet):
            chosen = rows[start : start + self._batch_size]
            yield [*chosen, *[chosen[0]] * (self._batch_size - len(chosen))], chosen

    def _placed(self, rows: Sequence[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
        """A batch: images, tokens and their number, and what else is a list of numbers, padded with its last."""
        from rad_jax import sharding

        batch = {"image": np.stack([row["image"] for row in rows])}
        batch["length"] = np.array([len(row["tokens"]) for row in rows], np.int32)
        for name, size in sizes.items():
            padded = [np.pad(row[name], (0, size - len(row[name])), mode="edge") for row in rows]
            batch[name] = np.stack(padded).astype(np.int32)
        return sharding.place_whole(batch, self._mesh)


class _Llava(_Model):
    what = "llava"

    def maps(self, targets: Sequence[Target]) -> np.ndarray:
        import jax

        from rad_jax import sharding
        from rad_jax.grounding import attention_to_image

        rows = [self._row(target) for target in targets]
        sizes = {name: max(len(row[name]) for row in rows) for name in ("tokens", "queries")}
        maps: list[np.ndarray] = []
        for batch, chosen in self._batches(rows):
            with jax.set_mesh(self._mesh):
                placed = self._placed(batch, sizes)
                at = placed.pop("queries")
                seen = sharding.gather(attention_to_image(self._model, self._variables, placed, at))
            maps += [m[:, :, : len(row["queries"])].mean(2) for m, row in zip(seen, chosen, strict=False)]
        return _square(np.stack(maps))

    def covered(self, targets: Sequence[Target]) -> np.ndarray:
        import jax

        from rad_jax import sharding
        from rad_jax.grounding import log_likelihood

        rows = [self._row(target) for target in targets]
        rows = [{**row, "count": np.array([len(row["queries"])])} for row in rows]
        sizes = {name: max(len(row[name]) for row in rows) for name in ("tokens", "queries", "count")}
        side = self._model.config.vision.image_size // self._model.config.vision.patch_size
        parts = min(side, PARTS)
        maps: list[np.ndarray] = []
        for batch, chosen in self._batches(rows):
            with jax.set_mesh(self._mesh):
                placed = self._placed(batch, sizes)
                films, at, count = placed.pop("image"), placed.pop("queries"), placed.pop("count")[:, 0]

                def likely(films: Any, placed: Any = placed, at: Any = at, count: Any = count) -> np.ndarray:
                    batch = {**placed, "image": films}
                    return sharding.gather(log_likelihood(self._model, self._variables, batch, at, count))

                whole, lost = likely(films), np.zeros((len(batch), parts, parts), np.float32)
                pixels = np.stack([row["image"] for row in batch])
                for y in range(parts):
                    for x in range(parts):
                        hidden = {"image": cover(pixels, y, x, self.image_size // parts)}
                        lost[:, y, x] = whole - likely(sharding.place_whole(hidden, self._mesh)["image"])
            maps.append(lost[: len(chosen)])
        place = np.arange(side) * parts // side
        return np.concatenate(maps)[:, place][:, :, place]

    def _row(self, target: Target) -> dict[str, Any]:
        from rad_jax import prompts

        tokenizer = self._tokenizer
        prompt = prompts.render_v1(tokenizer, target.record["question"], None).ids
        words = tokenizer.encode(target.text)
        ends = [len(tokenizer.decode(words[: k + 1])) for k in range(len(words))]
        start, stop = target.span
        inside = [k for k, end in enumerate(ends) if end > start and (ends[k - 1] if k else 0) < stop]
        queries = [len(prompt) + k - 1 for k in inside]
        return {"tokens": prompt + words, "queries": queries, "image": self._film(target)}


class _Tower(_Model):
    what = "tower"

    def maps(self, targets: Sequence[Target]) -> np.ndarray:
        import jax

        from rad_jax import prompts, sharding
        from rad_jax.grounding import attention_of_tower

        most = self._model.config.text.max_positions
        rows: list[dict[str, Any]] = [
            {
                "tokens": prompts.render_clip(self._tokenizer, target.text[slice(*target.span)], most).ids,
                "image": self._film(target),
            }
            for target in targets
        ]
        sizes = {"tokens": max(len(row["tokens"]) for row in rows)}
        maps: list[np.ndarray] = []
        for batch, chosen in self._batches(rows):
            with jax.set_mesh(self._mesh):
                placed = self._placed(batch, sizes)
                seen, like = sharding.gather(attention_of_tower(self._model, self._variables, placed))
            for attention, cosines in zip(seen[: len(chosen)], like[: len(chosen)], strict=True):
                shape = (1, attention.shape[1], attention.shape[2])
                maps.append(np.concatenate([attention, np.broadcast_to(cosines - cosines.min(), shape)]))
        return _square(np.stack(maps))


def cover(films: np.ndarray, y: int, x: int, size: int) -> np.ndarray:
    """Films uint8 [n, Y, X] whose part (y, x), of parts of so many pixels, is hidden with half a part around it."""
    half, hidden = size // 2, films.copy()

    def around(more: int) -> tuple[slice, slice, slice]:
        rows, columns = (slice(max(0, k * size - more), (k + 1) * size + more) for k in (y, x))
        return slice(None), rows, columns

    hidden[around(half)] = np.median(films[around(2 * half)], axis=(1, 2), keepdims=True).astype(films.dtype)
    return hidden


def _square(maps: np.ndarray) -> np.ndarray:
    """[n, L, N, P] to [n, L, N, h, w]."""
    side = round(maps.shape[-1] ** 0.5)
    return maps.reshape(*maps.shape[:3], side, side)
