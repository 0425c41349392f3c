"""The commands that README and docs print: parsed against the real command line, or run as printed.

A comment before a block says what the block cannot, and renders as nothing:

    <!-- not run: REASON -->              its commands need something that is not here
    <!-- run with: NAME=WORD … -->        from here on NAME stands for WORD, which may be a variable of `_KNOWN`

Running needs root, and Linux with namespaces and overlayfs. It has no network, and nothing that a command writes stays.
"""

import argparse
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import typer

from benchmarks.__main__ import SUITES
from fleet_cli.commands import COMMANDS
from fleet_cli.main import global_options

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENTS: Final = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))

_FLEET: Final = re.compile(r"(?:\S*/)?fleet")
_BENCHMARKS: Final = "python -m benchmarks"
_HERE: Final = frozenset({"fleet", "curl", "mosquitto", "openssl", "printf", "chown", "cp", "sha256sum", "export"})
_ELSEWHERE: Final = {
    "make": "sets up this checkout; CI runs it",
    "pip": "needs a package index",
    "apt": "needs the internet",
    "git": "needs the internet",
    "llama-wheel": "needs a package index",
    "ansible-bundle": "needs a package index",
    "system-test": "takes an hour",
    "ansible-playbook": "needs a fleet's machines; tests/ansible/system-test plays the playbooks",
    "ansible-vault": "needs a vault",
    "systemctl": "needs systemd",
    "journalctl": "needs systemd",
    "sudo": "needs systemd",
    "nft": "changes the kernel's firewall",
    "psql": "needs a PostgreSQL server",
    "createdb": "needs a PostgreSQL server",
    "pg_restore": "needs a PostgreSQL server",
    "python": "takes minutes; docs/measurements.md has the figures",
}
"""Programs whose commands are not run, each with the reason."""

_TYPES: Final = "asks for a password"  # as the comment behind a command says


@dataclass(frozen=True, slots=True)
class Printed:
    document: str  # path below the repository
    line: int  # from 1
    words: str  # continued lines joined, without the comment
    place: Literal["block", "row", "sentence"]
    reason: str = ""  # why it is not run; empty if it is
    names: tuple[tuple[str, str], ...] = ()  # replacements declared before it

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}: {self.words}"

    @property
    def typed(self) -> str:
        words = self.words
        for name, word in self.names:
            words = words.replace(name, word)
        return words


# --- what is printed


def commands(document: str) -> Iterator[Printed]:
    lines = iter(enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1))
    names: dict[str, str] = {}
    reason, fence = "", ""
    for number, line in lines:
        if mark := re.fullmatch(r"\s*<!-- (not run|run with): (.+) -->", line):
            if mark[1] == "not run":
                reason = mark[2]
            else:
                names |= dict(word.split("=", 1) for word in shlex.split(mark[2]))
        elif opening := re.match(r"\s*```(\w*)", line):
            fence, reason = ("", "") if fence else (opening[1] or "sh", reason)
        elif fence == "sh" or (not fence and line.startswith("    ")):
            whole = line
            while whole.endswith("\\"):
                whole = whole[:-1] + next(lines)[1].strip()
            words = re.sub(r"\s+# .*", "", whole).strip()
            if program := _program(words):
                why = reason or _ELSEWHERE.get(program, "") or (_TYPES if _TYPES in whole else "")
                yield Printed(document, number, words, "block", why, tuple(names.items()))
        elif not fence and line:
            reason = ""
            place: Literal["row", "sentence"] = "row" if line.startswith("|") else "sentence"
            for words in _within(line):
                yield Printed(document, number, words, place, names=tuple(names.items()))


def _within(line: str) -> Iterator[str]:
    for code in re.findall(r"`([^`]+)`", line):
        # A command with an ellipsis is abbreviated.
        if "…" not in code and (_FLEET.fullmatch(code.split(" ")[0]) or code.startswith(_BENCHMARKS)):
            yield code


def _program(words: str) -> str:
    first, _, rest = words.partition(" ")
    name = Path(first).name
    return name if (name in _HERE or name in _ELSEWHERE) and not rest.lstrip().startswith("=") else ""


# --- whether it can be parsed


def check(printed: Printed) -> str:
    """Return what is wrong with a command; empty if the command line accepts it."""
    if any(not _program(further) for further in printed.words.split(" | ")[1:]):
        return "it is no command: give each of the alternatives a line of its own"
    try:
        words = shlex.split(printed.typed, comments=True)
    except ValueError as error:
        return f"no shell can read it: {error}"
    if printed.words.startswith(_BENCHMARKS):
        return _check_benchmark(words[3:])
    if words[:2] == ["sudo", "-u"]:
        words = words[3:]
    return _check_fleet(words[1:], whole=printed.place == "block") if _FLEET.fullmatch(words[0]) else ""


def _check_fleet(words: list[str], *, whole: bool) -> str:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            _harmless()([re.sub(r"^[A-Z]$", "1", word) for word in words], prog_name="fleet")  # N stands for a number
        except SystemExit as leaving:
            if not leaving.code or (not whole and not words):
                return ""
    errors = [line.removeprefix("Error: ") for line in said.getvalue().splitlines() if line.startswith("Error: ")]
    if not errors:  # a group without a command shows its help
        return "a command is missing after it" if whole else ""
    return "" if not whole and re.match(r"Missing|.* requires an argument", errors[0]) else errors[0]


