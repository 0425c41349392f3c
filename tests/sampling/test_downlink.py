import cbor2
import numpy as np
import pytest

from sampling.distribution import Dist, point_mass, quantize
from sampling.downlink import FIRST_SAMPLES, FormName, choose_form, correct, dense, entry_bytes, samples, sparse
from schemas.codec import encode_verdict
from schemas.downlink import FORMS, MAX_SAMPLES, Dense, DownlinkForm, Samples, Sparse, pack_form
from schemas.messages import Verdict
from schemas.policy import SamplingPolicy
from tests.support.statistics import ALARM, p_value

MEGABYTE = 1 << 20
SHAPED = SamplingPolicy(seed=1)
OPEN = SamplingPolicy(seed=1, top_k=0, top_p=1.0)
VOCABULARY = 49_152


def uniform(support: int) -> Dist:
    return Dist(np.arange(support), np.full(support, np.float32(1.0 / support), dtype=np.float64))


def choose(
    p: Dist,
    policy: SamplingPolicy = SHAPED,
    *,
    vocabulary: int = VOCABULARY,
    max_bytes: int = MEGABYTE,
    form: FormName = FormName.AUTO,
    tried: int = 0,
) -> DownlinkForm:
    return choose_form(
        p, policy=policy, position=3, vocabulary_size=vocabulary, max_bytes=max_bytes, form=form, tried=tried
    )


def test_a_shaped_p_goes_whole() -> None:
    assert isinstance(choose(uniform(50)), Sparse)


def test_an_unshaped_p_goes_in_samples_unless_it_is_short() -> None:
    assert isinstance(choose(uniform(5000), OPEN), Samples)
    assert isinstance(choose(uniform(FIRST_SAMPLES), OPEN), Sparse)


def test_where_samples_have_failed_p_goes_whole() -> None:
    assert isinstance(choose(uniform(5000), OPEN, tried=16), Sparse)


def test_dense_goes_where_it_is_smaller() -> None:
    assert isinstance(choose(uniform(100), vocabulary=100), Dense)
    assert isinstance(choose(uniform(66), vocabulary=100), Sparse)


@pytest.mark.parametrize(
    ("form", "kind"), [(FormName.SPARSE, Sparse), (FormName.SAMPLES, Samples), (FormName.DENSE, Dense)]
)
def test_a_form_that_is_insisted_on_is_sent(form: FormName, kind: type) -> None:
    for policy in (SHAPED, OPEN):
        assert isinstance(choose(uniform(100), policy, vocabulary=100, form=form), kind)


@pytest.mark.parametrize("form", FormName)
@pytest.mark.parametrize("vocabulary", [100, 49_152, 128_256])
@pytest.mark.parametrize("support", [1, 50, 100])
@pytest.mark.parametrize("max_bytes", [8, 100, 400, 10_000, MEGABYTE])
@pytest.mark.parametrize("tried", [0, 16, 5000])
def test_the_form_fits_into_the_packet(
    form: FormName, vocabulary: int, support: int, max_bytes: int, tried: int
) -> None:
    following = choose(uniform(support), OPEN, vocabulary=vocabulary, max_bytes=max_bytes, form=form, tried=tried)
    verdict = Verdict(handle=1, round=1, accepted=0, next=following)
    assert len(encode_verdict(verdict)) <= max_bytes + 48


def test_samples_go_on_where_the_last_ended_and_grow() -> None:
    first = choose(uniform(5000), OPEN, form=FormName.SAMPLES)
    assert isinstance(first, Samples)
    assert (first.start, len(first.ids)) == (0, FIRST_SAMPLES)
    second = choose(uniform(5000), OPEN, form=FormName.SAMPLES, tried=16)
    assert isinstance(second, Samples)
    assert (second.start, len(second.ids)) == (16, 64)
    last = choose(uniform(5000), OPEN, form=FormName.SAMPLES, tried=4096)
    assert isinstance(last, Samples)
    assert (last.start, len(last.ids)) == (4096, MAX_SAMPLES)


