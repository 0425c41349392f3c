from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE, Unigram

from fleet_admin.models.facts import ModelFacts, ModelFormat, ModelUnreadable, gguf_facts, write_vocabulary
from fleet_admin.models.pair import CheckedPair, check_pair, device_need, edge_needs, findings_of
from fleet_common.checks import Check, CheckStatus
from schemas.control import ChatFormat
from tests.support.command import Run, as_json, refused
from tests.support.family_models import FAMILIES, family_folder, family_gguf, weight_bytes
from tests.support.tiny_gguf import CHAT_TEMPLATE, Row, sentencepiece_rows, tiny_gguf, tiny_rows

SMALL, LARGE = FAMILIES["Llama 3.2 1B"], FAMILIES["Llama 3.1 8B"]
OTHER = CHAT_TEMPLATE.replace("<|im_start|>", "<|im_end|>")
ALIKE = CHAT_TEMPLATE.replace("message.role", "message['role']")
FITS, NOTE = CheckStatus.OK, CheckStatus.NOTE


@pytest.fixture
def check(fleet: Run) -> Run:
    return partial(fleet, "models", "check")


def pair(folder: Path, **given: Any) -> CheckedPair:
    draft = family_gguf(folder / "draft.gguf", SMALL, **given)
    target = family_gguf(folder / "target.gguf", LARGE)
    return check_pair(str(draft), str(target), models_dir=folder)


def outcomes(checked: CheckedPair) -> dict[str, CheckStatus]:
    return {finding.name: finding.status for finding in checked.findings}


def sentence(checked: CheckedPair, aspect: str) -> str:
    return next(finding.sentence for finding in checked.findings if finding.name == aspect)


def facts(folder: Path, **given: Any) -> ModelFacts:
    if "chat_template" in given:
        template = given.pop("chat_template")
        given["chat"] = None if template is None else ChatFormat(template=template)
    return replace(gguf_facts(family_gguf(folder / "model.gguf", SMALL)), **given)


def rows(*, first: int, common: int, size: int = 260) -> list[Row]:
    """Return a vocabulary that shares `common` words with every other one made here."""
    control = tiny_rows()[:3]
    words = [f"w{index if index < common else first + index}" for index in range(size)]
    return [*control, *((word, TokenType.NORMAL) for word in words)]


@pytest.mark.parametrize(
    ("common", "outcome"),
    [(200, CheckStatus.NOTE), (54, CheckStatus.NOTE), (50, CheckStatus.FAILED), (0, CheckStatus.FAILED)],
)
def test_unlike_vocabularies_fit_if_enough_is_common(tmp_path: Path, common: int, outcome: CheckStatus) -> None:
    draft = family_gguf(tmp_path / "draft.gguf", SMALL, rows=rows(first=1000, common=common))
    target = family_gguf(tmp_path / "target.gguf", LARGE, rows=rows(first=5000, common=common))
    checked = check_pair(str(draft), str(target), models_dir=tmp_path)
    assert outcomes(checked)["vocabulary"] is outcome
    found = sentence(checked, "vocabulary")
    assert f"{common} of 260 draft tokens and 260 target tokens are common" in found
    assert ("target_vocabulary" in found) is (outcome is CheckStatus.NOTE)
    assert bool(checked.refused) is (outcome is CheckStatus.FAILED)
    assert outcomes(checked)["chat template"] is CheckStatus.OK, "it is the target's own"


def test_a_folder_does_not_tell_what_is_common_and_a_vocabulary_file_of_it_does(tmp_path: Path) -> None:
    draft = family_gguf(tmp_path / "draft.gguf", SMALL, rows=rows(first=1000, common=200))
    words = [str(word) for word, _ in rows(first=5000, common=200)]
    folder = family_folder(tmp_path / "target", LARGE, words=words)
    checked = check_pair(str(draft), str(folder), models_dir=tmp_path)
    assert [finding.name for finding in checked.refused] == ["vocabulary"]
    assert "--target-vocabulary" in checked.refused[0].sentence
    whole = family_gguf(tmp_path / "whole.gguf", LARGE, rows=rows(first=5000, common=200))
    write_vocabulary(whole, tmp_path / "words.gguf")
    checked = check_pair(str(draft), str(folder), models_dir=tmp_path, target_vocabulary=tmp_path / "words.gguf")
    assert outcomes(checked)["vocabulary"] is CheckStatus.NOTE
    with pytest.raises(ModelUnreadable):
        check_pair(str(draft), str(folder), models_dir=tmp_path, target_vocabulary=draft)


