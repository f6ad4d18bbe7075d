"""RadGraph's entities and relations read from reports by its own model, in JAX: the span model of version 1 (Jain et al. 2021; DyGIE++, Wadden et
al. 2019), for an archive that the user brings.

Every run of up to `max_width` words is a span: the states of its first and last word and a vector for its width. A scorer names its
entity or none. Another scorer keeps the likeliest spans, so many per word, and a third names the relation of each ordered pair of them from
both spans and their product, with both spans' scores added. "None" has score 0 everywhere.

Words are what blanks and / , : . ! ? ( ) part; a word's state is the mean of its pieces' states in the last layer, and a text longer than the
encoder is read in pieces that do not see each other. The first layer of a scorer is linear in the parts of a span, so that it is applied to
words and widths before they are combined: no span is ever written out.
"""

import dataclasses
import json
import math
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import encoder
from evaluation.radgraph import Annotation
from rad_jax.chat import access
from rad_jax.errors import UserError
from rad_jax.interop import sources
from rad_jax.prompts import Tokenizer, load_tokenizer

CONFIG, WEIGHTS, VOCABULARY = "config.json", "weights.th", "vocab.txt"
_BATCH = 8  # reports whose spans are scored at once
_PUNCTUATION = re.compile(r"([/,:.!?()])")
Layers = list[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What config.json says: words of the longest span, spans kept per word, pieces of the encoder's windows."""

    max_width: int
    spans_per_word: float
    window: int


def words(report: str) -> list[str]:
    """A report as the model reads it."""
    return _PUNCTUATION.sub(r" \1 ", report).split()


def unpack(archive: Path, folder: Path) -> Path:
    """Takes config.json, weights.th and the label lists out of RadGraph's archive (.tar.gz) into `folder`, and returns it.

    Nothing else is taken, and names in the archive decide no path. Raises UserError when one is missing.
    """
    wanted = re.compile(r"(?:\./)?(config\.json|weights\.th|vocabulary/[\w.-]+\.txt)")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                found = wanted.fullmatch(member.name)
                content = tar.extractfile(member) if found and member.isfile() else None
                if found and content:
                    (folder / found[1]).parent.mkdir(parents=True, exist_ok=True)
                    with (folder / found[1]).open("wb") as file:
                        while block := content.read(2**24):
                            file.write(block)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): download it again") from error
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{archive} holds no {name}: give RadGraph's archive of version 1, radgraph.tar.gz")
    return folder


