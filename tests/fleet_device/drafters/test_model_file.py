import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from gguf import TokenType

from fleet_device.drafters.contract import DrafterError, ModelNotFound
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings, load
from fleet_device.drafters.model_file import (
    MIN_CONTEXT,
    GgufModel,
    ModelSizes,
    automatic_budget,
    fit_memory,
    locate_model,
)
from fleet_device.requests.generate import Detokenizer
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import END, tiny_gguf, tiny_hybrid_gguf, tiny_rows, tiny_words

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


def test_a_file_that_is_named_by_its_quantization_has_its_folders_name(folder: Path) -> None:
    for draft in (folder / "smollm2-135m").iterdir():
        assert locate_model(str(draft), folder=folder).name == "smollm2-135m"


@pytest.mark.parametrize("text", ["smollm2-135m:Q4_0", "smollm2-135m:q4_0", " smollm2-135m:Q4_0\n"])
def test_a_model_in_the_folder_is_found_by_name(folder: Path, text: str) -> None:
    found = locate_model(text, folder=folder)
    assert found.path == folder / "smollm2-135m" / "Q4_0.gguf"
    assert found.name == "smollm2-135m"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "model"),
        ("smollm2-135m", "smollm2-135m:IQ4_NL"),
        ("smollm2-135m:Q9_9", "IQ4_NL, Q4_0"),
        ("other:Q4_0", "models_dir"),
        *((text, text) for text in ("../../etc", "..:Q4_0", "/nowhere/x.gguf", "/", "x.gguf", "what is this")),
    ],
)
def test_a_model_that_is_not_found_is_named(folder: Path, text: str, named: str) -> None:
    with pytest.raises(ModelNotFound, match=re.escape(named)):
        locate_model(text, folder=folder)


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


@pytest.mark.parametrize("pattern", ["*q2*", "tiny-*", "*.md"])
def test_a_pattern_that_names_none_or_several_is_refused(pattern: str) -> None:
    with pytest.raises(ModelNotFound):
        locate_model(f"owner/tiny-GGUF:{pattern}", folder=Path("models"), hub=FakeHub)


MODEL = ModelSizes(token_kv_bytes=23_040, rows=49_152, width=576, heads=9, key_width=64)
POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)
MEGA = 1_000_000


def test_with_less_the_batch_becomes_smaller_first_then_keys_then_the_context() -> None:
    batches = fit_memory(MODEL, context=2048, batch=256, sequences=1, budget=100 * MEGA)
    assert (batches.context, batches.small_keys) == (2048, False)
    assert batches.batch < 256
    keys = fit_memory(MODEL, context=2048, batch=256, sequences=1, budget=52 * MEGA)
    assert (keys.context, keys.small_keys) == (2048, True)
    context = fit_memory(MODEL, context=2048, batch=256, sequences=1, budget=30 * MEGA)
    assert context.context < 2048
    assert context.kept == 0


def test_any_budget_is_kept_or_refused() -> None:
    rng = random.Random(4)
    refused = 0
    for _ in range(3000):
        sizes = ModelSizes(
            rng.randint(64, 400_000), rng.choice((32, 32_000, 152_000)), rng.randint(64, 4096), rng.randint(1, 64),
            rng.choice((20, 32, 64)),
        )  # fmt: skip
        context, batch, sequences = rng.randint(1, 40_000), rng.randint(1, 512), rng.randint(1, 8)
        budget = int(10 ** rng.uniform(3, 10))
        try:
            memory = fit_memory(sizes, context=context, batch=batch, sequences=sequences, budget=budget)
        except DrafterError:
            refused += 1
            continue
        assert memory.needed <= budget
        assert min(context, MIN_CONTEXT) <= memory.context <= context
        assert 1 <= memory.batch <= min(batch, memory.context)
        assert 0 <= memory.kept <= context
    assert 300 < refused < 2700


def test_a_device_of_which_nobody_says_more_takes_half_of_what_is_free_beside_the_weights() -> None:
    assert automatic_budget(300, 100) == 100
    assert automatic_budget(50, 100) == 0
    assert automatic_budget(None, 100) is None