@pytest.mark.parametrize(
    ("aspect", "draft", "target", "outcome", "part"),
    [
        ("end tokens", (2,), (2,), FITS, "which the draft model knows"),
        ("end tokens", (0, 2), (2, 5), FITS, "which the draft model knows"),
        ("end tokens", (0,), (2,), NOTE, "ends at e0"),
        ("end tokens", (), (2,), NOTE, "knows no end"),
        ("end tokens", (0,), (), NOTE, "max_new_tokens alone"),
        ("chat template", CHAT_TEMPLATE, CHAT_TEMPLATE, FITS, "the same prompts"),
        ("chat template", CHAT_TEMPLATE, ALIKE, FITS, "the same prompts"),
        ("chat template", CHAT_TEMPLATE, OTHER, FITS, "by the target's"),
        ("chat template", CHAT_TEMPLATE, "{% broken", NOTE, "makes no prompt"),
        ("chat template", None, CHAT_TEMPLATE, FITS, "by the target's"),
        ("chat template", None, None, NOTE, "chats are refused"),
        ("chat template", CHAT_TEMPLATE, None, NOTE, "not tuned for chats"),
        ("context", 8192, 8192, FITS, "8,192 tokens"),
        ("context", 8192, 2048, FITS, "can have 2,048 tokens"),
        ("context", 2048, 8192, NOTE, "can have 2,048 tokens"),
        ("context", 0, 8192, NOTE, "draft model's file does not say"),
        ("context", 2048, 0, NOTE, "target's file does not say"),
    ],
)
def test_what_two_models_of_one_vocabulary_are_told(
    aspect: str, draft: Any, target: Any, outcome: CheckStatus, part: str, tmp_path: Path
) -> None:
    models = [facts(tmp_path, **{aspect.replace(" ", "_"): value}) for value in (draft, target)]
    models = [replace(each, end_texts=tuple(f"e{end}" for end in each.end_tokens)) for each in models]
    [found] = [each for each in findings_of(*models, overlap=lambda: None) if each.name == aspect]
    assert found.status is outcome
    assert part in found.sentence


def tokenizer_folder(path: Path, tokenizer: Tokenizer) -> ModelFacts:
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return replace(facts(path), source=str(path), form=ModelFormat.FOLDER)


def tried(one: ModelFacts, other: ModelFacts) -> Check:
    same = replace(other, vocabulary=one.vocabulary)
    [found] = [each for each in findings_of(one, same, overlap=lambda: None) if each.name == "tokenizer"]
    return found


def bytes_tokenizer(split: str) -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*letters, "12", "123", "Ġ1"]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, [("1", "2"), ("12", "3")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def unigram(scores: dict[str, float]) -> Tokenizer:
    pieces = [("<unk>", 0.0), *scores.items(), *((chr(code), -9.0) for code in range(33, 0x3000))]
    tokenizer = Tokenizer(Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (bytes_tokenizer(r"\d{1,3}"), bytes_tokenizer(r"\d")),
        (unigram({"▁": -1.0, "he": -2.0, "th": -3.0}), unigram({"▁": -1.0, "he": -3.0, "th": -2.0, "e": -4.0})),
    ],
    ids=["pre-tokenizer", "unigram"],
)
def test_tokenizers_of_the_same_tokens_are_tried_on_texts(tmp_path: Path, one: Tokenizer, other: Tokenizer) -> None:
    first, second = tokenizer_folder(tmp_path / "one", one), tokenizer_folder(tmp_path / "other", other)
    assert tried(first, replace(first)).status is FITS
    assert tried(first, second).status is NOTE


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ggufs_of_both_kinds_are_tried(tmp_path: Path, kind: str) -> None:
    rows = sentencepiece_rows() if kind == "llama" else None
    paths = [tiny_gguf(tmp_path / name, tokenizer=kind, rows=rows) for name in ("one.gguf", "other.gguf")]
    one, other = map(gguf_facts, paths)
    assert tried(one, other).status is FITS


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_tokenizer_that_cannot_be_read_is_not_called_alike(tmp_path: Path, text: str) -> None:
    folder = tokenizer_folder(tmp_path / "folder", bytes_tokenizer(r"\d"))
    (tmp_path / "folder" / "tokenizer.json").write_text(text)
    assert tried(folder, folder).status is NOTE


