"""Compiles the real step of a config for a TPU topology ahead of time, on any machine: what it would take, and how fast it would be.

    python -m launch.compile --config=configs/stage3.py --topology=v5e-64 --json=v5e-64.json --hlo=v5e-64.hlo
    python -m launch.compile --config=configs/stage3.py --topology=v5e-256 --slices=2
    python -m launch.compile --config=configs/stage3.py --topology=v5e-16 --generate_rows=64 --config.mesh.data=4 --config.mesh.fsdp=1 \\
        --config.mesh.tensor=4
    python -m launch.compile --config=configs/stage3.py --topology=v5e-16 --search_rows=1,2 --search_remat=full,minimal \\
        --search_mesh=1x16x1,16x1x1 --search_dtype=bfloat16,int8

No weights and no TPU are needed, only the TPU's compiler: pip install "jax[tpu]". The config is set up for the topology as configs/hardware.py
says, and --config. flags come on top: the program is that of launch.train with configs/stage3.py:v5e-64 and the same flags. With another
--config.batch_size the steps are as many fewer, and the turns as many more, unless --config.steps or --config.num_micro is given. The sizes
of v5p and v4 count cores, of which a chip has two: v5p-8 is four chips.

Memory, collectives and compiled FLOPs are the compiler's own. The time is an estimate from the cycles that the compiler writes beside
each operation; rad_jax/schedule.py says how it is made and how far such estimates have been off. Nothing here has been timed on a TPU.
FLOPs that count for utilisation are those of real tokens: --text_tokens says how many a row has on average.

The --search_ flags try every combination of what they list, at most 24, and mark those that no other beats in both memory and speed. --json
is written after each, and one that the compiler refuses says why in its row.

Exit status 3: the program does not fit into a chip's memory, or no program of a search. 1: nothing of a search could be compiled.
"""

import itertools
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
    "text_tokens", None, "Real text tokens of a row on average; without it what the config says, else all are real."
)
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_HLO = flags.DEFINE_string("hlo", None, "File for the scheduled program, from which the time can be read again.")
_SAVE = flags.DEFINE_string("save", None, "File for the serialized executable.")
_ROWS = flags.DEFINE_list("search_rows", [], "Rows per device at once to try.")
_REMAT = flags.DEFINE_list("search_remat", [], "Remat policies to try: full, attention, minimal, ...")
_MESH = flags.DEFINE_list("search_mesh", [], "Meshes to try, as data x fsdp x tensor: 1x16x1.")
_DTYPE = flags.DEFINE_list("search_dtype", [], "Types of the frozen weights to try: bfloat16, int8.")
flags.mark_flag_as_required("config")

MOST = 24  # compiles of one search


def main(_: Sequence[str]) -> int:
    from rad_jax import chips

    place = chips.find(_TOPOLOGY.value)
    set_flags = config_flags.get_override_values(flags.FLAGS["config"])
    config = fitted(_CONFIG.value, set_flags, place.name, _SLICES.value)
    if _ROWS.value or _REMAT.value or _MESH.value or _DTYPE.value:
        for flag in (_GENERATE_ROWS, _HLO, _SAVE):
            if flag.value:
                raise UserError(
                    f"--{flag.name} does not go with the --search_ flags, which try the train step: leave one of them out."
                )
        return search(place, config)
    return single(place, config)


def single(place: Any, config: Any) -> int:
    """One program: its page and its files."""
    from rad_jax import aot, sharding

    if not _GENERATE_ROWS.value:
        sharding.check_batch(config.batch_size, config.mesh.data * config.mesh.fsdp, config.num_micro)
    where = f"{_SLICES.value} slices of {place.name}" if _SLICES.value > 1 else place.name
    print(f"compiling for {where}, {place.chips * _SLICES.value} chips, which takes a minute or two ...", flush=True)
    rows, tokens = _GENERATE_ROWS.value, _MAX_NEW_TOKENS.value
    try:
        if rows:
            program = aot.compile_generation(config, place, _SLICES.value, rows, tokens)
        else:
            program = aot.compile_training(config, place, _SLICES.value)
    except aot.DoesNotFit as error:
        print(f"does not fit: {error} {aot.generation_advice(config, rows, tokens) if rows else aot.advice(config)}")
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


