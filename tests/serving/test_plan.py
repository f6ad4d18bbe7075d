"""The memory plan counts what will be there, and says no before anything is loaded."""

import dataclasses
import io
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from rad_jax.errors import UserError
from rad_jax.serving import films, limits
from rad_jax.serving import plan as plans
from rad_jax.serving.bundle import Bundle, Decoder, Tower, read
from rad_jax.serving.filling import expected
from rad_jax.serving.plan import CARDS, GIB, Card, check_build, plan

VICUNA = Decoder(32064, 4096, 32, 32, 32, 11008, 1e-5, 1e4, None, 4096, False)
BIOMEDCLIP = Tower("dinov2", 518, 14, 768, 11, 12, 3072, 1e-6, "gelu", (0.5,) * 3, (0.5,) * 3)


def shapes_of(decoder, tower):
    """Shapes of the tensors of a bundle that has no weights on this disk."""
    d, t = decoder, tower
    ends = {
        "embed_tokens.weight": (d.vocab_size, d.width),
        "lm_head.weight": (d.vocab_size, d.width),
        "model.norm.weight": (d.width,),
        "gate_proj.weight": (d.mlp_dim, d.width),
        "up_proj.weight": (d.mlp_dim, d.width),
        "down_proj.weight": (d.width, d.mlp_dim),
        "linear_1.weight": (d.width, t.width),
        "linear_2.weight": (d.width, d.width),
        "linear_1.bias": (d.width,),
        "linear_2.bias": (d.width,),
        "position_embeddings": (1, t.patches + 1, t.width),
        "projection.weight": (t.width, 3, t.patch_size, t.patch_size),
        "fc1.weight": (t.mlp_dim, t.width),
        "fc2.weight": (t.width, t.mlp_dim),
        "fc1.bias": (t.mlp_dim,),
        "query.weight": (t.width, t.width),
        "key.weight": (t.width, t.width),
        "value.weight": (t.width, t.width),
        "dense.weight": (t.width, t.width),
    }
    kv = (d.kv_heads * d.head_dim, d.width)
    ends |= {f"{p}_proj.weight": kv if p in "kv" else (d.width, d.width) for p in "qkvo"}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")

    def shape(name):
        found = [size for end, size in ends.items() if name.endswith(end)]
        return found[0] if found else (d.width,) if name.endswith(norms) else (t.width,)

    return {name: shape(name) for name in expected(decoder, tower)}


@pytest.fixture
def real(monkeypatch):
    """LLaVA-Rad's shapes, without its weights."""
    monkeypatch.setattr(Bundle, "shapes", lambda self: shapes_of(self.decoder, self.tower))
    return Bundle(Path("llava-rad"), "", "float16", VICUNA, BIOMEDCLIP, frozenset([2]), (), ())


def test_a_7b_on_the_cards_of_a_hospital(real):
    small, large = (plan(real, CARDS[name], "float16") for name in ("V100-16GB", "V100-32GB"))
    decoder = 6_738_415_616 + 2 * 64 * 4096  # Vicuna's parameters, and 64 rows more in embedding and head
    tower = 11 * (12 * 768**2 + 15 * 768) + 768 * (3 * 14 * 14 + 1) + 1370 * 768 + 768
    projector = 768 * 4096 + 4096 + 4096**2 + 4096
    assert small.weight_bytes == large.weight_bytes == 2 * (decoder + tower + projector)
    assert small.slot_bytes == 2**20 // 2 * 2048
    assert 14.2 * GIB < small.batch_1 < 14.8 * GIB and small.slots == 2
    assert large.slots == plans.MOST_SLOTS["cuda"] and large.total < CARDS["V100-32GB"].free
    assert (
        small.text().startswith("memory plan, V100-16GB, float16: needs 14.")
        and "of 15.8 GiB at batch 1" in small.text()
    )


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_smaller_weights_fit_where_float16_does_not(weights, real):
    # In 8 bits the 7B needs all of a card of 8 GB, so that a row and CUDA have no room on it.
    card = CARDS["RTX-2080"] if weights == "nf4" else Card("a card of 10 GB", "cuda", int(9.7 * GIB))
    with pytest.raises(UserError, match=r"needs 14\.\d GiB for a single row in float16, but .* --weights=int8"):
        plan(real, card, "float16")
    found = plan(real, card, "float16", weights)
    assert found.slots >= 1 and found.total <= card.free


