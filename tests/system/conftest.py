from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from broker_config.processes import MosquittoProcess
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_edge.verifiers.torch_engine.target import load_target
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from tests.support.one_thread import OnOneThread
from tests.support.prepared_models import prepared
from tests.support.whole import Whole

TARGET = "target"
KV_BYTES = 512 << 20


@pytest.fixture(scope="session")
def target_folder() -> Path:
    return prepared(TARGET)


@pytest.fixture(scope="session")
def dtype(forced_dtype: str | None) -> str:
    return forced_dtype or "float32"


@pytest.fixture(scope="session")
def verifier(target_folder: Path, dtype: str) -> TorchVerifier:
    return TorchVerifier(load_target(target_folder, dtype=dtype), budget_bytes=KV_BYTES)


@pytest.fixture(scope="session")
def oracle(target_folder: Path, dtype: str) -> Any:
    model = load_target(target_folder, dtype=dtype).model
    return model.eval()


@pytest.fixture(scope="session")
def drafters() -> Iterator[Callable[[str], LlamaCppDrafter]]:
    loaded: dict[str, OnOneThread] = {}

    def load(quantization: str) -> Any:
        if quantization not in loaded:
            settings = LlamaCppSettings(path=prepared(f"{quantization}.gguf"), threads=1, context=1024)
            loaded[quantization] = OnOneThread(lambda: LlamaCppDrafter(settings))
        return loaded[quantization]

    yield load
    for drafter in loaded.values():
        drafter.close()


@pytest.fixture
def whole(mosquitto: MosquittoProcess, tmp_path: Path, verifier: TorchVerifier) -> Whole:
    torch.manual_seed(0)
    return Whole(mosquitto.port, tmp_path, verifier)
