import contextlib
import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from fleet_admin.models.facts import KvShape, ModelUnreadable, folder_facts, gguf_facts, layers_of
from fleet_common.gguf_files import GgufUnreadable, read_header
from fleet_device.drafters.model_file import GgufModel
from fleet_edge.verifiers.torch_engine.attention import context_of, inspect_model
from tests.fleet_edge.verifiers.oracle import CONFIGS, tiny_folder, tiny_model
from tests.support.family_models import FAMILIES, family_folder, family_gguf, parameters, weight_bytes
from tests.support.tiny_gguf import CHAT_TEMPLATE, END, tiny_delta_gguf, tiny_gguf, tiny_hybrid_gguf

MISTRAL = FAMILIES["Mistral 7B"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shapes_of_a_family_are_read_from_a_gguf_and_from_a_folder(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    file = gguf_facts(family_gguf(tmp_path / "model.gguf", family))
    folder = folder_facts(family_folder(tmp_path / "model", family))
    for facts in (file, folder):
        assert len(facts.layers) == family.layers
        assert facts.kv_bytes(tokens=1, number_bytes=2) == family.kv_bytes
        assert facts.kv_bytes(tokens=1000, number_bytes=4) == 2000 * family.kv_bytes
        assert {layer.window for layer in facts.layers} <= {None, family.window}
        assert (facts.context, facts.parameters) == (family.context, parameters(family))
        assert facts.chat is not None
        assert (facts.chat.template, facts.refusal) == (CHAT_TEMPLATE, "")
    assert (file.number_format, file.end_tokens, file.weight_bytes) == ("Q4_0", (END,), weight_bytes(family))
    assert (folder.number_format, folder.end_tokens, folder.weight_bytes) == ("BF16", (END,), 2 * parameters(family))
    assert (folder.chat.bos, folder.chat.eos) == ("<|im_start|>", "<|im_end|>")
    assert file.vocabulary == folder.vocabulary


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_folder_is_said_to_keep_of_a_token_is_what_the_packed_verifier_keeps(name: str, tmp_path: Path) -> None:
    facts = folder_facts(tiny_folder(tmp_path / "model", name))
    model = tiny_model(name)
    kept = [(shape.kv_heads, shape.key_dim, shape.value_dim) for shape in inspect_model(model)]
    assert [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in facts.layers] == kept
    assert facts.context == context_of(model.config)
    stored = model.state_dict()
    own = {tensor.data_ptr(): tensor.numel() for tensor in stored.values()}  # what is tied is stored once
    assert facts.parameters == sum(own.values())


def test_what_a_gguf_is_said_to_take_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    facts = gguf_facts(path)
    model = GgufModel(path)
    assert facts.kv_bytes(tokens=1, number_bytes=2) == model.token_kv_bytes
    assert (facts.vocabulary, facts.context, facts.number_format) == (model.vocabulary, 256, model.quantization)
    model.close()


def test_layers_that_differ_are_each_counted(tmp_path: Path) -> None:
    """Values per layer, other head sizes with a sliding window, and layers that reuse the cache of others."""
    path = tmp_path / "mixed.gguf"
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(4)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2, 1, 2])
    writer.add_key_length(32)
    writer.add_value_length(16)
    writer.add_key_length_swa(8)
    writer.add_value_length_swa(8)
    writer.add_sliding_window(10)
    writer.add_sliding_window_pattern([True, True, False, True])
    writer.add_shared_kv_layers(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = layers_of(read_header(path), path)
    assert found == (KvShape(2, 8, 8, 10), KvShape(2, 8, 8, 10), KvShape(1, 32, 16))


def test_a_model_in_several_files_is_read_whole(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        writer = gguf.GGUFWriter(tmp_path / f"model-{part:05}-of-00003.gguf", "llama")
        writer.add_uint16("split.count", 3)
        writer.add_tensor(f"part.{part}", np.zeros((part, 8), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    header = read_header(tmp_path / "model-00001-of-00003.gguf")
    assert (header.parameters, header.weight_bytes) == (48, 192)
    with pytest.raises(GgufUnreadable):
        read_header(tmp_path / "model-00002-of-00003.gguf")
    (tmp_path / "model-00003-of-00003.gguf").unlink()
    with pytest.raises(GgufUnreadable, match=r"model-00003-of-00003\.gguf"):
        read_header(tmp_path / "model-00001-of-00003.gguf")


def test_a_gguf_that_is_none_or_is_cut_off_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(GgufUnreadable):
        read_header(path)
    for content in (b"", b"GG", b"noise" * 1000):
        path.write_bytes(content)
        with pytest.raises(GgufUnreadable, match="GGUF"):
            read_header(path)
    whole = family_gguf(path, MISTRAL).stat().st_size
    with path.open("rb") as file:
        header = file.read(1 << 16)
    with path.open("r+b") as file:
        file.truncate(whole - 1)
    with pytest.raises(ModelUnreadable):
        gguf_facts(path)
    path.write_bytes(header[:4] + b"\1\0\0\0" + header[8:])
    with pytest.raises(GgufUnreadable):
        read_header(path)


def test_no_file_makes_the_reader_of_headers_fail_otherwise_than_in_a_sentence(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    rng = random.Random(5)
    # Truncate or change the part before the weights.
    head = whole.index(b"tokenizer.ggml.token_type")
    for length in [*range(64), *(rng.randrange(len(whole)) for _ in range(150))]:
        path.write_bytes(whole[:length])
        with pytest.raises(GgufUnreadable):
            read_header(path)
    read = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(4, head)] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(GgufUnreadable):
            read_header(path)
            read += 1
    assert 0 < read < 300


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("["), "chat template"),
        (lambda folder: (folder / "generation_config.json").write_text("[]"), "generation_config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 4), "damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "damaged"),
    ],
)
def test_a_folder_that_is_not_whole_is_told_in_a_sentence(spoil: object, sentence: str, tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", MISTRAL)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(ModelUnreadable, match=sentence):
        folder_facts(folder)


def test_weights_in_several_files_are_all_counted_and_none_may_miss(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", MISTRAL)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    other = family_folder(tmp_path / "other", FAMILIES["Llama 3.1 8B"])
    (other / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    with (folder / names["b"]).open("r+b") as file:  # its tensors have other names
        header = file.read(1 << 16)
        file.seek(0)
        file.write(header.replace(b".weight", b".others"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    both = parameters(MISTRAL) + parameters(FAMILIES["Llama 3.1 8B"])
    assert folder_facts(folder).parameters == both
    with (folder / names["b"]).open("r+b") as file:
        file.truncate((folder / names["b"]).stat().st_size - 1)
    with pytest.raises(ModelUnreadable):
        folder_facts(folder)
    (folder / names["b"]).unlink()
    with pytest.raises(ModelUnreadable, match=r"model-00002-of-00002\.safetensors"):
        folder_facts(folder)


def test_states_of_recurrent_layers_count_as_memory(tmp_path: Path) -> None:
    facts = gguf_facts(tiny_delta_gguf(tmp_path / "delta.gguf"))
    assert not facts.refusal
    assert facts.kv_bytes(tokens=1, number_bytes=2) == 2 * 2 * 2 * 32 + facts.state_bytes
    assert facts.state_bytes > 2 * 2 * 32 * 32 * 4  # two layers of two heads


def test_layers_that_keep_a_running_state_are_refused(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", FAMILIES["Qwen 3 0.6B"])
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"] * 14}
    (folder / "config.json").write_text(json.dumps(config))
    assert "linear_attention" in folder_facts(folder).refusal
    assert "GGUF" in folder_facts(folder).refusal
    config |= {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 14, "conv_L_cache": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert not folder_facts(folder).refusal
    assert not gguf_facts(tiny_hybrid_gguf(tmp_path / "lfm2.gguf")).refusal
    mamba = family_gguf(tmp_path / "mamba.gguf", FAMILIES["SmolLM2 135M"])
    raw = mamba.read_bytes()
    mamba.write_bytes(
        raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1).replace(b"llama.", b"mamba.")
    )
    assert "recurrent kind" in gguf_facts(mamba).refusal
