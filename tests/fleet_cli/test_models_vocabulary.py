import json
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

from fleet_admin.models.facts import ModelsError, ModelUnreadable, write_vocabulary
from fleet_cli.models import app
from fleet_device.drafters.model_file import GgufModel
from tests.support.tiny_gguf import CHAT_TEMPLATE, sentencepiece_rows, tiny_gguf


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_devices_read_in_the_file_what_is_in_the_targets_own(kind: str, tmp_path: Path) -> None:
    rows = sentencepiece_rows() if kind == "llama" else None
    target = tiny_gguf(tmp_path / "target.gguf", rows=rows, tokenizer=kind)
    out = tmp_path / "small.gguf"
    vocabulary = write_vocabulary(target, out)
    whole, small = (GgufModel(path, vocabulary_only=True) for path in (target, out))
    assert small.vocabulary == whole.vocabulary == vocabulary
    assert small.chat_template == whole.chat_template == CHAT_TEMPLATE
    assert small.end_tokens == whole.end_tokens
    text = "the t\u00e9 \U0001f600"
    assert small.encode(text) == whole.encode(text)
    assert [small.piece(token) for token in range(vocabulary.size)] == [
        whole.piece(token) for token in range(vocabulary.size)
    ]
    whole.close()
    small.close()
    assert not gguf.GGUFReader(out).tensors
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["small.gguf", "target.gguf"]


def test_of_a_model_in_several_files_the_first_is_enough(tmp_path: Path) -> None:
    target = tmp_path / "model-00001-of-00002.gguf"
    tiny_gguf(target)
    reader = gguf.GGUFReader(target)
    writer = gguf.GGUFWriter(tmp_path / "first.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(reader.get_field("tokenizer.ggml.tokens").contents())
    writer.add_token_merges(reader.get_field("tokenizer.ggml.merges").contents())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary = write_vocabulary(tmp_path / "first.gguf", tmp_path / "out.gguf")
    model = GgufModel(tmp_path / "out.gguf", vocabulary_only=True)
    assert model.vocabulary == vocabulary
    model.close()


def test_the_command_says_what_to_do_with_the_file(tmp_path: Path) -> None:
    target, out = tiny_gguf(tmp_path / "target.gguf"), tmp_path / "out.gguf"
    done = CliRunner().invoke(app, ["vocabulary", str(target), "--out", str(out)])
    assert done.exit_code == 0
    assert "261 tokens" in done.output
    assert "target_vocabulary" in done.output
    done = CliRunner().invoke(app, ["vocabulary", str(target), "--out", str(out), "--json"])
    found = json.loads(done.output)
    assert found["tokens"] == 261
    assert found["bytes"] == out.stat().st_size
    assert len(bytes.fromhex(found["fingerprint"])) == 32


def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelUnreadable, match="GGUF"):
        write_vocabulary(tmp_path, out)
    with pytest.raises(ModelUnreadable):
        write_vocabulary(tmp_path / "none.gguf", out)
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 100)
    with pytest.raises(ModelUnreadable, match="GGUF"):
        write_vocabulary(tmp_path / "noise.gguf", out)
    with pytest.raises(ModelUnreadable):
        write_vocabulary(tiny_gguf(tmp_path / "bare.gguf", vocabulary=False), out)
    target = tiny_gguf(tmp_path / "target.gguf")
    with pytest.raises(ModelsError):
        write_vocabulary(target, target)
    with pytest.raises(ModelsError):
        write_vocabulary(target, tmp_path / "none" / "out.gguf")
    assert not out.exists()
