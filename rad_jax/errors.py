"""Errors a user can cause, and how a command ends on one: one clear sentence on stderr and exit status 2."""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rad_jax import FORMAT_VERSION

_OWN = ("rad_jax", "configs", "launch", "data", "evaluation")
_PACKAGES = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "tensorflow_datasets": "tensorflow-datasets",
}  # where the names differ


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
    """Runs an absl main; a `UserError`, unusable flags, a missing library or a failing disk end in one sentence and exit status 2.

    One of several processes of a job ends without waiting for the others, see `distributed.end`.

    Args:
        main: gets argv, the command's name first.
        positional: whether the command takes arguments beside its flags.
    """
    from absl import app, flags, logging

    from rad_jax import distributed

    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it moves

    def parse(argv: Sequence[str]) -> Sequence[str]:
        try:
            return flags.FLAGS(argv)
        except SystemExit:  # --help has printed its text, and absl would exit with 1
            sys.exit(0)
        except Exception as error:  # besides absl's own, whatever the file named in --config raises
            fail(describe_flag_error(error))

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            if len(argv) > 1 and not positional:
                raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value (see --help).")
            return main(argv)
        except UserError as error:
            fail(str(error))
        except (Exception, KeyboardInterrupt) as error:
            message = describe_missing_library(error) or describe_disk_error(error)
            if message is None:
                distributed.end(error)
                raise
            fail(message)

    app.run(guarded, flags_parser=parse)


def fail(message: str) -> NoReturn:
    """Ends the command with one line on stderr and exit status 2, and makes the file that $RAD_REFUSED names, if it names one."""
    from rad_jax import distributed

    if refused := os.environ.get("RAD_REFUSED"):
        Path(refused).touch()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    distributed.leave(2)
    sys.exit(2)


def describe_flag_error(error: Exception) -> str:
    """One sentence for flags that cannot be used, or a file in --config that cannot."""
    from absl import flags

    # The traceback that ml_collections puts into its message ends with what the config file had to say.
    text = str(error).strip().splitlines()[-1].strip(" \"'")
    if match := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{match[1]} is missing: give it (see --help)."
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"--{error.flagname} is unknown: see --help, and the config file for what --config. can set."
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, flags.Error):
        return re.sub(r"^\w+Error: ", "", text)
    return f"the config cannot be used ({type(error).__name__}: {text}): mend the file in --config or its settings."


def describe_missing_library(error: BaseException) -> str | None:
    """One sentence for a library that is not installed; None for other errors, and for a module of our own."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    name = error.name.partition(".")[0]
    if name in _OWN:
        return None
    package = _PACKAGES.get(name, name)
    return f"the library {name} is not installed and is needed for this: `pip install {package}`, or use .venv-dev (`make .venv-dev`)."


def describe_disk_error(error: BaseException) -> str | None:
    """One sentence for a failed file operation, which may hide behind another library's exception; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return describe_os_error(seen)
        if os.strerror(errno.ENOSPC) in str(seen):  # tensorstore raises ValueError, orbax its own
            return describe_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        seen = seen.__cause__ or seen.__context__
    return None


def describe_os_error(error: OSError) -> str:
    """One sentence for a failed file operation."""
    if error.errno is None:  # ml_collections raises its own over a config file that is missing
        text = str(error).strip().splitlines()[-1]
        if not (match := re.search(r"\[Errno (\d+)\] (.+): '(.+)'", text)):
            return text
        error = OSError(int(match[1]), match[2], match[3])
    where = error.filename or "writing failed"
    advice = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again.",
        errno.EDQUOT: "the disk quota is used up: free some space and run the same command again.",
        errno.EACCES: "permission denied: choose a folder you may write to.",
        errno.EROFS: "the file system is read-only: choose another folder.",
        errno.ENOENT: "no such file or folder: check the path.",
        errno.EEXIST: "this is a file, not a folder: choose another path.",
        errno.ENOTDIR: "a part of this path is a file, not a folder: check the path.",
    }
    return f"{where}: {advice.get(error.errno or 0, error.strerror)}"
