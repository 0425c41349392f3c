from fleet_edge.batching.background import BackgroundWork


def step(work: BackgroundWork, at: float, seconds: float, *, tokens: int, background: int) -> float:
    """Compute a step; return when it has ended."""
    work.stepped(started=at, ended=at + seconds, tokens=tokens, background=background)
    return at + seconds


def test_it_gets_its_share_of_the_time_while_others_are_verified() -> None:
    work, now, mine, whole = BackgroundWork(share=0.1), 0.0, 0.0, 0.0
    for _ in range(2000):
        if work.may_run():
            now, mine, whole = step(work, now, 0.12, tokens=148, background=128), mine + 0.12 * 128 / 148, whole + 0.12
        else:
            now, whole = step(work, now, 0.04, tokens=20, background=0), whole + 0.04
    assert 0.08 < mine / whole < 0.14


def test_time_in_which_nothing_is_computed_counts_for_its_share() -> None:
    work, now = BackgroundWork(share=0.1), 0.0
    now = step(work, now, 1.0, tokens=128, background=128)
    now = step(work, now, 0.01, tokens=20, background=0)
    assert not work.may_run()
    for _ in range(4):
        now = step(work, now + 2.0, 0.01, tokens=20, background=0)
    assert work.may_run()


def test_who_drafts_much_for_nothing_is_wasteful_until_that_is_forgotten() -> None:
    work = BackgroundWork()
    work.judged("device-1", computed=17, committed=1)
    assert not work.wasteful("device-1"), "a few drafts say nothing"
    for _ in range(10):
        work.judged("device-1", computed=17, committed=1)
    assert work.wasteful("device-1")
    assert not work.wasteful("device-2")
    for _ in range(100):
        work.judged("device-1", computed=5, committed=3)
    assert not work.wasteful("device-1")


def test_long_drafts_that_are_often_accepted_are_none() -> None:
    work = BackgroundWork()
    for _ in range(100):
        work.judged("device-1", computed=17, committed=4)
    assert not work.wasteful("device-1")


def test_prompts_have_a_credit_that_comes_back() -> None:
    work = BackgroundWork()
    work.prefilled("device-1", 560, 0.0)
    assert not work.has_credit("device-1", 5.0)
    assert work.has_credit("device-2", 5.0)
    assert work.has_credit("device-1", 10.0)


def test_who_writes_earns_credit_for_long_prompts() -> None:
    work = BackgroundWork()
    for _ in range(20):
        assert work.has_credit("device-1", 0.0), "a prompt of ten times the text is in proportion"
        work.prefilled("device-1", 500, 0.0)
        work.judged("device-1", computed=60, committed=50)


def test_credit_is_not_earned_without_bound() -> None:
    work = BackgroundWork()
    assert work.has_credit("device-1", 0.0)
    work.judged("device-1", computed=5000, committed=5000)
    work.prefilled("device-1", 6000, 0.0)
    assert not work.has_credit("device-1", 60.0)
