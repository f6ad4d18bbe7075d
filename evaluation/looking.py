"""Models that say where they look: a LLaVA while it writes a word, and the tower of a contrastive model."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rad_jax import distributed
from rad_jax.errors import UserError

PARTS = 8  # of a film's side, to be covered one after the other
TOKENS = 32  # of texts that are covered, lengths are multiples: each is a program to compile
Keep = Callable[[np.ndarray], np.ndarray]


def _whole(maps: np.ndarray) -> np.ndarray:
    return maps


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
    def maps(self, targets: Sequence[Target], keep: Keep = _whole) -> np.ndarray:
        """float32 [n, L, N, h, w] by layer and head: of a LLaVA the attention to the image when the span was about to be written, averaged
        over its tokens; of a tower the class token's attention, and as a last layer the likeness of each patch to the span's words, the
        same in every head and moved so that its least is 0.

        keep: what is wanted of the maps of a batch, [b, L, N, h, w] to [b, ...], and then returned for all n: of a 7B model the maps of all layers
        and heads are 6 MB for every target.
        """

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

    def maps(self, targets: Sequence[Target], keep: Keep = _whole) -> np.ndarray:
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
            own = [m[:, :, : len(row["queries"])].mean(2) for m, row in zip(seen, chosen, strict=False)]
            maps.append(keep(_square(np.stack(own))))
        return np.concatenate(maps)

    def covered(self, targets: Sequence[Target]) -> np.ndarray:
        import jax

        from rad_jax import sharding
        from rad_jax.grounding import log_likelihood

        rows, places = self._texts(targets)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["tokens"]))  # texts of one batch are about as long
        most = max(len(row["queries"]) for row in rows)
        side = self._model.config.vision.image_size // self._model.config.vision.patch_size
        parts = min(side, PARTS)
        lost: list[np.ndarray] = []  # of each row, [h, w, Q]
        for batch, chosen in self._batches([rows[i] for i in order]):
            longest = -(-max(len(row["tokens"]) for row in batch) // TOKENS) * TOKENS
            with jax.set_mesh(self._mesh):
                placed = self._placed(batch, {"tokens": longest, "queries": most})
                films, at = placed.pop("image"), placed.pop("queries")

                def likely(films: Any, placed: Any = placed, at: Any = at) -> np.ndarray:
                    return sharding.gather(log_likelihood(self._model, self._variables, {**placed, "image": films}, at))

                whole, found = likely(films), np.zeros((len(batch), parts, parts, most), np.float32)
                pixels = np.stack([row["image"] for row in batch])
                for y in range(parts):
                    for x in range(parts):
                        hidden = {"image": cover(pixels, y, x, self.image_size // parts)}
                        found[:, y, x] = whole - likely(sharding.place_whole(hidden, self._mesh)["image"])
            lost += list(found[: len(chosen)])
        own = np.argsort(order)
        maps = np.stack([lost[own[row]][..., span].sum(-1) for row, span in places])
        place = np.arange(side) * parts // side
        return maps[:, place][:, :, place]

    def _texts(self, targets: Sequence[Target]) -> tuple[list[dict[str, Any]], list[tuple[int, slice]]]:
        """A row for every text of a film, up to its last span, with the queries of all its targets; and each target's row and queries there."""
        rows: dict[tuple[Any, str], dict[str, Any]] = {}
        places: list[tuple[int, slice]] = []
        for target in targets:
            own, key = self._row(target), (target.record["id"], target.text)
            row = rows.setdefault(key, {**own, "queries": []})
            start = len(row["queries"])
            row["queries"] = row["queries"] + own["queries"]
            places.append((list(rows).index(key), slice(start, start + len(own["queries"]))))
        for row in rows.values():
            row["tokens"] = row["tokens"][: max(row["queries"]) + 2]
        return list(rows.values()), places

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

    def maps(self, targets: Sequence[Target], keep: Keep = _whole) -> np.ndarray:
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
            own = []
            for attention, cosines in zip(seen[: len(chosen)], like[: len(chosen)], strict=True):
                shape = (1, attention.shape[1], attention.shape[2])
                own.append(np.concatenate([attention, np.broadcast_to(cosines - cosines.min(), shape)]))
            maps.append(keep(_square(np.stack(own))))
        return np.concatenate(maps)


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