class RadGraphModel:
    """Weights, words and labels of an unpacked archive, ready to annotate. Batches are spread over all devices.

    Args:
        folder: config.json, weights.th and vocabulary/ of the archive, and vocab.txt of its encoder (PubMedBERT).

    Raises:
        UserError: a file is missing or of another model; version 1 alone is read, not the XL models.
    """

    def __init__(self, folder: Path) -> None:
        import jax

        self.shape = _shape(folder / CONFIG)
        read = encoder.read(folder / WEIGHTS)
        # config.json beside the weights is AllenNLP's and says nothing of heads: PubMedBERT's are 64 wide, as `read` takes them to be.
        self.config, self.sha256 = read.config, read.sha256
        if not (folder / VOCABULARY).is_file():
            raise UserError(f"{folder} has no vocab.txt: add that of the encoder named in config.json (PubMedBERT)")
        self._tokenizer: Tokenizer = load_tokenizer(folder / VOCABULARY)
        if self._tokenizer.vocab_size != self.config.vocab_size:
            raise UserError(
                f"{folder}: vocab.txt has {self._tokenizer.vocab_size} words, the weights {self.config.vocab_size}"
            )
        scorers, dataset = _scorers(read.others, folder / WEIGHTS, self.config.width, self.shape.max_width)
        self.entities = _labels(folder, f"{dataset}__ner_labels")
        self.relations = _labels(folder, f"{dataset}__relation_labels")
        if self.entities[0] != "" or len(self.entities) - 1 != scorers["entity"][-1][1].size:
            raise UserError(f"{folder}: the list of entity labels does not belong to the weights")
        if len(self.relations) != scorers["relation"][-1][1].size:
            raise UserError(f"{folder}: the list of relation labels does not belong to the weights")
        self._devices = encoder.Devices()
        self._params = self._devices.whole({"encoder": read.params, "scorers": scorers})
        self._encode = jax.jit(self._hidden)
        self._spans = jax.jit(self._score_spans)
        self._pairs = jax.jit(self._score_pairs)

    def annotate(self, reports: Sequence[str]) -> list[Annotation]:
        """The entities of n reports with their relations, in the form of the radgraph package; nothing for an empty report."""
        parts = [words(report) for report in reports]
        order = np.argsort([len(part) for part in parts], kind="stable")
        out: list[Annotation] = [{} for _ in reports]
        own = [int(i) for i in order if parts[i]]
        with tqdm(total=len(own), desc="RadGraph", unit="report", disable=None) as bar:
            for start in range(0, len(own), _BATCH):
                index = own[start : start + _BATCH]
                for i, annotation in zip(index, self._batch([parts[i] for i in index]), strict=True):
                    out[i] = annotation
                bar.update(len(index))
        return out

    def scores(self, parts: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], list[list[tuple[int, int]]], list[np.ndarray]]:  # fmt: skip
        """What the labels are read from, for reports given as words.

        Returns:
            entity scores [words, max_width, labels], of "none" first, by first word and width less one; the kept spans (first, last word)
            in order; relation scores [kept, kept, relations + 1], of "none" first.
        """
        import jax

        longest = max(map(len, parts))
        length = next((n for n in (*encoder.LENGTHS, 1024, 2048) if n >= longest), longest)
        size = self._devices.batch(_BATCH)
        states = np.zeros((size, length, self.config.width), np.float32)
        for row, found in zip(states, self._words(parts), strict=False):
            row[: len(found)] = found
        named, kept_scores = jax.device_get(self._spans(self._params, self._devices.rows(states)))
        chosen = [self._keep(kept_scores[i], len(part)) for i, part in enumerate(parts)]
        most = math.ceil(self.shape.spans_per_word * length)
        first, last = np.zeros((size, most), np.int32), np.zeros((size, most), np.int32)
        for i, spans in enumerate(chosen):
            first[i, : len(spans)], last[i, : len(spans)] = np.array(spans).T
        related = jax.device_get(self._pairs(self._params, *self._devices.rows((states, first, last))))
        entity = [named[i, : len(part)] for i, part in enumerate(parts)]
        return entity, chosen, [related[i, : len(spans), : len(spans)] for i, spans in enumerate(chosen)]

    def _batch(self, parts: Sequence[Sequence[str]]) -> list[Annotation]:
        out = []
        for part, named, spans, related in zip(parts, *self.scores(parts), strict=True):
            best = named.argmax(axis=-1)
            found = [(s, s + w, int(best[s, w])) for s, w in np.argwhere(best) if s + w < len(part)]
            number = {(start, stop): str(i) for i, (start, stop, _) in reversed(list(enumerate(found, start=1)))}
            annotation: Annotation = {
                str(i): {
                    "tokens": " ".join(part[start : stop + 1]),
                    "label": self.entities[label],
                    "start_ix": int(start),
                    "end_ix": int(stop),
                    "relations": [],
                }
                for i, (start, stop, label) in enumerate(found, start=1)
            }
            kinds = related.argmax(axis=-1)
            for a, b in np.argwhere(kinds):
                if spans[a] in number and spans[b] in number:
                    kind = self.relations[kinds[a, b] - 1]
                    annotation[number[spans[a]]]["relations"].append([kind, number[spans[b]]])
            out.append(annotation)
        return out

    def _keep(self, scores: np.ndarray, count: int) -> list[tuple[int, int]]:
        """The spans (first, last word) with the highest scores [words, max_width], in the order of the text; spans that leave it do not count."""
        first, width = (axis.ravel() for axis in np.indices((count, self.shape.max_width)))
        inside = first + width < count
        order = np.argsort(-scores[:count].ravel()[inside], kind="stable")[: max(1, math.ceil(count * self.shape.spans_per_word))]  # fmt: skip
        return [(int(first[inside][i]), int((first + width)[inside][i])) for i in sorted(order)]

    def _words(self, parts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """States float32 [words, D] of every report; a word without a piece is zero."""
        pieces = [[self._tokenizer.encode(word) for word in part] for part in parts]
        window = self.shape.window - 2
        windows, owner = [], []
        for i, report in enumerate(pieces):
            ids = [piece for word in report for piece in word]
            for start in range(0, len(ids), window):
                windows.append([self._tokenizer.bos_id, *ids[start : start + window], self._tokenizer.eos_id])
                owner.append(i)
        states = self._encoded(windows)
        out = []
        for i, report in enumerate(pieces):
            rows = [state[1:-1] for state, of in zip(states, owner, strict=True) if of == i]
            flat = np.concatenate(rows) if rows else np.zeros((0, self.config.width), np.float32)
            ends = np.cumsum([len(word) for word in report])
            means = [flat[end - len(w) : end].mean(axis=0) if w else np.zeros(self.config.width) for w, end in zip(report, ends, strict=True)]  # fmt: skip
            out.append(np.array(means, np.float32))
        return out

    def _encoded(self, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        import jax

        out: list[np.ndarray] = [np.zeros(0)] * len(windows)
        size = self._devices.batch(_BATCH)
        for length, index in encoder.buckets([len(w) for w in windows], self.config.max_positions, size):
            rows = self._devices.fitting(len(index), size)
            batch = encoder.padded([windows[i] for i in index], rows, length, self._tokenizer.pad_id)
            states = jax.device_get(self._encode(self._params, *self._devices.rows(batch)))
            for row, i in zip(states, index, strict=False):
                out[i] = row[: len(windows[i])]
        return out

    def _hidden(self, params: Any, tokens: Any, lengths: Any) -> Any:
        """Last states float32 [B, T, D]."""
        import jax.numpy as jnp

        from rad_jax.models.bert import Bert

        return jnp.asarray(Bert(self.config).apply({"params": params["encoder"]}, tokens, lengths)).astype(jnp.float32)

    def _score_spans(self, params: Any, states: Any) -> tuple[Any, Any]:
        """Entity scores [B, W, M, labels] and scores of keeping [B, W, M] of all spans, from states of words [B, W, D]."""
        import jax.numpy as jnp

        count, widest = states.shape[1], self.shape.max_width
        ends = jnp.minimum(jnp.arange(count)[:, None] + jnp.arange(widest), count - 1)

        def scored(name: str) -> Any:
            (first, last, width), *rest = params["scorers"][name]
            hidden = _linear(states, first)[:, :, None] + _dot(states, last)[:, ends] + width
            return _mlp(hidden, rest)

        entity = scored("entity")
        none = jnp.zeros((*entity.shape[:-1], 1))
        return jnp.concatenate([none, entity], axis=-1), scored("keep")[..., 0]

    def _score_pairs(self, params: Any, states: Any, first: Any, last: Any) -> Any:
        """Relation scores [B, K, K, relations + 1] of the kept spans, from states [B, W, D] and their first and last words int32 [B, K]."""
        import jax
        import jax.numpy as jnp

        scorers = params["scorers"]
        width = scorers["width"][last - first]
        ends = [jnp.take_along_axis(states, at[..., None], axis=1) for at in (first, last)]
        spans = jnp.concatenate([*ends, width], axis=-1)
        (one, other, product), *rest = scorers["relation"]
        hidden = _linear(spans, one)[:, :, None] + _dot(spans, other)[:, None]
        # One first span at a time: the products of all pairs would be gigabytes for long reports.
        products = jax.lax.map(lambda span: _dot(span[:, None] * spans, product), jnp.swapaxes(spans, 0, 1))
        hidden += jnp.swapaxes(products, 0, 1)
        (of_first, of_last, of_width), *keep = scorers["keep"]
        kept = _mlp(_linear(ends[0], of_first) + _dot(ends[1], of_last) + of_width[last - first], keep)[..., 0]
        related = _mlp(hidden, rest) + (kept[:, :, None] + kept[:, None])[..., None]
        return jnp.concatenate([jnp.zeros((*related.shape[:-1], 1)), related], axis=-1)


def _linear(x: Any, layer: Any) -> Any:
    kernel, bias = layer
    return _dot(x, kernel) + bias


def _dot(x: Any, kernel: Any) -> Any:
    import jax.numpy as jnp

    return jnp.matmul(x, kernel, precision="highest")  # a near-tie between labels must not hang on bfloat16


def _mlp(hidden: Any, layers: Any) -> Any:
    """The rest of a scorer after its first linear layer: ReLU, linear, ReLU, linear, ..."""
    import jax.numpy as jnp

    for layer in layers:
        hidden = _linear(jnp.maximum(hidden, 0), layer)
    return hidden


def _scorers(others: dict[str, np.ndarray], path: Path, width: int, widest: int) -> tuple[dict[str, Any], str]:
    """The three scorers with their first layers cut into parts, the vectors of widths [M, F], and the dataset's name."""
    found = [m[1] for n in others if (m := re.fullmatch(r"_ner\._ner_scorers\.(\w+)__ner_labels\.1\._module\.bias", n))]
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found)} entity scorers instead of one: give RadGraph's archive of version 1"
        )
    dataset = found[0]
    widths = others["_endpoint_span_extractor._span_width_embedding.weight"].astype(np.float32)
    span = 2 * width + widths.shape[1]

    def layers(prefix: str, last: str) -> Layers:
        """All linear layers of a scorer, the last one under a name of its own."""
        names = sorted(n.removesuffix(".weight") for n in others if re.fullmatch(re.escape(prefix) + r"\d+\.weight", n))
        return [encoder.matrix(others, name, path) for name in (*names, last)]

    ner, relation = f"_ner._ner_scorers.{dataset}__ner_labels", f"{dataset}__relation_labels"
    pruner = f"_relation._mention_pruners.{relation}._scorer"
    of_spans = {
        "entity": layers(f"{ner}.0._module._linear_layers.", f"{ner}.1._module"),
        "keep": layers(f"{pruner}.0._module._linear_layers.", f"{pruner}.1._module"),
    }
    out: dict[str, Any] = {"width": widths[:widest]}
    for name, ((kernel, bias), *rest) in of_spans.items():
        if kernel.shape[0] != span:
            raise UserError(f"{path}: the {name} scorer takes {kernel.shape[0]} numbers of a span instead of {span}")
        parts = (kernel[:width], bias), kernel[width : 2 * width], widths[:widest] @ kernel[2 * width :]
        out[name] = [parts, *rest]
    (kernel, bias), *rest = layers(f"_relation._relation_feedforwards.{relation}._linear_layers.", f"_relation._relation_scorers.{relation}")  # fmt: skip
    out["relation"] = [((kernel[:span], bias), kernel[span : 2 * span], kernel[2 * span :]), *rest]
    return out, dataset


