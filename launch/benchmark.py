"""Times ours against the usual PyTorch way, on the same machine, and prints a table.

    .venv-dev/bin/python -m launch.benchmark --suite=train_step --json=train_step.json
    .venv-dev/bin/python -m launch.benchmark --suite=weights --layers=32 --dir=/scratch --json=weights.json
    .venv-dev/bin/python -m launch.benchmark --suite=input --rounds=5 --json=input.json

suites
  train_step      one optimizer step of a small LLaVA, projector and language model trained (AdamW, clipping), float32; theirs is
                  transformers with its faster attention of sdpa and eager. Both start from the same weights, see the same batch and
                  must give the same loss at every step. Two to four minutes.
  projector_step  the same with the projector alone trained.
  decode          greedy writing at batch 1 and 8: 64 tokens after a prompt of 320; both must write the same. A minute or two.
  serve           eight requests at once, with texts as long as findings are, of a served bundle of random weights: ours is the engine of
                  rad_jax.serving; theirs is transformers' generate, the eight padded in one batch, and one after the other; then a single
                  request. At three sizes, two to four minutes; all tokens must be equal. Also seconds until the first token. With
                  --bundle a bundle of yours, and with --device=cuda on a card, in float16: there tokens may differ and are counted.
  weights         a language model of Vicuna-7B's width with random weights, as two torch files: ours is launch.convert and
                  launch.export with a LoRA adapter merged, both streaming; theirs is from_pretrained and save_pretrained, and merging
                  with peft. Every step is a process of its own. All 32 layers take about 45 GB of disk; what the next step does not
                  need is deleted.
  input           batches of films: ours from packed shards; theirs is --peer, a torch DataLoader that opens, scales, crops and normalises
                  image files and tokenises (LLaVA-Rad's way). It draws 24 films of 2,544 x 3,056 pixels, packs them with the tokenizer
                  of --tokenizer, and refuses sides that differ in a pixel or a token. Rows: `raw_films`, theirs from the films; `same_images`,
                  theirs from the stored images; `transform_only`, a decoded film to a square on one core, and `film_to_square`, the
                  same with reading and decoding the file; `packing`, ours from films to shards beside theirs reading the films once. Seconds are for 1,000 images. Then the
                  images a second that each host of a pod must feed, and whether it can. Three minutes.
  intervals       2,000 bootstrap draws over 2,461 reports: ours resamples rows of sums; theirs computes scikit-learn's F1 (eight averages)
                  and sacrebleu again for every draw, timed for a few and multiplied. A minute.
  evaluation      `intervals` and `labels` in one run; and how long all scores without weights take for 2,461 reports, and the ranks among
                  100,000 image-report pairs, with the memory that takes. Ten minutes.
  labels          14 labels of 128 reports by a BERT-base of random weights: ours in batches by length, theirs in PyTorch one report at a
                  time and 64 at a time; all logits must be equal. Some minutes.

Rows are name, ours_s, peer_s, ratio (above 1: ours is faster). In all but `weights` each side is a process that waits while
another one runs; the sides take turns, and the seconds are medians over --rounds. A row says what of their work ours does without. In
`intervals`, `labels` and `evaluation` each side runs once in this process, after what has to be compiled. In
`weights` a row has the greatest memory of each side: anonymous memory (its own, sampled) and resident memory (with mapped files).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from rad_jax import errors

_SUITE = flags.DEFINE_enum(
    "suite",
    "weights",
    ["train_step", "projector_step", "decode", "serve", "weights", "input", "intervals", "labels", "evaluation"],
    "What is timed; see above.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Runs of each side that count, in the first four suites.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores that each side may use, in the first four suites.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 2, "Layers of the model in `weights`; 32 is Vicuna-7B.", lower_bound=1)
_DIR = flags.DEFINE_string(
    "dir", "out/benchmark", "Folder for `weights` and `input` to work in; what is made there is deleted again."
)
_PEER = flags.DEFINE_string(
    "peer",
    "../shared/peer/peer_torch_input.py",
    "Program of the other side of `input`: takes a folder, prints its time as JSON.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "../shared/real/tokenizer/llama2_tokenizer.model",
    "tokenizer.model or tokenizer.json of both sides of `input`.",
)
_COMPILED = flags.DEFINE_list("compiled", [], "Files of launch.compile --json, for what a host must feed in `input`.")
_BUNDLE = flags.DEFINE_string("bundle", None, "Bundle to be served in `serve`, in place of random weights.")
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Where both sides of `serve` compute.")
_JSON = flags.DEFINE_string("json", None, "File for the rows.")


def main(_: Sequence[str]) -> None:
    from launch.benchmarks import films, host, llava, pairs, serve, weights

    if _SUITE.value == "weights":
        rows = weights.run(Path(_DIR.value) / "weights", _LAYERS.value)
        weights.table(rows)
    elif _SUITE.value == "input":
        files = Path(_DIR.value) / "input", Path(_PEER.value), Path(_TOKENIZER.value)
        rows, cpu = films.run(files[0], _ROUNDS.value, _THREADS.value, *files[1:])
        fed = host.demand(cpu, [Path(name) for name in _COMPILED.value])
        pairs.table(rows)
        host.table(fed)
        rows[0]["hosts"] = fed
    elif _SUITE.value == "serve":
        rows = serve.run(_ROUNDS.value, _THREADS.value, _DEVICE.value, Path(_BUNDLE.value) if _BUNDLE.value else None)
        pairs.table(rows)
    elif _SUITE.value in ("intervals", "labels", "evaluation"):
        from evaluation import benchmark

        rows = [row for part in benchmark.SUITES[_SUITE.value] for row in part()]
        benchmark.table(rows)
    else:
        rows = llava.run(_SUITE.value, _ROUNDS.value, _THREADS.value)
        pairs.table(rows)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    errors.run(main)
