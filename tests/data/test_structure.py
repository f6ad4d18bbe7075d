"""Reports rewritten by a language model: guards, and the whole way from real reports over a server on this machine into a packed corpus."""

import dataclasses
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.corpora import CORPORA, builder_class
from data.openi.builder import read_report
from data.packing import Arguments, pack
from data.reports import guards, structure
from evaluation.predictions import access_of, read_predictions
from launch import structure as command
from rad_jax.chat import access
from rad_jax.chat.client import UnusableError
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FAITHFUL = [
    (
        "en",
        "Small right pleural effusion. No pneumothorax. Heart size normal.",
        "Right pleural effusion, small. No pneumothorax.",
    ),
    ("en", "Right effusion and left atelectasis.", "Left atelectasis and right effusion."),
    ("en", "Interval resolution of the pneumothorax.", "Lungs are clear."),
    ("en", "The previously seen effusion is no longer present.", "No effusion."),
    ("en", "The effusion has decreased from 5 cm to 3 cm.", "The effusion measures 3 cm."),
    ("en", "Unchanged cardiomegaly. No new consolidation.", "Cardiomegaly. No consolidation."),
    ("en", "Bilateral effusions, right greater than left.", "Right greater than left bilateral effusions."),
    (
        "es",
        "cardiomegali sin cambi . derram pleural derech de 2,5 cm .",
        "Cardiomegaly. Right pleural effusion of 2.5 cm.",
    ),
    ("es", "Derrame pleural bilateral. No se observa neumotórax.", "Bilateral pleural effusions. No pneumothorax."),
    ("pt", "Pequeno derrame pleural à esquerda. Não há pneumotórax.", "Small left pleural effusion. No pneumothorax."),
]
OTHER_SIDE = {"left": "right", "right": "left"}
UNFAITHFUL = [
    ("en", "There is a nodule.", "There is a 5 mm nodule.", guards.NEW_NUMBER),
    ("en", "There is a 14 mm nodule in the left lung.", "There is a nodule in the left lung.", guards.LOST_MEASURE),
    ("en", "The heart is normal.", "The heart is normal. Mild edema.", guards.INVENTED),
    ("en", "Mild edema. The heart is normal.", "The heart is normal.", guards.LOST),
    ("en", "Unchanged cardiomegaly.", "Clear lungs.", guards.LOST),
    ("en", "Mild edema.", "No edema.", guards.DENIED),
    ("en", "No effusion or pneumothorax.", "No effusion. Pneumothorax.", guards.AFFIRMED),
    ("en", "Clear lungs.", "Clear lungs. No fracture.", guards.NEW_DENIAL),
    ("en", "No effusion or pneumothorax.", "No effusion.", guards.LOST_DENIAL),
    ("en", "Small right effusion.", "Small left effusion.", guards.SIDE),
    ("en", "Right effusion and left atelectasis.", "Left effusion and right atelectasis.", guards.SIDE),
    ("en", "Small right effusion.", "Small effusion.", guards.LOST_SIDE),
    ("es", "derram pleural derech .", "Left pleural effusion.", guards.SIDE),
    ("es", "sin derram . nodul .", "Effusion. Nodule.", guards.AFFIRMED),
    ("es", "derram pleural derech .", "Derrame pleural derecho.", guards.NOT_ENGLISH),
    ("pt", "Sem pneumotórax.", "Pneumothorax.", guards.AFFIRMED),
]  # fmt: skip


@pytest.mark.parametrize(("language", "source", "output"), FAITHFUL)
def test_faithful(language, source, output):
    assert guards.fault(source, output, language) is None


@pytest.mark.parametrize(("language", "source", "output", "reason"), UNFAITHFUL)
def test_unfaithful(language, source, output, reason):
    fault = guards.fault(source, output, language)
    assert fault is not None and fault[0] == reason


def test_residue_is_reported():
    assert guards.residue("Stable heart. Interval increase; the lungs are clear again.") == [
        "stable",
        "interval",
        "again",
    ]
    assert guards.residue("The heart is normal. No pneumothorax.") == []


@pytest.fixture(scope="module")
def openi(real, tmp_path_factory):
    """The first 300 real reports, as the collection has them, and a grey film for every image of the first 40."""
    source = tmp_path_factory.mktemp("structure") / "openi"
    (source / "NLMCXR_png").mkdir(parents=True)
    with tarfile.open(real / "openi/NLMCXR_reports.tgz") as archive:
        members = [m for m in archive if m.name.endswith(".xml") and int(Path(m.name).stem) <= 300]
        archive.extractall(source, members, filter="data")
    film = Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32))
    for uid in range(1, 41):
        for path in (source / "ecgen-radiology").glob(f"{uid}.xml"):
            for name in read_report(path)[1]:
                film.save(source / "NLMCXR_png" / f"{name}.png")
    return source


