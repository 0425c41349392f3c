"""What the configuration key `model` may hold."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fleet_device.drafters.contract import ModelNotFound
from fleet_device.drafters.model_file import locate_model

FILES = ["README.md", "tiny-q4_0.gguf", "tiny-q8_0.gguf", "big-00002-of-00002.gguf", "big-00001-of-00002.gguf"]


class FakeHub:
    def __init__(self) -> None:
        self.fetched: list[str] = []

    def files(self, repository: str) -> Sequence[str]:
        assert repository == "owner/tiny-GGUF"
        return FILES

    def fetch(self, repository: str, file: str) -> Path:
        assert repository == "owner/tiny-GGUF"
        if file not in FILES:
            raise ModelNotFound(f"The repository {repository} has no file {file}.")
        self.fetched.append(file)
        return Path("/cache") / file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "models" / "smollm2-135m"
    model.mkdir(parents=True)
    for name in ("Q4_0", "IQ4_NL"):
        (model / f"{name}.gguf").write_bytes(b"GGUF")
    return tmp_path / "models"


def test_a_path_to_a_file_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my model.gguf"
    path.write_bytes(b"GGUF")
    assert locate_model(str(path), folder=tmp_path).path == path
    assert locate_model(str(path), folder=tmp_path).name == "my model"
    monkeypatch.chdir(tmp_path)
    assert locate_model("my model.gguf", folder=tmp_path).path == Path("my model.gguf")


@pytest.mark.parametrize("text", ["smollm2-135m:Q4_0", "smollm2-135m:q4_0", " smollm2-135m:Q4_0\n"])
def test_a_prepared_model_is_found_by_name(folder: Path, text: str) -> None:
    found = locate_model(text, folder=folder)
    assert found.path == folder / "smollm2-135m" / "Q4_0.gguf"
    assert found.name == "smollm2-135m"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "No draft model is configured"),
        ("smollm2-135m", "has several quantizations; add one, such as smollm2-135m:IQ4_NL"),
        ("smollm2-135m:Q9_9", "has no quantization Q9_9; there are IQ4_NL, Q4_0"),
        ("other:Q4_0", "run 'fleet models prepare' there, or name another folder as models_dir"),
        ("../../etc:Q4_0", "does not exist"),
        ("..:Q4_0", "names no draft model"),
        ("/nowhere/x.gguf", "/nowhere/x.gguf does not exist"),
        ("/", "is a folder, not a GGUF file"),
        ("x.gguf", "does not exist"),
        ("what is this", "names no draft model"),
    ],
)
def test_every_failure_is_one_sentence(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(ModelNotFound, match=r"\.$") as caught:
        locate_model(text, folder=folder)
    assert sentence in str(caught.value)


def test_a_repository_s_file_is_fetched_without_asking_for_the_list() -> None:
    hub = FakeHub()
    found = locate_model("owner/tiny-GGUF:tiny-q4_0.gguf", folder=Path("models"), hub=lambda: hub)
    assert found.path == Path("/cache/tiny-q4_0.gguf")
    assert found.name == "tiny-GGUF"


def test_a_pattern_names_one_file() -> None:
    assert locate_model("owner/tiny-GGUF:*Q8_0*", folder=Path("models"), hub=FakeHub).path == Path(
        "/cache/tiny-q8_0.gguf"
    )


def test_a_model_in_several_files_is_fetched_whole() -> None:
    hub = FakeHub()
    assert (
        locate_model("owner/tiny-GGUF:big-*.gguf", folder=Path("models"), hub=lambda: hub).path.name
        == "big-00001-of-00002.gguf"
    )
    assert sorted(hub.fetched) == ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("pattern", "sentence"), [("*q2*", "No GGUF file of"), ("tiny-*", "Several files of"), ("*.md", "No GGUF file")]
)
def test_a_pattern_that_names_none_or_several_is_said(pattern: str, sentence: str) -> None:
    with pytest.raises(ModelNotFound, match=sentence):
        locate_model(f"owner/tiny-GGUF:{pattern}", folder=Path("models"), hub=FakeHub)
