import numpy as np
import pytest

from evaluation import baselines

SICK, TUBE = "Small left pleural effusion.", "The lungs are clear. An endotracheal tube is in place."


def test_most_frequent_ignores_white_space_and_empty_reports() -> None:
    texts = ["", "", "", "Clear lungs.", "b", " Clear\n lungs. "]
    assert baselines.most_frequent_report(texts) == ("Clear lungs.", True)
    assert baselines.most_frequent_report([SICK, "Large right pneumothorax."]) == ("Large right pneumothorax.", False)
    with pytest.raises(ValueError, match="not empty"):
        baselines.most_frequent_report(["", " "])


def test_most_frequent_is_a_normal_report() -> None:
    """Effusions are told of more often than of nothing, and a film with a tube is not normal; where none is, that is said."""
    assert baselines.most_frequent_report([SICK] * 5 + [TUBE] * 4 + ["The lungs are clear."]) == (
        "The lungs are clear.",
        True,
    )
    assert baselines.most_frequent_report([TUBE] * 4 + [SICK] * 5) == (SICK, False)
    normal = "The heart is normal in size. No pleural effusion or pneumothorax."
    assert baselines.is_normal(normal) and not baselines.is_normal(normal + " A nodule projects over the right lung.")


def test_thumbnail_is_the_mean_of_blocks() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 48)).astype(np.uint8)
    expected = image.reshape(16, 4, 16, 3).mean(axis=(1, 3)).reshape(-1)
    # Pillow's box filter works in single precision.
    np.testing.assert_allclose(baselines.thumbnail(image), expected, atol=1e-3)


def test_nearest_equals_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train, query = rng.normal(100, 50, (50, 256)).astype(np.float32), rng.normal(100, 50, (9, 256)).astype(np.float32)
    monkeypatch.setattr(baselines, "_BLOCK", 4)
    plain = [int(np.argmin(((train - q) ** 2).sum(axis=1))) for q in query]
    assert baselines.nearest(train, query).tolist() == plain
    reports = [str(i) for i in range(50)]
    assert baselines.nearest_reports(train, reports, train[7:8]) == ["7"]
    assert baselines.nearest_reports(train, reports, train[:0]) == []
    with pytest.raises(ValueError, match="no training image"):
        baselines.nearest(train[:0], query)


def test_random_reports_are_drawn_from_all() -> None:
    reports = [f"report {i}" for i in range(5)]
    drawn = baselines.random_reports(reports, 200)
    assert {*drawn} == {*reports} and drawn == baselines.random_reports(reports, 200)
    assert drawn != baselines.random_reports(reports, 200, seed=1)
    with pytest.raises(ValueError, match="no training report"):
        baselines.random_reports([], 1)
