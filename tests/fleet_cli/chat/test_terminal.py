import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.chat_program import over_fleet
from tests.support.waiting import PATIENCE_S, until

WAIT_S = PATIENCE_S
AGAIN_S = 2.0
COLOUR = re.compile("\x1b\\[[0-9;]+m")


class Screen:
    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def until(self, pattern: str, *, interrupting: bool = False) -> str:
        """Read until `pattern` is shown; return everything shown since the last call.

        With `interrupting`, press Ctrl-C, again if nothing happens: Python's readline misses a signal that arrives just
        before it waits for a key.
        """
        if interrupting:
            self.type("\x03")
        left = WAIT_S / AGAIN_S
        while (found := re.search(pattern, self._seen)) is None:
            if not select.select([self._terminal], [], [], AGAIN_S)[0]:
                left -= 1
                assert left > 0, f"nothing more after {self._seen!r}"
                if interrupting:
                    self.type("\x03")
                continue
            self._seen += os.read(self._terminal, 1 << 16).decode()
        shown, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return shown

    def prompt(self) -> str:
        """Read until the program waits for a line; return everything shown since the last call.

        A Ctrl-D before readline takes over the terminal would be lost.
        """
        shown = self.until("> ")
        until(lambda: not termios.tcgetattr(self._terminal)[3] & termios.ICANON)
        return shown


@contextmanager
def on_terminal() -> Iterator[Screen]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        # Background processes inherit an ignored SIGINT, and so would the program.
        ["env", "--default-signal=INT", sys.executable, "-m", "tests.support.chat_program"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null", "NO_COLOR": ""},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Screen(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_chat_streams_coloured_answers_stops_one_with_ctrl_c_and_ends_with_ctrl_d() -> None:
    with on_terminal() as screen:
        assert "drafted and accepted" in screen.prompt()
        screen.type("t1 t2\r")
        answer = screen.prompt()
        assert "\x1b[32m" in answer  # drafted and accepted
        assert "\x1b[33m" in answer  # corrected
        assert re.search(r"(t\d ){4}", COLOUR.sub("", answer))
        screen.type("/stats\r")
        assert re.search(r"\d+ drafted and accepted, \d+ corrected", screen.prompt())
        screen.type("\x04")  # this one ends, and the other begins
        screen.prompt()
        screen.type("t1\r")
        screen.until("\x1b\\[36mt3 ")
        screen.type("\x03")
        assert "[Stopped.]" in screen.prompt()
        screen.type("half a line")
        screen.until(
            "half a line"
        )  # Ctrl-C takes what is not read yet, and readline would wait for it, deaf to signals
        screen.until(r"Ctrl-D or /quit ends the chat", interrupting=True)
        screen.prompt()
        screen.type("/quit\r")
        assert screen.process.wait(WAIT_S) == 0


def test_in_a_pipe_there_is_only_the_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"t1 t2\nt\xff\n/quit\n"), encoding="utf-8"))
    over_fleet()
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"(t\d )+", line) for line in lines)
    assert "Ctrl-D ends" in said.err
    assert "\x1b" not in said.out + said.err
