#!/usr/bin/env python3
"""Check the commands that README and docs print, or run them as printed.

    scripts/printed_commands.py check [DOCUMENT …]    parses each command against the real command line
    scripts/printed_commands.py run [DOCUMENT …]      runs them, each document on a fresh overlay of this machine

A comment before a block says what cannot be seen from it, and renders as nothing:

    <!-- not run: REASON -->              its commands need something that is not here
    <!-- run with: NAME=WORD … -->        in this document NAME stands for WORD; `$(…)` in a word is computed there

`run` needs root, and Linux with namespaces and overlayfs: what a command writes is thrown away, and no network is there.
"""

import argparse
import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, Final, Literal

import typer

from benchmarks.__main__ import SUITES
from fleet_cli.commands import COMMANDS
from fleet_cli.main import app as fleet

ROOT: Final = Path(__file__).resolve().parents[1]
DOCUMENTS: Final = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))

_FLEET: Final = re.compile(r"(?:\S*/)?fleet")
_PROGRAMS: Final = frozenset(
    "fleet make pip curl pytest python mosquitto nft openssl printf chown systemctl journalctl sudo apt git cp sha256sum "
    "ansible-playbook ansible-vault createuser createdb psql pg_dump pg_restore vacuumdb export".split()
)
_BENCHMARKS: Final = "python -m benchmarks"
_SHELL: Final = ("", "sh", "bash")
_SERVES: Final = re.compile(
    r"fleet (edge run|device run|admin serve|broker (watch|metrics))|mosquitto |fleet admin (events .*--follow|alerts .*--watch)"
)
"""Commands that go on until they are ended: they stay to the end of their document, or until one like them starts."""
_TYPED: Final = "correct horse battery staple\n" * 2 + "/quit\n"
"""What a person types, where a command asks: a password, twice; and the end of a chat."""
_LONGEST_S: Final = 180.0
_READY: Final = r"is online at|of fleet \S+, draft model|http://"
_READY_S: Final = 90.0
_SETTLED_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Printed:
    """A command as a document prints it.

    Attributes:
        document: Path below the repository.
        line: Where it begins, from 1.
        words: Its text, continued lines joined, without a comment.
        place: A block of its own, a row of a table, or a sentence.
        reason: Why it is not run; empty if it is.
        names: What stands for what in it, as declared until there.
    """

    document: str
    line: int
    words: str
    place: Literal["block", "row", "sentence"]
    reason: str = ""
    names: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        """For a message."""
        return f"{self.document}:{self.line}: {self.words}"


# --- what is printed


def commands(document: str) -> Iterator[Printed]:
    """Yield the commands of a document, in order."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    names: dict[str, str] = {}
    reason, mark_at, fence, number = "", -9, None, 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if mark := re.fullmatch(r"\s*<!-- (not run|run with): (.+) -->", line):
            mark_at = number
            if mark[1] == "not run":
                reason = mark[2]
            else:
                names |= dict(word.split("=", 1) for word in shlex.split(mark[2], posix=True))
            continue
        if fence is None and (opening := re.match(r"\s*(`{3,})(\w*)", line)):
            fence = opening[2]
            continue
        if fence is not None and line.strip().startswith("```"):
            fence, reason = None, ""
            continue
        block = fence in _SHELL if fence is not None else line.startswith("    ")
        if not block:
            if fence is None:
                if line.strip() and number - mark_at > 1:
                    reason = ""
                yield from _within(document, number, line)
            continue
        begins = number
        while line.endswith("\\") and number < len(lines):
            line = line[:-1] + " " + lines[number].strip()
            number += 1
        words = re.sub(r"\s{2,}#.*|\s+# .*$", "", line).strip()
        if _program(words):
            yield Printed(document, begins, words, "block", reason, names=tuple(names.items()))


def _within(document: str, number: int, line: str) -> Iterator[Printed]:
    """Yield the commands in a line of text; a row of a table may hold a whole one."""
    for code in re.findall(r"`([^`]+)`", line):
        words = code.replace("\\|", "|").strip()
        if "…" in words:
            continue  # it is shortened
        if _FLEET.fullmatch(words.partition(" ")[0]) or words.startswith(_BENCHMARKS):
            yield Printed(document, number, words, "row" if line.startswith("|") else "sentence")


def _program(words: str) -> str:
    first, _, rest = words.partition(" ")
    name = Path(first).name
    known = name in _PROGRAMS or first.startswith("scripts/")
    return name if known and not rest.lstrip().startswith("=") else ""


# --- whether it can be parsed


def check(printed: Printed) -> str:
    """Return what is wrong with a command's words; empty if the real command line takes them."""
    words = printed.words
    for name, word in printed.names:
        words = words.replace(name, "1" if word.startswith("$(") else word)
    try:
        parts = shlex.split(words, comments=True)
    except ValueError as error:
        return f"no shell can read it: {error}"
    if words.startswith(_BENCHMARKS):
        return _check_benchmark(parts[3:])
    if any(not _program(further) for further in words.split(" | ")[1:]):
        return "it is no command: give each of the alternatives a line of its own"
    if parts[:2] == ["sudo", "-u"]:
        parts = parts[3:]
    return _check_fleet(parts[1:], whole=printed.place == "block") if _FLEET.fullmatch(parts[0]) else ""


