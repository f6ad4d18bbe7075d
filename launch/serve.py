from collections.abc import Sequence

from absl import flags

from rad_jax import errors
from rad_jax.errors import UserError
from rad_jax.serving import command

__doc__ = command.HELP.format(command="python -m launch.serve")

flags.DEFINE_string(
    "batch", None, "CSV of films to write findings for; the file to write follows: --batch IN.csv OUT.jsonl."
)
for _name, _kind, _default, _help, _choices in command.OPTIONS:
    if _choices:
        flags.DEFINE_enum(_name, _default, _choices, _help)
    elif _kind is int:
        flags.DEFINE_integer(_name, _default, _help)
    else:
        flags.DEFINE_string(_name, _default, _help)


def main(argv: Sequence[str]) -> int:
    given = {option.name: flags.FLAGS[option.name].value for option in command.OPTIONS}
    places, source = list(argv[1:]), flags.FLAGS.batch
    batch = None
    if source is not None:
        if len(places) != 2:
            raise UserError("--batch takes a list and the file to write: BUNDLE --batch IN.csv OUT.jsonl.")
        batch = source, places.pop()
    if len(places) > 1:
        raise UserError(f"unexpected argument {places[1]!r}: give one bundle (see --help).")
    return command.run(places[0] if places else None, given, batch)


if __name__ == "__main__":
    errors.run(main, positional=True)