def test_each_sample_is_one_draw_for_good() -> None:
    p = uniform(100)
    whole = samples(p, policy=OPEN, position=3, start=0, number=64)
    parts = [samples(p, policy=OPEN, position=3, start=start, number=16) for start in (0, 16, 32, 48)]
    assert whole.ids == tuple(token for part in parts for token in part.ids)
    assert samples(p, policy=OPEN, position=4, start=0, number=64).ids != whole.ids


def test_samples_have_law_p_and_carry_it() -> None:
    """Chi-square over 30,000 draws, false once in 10,000 seeds."""
    p = Dist(np.array([3, 0, 5]), np.array([0.5, 0.375, 0.125]))
    drawn = [
        samples(p, policy=OPEN.model_copy(update={"seed": seed}), position=seed % 7, start=0, number=1000)
        for seed in range(30)
    ]
    law = np.zeros(6)
    law[p.ids] = p.probs
    assert p_value(np.bincount([token for part in drawn for token in part.ids], minlength=6), law) > ALARM
    assert all(
        probability == law[token] for part in drawn for token, probability in zip(part.ids, part.probs, strict=True)
    )


P = Dist(np.array([0, 1, 2, 3]), np.array([0.5, 0.25, 0.125, 0.125]))
Q = quantize(Dist(np.array([1, 0, 4]), np.array([0.5, 0.25, 0.25])))
RESIDUAL = np.array([0.25, 0.0, 0.125, 0.125, 0.0]) / 0.5


@pytest.mark.parametrize("form", [FormName.SPARSE, FormName.SAMPLES, FormName.DENSE])
def test_the_correction_has_the_residual_law_in_every_form(form: FormName) -> None:
    """Chi-square over 20,000 seeds; 3 assertions, each false once in 10,000."""
    counts = np.zeros(5, dtype=np.int64)
    for seed in range(20_000):
        policy, tried, token = OPEN.model_copy(update={"seed": seed}), 0, None
        while token is None:
            following = choose(P, policy, vocabulary=5, form=form, tried=tried)
            token = correct(following, Q, policy=policy, position=3)
            tried += FIRST_SAMPLES if tried == 0 else 4 * tried
        counts[token] += 1
    assert p_value(counts, RESIDUAL) > ALARM


def test_samples_that_are_all_likelier_under_q_ask_for_more() -> None:
    certain = quantize(point_mass(1))
    form = Samples(start=0, ids=(1,) * 16, probs=(0.9,) * 16)
    assert correct(form, certain, policy=OPEN, position=3) is None


def test_sparse_and_dense_carry_p_bit_by_bit() -> None:
    p = uniform(7)
    assert np.array(sparse(p).probs).tolist() == p.probs.tolist()
    assert np.frombuffer(dense(p, 9).probs, dtype="<f4").astype(float).tolist() == [*p.probs.tolist(), 0.0, 0.0]


def test_every_form_on_the_wire_has_a_rule_and_a_name_in_the_settings() -> None:
    kinds = [form.model_fields["kind"].default for form in FORMS]
    assert [form.value for form in FormName] == ["auto", *kinds]
    assert len({form.number for form in FORMS}) == len(FORMS)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_a_form_takes_no_more_bytes_than_it_may(form: str, vocabulary: int) -> None:
    first = vocabulary - 200
    p = Dist(np.arange(first, vocabulary), np.full(200, np.float32(1 / 200), dtype=np.float64))
    size = entry_bytes(vocabulary) * len(p) if form == "sparse" else 4 * vocabulary
    made = choose(p, OPEN, vocabulary=vocabulary, form=FormName(form), max_bytes=size)
    assert made.kind == form
    arrays = sum(len(cbor2.dumps(field)) for field in pack_form(made))
    assert abs(arrays - size) <= 16  # the arrays' heads, and the numbers
    assert choose(p, OPEN, vocabulary=vocabulary, form=FormName(form), max_bytes=size - 1).kind == "samples"
