"""RadGraph's span model against its formulas written out in torch, on an archive of random weights.

With the same weights and words the modules of the radgraph package (0.1.18, which does not run as a whole beside today's transformers) gave the
same entities and relations.
"""

import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import models, radgraph, radgraph_model, report
from evaluation.predictions import Predictions, Row
from evaluation.radgraph_model import RadGraphModel
from rad_jax.errors import UserError

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *[
        "small",
        "left",
        "effusion",
        "no",
        "pneumo",
        "##thorax",
        "lungs",
        "are",
        "clear",
        "4",
        "5",
        "cm",
        ".",
        ",",
        "/",
        "(",
        ")",
        ":",
    ],
]
REPORTS = [
    "Small left effusion. No pneumothorax.",
    "clear",
    "",
    "Lungs are clear; \x00 4.5 cm (small/left), effusion: no " * 3,
]
WIDTH, FEATURES, HIDDEN, WIDEST, PER_WORD, WINDOW = 128, 5, 12, 4, 0.6, 16
ENTITIES = ["", "ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA"]
RELATIONS = ["modify", "located_at", "suggestive_of"]


def linears(sizes: list[int]) -> Any:
    return torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Random weights everywhere, by module."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    span = 2 * WIDTH + FEATURES
    modules: dict[str, Any] = {
        "bert": transformers.BertModel(config).eval(),
        "width": torch.nn.Embedding(WIDEST, FEATURES),
        "entity": linears([span, HIDDEN, HIDDEN, len(ENTITIES) - 1]),
        "keep": linears([span, HIDDEN, HIDDEN, 1]),
        "relation": linears([3 * span, HIDDEN, HIDDEN, len(RELATIONS)]),
    }
    with torch.no_grad():
        for name, module in modules.items():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.3 * noise if name in ("bert", "width") else noise / parameter.shape[-1] ** 0.5)
    return modules


def state(modules: dict[str, Any]) -> dict[str, Any]:
    """The tensors under the names they have in weights.th."""
    out = {f"_embedder.token_embedder_bert._matched_embedder.transformer_model.{n}": x for n, x in modules["bert"].state_dict().items()}  # fmt: skip
    out["_endpoint_span_extractor._span_width_embedding.weight"] = modules["width"].weight
    out["_coref._antecedent_scorer.weight"] = torch.zeros(3, 3)  # of tasks that are not used
    places = {
        "entity": ("_ner._ner_scorers.radgraph__ner_labels.0._module._linear_layers.{}", "_ner._ner_scorers.radgraph__ner_labels.1._module"),
        "keep": (
            "_relation._mention_pruners.radgraph__relation_labels._scorer.0._module._linear_layers.{}",
            "_relation._mention_pruners.radgraph__relation_labels._scorer.1._module",
        ),
        "relation": (
            "_relation._relation_feedforwards.radgraph__relation_labels._linear_layers.{}",
            "_relation._relation_scorers.radgraph__relation_labels",
        ),
    }  # fmt: skip
    for name, (inner, last) in places.items():
        for i, layer in enumerate(modules[name]):
            at = last if i == len(modules[name]) - 1 else inner.format(i)
            out |= {f"{at}.weight": layer.weight, f"{at}.bias": layer.bias}
    return {name: tensor.detach() for name, tensor in out.items()}


def archive(folder: Path, tensors: dict[str, Any], entities: list[str] = ENTITIES, zipped: bool = True) -> Path:
    """radgraph.tar.gz as it is published."""
    config = {
        "dataset_reader": {"max_span_width": WIDEST},
        "model": {
            "max_span_width": WIDEST,
            "modules": {"coref": {"coref_prop": 0}, "relation": {"spans_per_word": PER_WORD}},
            "embedder": {"token_embedders": {"bert": {"model_name": "x", "max_length": WINDOW}}},
        },
    }
    source = folder / "source"
    (source / "vocabulary").mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    (source / "vocabulary/radgraph__ner_labels.txt").write_text("\n".join(entities) + "\n")
    (source / "vocabulary/radgraph__relation_labels.txt").write_text("\n".join(RELATIONS) + "\n")
    torch.save(tensors, source / "weights.th", _use_new_zipfile_serialization=zipped)
    path = folder / "radgraph.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for part in ("config.json", "weights.th", "vocabulary"):
            tar.add(source / part, f"./{part}")
        tar.add(source / "config.json", "../outside.json")
    return path