@cache
def _harmless() -> Any:
    """Build the command line from new command objects, and replace each command by one that does nothing."""
    app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
    app.callback()(global_options)
    for name, command in COMMANDS.items():
        app.add_typer(importlib.import_module(command.module).app, name=name)
    whole = typer.main.get_command(app)
    _disarm(whole)
    return whole


def _disarm(command: Any) -> None:
    # The Typer objects and their functions are those of the program, so only the built commands may change.
    command.callback = lambda **_given: None
    for each in getattr(command, "commands", {}).values():
        _disarm(each)


def _check_benchmark(words: list[str]) -> str:
    parts = [key for key in SUITES if words and key.split(" ")[0] == words[0]]
    name = next((key for key in (" ".join(words[:2]), *words[:1]) if key in parts), "")
    if not name:
        return "" if not words or (parts and len(words) == 1) else f"there is no benchmark {' '.join(words[:2])!r}"
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in ("--models", "--json"):
        parser.add_argument(option)
    importlib.import_module(f"benchmarks.{SUITES[name][0]}").add_options(parser)
    try:
        _, rest = parser.parse_known_args(words[len(name.split(" ")) :])
    except argparse.ArgumentError as error:
        return str(error)
    return f"unknown options {rest}" if rest else ""


# --- running them

_SERVES: Final = re.compile(r"mosquitto |fleet (edge run|device run|admin serve)|fleet admin \w+ .*--(follow|watch)")
"""Services: they run until the end of their document, or until a similar one starts."""
_READY: Final = re.compile(r"is online at|of fleet \S+, draft model|http://")
_READY_S: Final = 180.0
_SETTLED_S: Final = 2.0  # for what follows the log, and says nothing yet
_LONGEST_S: Final = 180.0


