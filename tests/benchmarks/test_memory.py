import json
import os
import struct
from pathlib import Path

from benchmarks.memory import resident, weight_bytes


def test_a_process_that_allocates_grows_and_what_it_maps_from_files_is_not_its_own() -> None:
    before = resident(os.getpid(), 0)
    held = bytearray(os.urandom(1)) * 64_000_000
    after = resident(os.getpid(), 7)
    assert len(held) == 64_000_000
    assert after["texts"] == 7
    assert 60.0 < after["own"] - before["own"] < 70.0
    assert before["own"] < before["all"]


def test_weights_take_what_their_file_has_or_what_they_become(tmp_path: Path) -> None:
    gguf = tmp_path / "target.gguf"
    gguf.write_bytes(bytes(1000))
    assert weight_bytes(gguf, "float32") == 1000
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [10], "data_offsets": [0, 20]},
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [20, 40]},
        }
    ).encode()
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
    assert weight_bytes(folder, "float32") == 60
    assert weight_bytes(folder, "bfloat16") == 30
