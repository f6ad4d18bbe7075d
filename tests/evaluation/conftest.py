"""A page's worth of made-up but realistic content."""

import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import findings
from evaluation.overlay import overlay
from evaluation.page import Context, Study, judge

SIZE = 112
WORDS = {"effusion": "pleural_effusion", "pneumothorax": "pneumothorax", "nodule": "nodule", "heart": "cardiomegaly"}


def toy_parse(text: str) -> list[findings.Finding]:
    """Reads "[left|right] <word>" unless the sentence starts with "No": enough of a parser for tests."""
    out: list[findings.Finding] = []
    for sentence in re.split(r"[.!?]", text):
        tokens = sentence.lower().split()
        if not tokens or tokens[0] == "no":
            continue
        side = next((token for token in tokens if token in ("left", "right")), None)
        out += [(WORDS[token], side, None, None) for token in tokens if token in WORDS]
    return out


def radiograph(seed: int) -> np.ndarray:
    """Something with lungs, heart and noise, uint8 [112, 112]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    image = 175 - 40 * np.hypot(x - 0.5, y - 0.5)
    for centre in (0.28, 0.72):
        image -= 110 * np.exp(-(((x - centre) / 0.15) ** 4) - ((y - 0.45) / 0.33) ** 4)
    image += 70 * np.exp(-(((x - 0.56) / 0.15) ** 2) - ((y - 0.66) / 0.15) ** 2)
    image += 10 * np.sin(y * 55 + 6 * np.abs(x - 0.5)) * (np.abs(x - 0.5) > 0.08)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


def study(number: int, reference: str, prediction: str, word: str | None) -> Study:
    image = radiograph(number)
    y, x = np.mgrid[:14, :14]
    attention = np.exp(-((x - 10) ** 2 + (y - 9 + number % 4) ** 2) / 5.0) + 0.08 * np.random.default_rng(
        number
    ).random((14, 14))
    return Study(
        id=f"p{number:05d}/s1",
        image_png=png(image),
        attention_png=overlay(image, attention) if word else None,
        word=word,
        boxes=[[66, 56, 102, 96]] if word else [],
        indication="Shortness of breath for three days, worse when lying flat.",
        reference=reference,
        prediction=prediction,
        **judge(reference, prediction, toy_parse(reference), toy_parse),
    )


REPORTS = [
    (
        "There is a small left effusion. No pneumothorax. The heart is large.",
        "A small left effusion is seen. No pneumothorax.",
        "effusion",
    ),
    (
        "The heart and lungs look normal for age. Clear.".replace("heart", "cardiac shadow"),
        "Lungs are clear. Normal mediastinum.",
        None,
    ),
    (
        "Moderate right pneumothorax with partial collapse. Lungs otherwise clear.",
        "Moderate left pneumothorax with partial collapse.",
        "pneumothorax",
    ),
    (
        "A 12 mm nodule projects over the right upper zone. No effusion.",
        "A nodule projects over the right upper zone. Large left effusion.",
        "nodule",
    ),
    (
        "Large right effusion with a fluid level. An enlarged heart shadow. No pneumothorax.",
        "Large right effusion. The heart is enlarged. No pneumothorax.",
        "effusion",
    ),
    ("No effusion. No pneumothorax. Normal lungs.", "", None),
]


@pytest.fixture
def parse() -> Callable[[str], list[findings.Finding]]:
    return toy_parse


@pytest.fixture
def sample() -> Context:
    rng = np.random.default_rng(0)

    def curve(start: float, end: float, steps: int) -> list[tuple[float, float]]:
        return [(s, end + (start - end) * math.exp(-4 * s / steps) + rng.normal(0, 0.04)) for s in range(0, steps, 5)]

    names = [
        "cardiomegaly",
        "pleural effusion",
        "pneumothorax",
        "consolidation",
        "nodule",
        "endotracheal tube",
        "central line",
        "pacemaker",
    ]
    return Context(
        title="Findings from radiographs",
        subtitle="A small model, trained from nothing on this machine, writes the findings of films it has never seen.",
        corpus={
            "name": "The phantom corpus",
            "synthetic": True,
            "description": "4,000 studies of 2,013 drawn patients; 240 studies of other patients are held out.",
            "facts": [
                ("Corpus", "phantom 1.0.0, 112 px, seed 0"),
                ("Studies", "4,000 train, 200 validation, 240 test"),
            ],
        },
        tiles=[
            {
                "label": "Finding macro F1",
                "value": "0.874",
                "note": "floor 0.60; 95% interval 0.84 to 0.90, 240 studies",
                "fraction": 0.874,
                "marks": [(0.6, "floor")],
            },
            {
                "label": "Laterality: side named correctly",
                "value": "0.953",
                "note": "floor 0.85; of 118 findings with a side",
                "fraction": 0.953,
                "marks": [(0.85, "floor")],
            },
            {
                "label": "Image to text R@5",
                "value": "0.680",
                "note": "floor 0.40, chance 0.05; pool of 100",
                "fraction": 0.68,
                "marks": [(0.05, "chance"), (0.4, "floor")],
            },
            {
                "label": "Macro F1 on noise",
                "value": "0.021",
                "note": "must stay below half of its F1",
                "fraction": 0.021,
                "marks": [(0.437, "ceiling")],
            },
            {
                "label": "Macro F1 on another's image",
                "value": "0.113",
                "note": "must stay below half of its F1",
                "fraction": 0.113,
                "marks": [(0.437, "ceiling")],
            },
            {
                "label": "Most frequent normal report",
                "value": "0.000",
                "note": "baseline macro F1",
                "fraction": 0.0,
                "marks": [],
            },
            {
                "label": "Nearest thumbnail's report",
                "value": "0.214",
                "note": "baseline macro F1",
                "fraction": 0.214,
                "marks": [],
            },
            {
                "label": "Attention inside the box",
                "value": "0.61",
                "note": "pointing game; chance 0.09",
                "fraction": 0.61,
                "marks": [(0.09, "chance")],
            },
            {
                "label": "Export: largest logit difference",
                "value": "3.1e-5",
                "note": "JAX against PyTorch; texts equal: yes",
            },
            {"label": "From start to this page", "value": "9 min 41 s", "note": "2 CPU cores"},
        ],
        curves=[
            {"name": "Language model", "points": curve(6.9, 1.1, 600)},
            {"name": "Stage 1: contrastive tower", "points": curve(4.1, 0.6, 900)},
            {"name": "Stage 2: projector", "points": curve(2.4, 0.9, 400)},
            {"name": "Stage 3: LoRA", "points": [*curve(0.95, 0.35, 700), (700, math.nan)]},
        ],
        tables=[
            {
                "title": "Findings",
                "columns": ["finding", "precision", "recall", "F1", "support", "predicted"],
                "rows": [
                    [n, float(0.9 - 0.02 * i), float(0.85 - 0.01 * i), float(0.87 - 0.03 * i), 40 - i, 38]
                    for i, n in enumerate(names)
                ],
                "note": "Read from the generated text; a finding counts when it is named, its side is judged apart.",
                "bar": 3,
            },
            {
                "title": "Beside the baselines",
                "columns": ["system", "finding macro F1", "laterality", "BLEU-1", "BLEU-4", "ROUGE-L"],
                "rows": [
                    ["this model", 0.874, 0.953, "61.2", "38.0", 0.572],
                    ["most frequent normal report", 0.0, None, "31.0", "9.1", 0.31],
                    ["nearest thumbnail", 0.214, 0.5, "42.8", "15.3", 0.388],
                ],
                "bar": 1,
            },
        ],
        studies=[study(number, *REPORTS[number % len(REPORTS)]) for number in range(12)],
        timings=[
            ("Pack the corpus", 41.2),
            ("Language model", 95.0),
            ("Stage 1", 160.4),
            ("Stage 2", 48.9),
            ("Stage 3", 150.2),
            ("Generate and judge", 61.0),
            ("Export and compare", 18.3),
        ],
        config_text="model.vision.width = 192\nmodel.vision.layers = 6\noptim.lr = 0.001\n"
        + "a_long_line = "
        + "x" * 200,
        machine=[
            ("Machine", "2 CPU cores, 4 GB memory, no accelerator"),
            ("Versions", "rad_jax 0.1.0, jax 0.10.2, Python 3.11"),
        ],
    )


# A window is never narrower than about 500 px, so the page is measured in a frame of the asked width, whose style
# sheet sees that width, and tells the page around it what it found.
MEASURE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg")
    && e.getBoundingClientRect().right > innerWidth + 0.5);
  const broken = [...document.images].filter(e => !e.naturalWidth);
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, broken.length, wide.length].join(" "), "*");
})</script>"""
FRAME = """<body style="margin:0"><script>onmessage = e => document.body.dataset.measured = e.data</script>
<iframe src="measured.html" width="{width}" height="3000" style="border:0"></iframe></body>"""


