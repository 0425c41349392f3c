from fleet_edge.answers.told_loads import ToldLoads
from fleet_edge.sessions.acceptance import AcceptanceByModel
from schemas.fields import EdgeLoad
from schemas.policy import Mode
from tests.support.drafts import edge_session

LOAD = EdgeLoad(texts=8, writing_ms=60.0, step_ms=30.0, text_ms=5.0, token_ms=2.0, free=1)


def test_what_has_hardly_changed_is_told_as_it_was() -> None:
    loads, acceptance, session = ToldLoads(), AcceptanceByModel(), edge_session()
    first = loads.of(session, LOAD, acceptance)
    assert loads.of(session, LOAD.model_copy(update={"writing_ms": 66.0}), acceptance) is first
    changed = loads.of(session, LOAD.model_copy(update={"texts": 16}), acceptance)
    assert changed.texts == 16
    assert changed is not first


def test_it_changes_with_what_was_told_not_with_what_was_last_known() -> None:
    """Else a load that grows little by little would never be told."""
    loads, acceptance, session = ToldLoads(), AcceptanceByModel(), edge_session()
    told = {loads.of(session, LOAD.model_copy(update={"texts": texts}), acceptance).texts for texts in range(8, 33)}
    assert {8, 10} <= told
    assert 8 < len(told) < 16


def test_each_draft_model_has_its_acceptance() -> None:
    loads, acceptance = ToldLoads(), AcceptanceByModel()
    good, poor = edge_session(), edge_session()
    good.draft_model, poor.draft_model = "good", "poor"
    for model, accepted in (("good", 9), ("poor", 3)):
        acceptance.count(model, "device", tested=10, accepted=accepted)
    assert loads.of(good, LOAD, acceptance).acceptance == 0.9
    assert loads.of(poor, LOAD, acceptance).acceptance == 0.3


def test_tokens_cost_nothing_only_for_a_text_that_is_to_repeat() -> None:
    loads, acceptance = ToldLoads(), AcceptanceByModel()
    free = {}
    for mode in Mode:
        session = edge_session()
        session.policy = session.policy.model_copy(update={"mode": mode})
        free[session.policy.repeats] = loads.of(session, LOAD, acceptance).free
    assert free == {True: 1, False: 0}


def test_draft_models_without_end_are_forgotten() -> None:
    loads, acceptance, session = ToldLoads(), AcceptanceByModel(), edge_session()
    for number in range(1000):
        session.draft_model = f"model-{number}"
        loads.of(session, LOAD, acceptance)
    assert len(loads._known) <= 128