def fitted(config: Any, set_flags: dict[str, Any], name: str, slices: int = 1) -> Any:
    """The config set up for so many slices of a topology, with what --config. flags set on top: what launch.train trains there.

    Raises:
        UserError: the machine cannot share its batch, or is not known and the config is one for GPUs.
    """
    from configs import hardware

    if name in hardware.MACHINES:
        try:
            hardware.on(name if slices == 1 else f"{name}x{slices}", config)
        except ValueError as error:
            raise UserError(f"{error}: give another --config.batch_size.") from error
        config.update_from_flattened_dict(set_flags)
    elif any(part.get("attention") == "cudnn" for part in config.model.values() if hasattr(part, "get")):
        raise UserError(
            f"configs/hardware.py has no machine {name}: give a config for a TPU, configs/stage3.py:v5e-8 say, and --config.mesh. flags."
        )
    return config


# ----------------------------------------------------------------------------------------------------------------------- for people


def page(found: dict[str, Any]) -> str:
    """The figures of one program."""
    memory, schedule, gib = found["memory"], found["schedule"], 2**30
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    share = found["peak_hbm_bytes"] / found["hbm_bytes"]
    written = f" and up to {found['new_tokens']} written" if "new_tokens" in found else ""
    lines = [
        f"{found['chips']} chips, mesh {mesh}; {found['global_batch']} rows in {found['num_micro']} turns, {found['sequence_length']} tokens a "
        f"row{written}, of them {found['real_tokens']:.0f} real; remat {found['remat']}, frozen weights {found['frozen_dtype']}",
        f"parameters        {found['trainable_params']:,} trainable, {found['frozen_params']:,} frozen",
        f"memory per chip   {found['peak_hbm_bytes'] / gib:.2f} GiB at the peak, {share:.0%} of {found['hbm_bytes'] / gib:.2f}; arguments "
        f"{memory['arguments'] / gib:.2f}, temporaries {memory['temporaries'] / gib:.2f}",
        f"FLOPs per chip    {found['flops_compiled']:.4g} compiled, {found['flops_formula']:.4g} by formula; {found['flops_needed']:.4g} "
        "needed by real tokens",
    ]
    if "activation_bytes_per_image" in found:
        kept = found["activation_bytes_per_image"] / 2**20
        lines.append(f"activations       {kept:.2f} MiB per image, kept by the image tower for its backward pass")
    lines += [
        f"  {row['kind']:18}{row['axes']:12}{row['number']:7.0f} of {row['bytes'] / 1e9:9.3f} GB in all, {row['seconds']:.4f} s"
        for row in found["collectives"]
    ]
    lines += [
        f"time, estimated   {found['predicted_step_s']:.4f} s: products {schedule['matmul_s']:.4f}, kernels {schedule['kernels_s']:.4f}, other "
        f"{schedule['other_s']:.4f}, waiting for collectives {schedule['exposed_s']:.4f} of {schedule['transfers_s']:.4f}",
        f"per chip          {found['tokens_per_s_per_chip']:,.0f} real tokens/s",
        f"utilisation       {found['lora_mfu']:.1%} (needed FLOPs: 4 N for frozen weights; {found['lora_mfu_full_rows']:.1%} if texts filled "
        f"their rows), {found['mfu_6n']:.1%} (6 N), {found['hardware_utilization']:.1%} (computed)",
    ]
    if schedule["unknown_kernels"]:
        lines.append(f"no time is known for, and none counted of: {', '.join(schedule['unknown_kernels'])}")
    if "chip_hours" in found:
        lines.append(
            f"whole stage       {found['steps']:,} steps, {found['stage_hours']:.1f} h, {found['chip_hours']:,.0f} chip-hours; a checkpoint is "
            f"{found['checkpoint_bytes'] / 1e9:.2f} GB, {found['checkpoint_s_at_1_gb_per_s']:.1f} s at 1 GB/s"
        )
    else:
        lines.append(
            f"images            {found['images_per_s_per_chip']:.3f} a second and chip, if all texts are of full length"
        )
    return "\n".join([*lines, f"compiled in {found['compile_s']:.0f} s"])


# ----------------------------------------------------------------------------------------------------------------------- search


def search(place: Any, config: Any) -> int:
    """Compiles every combination and prints a table of them."""
    settings = combinations(config)
    from rad_jax import aot  # JAX, which takes seconds: after what a flag can be wrong about

    aot.devices(place, _SLICES.value)  # without a compiler there is nothing to try
    rows: list[dict[str, Any]] = []
    for number, setting in enumerate(settings, 1):
        tried = varied(config, setting)
        print(f"{number} of {len(settings)}: {describe(setting)} ...", flush=True)
        rows.append({"setting": setting, "num_micro": tried.num_micro, **outcome(place, tried)})
        mark(rows)
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if any("lora_mfu" in row for row in rows):
        return 0
    return 3 if any("needed_bytes" in row for row in rows) else 1


