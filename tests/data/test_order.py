"""The order: exhaustive bijections, exact mixtures, and nothing that depends on ranks or cuts."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from tinyllama_ds.data.order import MixtureStage, SampleOrder, permute
from tinyllama_ds.errors import ConfigError

V1 = {"slimpajama": 0.693584, "starcoderdata": 0.306416}
V1_MATH_CODE = {"slimpajama": 0.75, "starcoderdata": 0.15, "proof-pile-2": 0.1}


def located(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    found = order.locate(np.arange(start, stop))
    return list(zip(found.source.tolist(), found.epoch.tolist(), found.sample.tolist(), strict=True))


def counts_table(order: SampleOrder, samples: int) -> np.ndarray:
    """Counts (samples + 1, sources) before every position, from the located sources themselves."""
    source = order.locate(np.arange(samples)).source
    one_hot = source[:, None] == np.arange(len(order.sources))
    return np.concatenate((np.zeros((1, len(order.sources)), dtype=np.int64), np.cumsum(one_hot, axis=0)))


# --- the permutation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [range(1, 600), range(600, 5000, 37), [4095, 4096, 4097, 65_535, 65_537, 100_003]])
def test_permute_is_a_bijection(sizes: range | list[int]):
    for size in sizes:
        assert np.array_equal(np.sort(permute(np.arange(size), size, "key")), np.arange(size)), size


def test_permute_reaches_sizes_beyond_32_bits():
    size = 3 * 10**12 + 1
    indices = np.random.default_rng(0).integers(0, size, 10_000)
    values = permute(indices, size, "key")
    assert values.min() >= 0
    assert values.max() < size
    assert len(np.unique(values)) == len(np.unique(indices))
    assert values.max() > 0.99 * size


def test_permute_depends_on_the_key_and_on_nothing_else():
    size = 1000
    assert not np.array_equal(permute(np.arange(size), size, "a"), permute(np.arange(size), size, "b"))
    whole = permute(np.arange(size), size, "a")
    assert [permute(np.array([index]), size, "a")[0] for index in range(size)] == whole.tolist()


@pytest.mark.parametrize("size", [1000, 10_007])
def test_permute_mixes(size: int):
    """Chi-square of where sixteenths and neighbours land, against 5 standard deviations of its distribution."""
    values = permute(np.arange(size), size, "mix")
    origin_and_place = np.arange(size) * 16 // size * 16 + values * 16 // size
    distance_of_neighbours = np.diff(values) % size * 16 // size
    for landed, cells in ((origin_and_place, 256), (distance_of_neighbours, 16)):
        expected = len(landed) / cells
        chi_square = ((np.bincount(landed, minlength=cells) - expected) ** 2 / expected).sum()
        assert chi_square < cells + 5 * np.sqrt(2 * cells)


# --- the mixture ------------------------------------------------------------------------------------------------------


def random_mixtures(count: int, sources: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(sources)
    weights = rng.integers(1, 1000, (count, sources))
    return [{f"s{number}": weight / 1000 for number, weight in enumerate(row.tolist())} for row in weights]


@pytest.mark.parametrize(
    "weights",
    [V1, V1_MATH_CODE, {"a": 0.999, "b": 0.001}, {"a": 1}, {"a": 1 / 3, "b": 2 / 3}]
    + random_mixtures(10, 2)
    + random_mixtures(10, 3),
)
def test_every_prefix_is_within_one_sample_of_its_weights(weights: dict[str, float]):
    samples = 3000
    order = SampleOrder(1, dict.fromkeys(weights, 10**6), [MixtureStage(samples, weights)])
    counts = counts_table(order, samples)
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert (counts.sum(axis=1) == np.arange(samples + 1)).all()
    assert np.abs(counts - np.arange(samples + 1)[:, None] * shares).max() <= 1


@pytest.mark.parametrize("sources", [4, 5, 8, 13])
def test_many_sources_stay_within_two_samples(sources: int):
    for weights in random_mixtures(10, sources):
        order = SampleOrder(1, dict.fromkeys(weights, 10**6), [MixtureStage(5000, weights)])
        shares = np.array(list(weights.values())) / sum(weights.values())
        assert np.abs(counts_table(order, 5000) - np.arange(5001)[:, None] * shares).max() < 2


def test_counts_are_exact_integers_at_a_trillion_samples():
    order = SampleOrder(1, dict.fromkeys(V1, 10**9), [MixtureStage(10**12, V1)])
    for position in (10**12, 10**12 - 1, 5 * 10**11 + 7):
        counts = order.counts(position)
        assert sum(counts.values()) == position
        assert abs(counts["slimpajama"] - position * Fraction("0.693584")) <= Fraction(1, 2)


def test_weights_with_awkward_denominators_do_not_overflow():
    weights = {"a": 0.123456789, "b": 0.987654321, "c": 0.55555555507, "d": 1e-7}
    order = SampleOrder(1, dict.fromkeys(weights, 10**9), [MixtureStage(10**12, weights)])
    counts = np.array([list(order.counts(position).values()) for position in range(10**12 - 200, 10**12)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(axis=1) == np.arange(10**12 - 200, 10**12)).all()
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert np.allclose(counts[-1] / counts[-1].sum(), shares, rtol=1e-5, atol=1e-9)


STAGES = [
    MixtureStage(700, {"a": 1.0}),
    MixtureStage(500, {"a": 0.5, "b": 0.3, "c": 0.2}),
    MixtureStage(301, {"b": 0.25, "c": 0.75}),
]
SIZES = {"a": 90, "b": 41, "c": 1}


def test_counts_agree_with_what_is_drawn_across_stages():
    order = SampleOrder(7, SIZES, STAGES)
    table = counts_table(order, 1501)
    for position in [*range(690, 710), *range(1190, 1210), 1501]:
        assert list(order.counts(position).values()) == table[position].tolist()
    assert table[700].tolist() == [700, 0, 0]


def test_any_split_point_gives_the_same_sequence():
    order = SampleOrder(7, SIZES, STAGES)
    whole = located(order, 0, 1501)
    for cut in range(0, 1502, 53):
        assert located(order, 0, cut) + located(SampleOrder(7, SIZES, STAGES), cut, 1501) == whole
    shuffled = np.random.default_rng(0).permutation(1501)
    found = order.locate(shuffled)
    assert list(zip(found.source, found.epoch, found.sample, strict=True)) == [whole[index] for index in shuffled]


def test_every_epoch_of_every_source_holds_each_sample_once():
    order = SampleOrder(7, SIZES, STAGES)
    drawn = located(order, 0, 1501)
    assert len(set(drawn)) == len(drawn)
    for number, size in enumerate(SIZES.values()):
        epochs = itertools.groupby((entry for entry in drawn if entry[0] == number), key=lambda entry: entry[1])
        seen = [(epoch, sorted(sample for _, _, sample in entries)) for epoch, entries in epochs]
        assert [epoch for epoch, _ in seen] == list(range(len(seen)))
        assert all(samples == list(range(size)) for _, samples in seen[:-1])


def test_epochs_differ_from_each_other_and_seeds_too():
    order = SampleOrder(1, {"a": 50}, [MixtureStage(100, {"a": 1})])
    first, second = located(order, 0, 50), located(order, 50, 100)
    assert [sample for _, _, sample in first] != [sample for _, _, sample in second]
    other = SampleOrder(2, {"a": 50}, [MixtureStage(100, {"a": 1})])
    assert located(other, 0, 50) != first


def test_the_order_is_frozen():
    """A change of these numbers changes runs in progress: raise ORDER_VERSION with it."""
    order = SampleOrder(3407, {"a": 1000, "b": 77}, [MixtureStage(10**6, {"a": 0.7, "b": 0.3})])
    assert located(order, 123_456, 123_460) == [(0, 86, 491), (0, 86, 977), (1, 481, 32), (0, 86, 952)]


def test_a_source_without_a_sample_is_rejected():
    with pytest.raises(ConfigError, match="source 'b': has less than one sample"):
        SampleOrder(1, {"a": 5, "b": 0}, [MixtureStage(10, {"a": 1.0, "b": 1.0})])


# --- variants of one run ----------------------------------------------------------------------------------------------


def variant_orders() -> dict[str, SampleOrder]:
    """TinyLlama v1.1's three variants in small: one basic stage, two further stages with sources of their own."""
    weights = {
        "general": {"slimpajama": 1.0},
        "math-code": V1_MATH_CODE,
        "chinese": {"slimpajama": 0.5, "skypile": 0.5},
    }
    sizes = {"slimpajama": 211, "starcoderdata": 90, "proof-pile-2": 50, "skypile": 120}
    return {
        name: SampleOrder(
            3407,
            {source: sizes[source] for source in shares},
            [MixtureStage(600, {"slimpajama": 1.0}), MixtureStage(140, shares, 40), MixtureStage(64, shares)],
        )
        for name, shares in weights.items()
    }