def test_what_graphs_and_a_newer_card_take_beside(real):
    """Of NF4's rows on the way there are two sets on a card, one in the pool of its graphs, and none on a card for the others."""
    old, new = (Card("a card", "cuda", 80 * GIB, capability) for capability in ((8, 9), (9, 0)))
    for weights, rows in ((None, 0), ("int8", 0), ("nf4", 2048 * 11008 * (2 + 2))):
        before, after = (plan(real, card, "float16", weights, slots=1) for card in (old, new))
        assert after.total - before.total == 4 * 32 * 2**20
        whole = 0 if weights is None else 2 * 11008 * 4096 * 2
        assert before.scratch_bytes == after.scratch_bytes == whole + 2 * rows
        assert plan(real, Card("a CPU", "cpu", 80 * GIB), "float16", weights, slots=1).scratch_bytes == whole + rows


def test_too_many_slots_are_refused_with_the_number_that_fits(real):
    with pytest.raises(UserError, match=r"4 slots .* use --slots=2"):
        plan(real, CARDS["V100-16GB"], "float16", slots=4)
    assert plan(real, CARDS["V100-32GB"], "float16", slots=4).slots == 4


class Alive(TorchDispatchMode):
    """`peak` is the most bytes that tensors made within it held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.held:
                self.held[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.held.values()))
        return made


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_that_keeps_a_square_is_counted(dtype, real):
    """Of a decoder with fewer heads of keys, where no other kernel is to be had; the count is that of PyTorch's own steps."""
    fewer = dataclasses.replace(VICUNA, heads=8, kv_heads=2, width=128)
    q, *kv = (torch.zeros(1, heads, 256, 16, dtype=getattr(torch, dtype)) for heads in (8, 2, 2))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Alive() as alive:
        torch.nn.functional.scaled_dot_product_attention(q, *kv, is_causal=True, enable_gqa=True)
    assert alive.peak <= plans.square_bytes(fewer, 256) < 1.2 * alive.peak
    with torch.no_grad(), Alive() as alive:  # a CPU has a kernel without
        torch.nn.functional.scaled_dot_product_attention(q, *kv, is_causal=True, enable_gqa=True)
    assert alive.peak < 256 * 256 * 4

    grouped = dataclasses.replace(real, decoder=dataclasses.replace(VICUNA, kv_heads=8))
    cards = [Card("a card", "cuda", 80 * GIB, capability) for capability in ((7, 0), (7, 5), (8, 0))]
    needed = [[plan(bundle, card, dtype).temporary_bytes for card in cards] for bundle in (real, grouped)]
    more = [with_square > without + GIB // 2 for without, with_square in zip(*needed, strict=True)]
    assert more == [True, True, dtype == "float32"]
    assert not plans.keeps_squares(Card("a CPU", "cpu", GIB), grouped.decoder, dtype)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_counted_weights_are_those_in_memory(kind, weights, bundle):
    import torch

    from rad_jax.serving.filling import fill
    from rad_jax.serving.weights import Dense, Int8

    found = read(bundle(kind)[1])
    loaded = fill(found, torch.float32, "cpu", weights, lambda _: None)
    tensors = [loaded.embedding, loaded.norm, loaded.head, *loaded.vision.values()]
    for layer in loaded.layers:
        for part in layer:
            stored = (
                [part] if isinstance(part, torch.Tensor) else [v for v in vars(part).values() if torch.is_tensor(v)]
            )
            tensors += stored[:1] if isinstance(part, Dense) else stored
            assert isinstance(part, torch.Tensor | Dense | Int8)
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # What the plan counts and the engine leaves out: the mask token and the last norm.
    unused = 4 * 24 * (3 if kind == "dinov2" else 2)
    assert plans.weight_bytes(found, weights, 4) == bytes_ + unused


def test_a_cpu_also_holds_decoders_and_uploads(real):
    card = Card("a CPU", "cpu", 64 * GIB)
    found = plan(real, card, "bfloat16")
    assert found.decoder_bytes == 2 * 776 * 2**20 and found.body_bytes == 2 * limits.BODIES
    engine = found.weight_bytes + found.slot_bytes + found.temporary_bytes + found.allowance
    assert found.batch_1 == engine + found.decoder_bytes + found.body_bytes < 24 * 10**9
    assert "1.52 GiB  2 processes that decode films" in found.text() and "0.75 GiB  uploads" in found.text()
    with pytest.raises(UserError, match="a single row"):
        plan(real, dataclasses.replace(card, free=engine), "bfloat16")
    assert plan(real, CARDS["V100-32GB"], "float16").decoder_bytes == 0  # the host's memory


def square_dicom(side):
    """Noise of 12 bits in 16."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    dataset.Rows = dataset.Columns = side
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = np.random.default_rng(0).integers(0, 4096, (side, side), np.uint16).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_a_decoder_is_no_larger_than_the_plan_says():
    """Its peak grows with the pixels: here on a sixth of the largest film that an upload holds uncompressed. It is ended first, too."""
    reader, side = films.Films(1), 2000
    worker = reader._idle.get()
    reader._idle.put(worker)
    reader._ask(square_dicom(side), "deep", "window")
    process = Path(f"/proc/{worker.start().pid}")
    peak = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    idle = 89 * 2**20
    most = idle + (plans.DECODER_BYTES - idle) * side**2 / (limits.BODY / 2)
    assert peak is not None and idle / 2 < int(peak[1]) * 1024 < 1.15 * most
    assert (process / "oom_score_adj").read_text().strip() == "1000"
    reader.close()


@pytest.mark.parametrize(("others", "context"), [(0, 0.25), (8, 0.3)])
def test_the_context_of_a_card_is_counted_once(monkeypatch, others, context, real):
    """Free memory is asked for when the context is there: it has left the free bytes, and must leave the allowance."""
    total = CARDS["V100-32GB"].free
    free = total - int((0.25 + others) * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    card = plans.this_gpu()
    assert card.free == free and card.context == int(context * GIB)
    assert plan(real, card, "float16").allowance == plans.ALLOWANCE["cuda"] - card.context


def test_a_build_without_code_for_the_card_is_refused_with_one_that_has_it():
    pypi = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    advised = rf"pip install torch=={re.escape(plans.VOLTA_TORCH)} --index-url {plans.VOLTA_INDEX}"
    with pytest.raises(UserError, match=rf"no code for Tesla V100 \(sm_70; it has sm_75, .*\): {advised}"):
        check_build("Tesla V100", (7, 0), pypi, "2.14.1")
    check_build("Tesla V100", (7, 0), ["sm_50", "sm_60", "sm_70", "sm_75"], "2.14.1+cu126")
    check_build("L4", (8, 9), pypi, "2.14.1")  # sm_86 runs there
    check_build("newer", (12, 1), [*pypi, "compute_120"], "2.14.1")
    with pytest.raises(UserError, match="a build of PyTorch that has sm_61"):
        check_build("P40", (6, 1), pypi, "2.14.1")


def test_one_torch_for_volta_everywhere():
    """The lock's release, or installing the lock would take away what was advised; 2.14 is the last release of that index with sm_70."""
    root = Path(__file__).resolve().parents[2]
    locked = re.search(r"^torch==(.+)$", (root / "requirements-serve.txt").read_text(), re.MULTILINE)
    assert (
        locked is not None
        and f"{locked[1]}+cu126" == plans.VOLTA_TORCH
        and tuple(map(int, locked[1].split("."))) < (2, 15)
    )
    line = f"install torch=={plans.VOLTA_TORCH} --index-url {plans.VOLTA_INDEX}"
    for name in ("requirements-serve.txt", "README.md", "launch/serving_host/README.md"):
        text = (root / name).read_text(encoding="utf-8")
        assert line in text and set(re.findall(r"install torch==(\S+)", text)) == {plans.VOLTA_TORCH}, name
    image = (root / "launch/serving_host/Dockerfile").read_text(encoding="utf-8")
    assert f"--build-arg=TORCH_INDEX={plans.VOLTA_INDEX}" in image and "ARG TORCH_INDEX=\n" in image
    given = re.search(r'if \[ -n "\$TORCH_INDEX" \]; then(.*?)fi &&(.*)', image, re.DOTALL)
    assert given is not None and '--index-url="$TORCH_INDEX" "$(grep ^torch== requirements-serve.txt)"' in given[1]
    assert "-r requirements-serve.txt" in given[2]  # after it


def test_this_machine_has_memory():
    card = plans.this_cpu()
    assert card.kind == "cpu" and GIB // 8 < card.free < 2**50
