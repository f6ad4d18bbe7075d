"""Tokenizers and templates, against golden ids of the real Llama tokenizer and against transformers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rad_jax import prompts
from rad_jax.errors import UserError

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real"
LLAMA = REAL / "tokenizer" / "llama2_tokenizer.model"
BERT = REAL / "tokenizer" / "bert_base_uncased_vocab.txt"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real test data at {REAL}")

ROWS = [
    ("Cough and fever.", "The heart is normal in size. The lungs are clear. No pleural effusion or pneumothorax."),
    (None, "Moderate left pleural effusion with adjacent atelectasis. The heart is mildly enlarged."),
    ("", "Right internal jugular line ends 2.5 cm above the carina; no pneumothorax."),
    ("Shortness of breath // rule out edema", "Mild pulmonary edema.\nSmall bilateral pleural effusions."),
] * 5
TEXTS = [
    "",
    " ",
    "  two  blanks ",
    "\nfirst line\n\nthird",
    "Étude normale – aucune anomalie, ≥ 2 cm",
    "肺野清晰 \U0001fac1 a\u0301",
    "tabs\tand\r\nreturns",
    "___-sided tube, 4.5 cm (2 views) 50% // ?PTX",
    "a<b>c <x0A> <0x0A> [SEP]",
    "</s><s> <unk> <image> <pad>",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return prompts.train_tokenizer(ROWS, 512, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def llama():
    if not LLAMA.is_file():
        pytest.skip(f"no real test data at {REAL}")
    return prompts.load_tokenizer(LLAMA)


def real_rows() -> list[tuple[str | None, str]]:
    with open(REAL / "reports.csv", newline="", encoding="utf-8") as file:
        return [(row["indication"] or None, row["findings"]) for row in csv.DictReader(file) if row["findings"]]


@needs_real
def test_golden_ids_and_masks(llama):
    cases = json.loads((REAL / "tokenizer" / "golden_plain_v1.json").read_text(encoding="utf-8"))["cases"]
    assert {case["template"] for case in cases} == {"plain", "v1"}
    for case in cases:
        if case["template"] == "plain":
            example = prompts.render_plain(llama, case["findings"])
        else:
            question = prompts.question(case["reason"])
            example = prompts.render_v1(llama, question, case["findings"])
            prompt = prompts.render_v1(llama, question, None)
            assert prompt.ids == case["generation_ids"]
            assert set(prompt.labels) == {prompts.NO_LOSS}
        assert example.ids == case["input_ids"], case["text"]
        assert example.labels == case["labels"], case["text"]


@needs_real
def test_answer_apart_from_prompt_gives_the_ids_of_the_whole(llama, trained):
    for tokenizer in (llama, trained):
        for indication, findings in real_rows():
            head = f"\n{prompts.question(indication)} ASSISTANT:"
            assert tokenizer.encode(head) + tokenizer.encode(findings) == tokenizer.encode(f"{head} {findings}")


def test_questions():
    assert prompts.question(None) == "Provide a description of the findings in the radiology image."
    given = "Provide a description of the findings in the radiology image given the following indication: "
    assert prompts.question("") == given
    assert prompts.question("fever\ncough") == given + "fever cough"


def test_templates(trained):
    bos, eos, image = trained.bos_id, trained.eos_id, prompts.IMAGE_ID
    answer = trained.encode("Clear lungs.")

    plain = prompts.render_plain(trained, "Clear lungs.")
    assert plain.ids == [bos, image, *trained.encode("Clear lungs.\n")]
    assert plain.labels == [prompts.NO_LOSS] * 2 + plain.ids[2:]

    v1 = prompts.render_v1(trained, prompts.question("Cough"), "Clear lungs.")
    assert v1.ids.count(image) == 1
    assert v1.ids[0] == bos
    assert v1.ids[-len(answer) - 1 :] == v1.labels[-len(answer) - 1 :] == [*answer, eos]
    assert set(v1.labels[: -len(answer) - 1]) == {prompts.NO_LOSS}
    prompt = prompts.render_v1(trained, prompts.question("Cough"), None)
    assert prompt.ids == v1.ids[: len(prompt.ids)]
    text = [i for i in prompt.ids if i not in (bos, image)]
    expected = f"{prompts.SYSTEM} USER:  \nProvide a description of the findings in the radiology image given the"
    assert trained.decode(text) == f"{expected} following indication: Cough ASSISTANT:"

    words = trained.encode("No acute abnormality.")
    text_only = prompts.render_plain(trained, "Clear lungs.", words)
    assert text_only.ids == [bos, *words, *trained.encode("Clear lungs.\n")]
    assert text_only.labels == [prompts.NO_LOSS] * (1 + len(words)) + trained.encode("Clear lungs.\n")
    conversation = prompts.render_v1(trained, prompts.question("Cough"), "Clear lungs.", words)
    place = v1.ids.index(image)
    assert conversation.ids == v1.ids[:place] + words + v1.ids[place + 1 :]

    clip = prompts.render_clip(trained, "Clear lungs. " * 50, 16)
    assert len(clip.ids) == 16
    assert clip.ids[0] == bos
    assert clip.ids[-1] == eos


def test_trained_tokenizer_layout(trained):
    pieces = json.loads(trained.path.read_text(encoding="utf-8"))["model"]["vocab"]
    assert [pieces[piece] for piece in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")] == [0, 1, 2, 3, 258]
    assert (trained.bos_id, trained.eos_id, trained.pad_id, trained.vocab_size) == (1, 2, 0, 512)
    assert sorted(pieces.values()) == list(range(512))
    # The prompt is made of whole words: 22 in the system text and 9 in the question, and a few marks.
    assert len(prompts.render_v1(trained, prompts.question(None), None).ids) < 60


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_no_special_token_from_text(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


@pytest.mark.parametrize("text", [text for text in TEXTS if text != " "])
def test_llama_reads_special_tokens_as_text(llama, text):
    ids = llama.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert llama.decode(ids) == text


def test_special_tokens_stay_out_of_decoded_text(trained):
    ids = [1, *trained.encode("Clear lungs."), 2, 0, 0]
    assert trained.decode(ids) == "Clear lungs."


@pytest.mark.parity
def test_transformers_gives_the_same_ids(trained):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(trained.path), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for text in [findings for _, findings in ROWS] + TEXTS[:-1]:
        ids = trained.encode(text)
        assert fast.encode(text, add_special_tokens=False) == ids
        assert fast.decode(ids, clean_up_tokenization_spaces=False) == text


def test_training_is_reproducible(trained, tmp_path):
    script = (
        "import json, sys; from rad_jax import prompts; "
        "prompts.train_tokenizer([tuple(r) for r in json.load(sys.stdin)], 512, sys.argv[1])"
    )
    root = Path(prompts.__file__).parents[1]
    again = tmp_path / "again.json"
    subprocess.run([sys.executable, "-c", script, again], input=json.dumps(ROWS), text=True, check=True, cwd=root)
    assert again.read_bytes() == trained.path.read_bytes()


def test_rare_scripts_do_not_use_up_the_vocabulary(trained, tmp_path):
    strange = "".join(chr(0x4E00 + i) for i in range(3000))
    tokenizer = prompts.train_tokenizer([*ROWS, (None, strange)], 512, tmp_path / "tokenizer.json")
    # At most a quarter of the learned pieces are single characters.
    assert len(tokenizer.encode("The lungs are clear.")) <= len(trained.encode("The lungs are clear.")) + 2
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


@needs_real
@pytest.mark.parity
def test_bert_equals_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=str(BERT), do_lower_case=True)
    ours = prompts.load_tokenizer(BERT)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (101, 102, 0, 30522)
    sentences = [sentence for _, findings in real_rows() for sentence in findings.split(". ")]
    assert len(sentences) > 100
    for sentence in [*sentences, *TEXTS[:7], "Étude"]:
        assert prompts.render_clip(ours, sentence, 512).ids == theirs(sentence)["input_ids"], sentence
    long = " ".join(sentences[:60])
    assert prompts.render_clip(ours, long, 64).ids == theirs(long, truncation=True, max_length=64)["input_ids"]
    assert not {101, 102} & set(ours.encode("[CLS] [SEP]"))


def test_llama_3_begins_and_ends_a_text_in_its_own_words(trained, tmp_path):
    """Its tokenizer.json has neither <s> nor </s>, and nothing to pad with: the end pads."""
    names = {"<s>": "<|begin_of_text|>", "</s>": "<|end_of_text|>", "<pad>": "<|pad|>", "<unk>": "<|unk|>"}
    text = trained.path.read_text(encoding="utf-8")
    for ours, theirs in names.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    found = prompts.load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id, found.pad_id) == (trained.bos_id, trained.eos_id, trained.eos_id)
    assert found.vocab_size == trained.vocab_size
    question = prompts.question("Cough.")
    assert prompts.render_v1(found, question, "Clear.") == prompts.render_v1(trained, question, "Clear.")


def test_bad_tokenizers_end_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="at least 512"):
        prompts.train_tokenizer(ROWS, 300, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no text"):
        prompts.train_tokenizer([], 512, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no such tokenizer"):
        prompts.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="unknown kind"):
        prompts.load_tokenizer(tmp_path / "tokenizer.bin")
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"):
        (tmp_path / name).write_text("nothing\n")
        with pytest.raises(UserError, match=name):
            prompts.load_tokenizer(tmp_path / name)
