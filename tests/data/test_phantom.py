"""The phantom: same seed same study, another seed another corpus, and every finding where its label says it is."""

import dataclasses
import itertools

import numpy as np
import pytest

from data.labels import CHEXPERT
from data.phantom.anatomy import anatomy
from data.phantom.builder import plan
from data.phantom.draw import draw
from data.phantom.findings import FINDINGS, MOST, PREVALENCE, VOCABULARY, Finding
from data.phantom.study import content, studies_of, study

SIZE = 112

EVERY = [
    Finding(name, side, size, place)
    for name, (sides, sizes, places) in VOCABULARY.items()
    for side, size, place in itertools.product(sides or [None], sizes or [None], places or [None])
    if (name, side, place) != ("consolidation", "left", "middle lobe")
]


def film(findings, view="PA", patient=3, size=SIZE):
    return draw(anatomy(np.random.default_rng([0, patient])), findings, view, [0, patient, 0], size)


def test_a_study_is_made_from_its_numbers_alone():
    first, again = study(5, 7, 1, SIZE), study(5, 7, 1, SIZE)
    assert np.array_equal(first.image, again.image)
    assert dataclasses.replace(first, image=again.image) == again
    assert first.image.shape == (SIZE, SIZE) and first.image.dtype == np.uint8


def test_another_seed_changes_patients_images_and_texts():
    assert [studies_of(0, p) for p in range(50)] != [studies_of(1, p) for p in range(50)]
    for patient in range(5):
        a, b = study(0, patient, 0, SIZE), study(1, patient, 0, SIZE)
        assert a.report.findings != b.report.findings
        # Two films of one patient differ by noise alone in about 4 grey levels; another patient by much more.
        assert np.abs(a.image.astype(int) - b.image).mean() > 5


def test_a_patient_keeps_the_anatomy():
    body = anatomy(np.random.default_rng([0, 3]))
    one, two = (draw(body, [], "PA", [0, 3, k], SIZE)[0].astype(int) for k in (0, 1))
    other = film([], patient=4)[0]
    assert (one != two).any()
    assert np.abs(one - two).mean() < np.abs(one - other).mean() / 1.5


@pytest.mark.parametrize("view", ["PA", "AP"])
@pytest.mark.parametrize("finding", EVERY, ids=lambda f: "-".join(str(v) for v in f.key if v))
def test_a_finding_is_drawn_in_its_box(finding, view):
    normal, _ = film([], view)
    drawn, (found,) = film([finding], view)
    assert found.key == finding.key
    x0, y0, x1, y1 = found.box
    assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
    change = np.abs(drawn.astype(int) - normal)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[y0:y1, x0:x1] = True
    # The soft edge of an opacity, and the heart's shadow on the lung markings, may reach over the box; little else.
    assert change[inside].sum() > 0.85 * change.sum()
    # Visible: over at least 20 pixels by far more than the noise (about 4 grey levels).
    assert (change[inside] > 15).sum() >= 20


@pytest.mark.parametrize("finding", [f for f in EVERY if f.side], ids=lambda f: "-".join(str(v) for v in f.key if v))
def test_the_patients_right_is_image_left(finding):
    change = np.abs(film([finding])[0].astype(int) - film([])[0])
    left_half, right_half = change[:, : SIZE // 2].sum(), change[:, SIZE // 2 :].sum()
    own, other = (left_half, right_half) if finding.side == "right" else (right_half, left_half)
    if finding.finding in ("central_line", "pacemaker"):
        # Both end in the vena cava and the heart; the side is where they begin, in the upper outer part.
        own, other = (change[: SIZE // 3, :48].sum(), change[: SIZE // 3, 64:].sum())
        own, other = (own, other) if finding.side == "right" else (other, own)
    assert own > 3 * other


def test_sizes_grow():
    def changed(name, size):
        side = "left" if VOCABULARY[name][0] else None
        place = "mid zone" if name == "nodule" else None
        drawn, _ = film([Finding(name, side, size, place)])
        return (np.abs(drawn.astype(int) - film([])[0]) > 15).sum()

    for name, (_, sizes, _) in VOCABULARY.items():
        areas = [changed(name, size) for size in sizes]
        assert areas == sorted(areas) and len(set(areas)) == len(areas), (name, areas)


def test_a_finding_does_not_change_how_another_is_drawn():
    nodule, pacer = Finding("nodule", "right", "large", "mid zone"), Finding("pacemaker", "left")
    alone = film([nodule])[1][0].box
    together = film([pacer, nodule])[1][1].box
    assert alone == together


def test_boxes_scale_with_the_image():
    nodule = Finding("nodule", "right", "large", "mid zone")
    small, large = film([nodule])[1][0].box, film([nodule], size=518)[1][0].box
    # Two pixels of the small image: soft edges end at slightly different brightness.
    assert np.allclose(np.asarray(large) / 518, np.asarray(small) / SIZE, atol=2 / SIZE)


def test_prevalence_sides_and_number_of_findings():
    studies = [content(0, patient, 0)[0] for patient in range(3000)]
    assert max(map(len, studies)) <= MOST
    # 3,000 draws: three standard errors of a share of 0.14 are 0.019; of 0.5 among 400 cases 0.075.
    for name in FINDINGS:
        found = [f for s in studies for f in s if f.finding == name]
        assert abs(len(found) / 3000 - PREVALENCE) < 0.025, name
        if VOCABULARY[name][0]:
            assert abs(np.mean([f.side == "left" for f in found]) - 0.5) < 0.08, name
    assert 0.25 < np.mean([not s for s in studies]) < 0.36


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_studies_can_be_told_apart(seed):
    test = plan(seed, 4600)["test"]
    assert len(test) == 400
    kinds = {tuple(f.key for f in content(seed, *job)[0]) for job in test}
    assert len(kinds) >= 110  # retrieval needs 100 studies with pairwise different findings


@pytest.mark.parametrize("studies", [10, 137, 4600])
def test_splits_have_the_asked_size_and_share_no_patient(studies):
    splits = plan(0, studies)
    assert sum(map(len, splits.values())) == studies and all(splits.values())
    patients = [{patient for patient, _ in jobs} for jobs in splits.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))
    jobs = [job for split in splits.values() for job in split]
    assert len(set(jobs)) == studies


def test_labels_say_what_is_present():
    classes = {
        "cardiomegaly": "Cardiomegaly",
        "pleural_effusion": "Pleural Effusion",
        "pneumothorax": "Pneumothorax",
        "consolidation": "Consolidation",
        "nodule": "Lung Lesion",
    }
    for patient in range(40):
        made = study(0, patient, 0, 32)
        labels = dict(zip(CHEXPERT, made.labels, strict=True))
        names = {f.finding for f in made.findings}
        for name, label in classes.items():
            assert (labels[label] == 1) == (name in names)
        assert labels["Lung Opacity"] == labels["Consolidation"]
        assert (labels["Support Devices"] == 1) == bool(names - set(classes))
        assert (labels["No Finding"] == 1) == (not names & set(classes))
        assert labels["Fracture"] == -2
