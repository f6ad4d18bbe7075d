"""Sweeps: what is trained once, what is run again, and when an arm may be called better."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from configs.sweeps import phantom
from evaluation import report, sweeps
from launch import sweep
from rad_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def options_of(step):
    """Flag -> its last value."""
    return dict(word.removeprefix("--").split("=", 1) for word in step.command[1:])


def kinds_of(found):
    return Counter(step.kind for step in found.steps)


def check_order(found):
    """Every folder is made before it is used, by a step that is said to be needed."""
    made: dict[str, str] = {}
    for step in found.steps:
        options = options_of(step)
        used = [options.get(name) for name in ("checkpoint", "data", "tokenizer")] + options.get("base", "").split(",")
        makers = {made[folder.removesuffix("/tokenizer.json")] for folder in used if folder}
        if "recipe" in options:  # a mixture of what lies in --source
            makers.add(made[f"{options['source']}/{options['recipe'].partition(':')[2]}"])
        assert set(step.needs) == makers
        made[options.get("out") or options["workdir"]] = step.name


@pytest.mark.parametrize(("name", "arms"), [("demo", 9), ("all", 12)])
def test_what_seeds_do_not_change_is_trained_once(tmp_path, name, arms):
    config = phantom.get_config(name)
    found = sweep.plan(config, tmp_path, tmp_path, {})
    seeds = len(config.seeds)
    assert (len(config.arms), seeds) == (arms, 3) and not found.given
    more = arms == 12
    # Stage 1 as usual, hardly trained, of half the size, and by SigLIP's loss; stage 2 on each, of one matrix, on each share of the reports.
    expected = {"pack": 3 + more, "lm": 1, "stage1": 3 + more, "stage2": 5 + 2 * more}
    assert kinds_of(found) == {**expected, "stage3": seeds * arms, "generate": seeds * arms}
    assert next(iter(found.predictions)) == "recipe"
    assert all(len(files) == seeds for files in found.predictions.values())
    assert len({file for files in found.predictions.values() for file in files}) == seeds * arms
    check_order(found)


def test_arms_of_the_phantom_are_what_they_say(tmp_path):
    found = sweep.plan(phantom.get_config("all"), tmp_path, tmp_path, {})
    last = {step.title.partition(",")[0]: step for step in found.steps if step.kind == "stage3"}
    models = {arm: sweep.experiment(step.command) for arm, step in last.items()}
    assert {config.steps for config in models.values()} == {phantom.STEPS["stage3"]}
    without = {arm for arm, config in models.items() if "lora" not in config.model}
    assert without == {"every weight of the language model", "projector alone"}
    assert models["every weight of the language model"].trainable == ("params/projector/.*", "params/llm/.*")
    assert models["adapters of rank 4"].model.lora.rank == 4
    data = {arm: options_of(step)["data"] for arm, step in last.items()}
    assert data["a quarter of the reports"] == f"{tmp_path}/data/quarter"
    assert data["images of half the size"] == f"{tmp_path}/data/small" and data["recipe"] == f"{tmp_path}/data/whole"
    written = {step.title.partition(",")[0]: options_of(step) for step in found.steps if step.kind == "generate"}
    assert written["a quarter of the reports"]["data"] == f"{tmp_path}/data/whole"
    asked = {arm for arm, options in written.items() if options.get("selection") == "all.without_indication"}
    assert asked == {"without indication"}
    quarter = next(options_of(step) for step in found.steps if step.name == "pack quarter")
    assert (quarter["source"], quarter["recipe.members.whole.weight"]) == (f"{tmp_path}/data", "0.25")


def test_time_is_foretold_and_then_measured(tmp_path):
    """The nine arms within the hour, by the figures; a finished step counts for those of its kind."""
    found, done = sweep.plan(phantom.get_config(), tmp_path, tmp_path, {}), sweep.Done(tmp_path)
    assert sum(step.weight for step in found.steps) < 50 * 60
    assert (
        sweep.left(found.steps, done, foretold=True)
        == f"about {sum(s.weight for s in found.steps) / 60:.0f} minutes left"
    )
    steps = [sweep.Step(name, (name,), kind="stage3", weight=weight) for name, weight in (("a", 10.0), ("b", 20.0))]
    assert sweep.left(steps, done, foretold=False) == "time left not known yet"
    done.add(steps[0], 600.0)
    assert sweep.left(steps, done, foretold=True) == "about 20 minutes left"


def test_a_config_that_cannot_be_made_ends_before_anything_runs(tmp_path):
    config = phantom.get_config("tiny")
    config.arms = (("recipe", {}), ("wrong", {"stage3": ("--config.model.lora.rnk=4",)}))
    with pytest.raises(UserError, match=r"configs/phantom.py:stage3 .* the config cannot be used .*rnk"):
        sweep.plan(config, tmp_path, tmp_path, {})


def test_corpora_are_packed_here_whatever_via_says():
    run = sweep.Runner(["elsewhere"], os.environ)
    commands = [run.command(sweep.Step(name, (name, "--flag"))) for name in ("launch.pack", "launch.train")]
    assert commands == [[sys.executable, "-m", "launch.pack", "--flag"], ["elsewhere", "launch.train", "--flag"]]


def test_what_is_finished_is_not_run_again(tmp_path, capfd):
    """A training that is told to restart is; after a failure what needs it is left out, and the others go on."""
    script = (
        "import pathlib, sys\n"
        "log = pathlib.Path(sys.argv[1]); log.open('a').write(sys.argv[2] + chr(10))\n"
        "times = log.read_text().split().count(sys.argv[2])\n"
        "sys.exit({'b1': 42, 'c1': 3}.get(f'{sys.argv[2]}{times}', 0))"
    )
    via = [sys.executable, "-c", script, str(tmp_path / "log")]
    steps = [
        sweep.Step(name, (name,), name, needs)
        for name, needs in (("a", ()), ("b", ()), ("c", ("a",)), ("d", ("c",)), ("e", ("b",)))
    ]
    run = sweep.Runner(via, os.environ)
    failed = sweep.execute(steps, sweep.Done(tmp_path), run, foretold=False)
    assert failed == {"c": "ended with status 3", "d": "left out, for it needs `c`"}
    said = capfd.readouterr()
    assert "error: c: ended with status 3; the others go on." in said.err and "== 5 of 5, " in said.out
    assert sweep.execute(steps, sweep.Done(tmp_path), run, foretold=False) == {}
    assert (tmp_path / "log").read_text().split() == [*"abb", "c", "e", "c", "d"]
    assert sweep.Step("a", ("launch.train", "--config.steps=2")) not in sweep.Done(tmp_path)


def test_told_to_stop_it_begins_nothing_more(tmp_path):
    """The running command is told too; what it saves is its own affair, and it is not started again."""
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(42)); print('up', flush=True); time.sleep(60)"
    run = sweep.Runner([sys.executable, "-c", script], os.environ)
    before = signal.getsignal(signal.SIGTERM)
    try:
        run.listen()
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        steps = [sweep.Step(name, (name,)) for name in "ab"]
        assert sweep.execute(steps, sweep.Done(tmp_path), run, foretold=False) == {}
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.stops and not any(step in sweep.Done(tmp_path) for step in steps)


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
    with pytest.raises(ValueError, match="choose demo, all, tiny"):
        phantom.get_config("huge")


def run_sweep(out, *more, **options):
    """The command, in a process group of its own, and what it says in OUT.log."""
    command = [sys.executable, "-m", "launch.sweep", "--sweep=configs/sweeps/phantom.py:tiny", f"--out={out}", *more]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    log = out.with_suffix(".log").open("a")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True, **options
    )


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_ends_in_one_table_and_one_picture(tmp_path):
    out = tmp_path / "tiny"
    log, steps = out.with_suffix(".log"), out / "steps.json"
    first = run_sweep(out)
    try:  # killed with whatever it runs, when the first arm's first seed is trained
        while first.poll() is None and not (steps.exists() and "train stage3" in steps.read_text()):
            time.sleep(0.2)
        assert first.poll() is None, log.read_text()[-3000:]
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = json.loads(steps.read_text())
    assert not (out / "table.md").exists()
    assert run_sweep(out).wait() == 0, log.read_text()[-3000:]
    after = json.loads(steps.read_text())
    assert before.items() <= after.items() and len(after) == 14 > len(before)  # what was finished was not run again
    said = log.read_text()
    assert said.count("== pack whole: ") == 1 and f"14 commands, {len(before)} of them done" in said

    table = (out / "table.md").read_text()
    arms, metrics = ["recipe", "a quarter of the reports"], [w.strip() for w in table.splitlines()[0].split("|")[2:-1]]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == arms
    assert {"rouge_l", "bleu_4"} <= set(metrics) and "Means over 2 seeds on 14 studies" in table and table in said
    assert "Not computed: finding_macro_f1" in table  # of 14 studies no finding has enough
    scores = [sweeps.Score(**row) for row in json.loads((out / "arms.json").read_text())]
    assert {(score.arm, score.metric) for score in scores} == {(arm, metric) for arm in arms for metric in metrics}
    for score in scores:
        usual = next(other for other in scores if (other.arm, other.metric) == (arms[0], score.metric))
        apart = "better" if score.low > usual.high else "worse" if score.high < usual.low else ""
        assert score.verdict == apart and score.low <= score.high and len(score.seeds) == 2
        assert f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" in table
    with Image.open(out / "arms.png") as picture:
        assert picture.format == "PNG" and picture.width > 500

    # An arm that lacks a seed is in no table, and without the first arm there is none.
    config = phantom.get_config("tiny")
    found = sweep.plan(config, out, out, {})
    for lost, message in (("a quarter of the reports", ""), ("recipe", "no table: seeds of 'recipe'")):
        steps.write_text(json.dumps({name: step for name, step in after.items() if name != found.last[lost][1]}))
        if message:
            with pytest.raises(UserError, match=message):
                sweep.finish(found, sweep.Done(out), config.metrics, out)
        else:
            less = sweep.finish(found, sweep.Done(out), config.metrics, out)
            assert f"Not in it, because seeds are missing: {lost}." in less and f"| {lost} |" not in less
