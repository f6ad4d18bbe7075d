"""Compiles the real step of a config for a TPU topology ahead of time, on any machine, and says what it would take and how fast it would be.

    python -m launch.compile --config=configs/stage3.py --topology=v5e-64 --json=v5e-64.json --hlo=v5e-64.hlo
    python -m launch.compile --config=configs/stage3.py --topology=v5e-256 --slices=4 --config.batch_size=1024
    python -m launch.compile --config=configs/stage3.py --topology=v5e-8 --generate_rows=64 --max_new_tokens=256

No weights and no TPU are needed, only TPU's compiler: pip install "jax[tpu]". The config is set up for the topology as configs/hardware.py says,
and --config. flags come after that. Sizes after "v5p-" and "v4-" count cores, of which a chip has two.

Memory, collectives and compiled FLOPs are the compiler's own. The step's time is an estimate, from the cycles that the compiler writes
beside each operation (rad_jax/schedule.py says how, and how far such estimates have been off); nothing here has been timed on a TPU.

Exit status 3: the program does not fit into a chip's memory.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from rad_jax import errors
from rad_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, as configs/FILE.py or configs/FILE.py:VARIANT.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Machine: v5e-64, v5p-8, ...", required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "So many of them, joined by the data centre's network.", lower_bound=1)
_GENERATE_ROWS = flags.DEFINE_integer(
    "generate_rows", None, "Instead of the train step, generation for so many images at once.", lower_bound=1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest generated text.", lower_bound=1)
_TEXT_TOKENS = flags.DEFINE_float(
    "text_tokens", None, "Real text tokens of a row on average; all of them if not given."
)
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_HLO = flags.DEFINE_string("hlo", None, "File for the scheduled program, from which the time can be read again.")
_SAVE = flags.DEFINE_string("save", None, "File for the serialized executable.")
flags.mark_flag_as_required("config")


def main(_: Sequence[str]) -> int:
    from rad_jax import aot, chips

    place = chips.find(_TOPOLOGY.value)
    config = fitted()
    print(f"compiling for {_SLICES.value} x {place.name} ({place.chips} chips each) ...", flush=True)
    try:
        if _GENERATE_ROWS.value:
            rows, tokens = _GENERATE_ROWS.value, _MAX_NEW_TOKENS.value
            program = aot.compile_generation(config, place, _SLICES.value, rows, tokens)
        else:
            program = aot.compile_training(config, place, _SLICES.value)
    except aot.DoesNotFit as error:
        print(f"does not fit: {error} {aot.advice(config)}")
        return 3
    if _HLO.value:
        Path(_HLO.value).write_text(program.text)
    if _SAVE.value:
        aot.save(program, Path(_SAVE.value))
    found = aot.report(program, _TEXT_TOKENS.value)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")
    print(page(found))
    return 0


def fitted() -> Any:
    """The config set up for the topology, with what --config. flags say on top.

    Raises:
        UserError: the machine cannot share its batch.
    """
    from configs import hardware

    config = _CONFIG.value
    if _TOPOLOGY.value not in hardware.MACHINES:
        return config
    try:
        hardware.on(_TOPOLOGY.value, config)
    except ValueError as error:
        raise UserError(f"{error}: give another --config.batch_size.") from error
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
    return config


def page(found: dict[str, Any]) -> str:
    """The figures for people."""
    return json.dumps(found, indent=1)


if __name__ == "__main__":
    errors.run(main)
