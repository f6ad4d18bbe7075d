"""Where models look: the tower against its attention written out, and the command from films and checkpoints to scores."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluation import looking, phrases
from evaluation.heads import Heads
from evaluation.looking import Looker, Target, _Llava, _Tower
from evaluation.pointing import pointing_game
from launch import ground
from rad_jax import sharding, tasks
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.grounding import attention_of_tower
from rad_jax.images import normalise

ROOT = Path(__file__).parents[1]


def test_attention_of_the_tower(training):
    """The first layer equals the softmax written out in float64; the likeness is that of the patches' projections."""
    config = training.config("stage1")
    model, variables = tasks.make_task(config).model, training.variables(config, seed=2)
    batch = training.batch(config, rows=3, seed=5)
    seen, like = (np.asarray(x) for x in attention_of_tower(model, variables, batch))
    vision = model.config.vision
    assert vision is not None
    assert seen.shape == (3, vision.depth, vision.heads, vision.patches) and like.shape == (3, vision.patches)
    assert (seen > 0).all() and (seen.sum(-1) < 1).all()

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"]["vision"])
    pixels = normalise(batch["image"], np, vision.pixel_mean, vision.pixel_std).astype(np.float64)
    side = vision.image_size // vision.patch_size
    cut = pixels.reshape(3, side, vision.patch_size, side, vision.patch_size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("bpyxc,yxcd->bpd", cut.reshape(3, vision.patches, vision.patch_size, vision.patch_size, 3), p["patch_embed"]["kernel"])  # fmt: skip
    x = x + p["patch_embed"].get("bias", 0)
    x = np.concatenate([np.broadcast_to(p["cls_token"], (3, 1, vision.width)), x], axis=1) + p["pos_embed"]
    first = jax.tree.map(lambda leaf: leaf[0], p["blocks"])
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + vision.eps)
    y = y * first["norm1"]["scale"] + first["norm1"]["bias"]
    q, k = (np.einsum("bsd,dnh->bsnh", y, first["attn"][n]["kernel"]) + first["attn"][n]["bias"] for n in "qk")
    scores = np.einsum("bnh,btnh->bnt", q[:, 0], k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(seen[:, 0], weights[..., 1:], atol=1e-5)  # float32 against float64

    images = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
    states = model.apply(variables, images, method=lambda clip, x: clip.vision_head(clip.vision(x)[:, 1:]))
    text = model.apply(variables, batch["tokens"], batch["length"], method="encode_text")
    states = np.asarray(states, np.float64)
    expected = np.einsum("bpe,be->bp", states / np.linalg.norm(states, axis=-1, keepdims=True), np.asarray(text))
    np.testing.assert_allclose(like, expected, atol=1e-5)


def test_heads_are_not_scored_on_the_patients_they_were_chosen_on(training, tmp_path):
    """Refused before any map is made: predictions of the validation split, and a single one among others."""

    class Blind(Looker):
        image_size, what = 32, "llava"

        def maps(self, targets, keep=None):
            raise AssertionError("looked")

    corpus = Corpus.open(training.corpus)
    splits = {split: corpus.source(split) for split in ("validation", "test")}
    records = {split: [source[number] for number in range(len(source))] for split, source in splits.items()}
    seen = next(record for record in records["validation"] if record["annotations"] != "[]")

    def predict(rows):
        path = tmp_path / "p.jsonl"
        lines = [{"id": r["id"], "query": "", "reference": r["findings"], "prediction": r["findings"]} for r in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ground.of_predictions(Blind(), training.corpus, path, tmp_path / "out", False)

    for rows, count in (([seen], "1 of its 1 patients"), ([*records["test"], seen], "1 of its ")):
        with pytest.raises(UserError, match=f"p.jsonl: {count}.* among those that the heads are chosen on"):
            predict(rows)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match="looked"):  # of other patients alone: goes on
        predict(records["test"])

    one, other, unnamed = ({"id": name, "patient": patient} for name, patient in (("a", "p"), ("b", "p"), ("p", "")))
    ground.check_apart([one], [{"id": "a", "patient": "q"}], Path("p.jsonl"))
    for rows in ([other], [unnamed]):
        with pytest.raises(UserError, match="1 of its 1 patients"):
            ground.check_apart([one], rows, Path("p.jsonl"))


def test_maps_are_kept_batch_by_batch(training):
    """What is kept of every batch is what would be made of all the maps, and no more than a batch of whole maps is held."""
    config, corpus = training.config("stage1"), Corpus.open(training.corpus)
    model, variables = tasks.make_task(config).model, training.variables(config, seed=2)
    mesh = sharding.make_mesh(jax.device_count(), 1, 1)
    looker = _Tower(model, variables, mesh, corpus.tokenizer(), mesh.size)
    source = corpus.source("test")
    targets = [
        Target(source[i % len(source)], "The lungs are clear.", (0, 9), "", []) for i in range(2 * mesh.size + 1)
    ]
    maps, sizes = looker.maps(targets), []
    weights = np.zeros(maps.shape[1:3], np.float32)
    weights[0, 1] = weights[1, 0] = 0.5
    best = Heads(((0, 1), (1, 0)), weights, np.full(maps.shape[-2:], 0.01, np.float32), 1.0, True)

    def keep(batch):
        sizes.append(len(batch))
        return best.read(batch)

    np.testing.assert_array_equal(looker.maps(targets, keep), best.read(maps))
    assert sizes == [mesh.size, mesh.size, 1]


def test_what_is_lost_where_a_film_is_covered(training, monkeypatch):
    """Against the logits of whole texts, one target and one hidden part at a time; targets of one text share a pass, whatever their order."""
    config, corpus = training.config("stage3"), Corpus.open(training.corpus)
    model, variables = tasks.make_task(config).model, training.variables(config, seed=2)
    mesh = sharding.make_mesh(jax.device_count(), 1, 1)
    looker = _Llava(model, variables, mesh, corpus.tokenizer(), mesh.size)
    source = corpus.source("test")
    texts = ["The lungs are clear. There is a large effusion on the left, and a nodule.", "Clear."]
    places = [(0, 0, (4, 9)), (1, 1, (0, 5)), (0, 0, (32, 40)), (1, 0, (63, 71))]  # film, text, span
    targets = [Target(source[film], texts[text], span, "", []) for film, text, span in places]
    monkeypatch.setattr(looking, "PARTS", 2)
    found = looker.covered(targets)
    vision = model.config.vision
    assert found.shape == (4, 4, 4) and vision is not None
    for target, map_ in zip(targets, found, strict=True):
        row = looker._row(target)
        tokens = np.array([row["tokens"]], np.int32)

        def likely(film, row=row, tokens=tokens):
            pixels = normalise(film[None], jnp, vision.pixel_mean, vision.pixel_std)
            every = np.arange(tokens.shape[1])[None]
            logits = np.asarray(model.apply(variables, tokens, np.array([tokens.shape[1]]), pixels, every), np.float64)[
                0
            ]
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            return sum(logs[at, tokens[0, at + 1]] for at in row["queries"])

        for y in range(2):
            for x in range(2):
                lost = likely(row["image"]) - likely(looking.cover(row["image"][None], y, x, 16)[0])
                np.testing.assert_allclose(map_[2 * y : 2 * y + 2, 2 * x : 2 * x + 2], lost, atol=2e-5)
    assert np.abs(found).max() > 1e-3

    # What the command makes of them, batch by batch, is what all maps together give.
    maps, candidates = ground.seen(looker, targets, True)
    np.testing.assert_array_equal(maps[:, -1, 0], found)
    assert candidates == [*looker.candidates(maps[:, :-1]), (maps.shape[1] - 1, 0)]
    weights = np.zeros(maps.shape[1:3], np.float32)
    for number, place in enumerate(candidates):
        weights[place] = 0.1 * number - 0.3
    best = Heads((candidates[-1], (0, 1)), weights, np.full(maps.shape[-2:], 0.01, np.float32), 1.0, False)
    np.testing.assert_allclose(
        ground.looked(looker, best, targets, True), best.read(maps), atol=1e-6
    )  # sums in another order
    assert ground.in_words(looker, best, maps[:, :-1]) == "weighted sum, above all of covering, layer 0 head 1"
    with pytest.raises(UserError, match="films are covered for a run of stage 2 or 3"):
        _Tower(model, variables, mesh, corpus.tokenizer(), mesh.size).covered(targets)


def test_cover_takes_the_grey_around_it():
    film = np.full((1, 16, 16), 100, np.uint8)
    film[0, 4:8, 8:12] = 255
    hidden = looking.cover(film, 1, 2, 4)
    assert (hidden == 100).all() and film.max() == 255
    corner = looking.cover(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), 0, 0, 4)
    assert len(np.unique(corner[0, :6, :6])) == 1 and corner[0, 6, 6] == 6 * 16 + 6


