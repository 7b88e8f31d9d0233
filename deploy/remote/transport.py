"""How a device is reached: commands run there and files sent there, by programs that the user has: ssh and adb.

`open_device` gives the `Device` of a place; this machine is one too. Programs are called with lists of arguments; what
a shell on the device will read is quoted. No password is asked for, held or passed on: keys and the agent alone.
Knows nothing of bundles.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from compress import processes
from compress.errors import EdgestillError, TargetError
from compress.scratch import scratch
from deploy.remote.places import Place

SSH_OPTIONS = (
    "BatchMode=yes",  # never asks: neither for a password nor for an unknown host
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
)
_UNREACHED = 255  # ssh's own exit code
_ADB_LOST = re.compile(r"(?:adb|error): .*(?:device '.*' not found|device offline|unauthorized|no devices|connect)")


@dataclass(frozen=True)
class Finished:
    """A command that ran on a device."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line of its errors, in which programs say what went wrong."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.returncode}"


class Device(Protocol):
    """A machine on which commands run."""

    where: str  # as the user wrote it

    def run(self, arguments: Sequence[str], *, timeout: float) -> Finished:
        """Run a command and wait; its standard input stays open until it ends, and closes when this process dies."""

    def send(self, source: Path, target: str, *, offset: int = 0) -> None:
        """Put the bytes of ``source`` from ``offset`` on at the end of ``target``, which has ``offset`` bytes.

        Folders are made. A broken copy leaves a beginning of the file. Raises EdgestillError when it breaks.
        """

    def folder(self, name: str) -> str:
        """Where a bundle called ``name`` is kept when the user says nothing."""


def open_device(place: Place, *, ssh_config: Path | None = None) -> Device:
    """Return the device of ``place``; nothing is connected yet.

    Raises:
        TargetError: the program that reaches it is not installed.
    """
    if place.kind == "ssh":
        return Ssh(place, config=ssh_config)
    return Adb(place) if place.kind == "adb" else Local()


GO_ON = "The same command goes on with what has arrived"


def call(
    command: Sequence[str],
    *,
    timeout: float,
    stdin: IO[bytes] | None = None,
    do: str = "Use fewer repeats or tokens",
) -> Finished:
    """Run a program of this machine; without ``stdin`` its standard input is a pipe that stays open until it ends.

    It ends with this process, whatever ends that.

    Raises:
        EdgestillError: it is not done after ``timeout`` seconds.
    """
    try:
        with processes.held_input() as held:
            done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
                processes.tied(command),
                stdin=held if stdin is None else stdin,
                capture_output=True,
                timeout=timeout,
                check=False,
                env=processes.environment(),
            )
    except subprocess.TimeoutExpired as error:
        raise EdgestillError(command[0], f"not done after {timeout:g} s", do=do) from error
    return Finished(done.returncode, *(out.decode("utf-8", "replace") for out in (done.stdout, done.stderr)))


def words(arguments: Sequence[str]) -> str:
    """``arguments`` as one line for the device's shell; a leading ``~/`` means the home there."""
    return " ".join(f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word) for word in arguments)


def found_program(name: str, do: str) -> str:
    """The path of a program of this machine; TargetError with ``do`` when there is none."""
    path = shutil.which(name)
    if path is None:
        raise TargetError("--on", f"the program {name} is not installed", do=do)
    return path


class Local:
    """This machine."""

    where = "local"

    def run(self, arguments: Sequence[str], *, timeout: float) -> Finished:
        """See `Device`."""
        return call(arguments, timeout=timeout)

    def send(self, source: Path, target: str, *, offset: int = 0) -> None:
        """See `Device`."""
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as data, Path(target).open("ab" if offset else "wb") as out:
            data.seek(offset)
            shutil.copyfileobj(data, out)

    def folder(self, name: str) -> str:
        """See `Device`."""
        return str(Path.home() / ".cache" / "edgestill" / name)


