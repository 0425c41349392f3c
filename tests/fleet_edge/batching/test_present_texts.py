from fleet_edge.batching.present_texts import PresentTexts


def test_texts_are_present_while_their_devices_draft() -> None:
    present = PresentTexts()
    present.stepped([1, 2], step_s=0.02, at=10.0)
    present.stepped([3], step_s=0.02, at=10.5)
    assert present.count == 3
    present.stepped([3], step_s=0.02, at=11.2)
    assert present.count == 1


def test_where_steps_are_long_a_text_that_was_not_in_the_last_ones_is_present() -> None:
    present = PresentTexts()
    present.stepped([1], step_s=0.8, at=10.0)
    present.stepped([2], step_s=0.8, at=13.0)
    assert present.count == 2
    present.stepped([2], step_s=0.8, at=13.3)
    assert present.count == 1


def test_a_text_that_has_ended_is_gone_at_once() -> None:
    present = PresentTexts()
    present.stepped([1, 2], step_s=0.02, at=10.0)
    present.forget(1)
    present.forget(7)
    assert present.count == 1


def test_a_text_that_was_granted_is_present_before_it_is_in_a_step_but_not_for_ever() -> None:
    present = PresentTexts()
    present.opened(1)
    present.opened(2)
    assert present.count == 2
    present.stepped([1], step_s=0.02, at=10.0)
    assert present.count == 2
    present.stepped([1], step_s=0.02, at=11.5)  # the other is open, and nobody writes
    assert present.count == 1