@pytest.mark.parametrize("budget", [110_000, 150_000, 200_000, 1_000_000])
def test_a_small_budget_makes_a_small_context(tmp_path: Path, budget: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", context=4096)
    drafter = LlamaCppDrafter(LlamaCppSettings(path, threads=1, context=2048, memory_bytes=budget, sequences=2))
    other = drafter.another()
    assert other is not None
    assert (drafter.context < 2048) == any("instead of 2048" in message for message in caplog.messages)
    for each in (drafter, other):
        each.reset([index % 200 + 3 for index in range(drafter.context)])
        each.next(POLICY)
        each.truncate(drafter.context // 2)
        each.next(POLICY)
        each.extend([3] * (drafter.context + 1))
        with pytest.raises(DrafterError):
            each.next(POLICY)
    drafter.close()


def test_the_setting_is_in_megabytes_and_too_little_is_a_sentence(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", context=1 << 17)
    drafter = load(DeviceSettings(model=str(path), memory_mb=1, context=1 << 17))
    assert MIN_CONTEXT <= drafter.context < 1 << 13
    drafter.close()
    with pytest.raises(DrafterError, match="memory_mb"):
        LlamaCppDrafter(LlamaCppSettings(path, context=2048, memory_bytes=10_000))


@pytest.fixture(params=[False, True], ids=["weights", "vocabulary only"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GgufModel]:
    model = GgufModel(tiny_gguf(tmp_path / "tiny.gguf"), vocabulary_only=request.param)
    yield model
    model.close()
    model.close()


def test_a_token_that_is_not_used_is_a_token(tmp_path: Path) -> None:
    """llama.cpp marks rows as unused that every file of the model family has, also those of edges."""
    names = ("<unused0>", "<unused1>")
    for kind in (TokenType.CONTROL, TokenType.UNUSED):
        path = tiny_gguf(tmp_path / "tiny.gguf", rows=[*tiny_rows(), *((name, kind) for name in names)])
        model = GgufModel(path, vocabulary_only=True)
        assert model.vocabulary == Vocabulary.of([*tiny_words(), *names])
        model.close()


def test_plain_text_never_becomes_a_control_token(model: GgufModel) -> None:
    assert END not in model.encode("a <|im_end|> b")
    assert END in model.encode("a <|im_end|> b", special=True)


@pytest.mark.parametrize(
    "text", ["the thread", "naïve — 東京 😀\n\n\tx", "", "\x00\x01", "a\ud800b", "a" * 20_000, " " * 20_000]
)
def test_text_survives_the_round_trip(model: GgufModel, text: str) -> None:
    expected = text.encode("utf-8", "replace")
    assert b"".join(map(model.piece, model.encode(text))) == expected


def test_control_tokens_have_no_text(model: GgufModel) -> None:
    assert model.piece(END) == b""
    assert model.special_text("eos") == "<|im_end|>"
    assert model.special_text("bos") == "<|im_start|>"
    assert END in model.end_tokens


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.encode("a"),
        lambda model: model.piece(5),
        lambda model: model.end_tokens,
        lambda model: model.chat_template,
        lambda model: model.special_text("eos"),
        lambda model: model.quantization,
    ],
)
def test_a_closed_model_says_so(model: GgufModel, use: Callable[[GgufModel], object]) -> None:
    model.close()
    with pytest.raises(DrafterError):
        use(model)


def test_a_stream_never_gives_half_a_character(model: GgufModel) -> None:
    text = "é東😀 the"
    stream = Detokenizer(model)
    parts = [stream.feed([token]) for token in model.encode(text)]
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_a_broken_character_does_not_hold_up_the_text(model: GgufModel) -> None:
    stream = Detokenizer(model)
    assert stream.feed([*model.encode("😀")[:2], *model.encode("a")]) == "\ufffda"


@pytest.mark.models
def test_the_target_s_tokenizer_has_the_draft_s_fingerprint_and_ids() -> None:
    transformers = pytest.importorskip("transformers")
    target = prepared("target")
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    model = GgufModel(prepared("Q4_0.gguf"), vocabulary_only=True)
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert Vocabulary.of(strings) == model.vocabulary
    assert str(model.vocabulary) == "49152 tokens, 26138422"  # as every release has had it
    for text in ("It's 12345 o'clock.", "  a\n\n\tb", "naïve 東京 😀", "def f(x):\n    return x**2"):
        assert model.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    model.close()


def test_a_hybrid_counts_the_layers_that_have_keys(tmp_path: Path) -> None:
    model = GgufModel(tiny_hybrid_gguf(tmp_path / "hybrid.gguf"))
    dense = GgufModel(tiny_gguf(tmp_path / "dense.gguf"))
    assert model.token_kv_bytes == 2 * dense.token_kv_bytes  # two such layers of four
    assert (dense.state_bytes, model.state_bytes > 0) == (0, True)
    model.close()
    dense.close()
