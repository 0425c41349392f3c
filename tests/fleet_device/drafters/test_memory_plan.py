"""Memory plan: whatever the budget, what is planned fits, and what cannot fit is one sentence."""

import random
from pathlib import Path

import pytest

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings, load
from fleet_device.drafters.model_file import LEAST_CONTEXT, ModelSizes, automatic_budget, plan_memory
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from tests.support.tiny_gguf import tiny_gguf

MODEL = ModelSizes(token_kv_bytes=23_040, rows=49_152, width=576, heads=9, key_width=64)
POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)
MEGA = 1_000_000


def test_with_memory_enough_all_is_as_wanted() -> None:
    plan = plan_memory(MODEL, context=2048, batch=256, sequences=2, budget=1000 * MEGA)
    assert (plan.context, plan.batch, plan.small_keys, plan.kept) == (2048, 256, False, 2048)
    assert plan_memory(MODEL, context=2048, batch=256, sequences=2, budget=None).context == 2048


def test_with_less_the_batch_becomes_smaller_first_then_keys_then_the_context() -> None:
    batches = plan_memory(MODEL, context=2048, batch=256, sequences=1, budget=100 * MEGA)
    assert (batches.context, batches.small_keys) == (2048, False)
    assert batches.batch < 256
    keys = plan_memory(MODEL, context=2048, batch=256, sequences=1, budget=52 * MEGA)
    assert (keys.context, keys.small_keys) == (2048, True)
    context = plan_memory(MODEL, context=2048, batch=256, sequences=1, budget=30 * MEGA)
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
            plan = plan_memory(sizes, context=context, batch=batch, sequences=sequences, budget=budget)
        except DrafterError:
            refused += 1
            continue
        assert plan.needed <= budget
        assert min(context, LEAST_CONTEXT) <= plan.context <= context
        assert 1 <= plan.batch <= min(batch, plan.context)
        assert 0 <= plan.kept <= context
    assert 300 < refused < 2700


def test_a_device_of_which_nobody_says_more_takes_half_of_what_is_free_beside_the_weights() -> None:
    assert automatic_budget(300, 100) == 100
    assert automatic_budget(50, 100) == 0
    assert automatic_budget(None, 100) is None


@pytest.mark.parametrize("budget", [110_000, 150_000, 200_000, 1_000_000])
def test_a_small_budget_makes_a_small_context_that_works_to_its_end(
    tmp_path: Path, budget: int, caplog: pytest.LogCaptureFixture
) -> None:
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
        with pytest.raises(DrafterError, match="is full"):
            each.next(POLICY)
    drafter.close()


def test_the_setting_is_in_megabytes_and_too_little_is_a_sentence(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", context=1 << 17)
    drafter = load(DeviceSettings(model=str(path), memory_mb=1, context=1 << 17))
    assert LEAST_CONTEXT <= drafter.context < 1 << 13
    drafter.close()
    with pytest.raises(DrafterError, match="raise 'memory_mb'"):
        LlamaCppDrafter(LlamaCppSettings(path, context=2048, memory_bytes=10_000))