class Browser:
    """Headless Chromium that can reach no network; what pages ask for is logged."""

    def __init__(self, folder: Path):
        self._folder, self._log = folder, folder / "net.json"
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no chromium on this machine (apt-get install chromium)")
        self._program = program

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One start with these arguments, the page last; console messages are lines with CONSOLE in stderr."""
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage"]
        flags += [
            "disable-component-update",
            "no-first-run",
            "host-resolver-rules=MAP * ~NOTFOUND",
            "enable-logging=stderr",
        ]
        flags += [f"user-data-dir={self._folder / 'profile'}", f"log-net-log={self._log}"]
        command = [self._program, *(f"--{flag}" for flag in flags), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)

    def requests(self) -> list[str]:
        """What the pages of the last start asked of the network; what the browser asks for itself has no origin."""
        events = json.loads(self._log.read_text())["events"]
        asked = [event.get("params", {}) for event in events]
        return [a["url"] for a in asked if "url" in a and a.get("initiator", "not an origin") != "not an origin"]

    def measure(self, text: str, width: int) -> list[int]:
        """Inner width, scroll width, broken images and elements that stick out, of a page in a frame of this width."""
        policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
        text = re.sub(policy, "", text).replace("</body>", MEASURE + "</body>")
        (self._folder / "measured.html").write_text(text, encoding="utf-8")
        frame = self._folder / "frame.html"
        frame.write_text(FRAME.format(width=width), encoding="utf-8")
        done = self.run("--window-size=1400,3000", "--dump-dom", frame.as_uri())
        found = re.search(r'data-measured="(\d+) (\d+) (\d+) (\d+)"', done.stdout)
        assert found is not None, "the page did not finish loading"
        return [int(number) for number in found.groups()]


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


@pytest.fixture
def draw() -> Callable[[int], bytes]:
    """A PNG of something like a radiograph, by seed."""
    return lambda seed: png(radiograph(seed))
