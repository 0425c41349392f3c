from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from fleet_device.drafters import hugging_face
from fleet_device.drafters.contract import ModelNotFound
from fleet_device.drafters.hugging_face import HuggingFace


def hub(kind: type[Exception], text: str) -> Exception:
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub(RepositoryNotFoundError, "gone"), "There is no public repository owner/name"),
        (hub(GatedRepoError, "terms"), "requires its terms to be accepted"),
        (hub(HfHubHTTPError, "server on fire\nmore"), "could not be read: server on fire"),
        (OSError("disk full"), "could not be fetched (OSError); check the network and the disk"),
    ],
)
def test_failures_of_a_repository_are_one_sentence_each(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(*_: str, **__: object) -> None:
        raise error

    monkeypatch.setattr("fleet_common.hub.is_reachable", lambda: True)
    monkeypatch.setattr(hugging_face, "hf_hub_download", fail)
    monkeypatch.setattr(hugging_face, "list_repo_files", fail)
    monkeypatch.setattr(hugging_face, "snapshot_download", fail)
    client, name = HuggingFace(), "owner/name"
    for call in (lambda: client.fetch(name, "x.gguf"), lambda: client.files(name), lambda: client.folder(name)):
        with pytest.raises(ModelNotFound) as caught:
            call()
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


def test_offline_the_cache_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "gguf").mkdir(parents=True)
    model = repository / "snapshots" / "abc" / "gguf" / "x.gguf"
    model.write_text("a model")
    assert HuggingFace().files("owner/name") == ["gguf/x.gguf"]
    assert HuggingFace().fetch("owner/name", "gguf/x.gguf") == model
    assert HuggingFace().folder("owner/name") == model.parent.parent