def test_variants_share_the_order_of_their_basic_stage_whatever_sources_come_later():
    orders = variant_orders()
    general = located(orders["general"], 0, 600)
    for order in orders.values():
        assert located(order, 0, 600) == general
        assert order.counts(600)["slimpajama"] == 600


def test_borders_of_stages_lose_and_repeat_nothing():
    """Every source goes on in its epoch across the borders, wherever batches end and whatever their size."""
    for order in variant_orders().values():
        drawn = located(order, 0, 804)
        steps = [*range(0, 600, 8), *range(600, 740, 7), *range(740, 804, 32)]  # three batch sizes
        by_step = [entry for start, stop in itertools.pairwise([*steps, 804]) for entry in located(order, start, stop)]
        assert by_step == drawn
        assert len(set(drawn)) == len(drawn)
        for number, size in enumerate(order.num_samples.values()):
            own = [(epoch, sample) for source, epoch, sample in drawn if source == number]
            assert [epoch for epoch, _ in own] == [index // size for index in range(len(own))]


# --- ramps ------------------------------------------------------------------------------------------------------------


def ramp_target(positions: np.ndarray, ramp: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The integral of shares that go linearly from `before` to `after` over `ramp` samples, by its definition."""
    middle = np.arange(positions.max()) + 0.5
    progress = np.minimum(middle / ramp, 1)[:, None]
    shares = (1 - progress) * before + progress * after
    return np.concatenate((np.zeros((1, len(before))), np.cumsum(shares, axis=0)))[positions]


@pytest.mark.parametrize("ramp", [1, 2, 999, 1000, 2500])
@pytest.mark.parametrize("weights", [V1_MATH_CODE, {"slimpajama": 0.5, "skypile": 0.5}])
def test_a_ramp_of_the_published_stages_is_exact_to_one_sample(ramp: int, weights: dict[str, float]):
    first, second = 100, 2500
    sizes = dict.fromkeys(weights, 10**6)
    order = SampleOrder(
        1, sizes, [MixtureStage(first, {"slimpajama": 1.0}), MixtureStage(second, weights, ramp_samples=ramp)]
    )
    counts = counts_table(order, first + second)[first:] - [first, *[0] * (len(sizes) - 1)]
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(axis=1) == np.arange(second + 1)).all()
    before = np.array([1.0] + [0.0] * (len(sizes) - 1))
    target = ramp_target(np.arange(second + 1), ramp, before, np.array(list(weights.values())))
    assert np.abs(counts - target).max() <= 1
    after = counts[-1] - counts[ramp]
    assert np.abs(after - (second - ramp) * np.array(list(weights.values()))).max() <= 1


@pytest.mark.parametrize("seed", range(10))
def test_any_ramp_is_monotone_sums_up_and_stays_close(seed: int):
    rng = np.random.default_rng(seed)
    names = [f"s{number}" for number in range(int(rng.integers(2, 6)))]
    before, after = (rng.integers(0, 100, len(names)) / 100 + 0.001 for _ in range(2))
    ramp, samples = int(rng.integers(1, 2000)), 2000
    weights = [dict(zip(names, shares.tolist(), strict=True)) for shares in (before, after)]
    stages = [MixtureStage(50, weights[0]), MixtureStage(samples, weights[1], ramp)]
    order = SampleOrder(seed, dict.fromkeys(names, 500), stages)
    counts = counts_table(order, 50 + samples)
    assert list(order.counts(50 + samples).values()) == counts[-1].tolist()
    counts = counts[50:] - counts[50]
    assert (counts.sum(axis=1) == np.arange(samples + 1)).all()
    target = ramp_target(np.arange(samples + 1), ramp, before / before.sum(), after / after.sum())
    assert np.abs(counts - target).max() < 3
    whole = located(order, 0, 50 + samples)
    cut = int(rng.integers(0, samples))
    assert located(order, 0, cut) + located(order, cut, 50 + samples) == whole
    assert len(set(whole)) == len(whole)


def test_a_ramp_at_the_scale_of_the_published_run_is_closed_form():
    """1.5T tokens, then 350B with a ramp of 6B: counts at its end are those of its integral."""
    stage, ramp = 732_421_875, 2_929_688
    stages = [
        MixtureStage(stage, {"slimpajama": 1.0}),
        MixtureStage(170_898_438, V1_MATH_CODE, ramp_samples=ramp),
    ]
    order = SampleOrder(1, dict.fromkeys(V1_MATH_CODE, 10**8), stages)
    counts = order.counts(stage + ramp)
    assert abs(counts["starcoderdata"] - 0.15 * ramp / 2) <= 1
    assert abs(counts["proof-pile-2"] - 0.1 * ramp / 2) <= 1
    assert sum(counts.values()) == stage + ramp


def test_a_ramp_that_integers_cannot_hold_is_an_error():
    with pytest.raises(ValueError, match="expected less than"):
        SampleOrder(1, {"a": 1}, [MixtureStage(2**40, {"a": 1.0}, ramp_samples=2**31)])


# --- ranks ------------------------------------------------------------------------------------------------------------


def ranks_positions(batch: int, steps: int, world_size: int) -> list[list[int]]:
    """The contiguous slices that training deals to each rank."""
    share = batch // world_size
    return [
        [step * batch + rank * share + index for step in range(steps) for index in range(share)]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_are_disjoint_and_their_union_is_the_corpus(world_size: int):
    size, batch = 240, 24
    order = SampleOrder(3407, {"a": size}, [MixtureStage(size, {"a": 1.0})])
    shares = [
        set(order.locate(np.array(positions)).sample.tolist()) for positions in ranks_positions(batch, 10, world_size)
    ]
    assert sum(map(len, shares)) == size
    assert set.union(*shares) == set(range(size))


def test_a_planted_shuffle_per_rank_would_be_caught():
    """TinyLlama's bug 67: each rank shuffled with its own seed, then took its stride. Here it reads about 65 %."""
    size, world_size = 240, 8
    shares = [
        set(np.random.default_rng(3407 + rank).permutation(size)[rank::world_size].tolist())
        for rank in range(world_size)
    ]
    read = set.union(*shares)
    assert len(read) < size
    assert 0.5 < len(read) / size < 0.75


# --- samples left out -------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_passed_over_and_nothing_else_changes():
    stages = [MixtureStage(100, {"a": 0.7, "b": 0.3}), MixtureStage(60, {"a": 0.2, "b": 0.8})]
    gaps = [range(95, 103), range(16, 24), range(24, 40)]  # over a stage's border, and two that touch
    whole = SampleOrder(7, {"a": 1000, "b": 500}, stages)
    order = SampleOrder(7, {"a": 1000, "b": 500}, stages, gaps)
    kept = np.array([ordinal for ordinal in range(160) if not any(ordinal in excluded for excluded in gaps)])
    positions = np.arange(len(kept))
    assert np.array_equal(order.global_sample_index(positions), kept)
    found, expected = order.locate(positions), whole.locate(kept)
    for field in ("source", "epoch", "sample"):
        assert np.array_equal(getattr(found, field), getattr(expected, field))
    for position in range(len(kept)):
        seen = np.bincount(found.source[:position], minlength=2)
        assert list(order.counts(position).values()) == seen.tolist()
    assert order.span(14, 4) == range(14, 42)


def test_the_run_goes_on_past_its_last_stage_by_what_was_left_out():
    order = SampleOrder(7, {"a": 1000}, [MixtureStage(40, {"a": 1.0})], [range(8, 16)])
    located = order.locate(np.arange(40))
    assert order.global_sample_index(np.array([39]))[0] == 47
    assert len(set(located.sample.tolist())) == 40
