"""`python -m rad_jax.serving BUNDLE`: what `launch.serve` does, from the wheel, with requirements-serve.txt and without jax."""

import argparse
import sys
from collections.abc import Sequence

from rad_jax.errors import UserError, describe_disk_error, describe_missing_library
from rad_jax.serving import command


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; one sentence on stderr and 2 where the user can mend it."""
    parser = argparse.ArgumentParser(
        prog="python -m rad_jax.serving",
        description=command.HELP.format(command="python -m rad_jax.serving"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE")
    parser.add_argument("--batch", nargs=2, metavar=("IN.csv", "OUT.jsonl"), help="Write findings for a list of films.")
    for name, kind, default, text, choices in command.OPTIONS:
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown, choices=choices)
    given = vars(parser.parse_args(arguments))
    batch = given.pop("batch")
    try:
        return command.run(given.pop("bundle"), given, (batch[0], batch[1]) if batch else None)
    except Exception as error:
        message = (
            str(error)
            if isinstance(error, UserError)
            else describe_missing_library(error) or describe_disk_error(error)
        )
        if message is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