class Shell:
    """Runs commands in the current folder; services run until `close`."""

    def __init__(self) -> None:
        self._serving: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, words: str) -> str:
        if words.startswith("fleet device chat"):
            self._stop("fleet device run")  # a broker keeps one connection for each name
        serves = _SERVES.match(words)
        if serves is None:
            return _finish(words)
        key = serves[0].split(" --")[0]
        self._stop(key)
        return self._serve(key, words)

    def close(self) -> None:
        for key in list(self._serving):
            self._stop(key)

    def _serve(self, key: str, words: str) -> str:
        with tempfile.NamedTemporaryFile() as log:
            process = self._serving[key] = subprocess.Popen(
                ["/bin/bash", "-c", f"exec {words}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            follows = key.startswith("fleet admin ") and key != "fleet admin serve"
            deadline = time.monotonic() + (_SETTLED_S if follows else _READY_S)
            while time.monotonic() < deadline:
                said = Path(log.name).read_text(errors="replace")
                if process.poll() is not None:
                    return f"it ended with exit code {process.returncode}: {said[-600:].strip()}"
                if _READY.search(said) or (key == "mosquitto " and _listens(process.pid)):
                    return ""
                time.sleep(0.2)
        return "" if follows else f"it was not ready within {_READY_S:.0f} s: {said[-600:].strip()}"

    def _stop(self, key: str) -> None:
        if (process := self._serving.pop(key, None)) is not None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(pid: int) -> bool:
    return any(each.status == psutil.CONN_LISTEN for each in psutil.Process(pid).net_connections())


def _finish(words: str) -> str:
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", words],
            input="/quit\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_LONGEST_S,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return f"it has not ended within {_LONGEST_S:.0f} s"
    return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout[-600:].strip()}"


def runs(printed: Printed) -> bool:
    """Return whether a command is meant to be run: one of a block, or a complete one in a table."""
    if printed.place == "row" and printed.words.startswith("fleet admin "):
        return not check(replace(printed, place="block"))
    return printed.place == "block"


def run_document(document: str) -> list[str]:
    """Run a document's commands; return those that failed, with the end of their output."""
    failed, shell = list[str](), Shell()
    try:
        for printed in filter(runs, commands(document)):
            if not printed.reason and (wrong := shell.run(printed.typed)):
                failed.append(f"{printed.where}\n    {wrong}")
    finally:
        shell.close()
    return failed


# --- where they run: a throw-away machine with what the documents take for granted

_MACHINE: Final = r"""
set -euo pipefail
mount --make-rprivate /
mount -t tmpfs changes "$1"
mkdir -p "$1"/{root,repo}-{changes,work} "$1/root"
mount -t overlay root -o "lowerdir=/,upperdir=$1/root-changes,workdir=$1/root-work" "$1/root"
for folder in /tmp /run /srv; do mount -t tmpfs new "$1/root$folder"; done
mkdir -p "$1/root$2"
mount -t overlay repo -o "lowerdir=$2,upperdir=$1/repo-changes,workdir=$1/repo-work" "$1/root$2"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
ip link set lo up
hostname broker.north.example
printf '127.0.0.1 localhost broker.north.example db.north.example\n' > "$1/root/etc/hosts"
exec chroot "$1/root" env -i HOME=/root TERM=dumb COLUMNS=100 LANG=C.UTF-8 "PYTHONPATH=$2" \
  "PATH=$2/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
  bash -c 'cd "$1" && exec python "$2" "$3"' - "$2" "$3" "$4"
"""
_SITE: Final = r"""
set -euo pipefail
rm -f fleet.sqlite3*  # the overlay's; a demo may have left one here
mkdir -p /opt/fleet/current/venv/bin /etc/fleet /srv/backups /srv/fleet /var/lib/fleet/edge
ln -s "$(command -v fleet)" /opt/fleet/current/venv/bin/fleet
fleet broker init /root/site --fleet north --devices 1 --edge edge-1
for each in monitor dashboard; do cp /root/site/identities/$each.* .; done
cp /root/site/authority/ca.pem .
ln -s /root/site/authority /srv/fleet/ca
printf 'listener 1883 127.0.0.1\nallow_anonymous true\n' > /etc/plain.conf
cat > edge.toml <<END
engine = "llama.cpp"
target = "models/smollm2-135m/target-Q8_0.gguf"
threads = 1
kv_bytes = 200000000
alerts = "alerts.toml"
END
printf 'device = "gateway-17"\ndrafter = "suffix"\n' > device.toml
printf 'hold_s = 0\noffline_min = 0.001\n' > alerts.toml
cp edge.toml device.toml /opt/fleet/current
"""
_BROKER: Final = "mosquitto -c /root/site/mosquitto.conf"
_EDGE: Final = ("mosquitto -c /etc/plain.conf", "fleet edge run --config edge.toml --edge edge-0 --spool /tmp/spool")
_DEVICES: Final = "fleet device run --drafter suffix --device {name} --api-listen '{listen}'"
_KNOWN: Final = r"""
set -euo pipefail
exec 3>&1 >&2
fleet device generate --device gateway-7 --drafter suffix --max-new-tokens 8 "Hello"
fleet admin label gateway-7 --add hall_a
(umask 077; echo "correct horse battery staple" > /tmp/password)
fleet admin user add setup --role operator --password-file /tmp/password
fleet device run --device gateway-6 --drafter suffix --api-listen '' 3>&- &
timeout 120 bash -c 'until fleet admin devices --json | grep -q gateway-6; do sleep 1; done'
kill -9 $!  # the edge makes an alert of it; a device that ends in order is none
timeout 120 bash -c 'until fleet admin alerts --all --json | grep -q "\"id\""; do sleep 1; done'
session=$(fleet admin sessions --json | grep -o '"session": "[^"]*' | head -1)
printf '{"SESSION": "%s"}' "${session##*\"}" >&3
"""
"""Sets the variables for `run with` marks."""


def _printed(document: str) -> str:
    return " ".join(each.words for each in commands(document) if runs(each) and not each.reason)


def machines() -> list[tuple[str, ...]]:
    """Return the documents that run on one machine: those that start no broker and no device share what is granted."""
    printing = [document for document in DOCUMENTS if _printed(document)]
    alone = [document for document in printing if re.search("mosquitto -c|device run", _printed(document))]
    return [tuple(document for document in printing if document not in alone), *((document,) for document in alone)]


def run_here(documents: Sequence[str]) -> list[str]:
    """Run the documents' commands on the throw-away machine of this process."""
    subprocess.run(["/bin/bash", "-c", _SITE], check=True, stdout=subprocess.DEVNULL)
    printed = " ".join(map(_printed, documents))
    granted: list[Shell] = []

    def grant(words: str) -> None:
        granted.insert(0, Shell())
        if wrong := granted[0].run(words):
            raise SystemExit(f"{words}: {wrong}")

    try:
        for words in (*(() if "mosquitto -c" in printed else (_BROKER,)), *_EDGE):
            grant(words)
        known = subprocess.run(["/bin/bash", "-c", _KNOWN], check=True, stdout=subprocess.PIPE, text=True)
        os.environ.update(json.loads(known.stdout))
        grant(_DEVICES.format(name="gateway-7", listen="" if "device run" in printed else "127.0.0.1:8321"))
        grant(_DEVICES.format(name="gateway-8", listen=""))
        return [failure for document in documents for failure in run_document(document)]
    finally:
        for shell in granted:
            shell.close()


def run_apart(documents: Sequence[str]) -> list[str]:
    """Run the documents' commands on their own throw-away machine."""
    apart = ["/usr/bin/unshare", "-m", "-n", "-p", "-f", "-u", "--kill-child", "/bin/bash", "-c", _MACHINE, "-"]
    with tempfile.TemporaryDirectory(prefix="fleet-printed-") as folder:
        done = subprocess.run(
            [*apart, folder, str(ROOT), str(Path(__file__).resolve()), " ".join(documents)],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        return list(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return [f"{documents}: the machine did not come up: {done.stderr[-2000:].strip()}"]


if __name__ == "__main__":
    print(json.dumps(run_here(sys.argv[1].split())))
