import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from fleet_edge.verifiers.tokens import gguf_tokens, target_tokens
from fleet_edge.verifiers.torch_engine.target import best_device, load_target, resolve_dtype
from schemas.vocabulary import Vocabulary
from tests.fleet_edge.verifiers.oracle import CONFIGS, CONTEXT, WORDS, random_model, tiny_folder, tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "broken"
    path.mkdir()
    for file in whole.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def _gguf(path: Path, words: list[str] | None, *, weights: bool = True) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if words is not None:
        writer.add_token_list(words)
    if weights:
        writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_is_loaded_without_padding_or_output(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = load_target(whole, dtype="float32")
    assert target.info.name == "tiny"
    assert target.info.vocabulary == Vocabulary.of(WORDS)
    assert target.info.context == CONTEXT
    assert target.info.end_tokens == (2,)
    assert target.model.dtype == torch.float32
    assert not target.model.training
    assert capfd.readouterr() == ("", "")


def test_a_gguf_and_a_folder_of_one_model_have_one_fingerprint(whole: Path, tmp_path: Path) -> None:
    padded = [*WORDS, *(f"[PAD{index}]" for index in range(len(WORDS), 64))]
    path = _gguf(tmp_path / "tiny.gguf", padded)
    assert len(gguf_tokens(path)) == 64
    assert target_tokens(path) == target_tokens(whole) == WORDS


def test_an_added_token_without_a_row_is_no_token(folder: Path) -> None:
    """Gemma's small models have the large ones' tokenizer, with an image token after the last row."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["added_tokens"].append({"id": 64, "content": "<image_soft_token>"})
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert load_target(folder, dtype="float32").info.vocabulary == Vocabulary.of(WORDS)
    assert target_tokens(folder) == WORDS


def test_a_folder_and_a_gguf_that_spell_spaces_unlike_have_one_fingerprint(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer(["\u2581a", "\u2581\u2581", "b", "<x>", "<y>"]))
    path = _gguf(tmp_path / "tiny.gguf", ["\u2581a", "  ", "b", "<x>", "<y>"])
    assert target_tokens(path) == target_tokens(folder)


def test_of_a_model_that_reads_images_the_language_model_is_taken(tmp_path: Path) -> None:
    _, text = CONFIGS["gemma3-window"]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    whole = random_model(
        "Gemma3Config", {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "eos_token_id": [2, 7]}
    )
    whole.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer(WORDS))
    target = load_target(tmp_path, dtype="float32")
    assert target.info.vocabulary == Vocabulary.of(WORDS)
    assert target.info.end_tokens == (2, 7)
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.inference_mode():
        expected = whole(input_ids=tokens, token_type_ids=torch.zeros_like(tokens)).logits
        target.model.set_attn_implementation("eager")
        found = target.model(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-5)


def _refused(source: Path | str, kind: type[VerifierError], said: str) -> None:
    """Check that a target is refused in one sentence."""
    with pytest.raises(kind, match=said) as error:
        load_target(source)
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 400


DAMAGED = ["", "{", "[]", "{}", '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": {}}}']


@pytest.mark.parametrize(
    ("file", "content", "kind", "said"),
    [
        ("tokenizer.json", None, UnsupportedModel, r"tokenizer\.json"),
        *(("tokenizer.json", text.encode(), UnsupportedModel, r"tokenizer\.json") for text in DAMAGED),
        ("tokenizer.json", tokenizer([f"w{index}" for index in range(80)]).encode(), UnsupportedModel, "tokens"),
        ("model.safetensors", None, UnsupportedModel, "weights"),
        ("model.safetensors", b"\x00" * 100, UnsupportedModel, "loaded"),
        ("config.json", None, UnsupportedModel, r"config\.json"),
        ("config.json", b'{"model_type": "vit"}', UnsupportedModel, "vit"),
        ("config.json", b"{", VerifierError, "cannot be found"),
    ],
)
def test_a_folder_that_holds_no_whole_model(
    folder: Path, file: str, content: bytes | None, kind: type[VerifierError], said: str
) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    _refused(folder, kind, said)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"GGUF", b"GGUF\x03", b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40), b"GGUF" + b"\xff" * 64],
)
def test_a_gguf_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    _refused(tmp_path / "model.gguf", UnsupportedModel, "GGUF")


def test_a_gguf_without_tokenizer_or_weights(tmp_path: Path) -> None:
    _refused(_gguf(tmp_path / "model.gguf", None), UnsupportedModel, "tokenizer")
    path = _gguf(tmp_path / "model.gguf", WORDS, weights=False)
    assert gguf_tokens(path, vocabulary_only=True) == WORDS
    _refused(path, UnsupportedModel, "weights")


def test_a_folder_whose_weights_lack_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_target(folder)


def test_auto_takes_the_gpu_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert best_device() == "cuda"


def test_auto_says_so_where_torch_cannot_use_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert best_device(driver=tmp_path / "none") == "cpu"
    assert caplog.records == []
    assert best_device(driver=tmp_path) == "cpu"
    assert "NVIDIA" in caplog.text


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", device="cpu") == expected
    assert resolve_dtype("float32", device="cpu") == torch.float32