def test_a_model_that_takes_no_tokens_back_is_refused_at_either_end(tmp_path: Path) -> None:
    good, bad = facts(tmp_path), facts(tmp_path, refusal="is of the recurrent kind, which takes no tokens back")
    for models, role in (((bad, good), "draft model"), ((good, bad), "target")):
        found = findings_of(*models, overlap=lambda: None)[0]
        assert found.status is CheckStatus.FAILED
        assert found.sentence.startswith(f"The {role} ")


def test_two_models_in_the_wrong_order_are_told(check: Run, tmp_path: Path) -> None:
    small, large = family_gguf(tmp_path / "s.gguf", SMALL), family_gguf(tmp_path / "l.gguf", LARGE)
    code, output, _ = check(large, small)
    assert code == 1
    assert "The draft model is the larger one" in output
    folder = family_folder(tmp_path / "folder", LARGE)
    assert f"did you mean `fleet models check {small} {folder}`?" in refused(check(folder, small))


def test_memory_is_that_of_each_engine(tmp_path: Path) -> None:
    draft = gguf_facts(family_gguf(tmp_path / "draft.gguf", SMALL))
    device = device_need(draft)
    assert (device.weight_bytes, device.kv_bytes) == (weight_bytes(SMALL), 1000 * SMALL.kv_bytes)
    target = gguf_facts(family_gguf(tmp_path / "target.gguf", LARGE, kind=GGMLQuantizationType.Q8_0))
    needs = {(need.engine, need.number_format): (need.weight_bytes, need.kv_bytes) for need in edge_needs(target)}
    assert needs == {
        ("blocks", "Q8_0"): (weight_bytes(LARGE, GGMLQuantizationType.Q8_0), 1000 * LARGE.kv_bytes),
        ("llama.cpp", "Q8_0"): (weight_bytes(LARGE, GGMLQuantizationType.Q8_0), 1000 * LARGE.kv_bytes),
        ("torch", "bfloat16"): (2 * target.parameters, 1000 * LARGE.kv_bytes),
        ("torch", "float32"): (4 * target.parameters, 2000 * LARGE.kv_bytes),
    }


def test_the_command_says_whether_the_pair_fits(check: Run, tmp_path: Path) -> None:
    draft, target = family_gguf(tmp_path / "draft.gguf", SMALL), family_folder(tmp_path / "target", LARGE)
    code, output, complaint = check(draft, target)
    assert (code, complaint) == (0, "")
    assert output.rstrip().endswith("The pair fits.")
    assert "32.8" in output, "MB of the draft model's keys and values for 1,000 tokens"
    found = as_json(check(draft, target, "--json"))
    assert (found["fits"], found["draft"]["layers"], found["target"]["form"]) == (True, 16, "folder")
    assert found["memory"]["device"]["kv_bytes_per_1000_tokens"] == 1000 * SMALL.kv_bytes
    assert [need["weights"] for need in found["memory"]["edge"]] == ["8 bits", "4 bits", "bfloat16", "float32"]
    assert found["disk"]["device"] == draft.stat().st_size
    assert found["disk"]["edge"] == sum(path.stat().st_size for path in target.iterdir())
    other = {finding["name"] for finding in found["findings"] if finding["status"] != "ok"}
    assert other == {"tokenizer"}, "the folder's is none"
    other = family_gguf(tmp_path / "other.gguf", SMALL, rows=rows(first=9000, common=0))
    assert as_json(check(other, target, "--json"), 1)["fits"] is False


def test_what_a_file_says_cannot_steer_a_terminal(check: Run, tmp_path: Path) -> None:
    evil = [*tiny_rows()[:2], ("\x1b[2J", TokenType.CONTROL), *tiny_rows()[3:]]
    draft = family_gguf(tmp_path / "draft.gguf", SMALL, rows=evil)
    code, output, _ = check(draft, family_gguf(tmp_path / "target.gguf", LARGE, rows=evil))
    assert code == 0
    assert "\x1b" not in output