def test_scores_of_predictions_have_intervals_of_patients(capsys):
    """Twelve findings of four patients, three alike of each, half of whom are pointed at; two boxes cover the whole film and have no contrast."""
    size, map_ = (8, 8), np.zeros((4, 4))
    map_[0, 0] = 1.0
    hit, miss, whole = [[0.0, 0.0, 4.0, 4.0]], [[4.0, 4.0, 8.0, 8.0]], [[0.0, 0.0, 8.0, 8.0]]
    boxes = [hit, hit, whole, miss, miss, miss, hit, hit, whole, miss, miss, miss]
    targets = [
        Target({"id": f"s{i}", "patient": f"p{i // 3}"}, "", (0, 0), "nodule", own) for i, own in enumerate(boxes)
    ]
    found = ground.beyond_pointing(targets, [map_] * 12, size)
    game = pointing_game([map_] * 12, boxes, [size] * 12)
    assert game.chance is not None and (game.accuracy, found["patients"]) == (0.5, 4)
    # Of four patients two: a draw of four has none, or all, with 1/16 each, which is more than 2.5%.
    assert found["ci"]["accuracy"] == (0.0, 1.0)
    assert found["mass"] == pytest.approx(4 / 10) and found["ci"]["mass"][0] < 0.4 < found["ci"]["mass"][1]
    assert found["ci"]["chance"][0] <= game.chance <= found["ci"]["chance"][1]
    assert found["above_chance"] == pytest.approx(0.5 - game.chance)
    json.dumps(found, allow_nan=False)
    ground.tell({**vars(game), **found})
    assert "pointing game: 0.50 [0.00, 1.00] of 12 findings of 4 patients" in capsys.readouterr().out
    signed = phrases.signature("llava", "phrases", 518, True, False)
    assert signed.startswith("grounding|map:llava-attention|of:phrases|heads:mean-of-at-most-8-on-other-patients|")
    assert signed.endswith("|image:518px|unit:patient|ci:percentile-2000-seed0")
    covered = phrases.signature("llava", "phrases", 518, False, True)
    assert "|map:llava-attention+covering-at-most-8x8|of:phrases|heads:ridge-1-on-other-patients|" in covered


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage3", "stage1"])
def test_command_on_real_boxes(chain, real, tmp_path, stage):
    """153 boxes and masks that radiologists drew, and models of four steps: everything runs, and pointing is at chance."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.ground", f"--checkpoint={chain / stage}", f"--out={out}"]
    command += [f"--boxes={real / 'grounding_boxes.csv'}", f"--patients={real / 'reports.csv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "grounding.json").read_text())
    assert result["model"] == {"stage3": "llava", "stage1": "tower"}[stage]
    assert f"|map:{result['model']}-attention|of:phrases|" in result["signature"]
    assert result["n"] + result["validation_n"] + len(result["skipped"]) == 147  # boxes of one film and phrase are one
    assert result["patients"] + result["validation_patients"] == 44
    assert set(result["phrases"]) >= {"left lung", "right lung"}
    assert 0.25 < result["chance"]["value"] < 0.35  # a lung is a third of a film
    assert result["shuffled"]["p"] > 0.01 and "pointing is at chance" in done.stdout
    for name in ("accuracy", "mass", "contrast", "mean_iou"):
        assert result[name]["ci"][0] <= result[name]["value"] <= result[name]["ci"][1]
    assert f"{result['n']} phrases of {result['patients']} other patients" in done.stdout
    assert len(np.load(out / "maps.npz").files) == result["n"]


@pytest.mark.slow
def test_every_word_of_the_predictions(chain, training, tmp_path):
    """Maps of all words, which the evaluation's page takes as they are."""
    source = Corpus.open(training.corpus).source("test")
    rows = [source[number] for number in range(min(3, len(source)))]
    predictions = tmp_path / "p.jsonl"
    lines = [
        {"id": row["id"], "query": "", "reference": row["findings"], "prediction": row["findings"]} for row in rows
    ]
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(program, *arguments):
        command = [sys.executable, "-m", f"launch.{program}", *arguments, f"--data={training.corpus}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    looks = f"--out={tmp_path / 'g'}"
    run("ground", f"--checkpoint={chain / 'stage3'}", f"--predictions={predictions}", "--every_word", looks)
    words = json.loads((tmp_path / "g/words.json").read_text())
    maps = np.load(tmp_path / "g/words.npz")
    for line in lines:
        spans = words[line["id"]]["spans"]
        assert [line["prediction"][a:b] for a, b in spans] == line["prediction"].replace(".", " ").replace(",", " ").replace("-", " ").split()  # fmt: skip
        assert maps[line["id"]].shape[0] == len(spans) and np.isfinite(maps[line["id"]]).all()
    run("evaluate", str(predictions), f"--attention={tmp_path / 'g'}", f"--out={tmp_path / 'e'}")
    page = (tmp_path / "e/report.html").read_text(encoding="utf-8")
    assert page.count('class="map"') == sum(len(words[line["id"]]["spans"]) for line in lines)
    assert page.count('alt="Radiograph"') == len(lines)
    assert "Restricted data" not in page  # drawn films


@pytest.mark.slow
def test_retrieval_and_zero_shot(chain, training, tmp_path):
    """Ranks, and fourteen classes of drawn films: the model has seen four steps, so what is asserted holds for every model."""
    from evaluation.labels import CLASSES
    from evaluation.zero_shot import default_prompts

    def run(out, *arguments):
        command = [sys.executable, "-m", "launch.retrieve", f"--checkpoint={chain / 'stage1'}"]
        command += [f"--data={training.corpus}", "--split=train", "--zero_shot", f"--out={out}", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text()), done.stdout

    result, printed = run(tmp_path / "r.json")
    source = Corpus.open(training.corpus).source("train", "pairs")
    records = [source[number] for number in range(len(source))]
    for direction in ("image_to_text", "text_to_image"):
        for block in (result, result["all_studies"]):
            found = block[direction]
            ways = [found, found["ties_expected"], found["ties_for"]]
            for name, sign in (("r1", 1), ("r5", 1), ("r10", 1), ("median_rank", -1), ("mean_rank", -1)):
                assert sign * ways[0][name] <= sign * ways[1][name] <= sign * ways[2][name]
            assert ways[2]["mean_rank"] >= 1 and ways[0]["mean_rank"] <= found["n"]
        assert result[direction]["n"] < result["all_studies"][direction]["n"] == len(records)
        assert result[direction]["chance"]["r1"] == pytest.approx(1 / result[direction]["n"])
        assert "|equal-words:no-rivals|" in result["all_studies"][direction]["signature"]
        assert 0 < result["same_labels"][direction]["chance"] < 1
    assert "all studies, equal reports no rivals, chance" in printed and "same 14 labels" in printed

    zero_shot = result["zero_shot"]
    assert list(zero_shot["classes"]) == list(default_prompts()) and len(zero_shot["classes"]) == 14
    films = {record["id"].partition("~")[0]: record["labels"] for record in records}
    for name, scores in zero_shot["classes"].items():
        column = [labels[CLASSES.index(name)] for labels in films.values()]
        assert (scores["positive"], scores["uncertain"], scores["n"]) == (
            column.count(1),
            column.count(-1),
            len(column),
        )
        assert (scores["auroc"] is None) == (scores["positive"] in (0, scores["n"] - scores["uncertain"]))
        if scores["auroc"] is not None:
            assert 0 <= scores["ci"][0] <= scores["auroc"] <= scores["ci"][1] <= 1
    known = {name: scores["auroc"] for name, scores in zero_shot["classes"].items() if scores["auroc"] is not None}
    assert len(known) > 5 and zero_shot["mean_auroc"] == pytest.approx(np.mean(list(known.values())))
    assert f"zero-shot AUROC, mean of {len(known)}" in printed
    assert (
        f"|mean-of:{len(known)}-of-14-classes|" in zero_shot["signature"] and "|films:once|" in zero_shot["signature"]
    )

    # With the texts that deny and those that affirm exchanged, every order is turned round.
    turned = {name: {"positive": sides[1], "negative": sides[0]} for name, sides in default_prompts().items()}
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    other = run(tmp_path / "t.json", f"--prompts={tmp_path / 'turned.json'}")[0]["zero_shot"]["classes"]
    assert {name: other[name]["auroc"] for name in known} == pytest.approx({n: 1 - v for n, v in known.items()})