def unpacked(folder: Path, path: Path) -> Path:
    out = radgraph_model.unpack(path, folder / "model")
    (out / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return out


@pytest.fixture(scope="module")
def model(theirs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RadGraphModel:
    folder = tmp_path_factory.mktemp("radgraph")
    out = unpacked(folder, archive(folder, state(theirs), zipped=False))
    assert not (folder / "outside.json").exists()
    return RadGraphModel(out)


def run(layers: Any, x: Any) -> Any:
    for layer in list(layers)[:-1]:
        x = torch.relu(layer(x))
    return layers[-1](x)


def alone(m: dict[str, Any], ours: RadGraphModel, report: str) -> tuple[Any, list[tuple[int, int]], Any]:
    """Entity scores of every span, kept spans, and relation scores of one report, span by span as the paper has it."""
    part = radgraph_model.words(report)
    pieces = [ours._tokenizer.encode(word) for word in part]
    flat = [piece for word in pieces for piece in word]
    states = [m["bert"](torch.tensor([[2, *flat[i : i + WINDOW - 2], 3]])).last_hidden_state[0, 1:-1] for i in range(0, len(flat), WINDOW - 2)]  # fmt: skip
    joined, at, of_words = torch.cat(states) if states else torch.zeros(0, WIDTH), 0, []
    for word in pieces:
        of_words.append(joined[at : at + len(word)].mean(0) if word else torch.zeros(WIDTH))
        at += len(word)
    spans = [(s, e) for s in range(len(part)) for e in range(s, min(s + WIDEST, len(part)))]
    vectors = torch.stack([torch.cat([of_words[s], of_words[e], m["width"].weight[e - s]]) for s, e in spans])
    entity = torch.cat([torch.zeros(len(spans), 1), run(m["entity"], vectors)], dim=1)
    keep = run(m["keep"], vectors)[:, 0]
    best = sorted(keep.topk(max(1, int(np.ceil(PER_WORD * len(part))))).indices.tolist())
    top, kept = vectors[best], keep[best]
    pairs = torch.cat([top[:, None].expand(-1, len(best), -1), top[None].expand(len(best), -1, -1), top[:, None] * top[None]], dim=-1)  # fmt: skip
    related = run(m["relation"], pairs) + (kept[:, None] + kept[None])[..., None]
    return dict(zip(spans, entity, strict=True)), [spans[i] for i in best], torch.cat([torch.zeros(len(best), len(best), 1), related], -1)  # fmt: skip


def test_scores_of_spans_and_pairs(parity: Any, theirs: dict[str, Any], model: RadGraphModel) -> None:
    parts = [radgraph_model.words(report) for report in REPORTS if report]
    named, kept, related = model.scores(parts)
    with torch.no_grad():
        for report, ours, spans, pairs in zip([r for r in REPORTS if r], named, kept, related, strict=True):
            entity, best, relation = alone(theirs, model, report)
            assert spans == best
            mine = np.array([ours[s, e - s] for s, e in entity])
            other = torch.stack(list(entity.values())).numpy()
            # A few layers in float32: relative to the largest score the usual 1e-5.
            size = np.abs(other).max(), np.abs(relation.numpy()).max()
            parity.forward("RadGraph, entities", "torch, span by span", mine / size[0], other / size[0])
            parity.forward("RadGraph, relations", "torch, pair by pair", pairs / size[1], relation.numpy() / size[1])


def test_annotations_follow_from_the_scores(theirs: dict[str, Any], model: RadGraphModel, tmp_path: Path) -> None:
    found = model.annotate(REPORTS)
    assert found[2] == {}
    with torch.no_grad():
        for report, annotation in zip(REPORTS, found, strict=True):
            if not report:
                continue
            part = radgraph_model.words(report)
            entity, best, relation = alone(theirs, model, report)
            named = {span: ENTITIES[int(scores.argmax())] for span, scores in entity.items() if scores.argmax() > 0}
            ours = {(e["start_ix"], e["end_ix"]): (e["tokens"], e["label"]) for e in annotation.values()}
            assert ours == {(s, e): (" ".join(part[s : e + 1]), label) for (s, e), label in named.items()}
            expected = {
                (best[i], RELATIONS[int(relation[i, j].argmax()) - 1], best[j])
                for i in range(len(best))
                for j in range(len(best))
                if relation[i, j].argmax() > 0 and best[i] in named and best[j] in named
            }
            where = {number: (e["start_ix"], e["end_ix"]) for number, e in annotation.items()}
            got = {(where[n], kind, where[to]) for n, e in annotation.items() for kind, to in e["relations"]}
            assert got == expected
    assert sum(len(e["relations"]) for a in found for e in a.values()) > 5
    radgraph_model.write(tmp_path / "a.json", ["a", "b", "c", "d"], found)
    assert radgraph.read(tmp_path / "a.json")["a"] == found[0]


def test_command_writes_annotations(theirs: dict[str, Any], model: RadGraphModel, tmp_path: Path) -> None:
    folder = unpacked(tmp_path, archive(tmp_path, state(theirs)))
    lines = [json.dumps({"id": str(i), "prediction": text}) for i, text in enumerate(REPORTS)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "launch.label", str(tmp_path / "p.jsonl"), "--text=prediction"]
    command += [f"--radgraph={folder}", f"--out={tmp_path / 'e.json'}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = radgraph.read(tmp_path / "e.json")
    assert list(found.values()) == model.annotate(REPORTS)
    assert f"4 reports, {sum(map(len, found.values()))} entities" in done.stdout and "effusion" not in done.stdout


def test_words_of_a_report() -> None:
    assert radgraph_model.words("A 3.5cm mass, left-sided (new).") == [
        *["A", "3", ".", "5cm", "mass", ",", "left-sided", "(", "new", ")", "."]
    ]


def test_in_the_evaluation(theirs: dict[str, Any], model: RadGraphModel, tmp_path: Path) -> None:
    """A folder of weights with this model alone gives F1 over what the model reads in both texts."""
    unpacked(tmp_path, archive(tmp_path, state(theirs))).rename(tmp_path / "radgraph")
    rows = [Row("a", "", REPORTS[0], REPORTS[3], 1), Row("b", "", REPORTS[3], REPORTS[3], 2)]
    filled = models.fill([report.Input("p", Predictions(rows, []))], report.Options(draws=100), tmp_path)
    result, _ = report.evaluate(*filled)
    read = dict(zip(REPORTS, model.annotate(REPORTS), strict=True))
    for form in ("simple", "partial", "complete"):
        expected = [radgraph.f1(read[row.prediction], read[row.reference], form, False) for row in rows]
        found = report.lookup(result, f"radgraph_{form}") or {}
        assert found["value"] == pytest.approx(np.mean(expected)) and found["value"] > 0.5
        assert "annotations:v1-" in found["signature"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "vocab.txt").unlink(), "has no vocab.txt"),
        (lambda folder: (folder / "vocab.txt").write_text("\n".join(PIECES[:-1]) + "\n"), "vocab.txt has"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no configuration of RadGraph"),
        (lambda folder: (folder / "vocabulary/radgraph__ner_labels.txt").write_text("\nA\n"), "entity labels"),
        (lambda folder: (folder / "vocabulary/radgraph__relation_labels.txt").unlink(), "radgraph__relation_labels"),
    ],
)
def test_other_archives_are_refused(tmp_path: Path, theirs: dict[str, Any], change: Any, message: str) -> None:
    folder = unpacked(tmp_path, archive(tmp_path, state(theirs)))
    change(folder)
    with pytest.raises(UserError, match=message):
        RadGraphModel(folder)


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be unpacked"):
        radgraph_model.unpack(tmp_path / "x.tar.gz", tmp_path / "out")
    with tarfile.open(tmp_path / "y.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x.tar.gz", "config.json")
    with pytest.raises(UserError, match=r"holds no weights\.th"):
        radgraph_model.unpack(tmp_path / "y.tar.gz", tmp_path / "out")
