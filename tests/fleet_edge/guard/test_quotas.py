from fleet_edge.guard.quotas import QuotaSettings


def test_the_first_label_that_a_device_has_stands_in_place_of_everybodys() -> None:
    quotas = QuotaSettings.model_validate(
        {
            "top_k": 40,
            "drafts_per_s": 50,
            "labels": {
                "hall_a": {"devices": ["press-*", "oven-1"], "top_k": 7},
                "presses": {"devices": ["press-1"], "top_k": 9, "kv_share": 0.1},
            },
        }
    )
    assert quotas.of("press-1").top_k == 7
    assert quotas.of("oven-1").top_k == 7
    assert quotas.of("press-1").drafts_per_s == 50
    assert quotas.of("press-1").kv_share == QuotaSettings().kv_share
    assert quotas.of("oven-2").top_k == 40
    assert quotas.of("Press-1").top_k == 40, "names have case"