def bodies(source):
    texts = [read_report(path)[0] for path in sorted((source / "ecgen-radiology").glob("*.xml"))]
    return [known.body for words in texts if (known := structure.of_texts([words]))]


def test_guards_on_real_reports(openi):
    """A text is faithful to itself; of texts with one thing changed, nearly all are caught: each change is seen where the lexicon names it."""
    seen: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    for body in bodies(openi):
        assert guards.fault(body, body) is None
        said = guards.findings(body)
        changed = {}
        if any(own.sides and own.sides != {"left", "right"} for own in said.values()):
            changed["side"] = re.sub(r"\b(left|right)\b", lambda m: OTHER_SIDE[m[0].lower()], body, flags=re.I)
        denied = [name for name, own in said.items() if own.denied and not own.affirmed and not own.gone]
        if denied and "pneumothorax" in denied:
            changed["denial"] = re.sub(r"\b(no|without|or|not|free of)\b", "", body, flags=re.I)
        if "nodule" not in said:
            changed["invented"] = body + "\nThere is a nodule in the right lung."
        sentences = re.split(r"(?<=[.])\s", body)
        if "effusion" in denied:
            changed["lost denial"] = " ".join(s for s in sentences if "effusion" not in s.lower())
        for kind, text in changed.items():
            seen[kind] += 1
            caught[kind] += guards.fault(body, text) is not None
    assert min(seen.values()) >= 20
    assert {kind: caught[kind] / seen[kind] for kind in seen} == pytest.approx(dict.fromkeys(seen, 1.0), abs=0.05)


def structurer(body):
    """A model that works by rules: sections by their headings, no sentence about other studies; every tenth report it puts on the other side."""
    text = body["messages"][1]["content"].partition("The report:\n")[2]
    found = dict(re.findall(r"(INDICATION|FINDINGS|IMPRESSION): (.*?)(?=\n[A-Z]+: |\Z)", text, re.DOTALL))
    out = dict.fromkeys((name.upper() for name in structure.SECTIONS), None) | found
    for name in ("FINDINGS", "IMPRESSION"):
        sentences = re.split(r"(?<=[.])\s+", out[name] or "")
        out[name] = " ".join(s for s in sentences if not re.search("compar|prior|previous", s, re.I)) or None
    if int(structure.key_of(text), 16) % 10 == 0 and out["FINDINGS"]:
        out["FINDINGS"] += " There is a nodule of 77 mm."
    return json.dumps(out)


def arguments(source, **other):
    values = {"image_size": 16, "studies": 10, "seed": 0, "tokenizer": None, "vocab_size": 512}
    return Arguments(dataset="openi", source=str(source), **values | other)


@pytest.fixture
def options(client_options):
    def say(source, out, endpoint, **other):
        own = {"language": None, "dataset": "openi", "max_tokens": 1024, "max_failures": 300}
        own |= {"source": str(source), "out": str(out), "endpoint": endpoint}
        return client_options(**own | other)

    return say


