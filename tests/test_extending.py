import importlib.util
import re
from pathlib import Path

import pytest

from fleet_device.settings import DRAFTERS
from fleet_edge.settings import VERIFIERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
KINDS = {
    "verifier",
    "drafter",
    "downlink form",
    "topic",
    "counter of the session log",
    "setting and its flag",
    "metric",
    "check of the doctor",
    "scheduling policy",
}


def named_paths() -> list[str]:
    words = {word for quoted in re.findall(r"`([^`\n]+)`", PAGE) for word in quoted.split()}
    return sorted(word for word in words if re.fullmatch(r"[\w./-]+", word) and ("/" in word or word.endswith(".md")))


@pytest.mark.parametrize("path", named_paths())
def test_a_path_on_the_page_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_each_kind_of_addition_has_a_section_with_a_test_that_holds_it() -> None:
    sections = dict(re.findall(r"^## An? ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
    assert set(sections) == KINDS
    for text in sections.values():
        assert re.search(r"`tests/[\w/]+\.py`", text)


@pytest.mark.parametrize("kind", [VERIFIERS, DRAFTERS], ids=["verifiers", "drafters"])
def test_a_registered_loader_is_a_module_of_ours_and_a_function(kind: dict[str, str]) -> None:
    for place in kind.values():
        module, _, function = place.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert f"def {function}(settings: " in Path(spec.origin).read_text(encoding="utf-8")
