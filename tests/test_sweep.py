"""Sweeps: what is trained once, what is run again, and when an arm may be called better."""

import json
import subprocess

import pytest
from PIL import Image

from configs.sweeps import paper, phantom
from evaluation import report, sweeps
from launch import sweep
from rad_jax import distributed
from rad_jax.errors import UserError


def flags_of(step):
    return [word for word in step.command if word.startswith("--")]


def test_stages_are_shared_between_arms_and_not_between_seeds(tmp_path):
    config = phantom.get_config()
    found = sweep.plan(config, tmp_path, tmp_path, {})
    kinds = [step.name.split("-")[0].rpartition(" ")[2] for step in found.steps if step.name.startswith("train")]
    seeds, arms = len(config.seeds), len(config.arms)
    assert (arms, seeds) == (9, 3)
    assert kinds.count("lm") == 2 * seeds  # of the two corpora
    assert kinds.count("stage1") == seeds * 4  # as usual, SigLIP's loss, hardly trained, half the size
    assert kinds.count("stage3") == seeds * arms
    assert next(iter(found.predictions)) == "recipe" and all(
        len(files) == seeds for files in found.predictions.values()
    )
    assert len({file for files in found.predictions.values() for file in files}) == seeds * arms
    # Every base is made before it is used.
    made: set[str] = set()
    for step in found.steps:
        for word in flags_of(step):
            if word.startswith(("--base=", "--checkpoint=", "--data=")):
                assert set(word.split("=", 1)[1].split(",")) <= made
            if word.startswith(("--out=", "--workdir=")):
                made.add(word.split("=", 1)[1])


def test_paper_sweep_uses_what_it_is_given(tmp_path):
    config = paper.get_config("v5p-64")
    names = [name for name, _ in config.corpora]
    found = sweep.plan(config, tmp_path, tmp_path / "given", {name: tmp_path / name for name in names})
    assert not any("launch.pack" in step.command for step in found.steps)
    full = [word for step in found.steps for word in step.command if word.startswith("--config=configs/stage3.py:full")]
    assert set(full) == {"--config=configs/stage3.py:full,v5p-64"} and len(full) == 3
    assert f"--base={tmp_path}/given/vicuna,{tmp_path}/given/rad_dino" in [w for s in found.steps for w in s.command]
    # The public BiomedCLIP has patches of 16: its arms have that tower, and films of its size, in every stage.
    biomedclip = [step for step in found.steps if f"--data={tmp_path}/images_512" in step.command]
    tower = [
        "--config.model.vision.image_size=512",
        "--config.model.vision.patch_size=16",
        "--config.model.vision.layer_scale=False",
    ]
    assert len(biomedclip) == 3 * (
        1 + 2 * 3
    )  # seeds; stage 1 is shared; then stages 2 and 3 and the findings of each arm
    for step in biomedclip:
        if "--config=configs/stage1.py:biomedclip,v5p-64" in step.command:
            assert f"--base={tmp_path}/given/biomedclip" in step.command
        elif step.command[0] == "launch.train":
            assert [word for word in step.command if "vision" in word] == tower
    # Stages of another size of images have it all.
    small = [step for step in found.steps if f"--data={tmp_path}/images_224" in step.command]
    trained = [step for step in small if step.command[0] == "launch.train"]
    assert len(trained) == 9 and all("--config.model.vision.image_size=224" in step.command for step in trained)
    with pytest.raises(UserError, match="--corpora has no rules: give rules=FOLDER"):
        sweep.plan(config, tmp_path, tmp_path, {name: tmp_path for name in names if name != "rules"})


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    steps = [sweep.Step(name, ("launch.train", f"--workdir={name}")) for name in "abc"]
    statuses = {"a": [0], "b": [distributed.RESTART, 0], "c": [1]}
    ran = []

    def run(command, env):
        name = command[-1][-1]
        ran.append(name)
        return subprocess.CompletedProcess(command, statuses[name].pop(0))

    monkeypatch.setattr(sweep.subprocess, "run", run)
    assert sweep.execute(steps, sweep.Done(tmp_path), ["via"], dry=False) == 1
    statuses["c"] = [0]
    assert sweep.execute(steps, sweep.Done(tmp_path), ["via"], dry=False) == 0
    assert ran == ["a", "b", "b", "c", "c"]  # told to restart, b was
    changed = [sweep.Step("a", ("launch.train", "--workdir=a", "--config.steps=2"))]
    assert changed[0] not in sweep.Done(tmp_path)


TEXTS = ("Right pleural effusion.", "The heart is large.", "No acute finding.", "Left lower lobe consolidation.")


def predictions(folder, arm, right, count=60, seeds=3):
    """Files in which so many of ten studies say what the reference says."""
    files = []
    for seed in range(seeds):
        rows = []
        for number in range(count):
            reference = TEXTS[number % 4]
            said = reference if (number + seed) % 10 < right else "Tubes."
            rows.append({"id": f"s{number}", "query": "", "reference": reference, "prediction": said})
        files.append(folder / f"{arm}{seed}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def test_arms_are_ordered_only_where_intervals_separate(tmp_path):
    given = {
        name: predictions(tmp_path, name, right)
        for name, right in (("recipe", 6), ("same", 6), ("better", 10), ("worse", 1), ("near", 7))
    }
    scores = sweeps.compare(given, ("bleu_4", "rouge_l", "no_such_metric"), report.Options())
    found = {score.arm: score for score in scores if score.metric == "rouge_l"}
    assert list(found) == list(given)
    assert {score.metric for score in scores} == {"bleu_4", "rouge_l"}
    assert {name: score.verdict for name, score in found.items()} == {
        "recipe": "",
        "same": "",
        "near": "",
        "better": "better",
        "worse": "worse",
    }
    for score in found.values():
        assert score.low <= score.value <= score.high and len(score.seeds) == 3
        assert score.value == pytest.approx(sum(score.seeds) / 3)
    assert (found["same"].value, found["same"].low) == (found["recipe"].value, found["recipe"].low)
    text = sweeps.table(scores)
    assert len(text.splitlines()) == 2 + len(given) and "1.000 [1.000, 1.000] better" in text
    sweeps.draw(scores, tmp_path / "arms.png")
    with Image.open(tmp_path / "arms.png") as picture:
        assert picture.format == "PNG"
    with pytest.raises(UserError, match="none of nothing could be computed"):
        sweeps.compare(given, ("nothing",), report.Options())


def test_unknown_size():
    with pytest.raises(ValueError, match="choose demo or tiny"):
        phantom.get_config("huge")