def outcome(place: Any, config: Any) -> dict[str, Any]:
    """The figures of a step, or why there are none: "needed_bytes", or the "error" of a step that cannot be compiled."""
    from rad_jax import aot

    try:
        return aot.report(aot.compile_training(config, place, _SLICES.value), _TEXT_TOKENS.value)
    except aot.DoesNotFit as error:
        return {"needed_bytes": error.needed}
    except Exception as error:  # whatever tracing or the compiler says of this one, the others are still wanted
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def combinations(config: Any) -> list[dict[str, Any]]:
    """Every setting that shares the global batch evenly, by the --search_ flags.

    Raises:
        UserError: a flag cannot be read, or there are none, or too many.
    """
    now = config.batch_size // (config.num_micro * config.mesh.data * config.mesh.fsdp)
    policy = config.model.llm.remat if "llm" in config.model else config.model.vision.remat
    current = "x".join(str(config.mesh[axis]) for axis in ("data", "fsdp", "tensor"))
    try:
        meshes = [tuple(int(n) for n in mesh.split("x")) for mesh in _MESH.value or [current]]
        sizes = [int(n) for n in _ROWS.value or [now]]
    except ValueError as error:
        raise UserError(f"--search_rows and --search_mesh take numbers, as 1,2 and 1x16x1: {error}.") from error
    if any(len(mesh) != 3 for mesh in meshes):
        raise UserError("--search_mesh takes data x fsdp x tensor, as 1x16x1.")
    options = itertools.product(meshes, _REMAT.value or [policy], _DTYPE.value or [config.frozen_dtype], sizes)
    found = [
        {"mesh": mesh, "remat": remat, "frozen_dtype": dtype, "rows": rows}
        for mesh, remat, dtype, rows in options
        if config.batch_size % (mesh[0] * mesh[1] * rows) == 0
    ]
    if not 0 < len(found) <= MOST:
        raise UserError(
            f"{len(found)} combinations share {config.batch_size} rows evenly, and a search takes 1 to {MOST}: list fewer or other values."
        )
    return found


def varied(config: Any, setting: dict[str, Any]) -> Any:
    """The config with a setting; the global batch stays."""
    tried = config.copy_and_resolve_references()
    data, fsdp, tensor = setting["mesh"]
    tried.mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    tried.num_micro = config.batch_size // (data * fsdp * setting["rows"])
    tried.frozen_dtype = setting["frozen_dtype"]
    for part in ("llm",) if "llm" in tried.model else ("vision", "text"):
        tried.model[part].remat = setting["remat"]
    return tried


def mark(rows: list[dict[str, Any]]) -> None:
    """Sets `best` where no other row is as good in both memory and speed, and better in one."""
    fitting = [row for row in rows if "lora_mfu" in row]
    for row in rows:
        here = row.get("peak_hbm_bytes", 0), -row.get("tokens_per_s_per_chip", 0)
        beaten = any(
            there != here and there[0] <= here[0] and there[1] <= here[1]
            for there in ((other["peak_hbm_bytes"], -other["tokens_per_s_per_chip"]) for other in fitting)
        )
        row["best"] = row in fitting and not beaten


def describe(setting: dict[str, Any]) -> str:
    mesh = "x".join(str(n) for n in setting["mesh"])
    return f"{mesh:10}{setting['remat']:10}{setting['frozen_dtype']:10}{setting['rows']:4}"


def table(rows: list[dict[str, Any]]) -> str:
    """A line per combination; a star where none is both smaller and faster."""
    lines = [f"  {'mesh':10}{'remat':10}{'frozen':10}{'rows':>4}{'GiB':>9}{'step s':>9}{'tokens/s':>10}{'MFU 4N':>8}"]
    for row in rows:
        start = f"{'*' if row['best'] else ' '} {describe(row['setting'])}"
        if "error" in row:
            lines.append(f"{start}  cannot be compiled: {row['error']}")
            continue
        if "lora_mfu" not in row:
            lines.append(f"{start}{row['needed_bytes'] / 2**30:9.2f}  does not fit")
            continue
        lines.append(
            f"{start}{row['peak_hbm_bytes'] / 2**30:9.2f}{row['predicted_step_s']:9.3f}{row['tokens_per_s_per_chip']:10,.0f}{row['lora_mfu']:8.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    errors.run(main)
