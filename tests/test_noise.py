"""The noise is Philox4x32-10, never repeats, has its distribution, and does not depend on how work is divided."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from oracles import noise_block, philox4x32_10
from scipy import stats
from tolerances import TOLERANCES

import anpgpu
from anpgpu.functional import Counters, Purpose, noise
from anpgpu.kernels import noise as noise_module
from anpgpu.runtime import dispatch

pytestmark = pytest.mark.usefixtures("cpu_backend")

SEED = 0x299F31D0A4093822
LIMITS = {"purpose": 2**4, "layer": 2**8, "time": 2**32, "rollout": 2**32, "sample": 2**20, "rank": 2**12}
PINNED_SIGNS = "459e2cef779b9374b9ce1ac7e003cb56e6bc09cf6c2990d77c7be72c1e6ea9f4"
PINNED_GAUSSIANS = (0.6099683, 0.907976, 0.6462676, 0.9958206, 1.0285858, -1.0599411, -0.0857927, -1.5556055)
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def as_int64(key):
    return torch.tensor(key - 2**64 if key >= 2**63 else key, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_random123_known_answers(counter, key, words):
    drawn = noise_module.philox(*(torch.tensor([word]) for word in counter), as_int64(key[0] | key[1] << 32))
    assert tuple(int(word) for word in drawn) == words
    assert philox4x32_10(counter, key) == words


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), st.integers(0, 2**64 - 1))
def test_philox_equals_integer_arithmetic(counter, seed):
    drawn = noise_module.philox(*(torch.tensor([word]) for word in counter), as_int64(seed))
    assert tuple(int(word) for word in drawn) == philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))


@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 65, 127, 129, 511, 513, 1100])
def test_rademacher_bits_by_brute_force(hidden):
    where = {"purpose": 3, "layer": 5, "time": 2**32 - 2, "rollout": 2**31, "sample": 7, "rank": 4095}
    drawn = noise(SEED, (2, 1, 1, hidden), counters=Counters(**where))
    assert torch.equal(drawn.double(), noise_block(SEED, (2, 1, 1, hidden), "rademacher", **where))


@pytest.mark.parametrize("hidden", [1, 2, 3, 8, 9, 15, 17, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussians_by_brute_force(hidden, dtype):
    where = {"purpose": 1, "layer": 255, "time": 3, "rollout": 2**32 - 2, "sample": 2**20 - 3, "rank": 1}
    drawn = noise(SEED, (1, 3, 2, hidden), kind="gaussian", counters=Counters(**where), dtype=dtype)
    error = (drawn.double() - noise_block(SEED, (1, 3, 2, hidden), "gaussian", **where)).abs().max()
    assert error <= (TOLERANCES["gaussian"].bound if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sigma_and_dtype(kind, dtype):
    unit = noise(SEED, (2, 3, 4, 37), kind=kind)
    scaled = noise(SEED, (2, 3, 4, 37), kind=kind, sigma=0.125, dtype=dtype)
    assert scaled.dtype == dtype
    step = 2 * torch.finfo(dtype).eps + TOLERANCES["gaussian"].bound
    assert ((scaled.double() - 0.125 * unit.double()).abs() <= step * (1 + unit.double().abs())).all()


def test_negative_and_large_seeds_are_the_same_64_bits():
    assert torch.equal(noise(2**64 - 5, (1, 1, 3, 64)), noise(-5, (1, 1, 3, 64)))
    assert torch.equal(noise(torch.tensor(-5), (1, 1, 3, 64)), noise(-5, (1, 1, 3, 64)))


@pytest.fixture
def drawn_counters(torch_backend, monkeypatch):
    """The counters of every Philox call, as rows (c0, c1, c2, c3)."""
    rows = []
    philox = noise_module.philox

    def spy(*words_and_seed):
        broadcast = torch.broadcast_tensors(*words_and_seed[:4])
        rows.append(torch.stack([word.flatten() for word in broadcast], dim=1))
        return philox(*words_and_seed)

    monkeypatch.setattr(noise_module, "philox", spy)
    return rows


@st.composite
def blocks_of_noise(draw):
    shape = tuple(draw(st.integers(1, high)) for high in (4, 4, 6, 1100))
    extent = {"time": shape[0], "sample": shape[1], "rollout": shape[2]}
    edges = {name: limit - extent.get(name, 1) for name, limit in LIMITS.items()}
    fields = {name: draw(st.one_of(st.integers(0, edge), st.just(edge))) for name, edge in edges.items()}
    return shape, Counters(**fields)


@given(blocks_of_noise(), st.sampled_from(["rademacher", "gaussian"]))
def test_counters_are_injective(block, kind):
    # Every field can be read back from the counter, so that no two sets of fields share a counter.
    shape, first = block
    rows = []
    philox = noise_module.philox
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module, "philox", lambda *words: rows.extend(words[:4]) or philox(*words))
        patch.setattr(dispatch, "_has_numba", lambda: False)
        noise(SEED, shape, kind=kind, counters=first)
    c0, c1, c2, c3 = (word.to(torch.int64) for word in torch.broadcast_tensors(*rows))
    assert all(bool(((word >= 0) & (word < 2**32)).all()) for word in (c0, c1, c2, c3))
    assert bool((c0 >> 28 == first.purpose).all())
    assert bool((c0 >> 20 & 0xFF == first.layer).all())
    assert bool((c3 >> 20 == first.rank).all())
    block = c0 & 0xFFFFF
    places = [block % 4, c1 - first.time, (c3 & 0xFFFFF) - first.sample, c2 - first.rollout, block // 4]
    units = 512 if kind == "rademacher" else 16
    expected = np.indices((4, *shape[:3], -(-shape[3] // units)))
    assert np.array_equal(torch.stack(places).numpy(), expected)


def test_no_counter_is_drawn_twice_in_an_update(drawn_counters):
    torch.manual_seed(1)
    rnn = anpgpu.RNN(3, 20, num_layers=2, bidirectional=True, perturbation=anpgpu.Perturbation("anp", 5))
    head = torch.nn.Linear(40, 2)
    how = anpgpu.Perturbation("anp", 5, readout="perturbed")
    anpgpu.estimate_grad_(rnn, head, torch.randn(4, 3, 3), torch.randn(4, 3, 2), perturbation=how)
    rows = torch.cat(drawn_counters)
    # (T, B, P) counters of four blocks each, for four layers of one group and for the readout.
    assert len(rows) == 5 * 4 * (4 * 3 * 5)
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_noise_goes_on_past_4_billion_elements(kind):
    # A flattened 32-bit index over 2^21 rollouts of 2048 units would wrap to 0 at the second step.
    rollouts, hidden = 2**21, 2048
    assert rollouts * hidden == 2**32
    first, second = (
        noise(SEED, (1, 1, 1, hidden), kind=kind, counters=Counters(time=time, rollout=rollout))
        for time, rollout in ((0, 0), (1, 0))
    )
    across = noise(SEED, (1, 1, 1, hidden), kind=kind, counters=Counters(rollout=rollouts))
    for left, right in ((first, second), (first, across), (second, across)):
        assert abs(float((left * right).sum())) / hidden**0.5 < TOLERANCES["z"].bound


@pytest.mark.parametrize("field", list(LIMITS))
def test_every_field_changes_the_noise(field):
    low, high = (noise(SEED, (2, 2, 2, 600), counters=Counters(**{field: value})) for value in (0, 2))
    assert abs(float((low * high).sum())) / low.numel() ** 0.5 < TOLERANCES["z"].bound


@pytest.mark.parametrize(("field", "limit"), LIMITS.items())
def test_fields_beyond_their_range_raise(field, limit):
    for value in (-1, limit):
        with pytest.raises(ValueError, match=rf"{field}.*{value}"):
            noise(SEED, (1, 1, 1, 4), counters=Counters(**{field: value}))
    assert noise(SEED, (1, 1, 1, 4), counters=Counters(**{field: limit - 1})).shape == (1, 1, 1, 4)


@pytest.mark.parametrize(("field", "axis"), [("time", 0), ("sample", 1), ("rollout", 2)])
def test_blocks_that_reach_beyond_a_range_raise(field, axis):
    shape = [1, 1, 1, 4]
    shape[axis] = 3
    last = LIMITS[field] - 3
    assert noise(SEED, tuple(shape), counters=Counters(**{field: last})).shape == tuple(shape)
    with pytest.raises(ValueError, match=rf"{field}.*{LIMITS[field]}"):
        noise(SEED, tuple(shape), counters=Counters(**{field: last + 1}))


@pytest.mark.parametrize(("kind", "units"), [("rademacher", 512), ("gaussian", 16)])
def test_too_many_units_raise(kind, units):
    most = 2**20 // 4 * units
    with pytest.raises(ValueError, match=str(most + 1)):
        noise(SEED, (1, 0, 1, most + 1), kind=kind)
    assert noise(SEED, (1, 0, 1, most), kind=kind).shape == (1, 0, 1, most)


def test_gaussians_are_normal():
    drawn = noise(SEED, (20, 10, 10, 130), kind="gaussian", dtype=torch.float64).flatten().numpy()
    assert stats.kstest(drawn, "norm").pvalue > TOLERANCES["p_value"].bound
    count = len(drawn)
    # Standard errors of the first four moments of a normal sample.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - mean) / (variance / count) ** 0.5 < TOLERANCES["z"].bound


def test_gaussian_tail():
    drawn = noise(SEED, (64, 8, 16, 256), kind="gaussian").abs().flatten()
    # At 2^21 numbers about 133 are beyond 4; |x| is at most sqrt(2 * 33 log 2) = 6.8.
    expected = len(drawn) * 2 * stats.norm.sf(4)
    assert abs(int((drawn > 4).sum()) - expected) / expected**0.5 < TOLERANCES["z"].bound
    assert float(drawn.max()) <= 6.8


def test_rademacher_patterns_are_equally_likely():
    drawn = noise(SEED, (20, 10, 10, 640))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    bits = (drawn > 0).flatten().numpy()
    patterns = np.packbits(bits.reshape(-1, 8), axis=1).ravel()
    assert stats.chisquare(np.bincount(patterns, minlength=256)).pvalue > TOLERANCES["p_value"].bound


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_no_correlation_along_any_axis(kind, axis):
    # There are some 18 lags per axis; the bound allows for 100,000.
    drawn = noise(SEED, (16, 16, 16, 640), kind=kind, counters=Counters(time=5, sample=3, rollout=1))
    size = drawn.shape[axis]
    lags = [lag for lag in (1, 2, 3, 4, 7, 8, 15, 16, 64, 128, 256, 512) if lag < size]
    for lag in lags:
        values, lagged = drawn.narrow(axis, 0, size - lag), drawn.narrow(axis, lag, size - lag)
        z = float((values * lagged).sum(dtype=torch.float64)) / values.numel() ** 0.5
        assert abs(z) < TOLERANCES["z_many"].bound, f"lag {lag}: z = {z:.1f}"


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("rows", ["units", "rollouts", "samples", "steps"])
def test_no_pair_is_correlated(kind, rows):
    # Every pair of 300 units (rollouts, ...): 45,000 correlations.
    shape = {"units": (16, 16, 16, 300), "rollouts": (8, 8, 300, 64), "samples": (8, 300, 8, 64)}
    drawn = noise(SEED, shape.get(rows, (300, 8, 8, 64)), kind=kind)
    axis = ("steps", "samples", "rollouts", "units").index(rows)
    table = drawn.movedim(axis, 0).flatten(1).double()
    z = (table @ table.T) / table.shape[1] ** 0.5
    z.fill_diagonal_(0)
    assert float(z.abs().max()) < TOLERANCES["z_many"].bound


def test_neighbouring_seeds_layers_and_purposes_are_uncorrelated():
    streams = [
        noise(seed, (4, 4, 8, 512), counters=Counters(purpose=purpose, layer=layer)).flatten().double()
        for seed in (0, 1, 2**32, -1)
        for purpose in Purpose
        for layer in (0, 1, 128)
    ]
    table = torch.stack(streams)
    z = (table @ table.T) / table.shape[1] ** 0.5
    z.fill_diagonal_(0)
    assert float(z.abs().max()) < TOLERANCES["z_many"].bound


@st.composite
def parts_of_a_block(draw):
    whole = [draw(st.integers(1, high)) for high in (5, 4, 6, 700)]
    cuts = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in whole[:3]]
    slices = [slice(low, max(high, low + 1)) if low < size else slice(size - 1, size)
              for (low, high), size in zip(cuts, whole[:3], strict=True)]  # fmt: skip
    return tuple(whole), slices, draw(st.integers(1, whole[3]))


@given(parts_of_a_block(), st.sampled_from(["rademacher", "gaussian"]), st.integers(0, 2**31 - 50))
def test_a_part_of_a_block_is_that_part_of_the_noise(part, kind, offset):
    whole, (steps, samples, rollouts), units = part
    first = Counters(layer=3, time=offset, rollout=2 * offset, sample=offset % 1000, rank=2)
    everything = noise(SEED, whole, kind=kind, counters=first)[steps, samples, rollouts, :units]
    where = first._replace(
        time=first.time + steps.start, sample=first.sample + samples.start, rollout=first.rollout + rollouts.start
    )
    assert torch.equal(noise(SEED, tuple(everything.shape), kind=kind, counters=where), everything)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_largest_sigma_leaves_the_noise_finite(dtype):
    most = torch.finfo(dtype).max / 8
    assert bool(torch.isfinite(noise(SEED, (1, 1, 64, 1024), sigma=most, kind="gaussian", dtype=dtype)).all())
    with pytest.raises(ValueError, match="sigma must be positive and finite"):
        noise(SEED, (1, 1, 1, 1), sigma=1.01 * most, dtype=dtype)


def test_an_empty_batch_has_no_noise():
    assert noise(SEED, (3, 0, 2, 5)).shape == (3, 0, 2, 5)


def test_the_stream_is_pinned():
    # A different checksum is a different stream: it needs a new NOISE_STREAM_VERSION.
    where = Counters(purpose=Purpose.READOUT, layer=2, time=11, rollout=13, sample=17, rank=19)
    signs = (noise(SEED, (2, 3, 5, 1100), counters=where) > 0).to(torch.uint8).numpy()
    assert anpgpu.NOISE_STREAM_VERSION == 1
    assert hashlib.sha256(signs.tobytes()).hexdigest() == PINNED_SIGNS
    gaussians = noise(SEED, (1, 1, 1, 8), kind="gaussian", counters=where, dtype=torch.float64).flatten()
    pinned = torch.tensor(PINNED_GAUSSIANS, dtype=torch.float64)
    assert float((gaussians - pinned).abs().max()) < TOLERANCES["gaussian"].bound


def test_steps_that_are_not_there_are_refused():
    steps = noise_module.NoiseSteps(
        torch.tensor(1), (4, 1, 2, 3), sigma=1.0, kind="rademacher", counters=Counters(), dtype=torch.float32
    )
    whole = noise(1, (4, 1, 2, 3))
    assert torch.equal(steps.fill(2, torch.empty(2, 1, 2, 32)), whole[2:])
    with pytest.raises(IndexError, match="steps 3 to 5 are not among the 4 there are"):
        steps.fill(3, torch.empty(2, 1, 2, 32))
