"""The command of --rollout-reload, which makes a server load new weights."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path


def run_command(command: str, folder: Path, limit: float) -> None:
    """Run --rollout-reload for a folder of new weights. OSError: it fails, or takes over `limit` s.

    The command gets the folder as {folder} in an argument, and as PLUMB_FOLDER. It may leave a
    daemon behind: its output goes to a file, so nobody waits for the daemon to close it.
    """
    words = [word.replace("{folder}", str(folder)) for word in reload_words(command)]
    environment = {**os.environ, "PLUMB_FOLDER": str(folder)}
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise OSError(
                f"--rollout-reload: {command} did not end within {limit:g} s: let it start "
                "what goes on in the background, or raise --rollout-timeout"
            ) from None
        except OSError as error:
            raise OSError(f"--rollout-reload: {command} did not run: {error}") from None
        if code:
            output.seek(0)
            reason = output.read().decode(errors="replace")[-500:]
            raise OSError(f"--rollout-reload: {command} failed ({code}): {reason}")


def reload_words(command: str) -> list[str]:
    """Return the words of --rollout-reload.

    ValueError: its quotes do not match, or {folder} stands in a program that is given as text,
    where characters of a path would run as code.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--rollout-reload {command}: {error}") from None
    for before, word in zip(words, words[1:]):
        if re.fullmatch(r"-\w*c", before) and "{folder}" in word:
            raise ValueError(
                f"--rollout-reload {command}: {{folder}} stands inside a program: read the "
                "environment's PLUMB_FOLDER there, or pass {folder} as an argument behind it"
            )
    return words
