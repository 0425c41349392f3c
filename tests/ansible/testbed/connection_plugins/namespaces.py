"""Connects to a machine of `tests/ansible/testbed/machines`: enters its namespaces, as a shell on it would."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: namespaces
short_description: enter the namespaces of a test machine
description:
  - Runs commands on a machine that C(tests/ansible/testbed/machines) has booted, whose state is in C(FLEET_TESTBED).
options: {}
"""


class Connection(ConnectionBase):
    transport = "namespaces"
    has_pipelining = True

    def _connect(self) -> Connection:
        try:
            pid = int(Path(os.environ["FLEET_TESTBED"], f"{self._play_context.remote_addr}.pid").read_text())
        except (OSError, KeyError, ValueError) as error:
            raise AnsibleConnectionFailure("The machine is not running: tests/ansible/testbed/machines up") from error
        self._enter = ["nsenter", "-t", str(pid), *["-m", "-n", "-p", "-u", "-i", "-C", "-r", "-w", "--"]]
        self._connected = True
        return self

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        return self._run(["/bin/sh", "-c", cmd], in_data or b"")

    def put_file(self, in_path: str, out_path: str) -> None:
        super().put_file(in_path, out_path)
        with Path(in_path).open("rb") as source:
            self._must(self._run(["/bin/sh", "-c", f"cat > {shlex.quote(out_path)}"], source), out_path)

    def fetch_file(self, in_path: str, out_path: str) -> None:
        super().fetch_file(in_path, out_path)
        Path(out_path).write_bytes(self._must(self._run(["/bin/cat", in_path], b""), in_path))

    def close(self) -> None:
        self._connected = False

    def _run(self, command: list[str], source: Any) -> tuple[int, bytes, bytes]:
        given = {"input": source} if isinstance(source, bytes) else {"stdin": source}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([*self._enter, *command], capture_output=True, check=False, env=environment, **given)
        if done.returncode and b"nsenter: " in done.stderr:
            raise AnsibleConnectionFailure(f"The machine is gone: {done.stderr.decode().strip()}")
        return done.returncode, done.stdout, done.stderr

    @staticmethod
    def _must(outcome: tuple[int, bytes, bytes], path: str) -> bytes:
        status, out, error = outcome
        if status:
            raise AnsibleError(f"{path} was not transferred: {error.decode().strip()}")
        return out