def _check_fleet(words: list[str], *, whole: bool) -> str:
    """Have the command line parse the words, with commands that do nothing."""
    said = io.StringIO()
    words = [re.sub(r"^[A-Z]$", "1", word) for word in words]  # N stands for a number
    with redirect_stdout(said), redirect_stderr(said):
        try:
            _harmless()(words, prog_name="fleet")
        except SystemExit as leaving:
            if not leaving.code or (not whole and not words):
                return ""
    errors = [line.removeprefix("Error: ") for line in said.getvalue().splitlines() if line.startswith("Error: ")]
    if not errors:  # a group without a command shows its help
        return "a command is missing after it" if whole else ""
    return "" if not whole and re.match(r"Missing|.* requires an argument", errors[0]) else errors[0]


@cache
def _harmless() -> Callable[..., Any]:
    app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
    app.callback()(_nothing_of(fleet.registered_callback.callback if fleet.registered_callback else None))
    for name, command in COMMANDS.items():
        group = importlib.import_module(command.module).app
        _disarm(group)
        app.add_typer(group, name=name)
    return typer.main.get_command(app)


def _disarm(app: typer.Typer) -> None:
    for info in (*app.registered_commands, *([app.registered_callback] if app.registered_callback else [])):
        info.callback = _nothing_of(info.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _disarm(group.typer_instance)


def _nothing_of(command: Callable[..., Any] | None) -> Callable[..., None]:
    assert command is not None

    @wraps(command)
    def nothing(**_given: Any) -> None:  # noqa: ANN401 - whatever the command takes
        return

    return nothing


def _check_benchmark(words: list[str]) -> str:
    parts = [key for key in SUITES if words and key.partition(" ")[0] == words[0]]
    if not parts:
        return "" if not words else f"there is no benchmark {words[0]!r}"
    name = " ".join(words[:2])
    if name not in parts and len(parts) > 1:
        return "" if len(words) == 1 else f"{words[1]!r} is no part of it"
    options = words[1 if name not in parts else 2 :]
    if not options:
        return ""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in ("--models", "--json", "--picture"):
        parser.add_argument(option)
    importlib.import_module(f"benchmarks.{SUITES[name if name in parts else parts[0]][0]}").add_options(parser)
    try:
        _, rest = parser.parse_known_args([re.sub(r"^[A-Z]$", "1", word) for word in options])
    except argparse.ArgumentError as error:
        return str(error)
    return f"unknown options {rest}" if rest else ""


# --- running them


@dataclass
class Outcome:
    """What became of a document's commands.

    Attributes:
        ran: Number of commands that did what they are printed for.
        left: Those that were not run, with the reason.
        failed: Those that failed, with the end of what they said.
    """

    ran: int = 0
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Shell:
    """Runs commands in one folder; those that serve go on until `close`."""

    def __init__(self) -> None:
        self._serving: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = Path(tempfile.mkdtemp())

    def run(self, words: str) -> str:
        """Run a command; return what is wrong, empty if nothing is."""
        serves = _SERVES.match(words)
        if serves is None:
            return self._finish(words)
        key = serves[0].split(" --")[0]
        self._stop(key)
        return self._serve(key, words)

    def close(self) -> None:
        """End what still serves."""
        for key in list(self._serving):
            self._stop(key)

    def _finish(self, words: str) -> str:
        try:
            done = subprocess.run(
                ["bash", "-c", words], input=_TYPED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=_LONGEST_S, check=False, start_new_session=True, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it has not ended within {_LONGEST_S:.0f} s"
        return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout[-600:].strip()}"

    def _serve(self, key: str, words: str) -> str:
        log = self._logs / f"{len(list(self._logs.iterdir()))}.log"
        process = subprocess.Popen(
            ["bash", "-c", f"exec {words}"], stdin=subprocess.DEVNULL, stdout=log.open("wb"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._serving[key] = process
        deadline = time.monotonic() + (_READY_S if " run" in key else _SETTLED_S)
        while time.monotonic() < deadline:
            said = log.read_text(errors="replace")
            if process.poll() is not None:
                return f"it ended with exit code {process.returncode}: {said[-600:].strip()}"
            if re.search(_READY, said):
                break
            time.sleep(0.2)
        return ""

    def _stop(self, key: str) -> None:
        if (process := self._serving.pop(key, None)) is not None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def run_document(document: str) -> Outcome:
    """Run a document's commands here, in the current folder."""
    outcome, shell = Outcome(), Shell()
    try:
        for printed in commands(document):
            if printed.place == "sentence" or (printed.place == "row" and not _complete(printed)):
                continue
            if printed.reason:
                outcome.left.append(f"{printed.where} ({printed.reason})")
                continue
            words = printed.words
            for name, word in printed.names:
                if name in words:
                    value = word
                    if word.startswith("$("):
                        value = subprocess.run(
                            ["bash", "-c", f"printf %s {word}"], capture_output=True, text=True, check=False
                        ).stdout
                    words = words.replace(name, value)
            wrong = shell.run(words)
            if wrong:
                outcome.failed.append(f"{printed.where}\n    {wrong}")
            else:
                outcome.ran += 1
    finally:
        shell.close()
    return outcome


def _complete(printed: Printed) -> bool:
    return printed.words.startswith("fleet admin ") and not check(replace(printed, place="block"))


# --- where they run: a throw-away machine with what the documents take for granted

_MACHINE: Final = r"""
set -euo pipefail
mount --make-rprivate /
mount -t tmpfs changes "$1"
mkdir -p "$1"/{root,repo}-{changes,work} "$1/root"
mount -t overlay root -o "lowerdir=/,upperdir=$1/root-changes,workdir=$1/root-work" "$1/root"
mkdir -p "$1/root$2"
mount -t overlay repo -o "lowerdir=$2,upperdir=$1/repo-changes,workdir=$1/repo-work" "$1/root$2"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
for folder in /tmp /run /srv; do mount -t tmpfs new "$1/root$folder"; done
ip link set lo up
hostname broker.north.example
printf '127.0.0.1 localhost broker.north.example db.north.example\n' > "$1/root/etc/hosts"
exec chroot "$1/root" env -i HOME=/root TERM=dumb COLUMNS=100 LANG=C.UTF-8 "PYTHONPATH=$2" \
    "PATH=$2/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" bash -c 'cd "$1" && exec python "$2" inside "$3"' - "$2" "$3" "$4"
"""

_SITE: Final = r"""
set -euo pipefail
mkdir -p /opt/fleet/current/venv/bin /etc/fleet /srv/backups /srv/fleet /var/lib/fleet/edge
ln -s "$(command -v fleet)" /opt/fleet/current/venv/bin/fleet
fleet broker init /root/site --fleet north --devices 1 --edge edge-1
fleet broker issue dashboard --role monitor --ca /root/site/authority --out /root/site/identities
for each in monitor dashboard; do cp /root/site/identities/$each.* .; done
cp /root/site/authority/ca.pem .
printf 'listener 1883 127.0.0.1\nallow_anonymous true\n' > /etc/plain.conf
cat > edge.toml <<END
engine = "llama.cpp"
target = "models/smollm2-135m/target-Q8_0.gguf"
threads = 1
kv_bytes = 200000000
END
cat > device.toml <<END
device = "gateway-17"
drafter = "prompt-lookup"
END
printf '' > alerts.toml
cp edge.toml device.toml /opt/fleet/current
"""
_GRANTED: Final = (
    "mosquitto -c /root/site/mosquitto.conf",
    "mosquitto -c /etc/plain.conf",
    "fleet edge run --config edge.toml --edge edge-0",
    "fleet device run --drafter prompt-lookup --api-port 0 --device gateway-7",
    "fleet device run --drafter prompt-lookup --api-port 0 --device gateway-8",
)


def run_here(document: str) -> Outcome:
    """Run a document's commands on the throw-away machine that this process is on."""
    subprocess.run(["bash", "-c", _SITE], check=True, stdout=subprocess.DEVNULL)
    granted = [Shell() for _ in _GRANTED]
    try:
        for shell, words in zip(granted, _GRANTED, strict=True):
            if wrong := shell.run(words):
                raise SystemExit(f"{words}: {wrong}")
        for device in ("gateway-7", "gateway-8"):
            granted[0].run(f"fleet admin label {device} --add hall_a")
        return run_document(document)
    finally:
        for shell in reversed(granted):
            shell.close()


def run_apart(document: str) -> Outcome:
    """Run a document's commands on a throw-away machine of its own."""
    with tempfile.TemporaryDirectory(prefix="fleet-printed-") as folder:
        done = subprocess.run(
            ["unshare", "-m", "-n", "-p", "-f", "-u", "--kill-child", "bash", "-c", _MACHINE, "-", folder, str(ROOT)]
            + [str(Path(__file__).resolve()), document],
            stdout=subprocess.PIPE, check=False, text=True,
        )  # fmt: skip
    try:
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return Outcome(failed=[f"{document}: the machine for its commands did not come up"])


def main() -> int:
    """Check or run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "run", "inside"])
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT")
    asked = parser.parse_args()
    documents = asked.documents or DOCUMENTS
    if asked.what == "inside":
        print(json.dumps(asdict(run_here(documents[0]))))
        return 0
    failed = 0
    for document in documents:
        if asked.what == "check":
            wrong = [f"{printed.where}\n    {why}" for printed in commands(document) if (why := check(printed))]
            outcome = Outcome(failed=wrong)
        elif any(printed.place == "block" or _complete(printed) for printed in commands(document)):
            outcome = run_apart(document)
            print(
                f"{document}: {outcome.ran} ran, {len(outcome.left)} not run, {len(outcome.failed)} failed", flush=True
            )
            for line in outcome.left:
                print(f"  not run: {line}")
        else:
            continue
        failed += len(outcome.failed)
        for line in outcome.failed:
            print(f"  FAILED {line}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
