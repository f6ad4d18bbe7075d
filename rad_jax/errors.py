"""Errors a user can cause, and how a command ends on one: one clear sentence on stderr and exit status 2."""

import errno
import sys
from collections.abc import Callable, Sequence

from rad_jax import FORMAT_VERSION


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do."""


def check_format(found: object, where: object) -> None:
    """Refuses a corpus, checkpoint or bundle that another format version wrote.

    Raises:
        UserError: `found` is not this version's `FORMAT_VERSION`.
    """
    if found != FORMAT_VERSION:
        raise UserError(
            f"{where} has format_version {found!r} but this rad_jax reads version {FORMAT_VERSION}: "
            "make it again with this version, or use the rad_jax that wrote it."
        )


def run(main: Callable[[Sequence[str]], int | None], positional: bool = False) -> None:
    """Runs an absl main; a `UserError` or a failing disk ends in one sentence and exit status 2.

    Args:
        main: gets argv, the command's name first.
        positional: whether the command takes arguments beside its flags.
    """
    from absl import app, logging

    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it moves

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            if len(argv) > 1 and not positional:
                raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value (see --help).")
            return main(argv)
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = describe_os_error(error)
        print(f"error: {message}", file=sys.stderr)
        return 2

    app.run(guarded)


def describe_os_error(error: OSError) -> str:
    """One sentence for a failed file operation."""
    where = error.filename or "a file"
    advice = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again; finished steps are kept.",
        errno.EDQUOT: "the disk quota is used up: free some space and run the same command again.",
        errno.EACCES: "permission denied: choose a folder you may write to.",
        errno.EROFS: "the file system is read-only: choose another folder.",
        errno.ENOENT: "no such file or folder: check the path.",
        errno.ENOTDIR: "a part of this path is a file, not a folder: check the path.",
    }
    return f"{where}: {advice.get(error.errno or 0, error.strerror or str(error))}"