class Ssh:
    """A machine that OpenSSH's client reaches, with the user's own configuration, keys and known hosts."""

    def __init__(self, place: Place, *, config: Path | None = None) -> None:
        self.place, self.where = place, place.text
        program = found_program("ssh", "Install it with: apt-get install openssh-client")
        self.command = [program, *([] if config is None else ["-F", str(config)]), "-T"]
        for option in SSH_OPTIONS:
            self.command += ["-o", option]
        if place.port is not None:
            self.command += ["-p", str(place.port)]
        self.target = f"{place.user}@{place.host}" if place.user else place.host

    def run(self, arguments: Sequence[str], *, timeout: float) -> Finished:
        """See `Device`. Raises TargetError when the device cannot be reached."""
        return self._reached(call([*self.command, "--", self.target, words(arguments)], timeout=timeout))

    def send(self, source: Path, target: str, *, offset: int = 0) -> None:
        """See `Device`. Any POSIX shell does; no SFTP server is needed."""
        folder = target.rpartition("/")[0]
        line = f"mkdir -p {words([folder])} && cat {'>>' if offset else '>'} {words([target])}"
        with source.open("rb") as data:
            data.seek(offset)
            os.lseek(data.fileno(), offset, os.SEEK_SET)  # the child reads the descriptor, not Python's buffer
            command = [*self.command, "--", self.target, line]
            done = self._reached(call(command, timeout=_time(source), stdin=data, do=GO_ON))
        _sent(self.where, source, done)

    def folder(self, name: str) -> str:
        """See `Device`."""
        return f"~/.cache/edgestill/{name}"

    def _reached(self, done: Finished) -> Finished:
        if done.returncode != _UNREACHED:
            return done
        said, port = done.stderr, "" if self.place.port is None else f"-p {self.place.port} "
        by_hand = f"ssh {port}{self.target}"
        if "IDENTIFICATION HAS CHANGED" in said:
            got = "the device's host key is not the one that is known: another machine, or someone in between"
            do = f"Find out why before anything else; then ssh-keygen -R {self.place.host}, and {by_hand}"
        elif "Host key verification failed" in said:
            got = "the device's host key is not known here"
            do = f"Connect once by hand and compare the fingerprint with the device's: {by_hand}"
        elif "Permission denied" in said:
            got = f"the device lets no key of yours in ({done.last_line})"
            do = f"Only keys are used, passwords never: ssh-copy-id {port}{self.target}, or ssh-add for a key with one"
        else:
            got, do = f"cannot be reached ({done.last_line})", f"See whether this works: {by_hand}"
        raise TargetError(self.where, got, do=do)


class Adb:
    """An Android device that the Android Debug Bridge reaches."""

    def __init__(self, place: Place) -> None:
        do = "Install Android's platform-tools: apt-get install adb, or developer.android.com/tools/releases"
        self.where = place.text
        self.command = [found_program("adb", do), "-s", place.serial]

    def run(self, arguments: Sequence[str], *, timeout: float) -> Finished:
        """See `Device`. Raises TargetError when the device cannot be reached."""
        return self._reached(call([*self.command, "shell", words(arguments)], timeout=timeout))

    def send(self, source: Path, target: str, *, offset: int = 0) -> None:
        """See `Device`. ``adb push`` starts anew each time, so the rest goes as a file of its own and is put on."""
        self.run(["mkdir", "-p", target.rpartition("/")[0]], timeout=60)
        if not offset:
            _sent(self.where, source, self._push(source, target))
            return
        with scratch() as temporary:
            rest = temporary / "rest"
            with source.open("rb") as data, rest.open("wb") as out:
                data.seek(offset)
                shutil.copyfileobj(data, out)
            _sent(self.where, source, self._push(rest, f"{target}.rest"))
        put_on = f"cat {words([target + '.rest'])} >> {words([target])} && rm {words([target + '.rest'])}"
        done = call([*self.command, "shell", put_on], timeout=_time(source), do=GO_ON)
        _sent(self.where, source, self._reached(done))

    def folder(self, name: str) -> str:
        """See `Device`."""
        return f"/data/local/tmp/edgestill/{name}"

    def _push(self, source: Path, target: str) -> Finished:
        return self._reached(call([*self.command, "push", str(source), target], timeout=_time(source), do=GO_ON))

    def _reached(self, done: Finished) -> Finished:
        lost = [line for line in done.stderr.splitlines() if _ADB_LOST.match(line)]
        if done.returncode and lost:
            do = "See: adb devices. The device must be listed as device: debugging switched on, this machine allowed"
            raise TargetError(self.where, f"cannot be reached ({lost[-1]})", do=do)
        return done


def _time(source: Path) -> float:
    """Seconds after which a copy is given up: ten minutes, and more for what is larger than 600 MB."""
    return max(600.0, source.stat().st_size / 1e6)


def _sent(where: str, source: Path, done: Finished) -> None:
    if done.returncode:
        raise EdgestillError(where, f"the copy of {source.name} broke off ({done.last_line})", do=GO_ON)
