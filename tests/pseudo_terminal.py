"""A command on a pseudo-terminal of its own."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path


class Terminal:
    """A Python script on a pseudo-terminal, and what it shows there, without colours and cursor moves.

    `home` is its EDGE_SPEC_HOME. POSIX only.
    """

    def __init__(self, script: str, home: Path) -> None:
        import termios

        self._leader, follower = os.openpty()
        termios.tcsetwinsize(follower, (24, 120))
        take_terminal = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", take_terminal + textwrap.dedent(script)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "EDGE_SPEC_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(follower)
        self.shown = ""

    def expect(self, text: str) -> str:
        """Read on until `text` shows; what was shown up to it."""
        deadline = time.monotonic() + 20
        while text not in self.shown:
            ready, _, _ = select.select([self._leader], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come after {self.shown!r}"
            raw = os.read(self._leader, 65536).decode(errors="replace")
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r", "", raw)
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._leader, keys.encode())

    def wait(self) -> int:
        """Wait for the script's end, and give its exit code."""
        return self._process.wait(timeout=20)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._leader)