@pytest.mark.slow
def test_real_reports_from_collection_to_corpus(openi, tmp_path, chat_server, options):
    server = chat_server(structurer)
    server.faults = {
        3: "error",
        5: "filtered",
        8: "busy_ms",
        9: "truncated",
        11: "cut_off",
        13: "garbage",
        17: "not_json",
    }
    out = tmp_path / "openi.jsonl"
    dry = options(openi, out, server.url, dry_run=True, prices=["2", "8"], requests_per_minute=60)
    reckoned = command.structure_corpus(dry)
    documents = builder_class("openi")(source=openi, image_size=16, data_dir=tmp_path).documents()
    assert f"{len(documents)} requests, 0 of them answered in the cache" in reckoned
    assert "US dollars" in reckoned and f"at least {len(documents) / 60:.1f} minutes" in reckoned
    assert not server.bodies and not out.exists()

    flags = (
        "--dataset=openi",
        f"--source={openi}",
        f"--out={out}",
        f"--endpoint={server.url}",
        "--model=m",
        "--max_failures=300",
    )
    done = subprocess.run(
        [sys.executable, "-m", "launch.structure", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rejected = [json.loads(line) for line in Path(f"{out}.rejected.jsonl").read_text().splitlines()]
    info = json.loads(Path(f"{out}.info.json").read_text())
    assert {row["key"] for row in rows} | {row["key"] for row in rejected} == documents.keys()
    assert info["rejected"]["filtered"] == info["rejected"]["cut at the token limit"] == 1
    assert info["rejected"][guards.NEW_NUMBER] >= 10 and info["access"] == "public"
    assert sum(info["rejected"].values()) == len(rejected) and info["structured"] == len(rows) > 200
    assert all(row["findings"] or row["impression"] for row in rows)
    for text in ("effusion", "There is a nodule"):  # nothing of a report is told
        assert text not in done.stdout + done.stderr

    compared = read_predictions(Path(f"{out}.pairs.jsonl"))
    assert len(compared.rows) == sum(bool(documents[row["key"]].findings and row["findings"]) for row in rows) > 150
    same = sum(row.prediction.split() == row.reference.split() for row in compared.rows)
    assert 0.8 < same / len(compared.rows) < 1.0  # the others lost a sentence about another study
    assert access_of(compared.rows) == "public"

    before = len(server.bodies)  # once more: only what was filtered, or cut off, is asked for again
    command.structure_corpus(options(openi, out, server.url))
    assert len(server.bodies) - before <= 4

    given = arguments(openi, structured=str(out))
    manifest, _ = pack(given, tmp_path / "c", workers=1, progress=False, bad_rows=1.0)  # films of 40 of the 300 reports
    counts = manifest["summary"]["counts"]
    assert counts["films with a structured text"] > 40 > counts["films with a report and no structured text"]
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.access == "public"
    # As they are since the second run, which has those that the first one's faults hit: other reports each time.
    texts = {row["key"]: row for row in map(json.loads, out.read_text().splitlines())}
    found = corpus.source("train", "pairs.llm")
    for number in range(len(found)):
        row = found[number]
        words = read_report(openi / "ecgen-radiology" / f"{row['study']}.xml")[0]
        document = structure.of_texts([words])
        assert document is not None
        wanted = texts[document.key]
        assert row["method"] == "llm" and row["id"].endswith("~llm")
        assert all(row[name] == (wanted[name] or "") for name in ("findings", "impression", "indication"))
    assert len(corpus.source("train", "pairs")) > len(corpus.source("train", "pairs.report")) >= len(found)
    assert not pack(arguments(openi, structured=str(out)), tmp_path / "c", workers=1, progress=False)[1]
    with pytest.raises(UserError, match="other arguments \\(structured"):
        pack(arguments(openi), tmp_path / "c", workers=1, progress=False)


def test_restricted_reports_stay_here(tmp_path, options):
    table = tmp_path / "my.csv"
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    table.write_text("image,findings\na.png,Clear lungs.\n")
    remote = options(table, tmp_path / "o", "https://192.0.2.1/v1", dataset="folder")
    with pytest.raises(UserError, match=r"this data is private, and 192\.0\.2\.1 is another machine"):
        command.structure_corpus(remote)


def test_a_spanish_corpus(tmp_path, chat_server, options):
    """PadChest's word stems become English texts of their films; one that is put on the wrong side is refused."""
    source = tmp_path / "padchest"
    (source / "12").mkdir(parents=True)
    reports = {"1": "derram pleural derech . cardiomegali .", "2": "sin derram .", "3": "derram izquierd ."}
    english = {"1": "Right pleural effusion. Cardiomegaly.", "2": "No effusion.", "3": "Right effusion."}
    columns = (
        "ImageID,ImageDir,StudyID,PatientID,PatientBirth,PatientSex_DICOM,StudyDate_DICOM,Projection,Report,Labels"
    )
    lines = [f"{n}.png,12,s{n},p{n},1930,F,20140915,PA,{text},\"['cardiomegaly']\"" for n, text in reports.items()]
    (source / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv").write_text("\n".join([columns, *lines]) + "\n")
    for number in reports:
        Image.new("L", (32, 32)).save(source / "12" / f"{number}.png")

    def translator(body):
        text = body["messages"][1]["content"].partition("The report:\n")[2]
        return reply(findings=next(english[n] for n, spanish in reports.items() if spanish in text))

    server, out = chat_server(translator), tmp_path / "s.jsonl"
    told = command.structure_corpus(options(source, out, server.url, dataset="padchest"))
    assert "2 of 3 reports structured, 1 rejected (1 a side is changed)" in told
    assert "Spanish" in server.bodies[0]["messages"][1]["content"]
    given = dataclasses.replace(arguments(source, structured=str(out)), dataset="padchest")
    manifest, _ = pack(given, tmp_path / "c", workers=1, progress=False)
    corpus = Corpus.open(tmp_path / "c")
    counts = {split: index["rows"] for split, index in manifest["selections"]["all.llm"]["splits"].items()}
    rows = [corpus.source(split, "all.llm")[0] for split, count in counts.items() if count]
    assert sum(counts.values()) == 2 and {row["findings"] for row in rows} <= set(english.values())
    assert corpus.access == "credentialed"


# Portuguese report -> the model's answers in turn, and why the last of them is rejected.
PORTUGUESE: list[tuple[str, tuple[str, ...], str | None]] = [
    ("Derrame pleural à direita. Cardiomegalia.", ("Right pleural effusion. Cardiomegaly.",), None),
    (
        "Não há consolidações. Nódulo de 12 mm no lobo superior direito.",
        ("No consolidation. 12 mm nodule in the right upper lobe.",),
        None,
    ),
    ("Marca-passo à esquerda. Não se observa fratura.", ("Pacemaker on the left. No fracture is seen.",), None),
    ("Derrame bilateral, maior à direita.", ("Bilateral effusions, right greater than left.",), None),
    ("Derrame resolvido desde o exame anterior. Pulmões livres.", ("The lungs are clear.",), None),
    # The second try is right.
    ("Sem fraturas. Derrame à esquerda.", ("Fracture. Left effusion.", "No fracture. Left effusion."), None),
    # A denial that is lost: turned into a finding, or left out.
    ("Coração normal, sem derrame.", ("Normal heart, effusion.",), guards.AFFIRMED),
    ("Sem pneumotórax. Atelectasia à esquerda.", ("Left atelectasis.",), guards.LOST_DENIAL),
    # Sides that change places, and one that is lost.
    ("Pneumotórax à esquerda.", ("Right pneumothorax.",), guards.SIDE),
    (
        "Derrame à direita e atelectasia à esquerda.",
        ("Left effusion and right atelectasis.", "Effusion on the left and atelectasis on the right."),
        guards.SIDE,
    ),
    ("Consolidação à direita.", ("Consolidation.",), guards.LOST_SIDE),
    ("Nódulo calcificado de 8 mm.", ("Calcified nodule of 18 mm.",), guards.NEW_NUMBER),
    ("Pulmões livres.", ("Clear lungs. Small nodule.",), guards.INVENTED),
    ("Cardiomegalia. Espessamento pleural.", ("Cardiomegaly.",), guards.LOST),
    ("Edema intersticial, sem nódulos.", ("Edema intersticial, sem nódulos.",), guards.NOT_ENGLISH),
]


def test_portuguese_reports(tmp_path, chat_server, options):
    """Own reports in Portuguese become English texts of their films, or are rejected with the reason and the model's last answer."""
    lines = ["id,image,split,findings", *(f'{k},{k}.png,train,"{text}"' for k, (text, *_) in enumerate(PORTUGUESE))]
    (tmp_path / "reports.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked: Counter[str] = Counter()

    def translator(body):
        # A second try has the first one's turns before its own.
        report = body["messages"][1]["content"].partition("The report:\n")[2].removeprefix("FINDINGS: ")
        answers = next(answers for text, answers, _ in PORTUGUESE if text == report.strip())
        asked[report.strip()] += 1
        return reply(findings=answers[min(asked[report.strip()], len(answers)) - 1])

    server, out = chat_server(translator), tmp_path / "s.jsonl"
    told = command.structure_corpus(options(tmp_path, out, server.url, dataset="folder", language="pt"))
    wrong = {text: reason for text, _, reason in PORTUGUESE if reason}
    assert f"{len(PORTUGUESE) - len(wrong)} of {len(PORTUGUESE)} reports structured, {len(wrong)} rejected" in told
    assert all("Portuguese" in body["messages"][0]["content"] for body in server.bodies)
    # What the guards refuse is asked for once more.
    assert asked == {text: 2 if reason or len(answers) > 1 else 1 for text, answers, reason in PORTUGUESE}
    keys = {structure.key_of(f"FINDINGS: {text}"): text for text, *_ in PORTUGUESE}
    rejected = [json.loads(line) for line in Path(f"{out}.rejected.jsonl").read_text().splitlines()]
    assert {keys[row["key"]]: row["reason"] for row in rejected} == wrong
    last = {text: answers[-1] for text, answers, _ in PORTUGUESE}
    assert all(json.loads(row["answer"])["FINDINGS"] == last[keys[row["key"]]] for row in rejected)
    kept = {keys[key]: row["findings"] for key, row in structure.load(out).items()}
    assert kept == {text: last[text] for text in last.keys() - wrong.keys()}
    info = json.loads(Path(f"{out}.info.json").read_text())
    assert info["language"] == "pt" and info["rejected"] == dict(Counter(wrong.values()))

    for number in range(len(PORTUGUESE)):
        Image.new("L", (32, 32), number).save(tmp_path / f"{number}.png")
    given = dataclasses.replace(arguments(tmp_path, structured=str(out)), dataset="folder")
    manifest, _ = pack(given, tmp_path / "c", workers=1, progress=False)
    assert manifest["summary"]["counts"]["films with a structured text"] == len(kept)
    rows = Corpus.open(tmp_path / "c").source("train", "all.llm")
    assert sorted(rows[number]["findings"] for number in range(len(rows))) == sorted(kept.values())


def test_every_corpus_says_who_may_have_it():
    public = {"phantom", "openi", "chestxray14"}
    for name in CORPORA:
        kind = builder_class(name)
        assert kind.access in access.LEVELS and (kind.access == "public") == (name in public), name
    assert builder_class("padchest").language == "es"


def made_of(findings, **other):
    text = {"method": "report", "findings": findings, "impression": None, "indication": None, "prompt": None}
    found = structure.of_texts([text | other])
    assert found is not None
    return found


def reply(**sections):
    return json.dumps({name.upper(): sections.get(name) for name in structure.SECTIONS})


def test_an_answer_is_read_and_guarded():
    given = made_of("Stable  small effusion.", indication="Pneumonia?")
    assert given.text == "INDICATION: Pneumonia?\nFINDINGS: Stable  small effusion."
    value = structure.read(reply(findings=" Small\neffusion. ", indication="Pneumonia?"), given, "en")
    assert value == {
        "examination": None,
        "indication": "Pneumonia?",
        "findings": "Small effusion.",
        "impression": None,
        "residue": [],
    }
    for bad, reason in (
        ("Small effusion.", "not JSON"),
        ("{}", "not of the schema"),
        (reply(), structure.NOTHING_LEFT),
        (reply(findings=" "), structure.NOTHING_LEFT),
        (
            reply(findings="Small effusion. Pneumonia."),
            guards.INVENTED,
        ),  # the indication asks for it, the image does not show it
    ):
        with pytest.raises(UnusableError) as error:
            structure.read(bad, given, "en")
        assert error.value.reason == reason


def test_a_whole_report_is_guarded_by_what_it_says_of_the_image():
    report = "EXAM: CHEST\n\nINDICATION: Pneumonia.\n\nCOMPARISON: 2 films of 2019.\n\nFINDINGS: Mild edema.\n\nIMPRESSION: Edema.\n"
    given = structure.of_report(report)
    assert given.body.split() == ["Mild", "edema.", "Edema."] and given.findings == "Mild edema."
    assert structure.of_report(report + "  ").key == given.key != structure.of_report(report + "x").key
    assert structure.of_report("no heading, mild edema").body == "no heading, mild edema"


def test_labels_alone_are_no_report():
    assert (
        structure.of_texts([{"method": "labels", "findings": "Edema.", "impression": None, "indication": None}]) is None
    )
    spanish = structure.of_texts(
        [{"method": name, "findings": name, "impression": None, "indication": None} for name in ("labels", "spanish")]
    )
    assert spanish is not None and spanish.body == "spanish"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"key": 1}', '{"key": "a", "findings": 3, "impression": null, "indication": null}']
)
def test_a_damaged_file_is_named(tmp_path, line):
    file = tmp_path / "s.jsonl"
    good = structure.row("k", dict.fromkeys(structure.SECTIONS, "x"), "public")
    file.write_text(json.dumps(good) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match="line 3: no structured report"):
        structure.load(file)
    file.write_text(json.dumps(good) + "\n")
    assert structure.load(file)["k"]["findings"] == "x"
    with pytest.raises(UserError, match="no structured reports here"):
        structure.load(tmp_path / "none")


def test_prompts_of_all_languages():
    given = dataclasses.replace(made_of("x"), text="TEXT")
    for language, word in (("en", "Sort the report"), ("es", "Spanish"), ("pt", "Portuguese")):
        asked = structure.question(given, structure.prompt_of(language), language)
        assert [m["role"] for m in asked.messages] == ["system", "user"]
        assert word in asked.messages[1]["content"] and asked.messages[1]["content"].endswith("The report:\nTEXT")


def test_the_phantom_needs_no_structuring(tmp_path):
    given = Arguments("phantom", None, 32, 24, 0, None, 512, structured="x.jsonl")
    with pytest.raises(UserError, match="needs no structured reports"):
        pack(given, tmp_path / "c", workers=1, progress=False)