def _shape(path: Path) -> Shape:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: unpack RadGraph's archive of version 1 there")
    config = sources.read_json(path)
    try:
        model, bert = config["model"], config["model"]["embedder"]["token_embedders"]["bert"]
        if model["modules"]["coref"].get("coref_prop", 0):
            raise UserError(f"{path}: a model with coreference propagation is not read")
        return Shape(
            max_width=int(model["max_span_width"]) if "max_span_width" in model else int(config["dataset_reader"]["max_span_width"]),
            spans_per_word=float(model["modules"]["relation"]["spans_per_word"]),
            window=int(bert["max_length"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no configuration of RadGraph's version 1 ({error!r} is missing)") from error


def _labels(folder: Path, namespace: str) -> list[str]:
    """The labels of a namespace in the order of their numbers."""
    path = folder / "vocabulary" / f"{namespace}.txt"
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: unpack the whole of RadGraph's archive")
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def write(path: Path, ids: Sequence[str], annotations: Sequence[Annotation]) -> None:
    """A file that `radgraph.read` reads, for its owner's eyes: it quotes the reports."""
    content = {name: {"entities": found} for name, found in zip(ids, annotations, strict=True)}
    access.create(path, access.PRIVATE).write_text(json.dumps(content) + "\n", encoding="utf-8")
