import mmap
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fleet_common import llama
from fleet_common.llama import FairLock, LlamaError, give_back_mapped
from tests.support.waiting import PATIENCE_S, until

SIZE = 8 << 20


def resident_kib(path: Path) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(each.split()[1]) for each in lines if each.startswith("Rss:"))
    raise AssertionError("not mapped")


def test_the_pages_go_and_what_they_hold_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[::4096]
        assert resident_kib(path) > SIZE >> 11
        assert give_back_mapped(path) == SIZE
        assert resident_kib(path) < SIZE >> 14
        assert mapped[1000:1003] == bytes((232, 233, 234))
    assert give_back_mapped(path) == 0


def test_what_may_be_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 1
        assert give_back_mapped(path) == 0
        assert mapped[0] == 1


def test_a_turn_is_handed_on_in_the_order_in_which_it_was_asked_for() -> None:
    turns, order = FairLock(), list[int]()

    def take(number: int) -> None:
        for _ in range(3):
            with turns:
                order.append(number)
                if len(order) <= 6:
                    until(lambda: turns.waiting == 2)

    with turns:
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=take, args=(number,), daemon=True))
            threads[-1].start()
            until(lambda: turns.waiting == len(threads))
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == [0, 1, 2] * 3


PACKAGE = """
import pathlib

LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
llama_log_callback, loaded = str, []


def llama_log_set(*_): pass


def llama_backend_init(): assert _lib.registered


class llama_cpp:
    _base_path = pathlib.Path("/somewhere/lib")


class _lib:
    registered = REGISTERED

    @classmethod
    def ggml_backend_reg_count(cls): return cls.registered

    @classmethod
    def ggml_backend_load_all_from_path(cls, folder):
        loaded.append(folder)
        cls.registered = FOUND


llama_cpp._lib = _lib
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that loads a package `llama_cpp` with the given source."""

    def load(source: str) -> Any:
        (tmp_path / "llama_cpp.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("sys.dont_write_bytecode", True)
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
        del sys.modules["llama_cpp"]
        return llama.library.__wrapped__()

    return load


def test_a_package_with_kernels_for_many_processors_loads_those_for_this_one(library: Any) -> None:
    assert library(PACKAGE.replace("REGISTERED", "0").replace("FOUND", "1")).loaded == [b"/somewhere/lib"]


@pytest.mark.parametrize(
    "source", [PACKAGE.replace("REGISTERED", "0").replace("FOUND", "0"), "raise RuntimeError('libgomp.so.1')"]
)
def test_a_package_that_cannot_compute_here_is_an_error(library: Any, source: str) -> None:
    with pytest.raises(LlamaError):
        library(source)
