"""Layouts: bit for bit against goldens, closed forms and FlashInfer itself, and back again."""

import warnings
from importlib import metadata

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_nvfp4_moe import layouts

E4M3 = ml_dtypes.float8_e4m3fn
KERNEL_LAYOUTS = {"trtllm": "trt", "cute_dsl": "cute"}  # and their prefix in the goldens
PREP = {"prep_gated": True, "prep_relu2": False}
SHORT = settings(max_examples=40)

in_every_way = pytest.mark.parametrize("way", ["numpy", "jax", "jit"])
gated_or_not = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
each_kernel = pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
each_prep = pytest.mark.parametrize("prep", PREP)


def run(way, f, x):
    """f(x) on numpy, on a JAX array or traced; what comes in must come out."""
    if way == "numpy":
        y = f(x)
        assert isinstance(y, np.ndarray)
    else:
        y = (jax.jit(f) if way == "jit" else f)(jnp.asarray(x))
        assert isinstance(y, jax.Array)
    assert y.dtype == x.dtype
    return np.asarray(y)


def assert_same_bits(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()


def swap_halves(w):
    return np.roll(w, w.shape[-2] // 2, axis=-2)


def to_kernel(x, name, layout, sizes, *, gated):
    """All four steps for `name` in w13, s13, w2, s2, from a checkpoint's array."""
    hidden, intermediate = sizes
    per_byte = 2 if name[0] == "w" else 16
    if name[1:] == "13":
        x = layouts.pad_w13(x, gated=gated, rows=intermediate, cols=hidden // per_byte)
        order = layouts.w13_row_order(layout, intermediate, gated=gated)
    else:
        x = layouts.pad_w2(x, rows=hidden, cols=intermediate // per_byte)
        order = layouts.w2_row_order(layout, hidden)
    x = x[..., order, :]
    return layouts.swizzle_scales(x) if name[0] == "s" else x


def from_kernel(x, name, layout, shape, sizes, *, gated):
    """`to_kernel` backwards; `shape` is the checkpoint's."""
    hidden, intermediate = sizes
    *_, rows, cols = shape
    if name[0] == "s":
        k = hidden if name == "s13" else intermediate
        x = layouts.unswizzle_scales(x, rows=x.shape[-2], cols=k // 16)
    if name[1:] == "13":
        order = layouts.w13_row_order(layout, intermediate, gated=gated)
        x = x[..., layouts.inverse_order(order), :]
        return layouts.trim_w13(x, gated=gated, rows=rows // (2 if gated else 1), cols=cols)
    x = x[..., layouts.inverse_order(layouts.w2_row_order(layout, hidden)), :]
    return layouts.trim_w2(x, rows=rows, cols=cols)


# Goldens.


@in_every_way
@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("dtype", [np.uint8, E4M3])
def test_swizzle_golden(golden, case, dtype, way):
    data = golden("prep_swizzle")
    linear, swizzled = data[f"in{case}"].view(dtype), data[f"out{case}"].view(dtype)
    *_, rows, cols = linear.shape
    assert_same_bits(run(way, layouts.swizzle_scales, linear), swizzled)

    def back(x):
        return layouts.unswizzle_scales(x, rows=rows, cols=cols)

    assert_same_bits(run(way, back, swizzled), linear)


@each_prep
def test_padded_sizes_golden(golden, prep):
    data, gated = golden(prep), PREP[prep]
    assert layouts.padded_sizes("trtllm", 192, 48, gated=gated) == tuple(data["padded"])
    assert layouts.padded_sizes("cute_dsl", 192, 48, gated=gated) == tuple(data["cute_dims"])


@in_every_way
@each_prep
def test_padding_golden(golden, prep, way):
    data, gated = golden(prep), PREP[prep]
    hidden, intermediate = (int(n) for n in data["padded"])
    for name, cols in (("w13", hidden // 2), ("s13", hidden // 16)):
        source, expected = data[name], data[f"pad_{name}"]
        if gated:  # the goldens swap the halves first and pad then
            assert_same_bits(swap_halves(source), data[f"reord_{name}"])
            expected = swap_halves(expected)

        def pad(x, cols=cols):
            return layouts.pad_w13(x, gated=gated, rows=intermediate, cols=cols)

        assert_same_bits(run(way, pad, source), expected)
    for name, cols in (("w2", intermediate // 2), ("s2", intermediate // 16)):

        def pad(x, cols=cols):
            return layouts.pad_w2(x, rows=hidden, cols=cols)

        assert_same_bits(run(way, pad, data[name]), data[f"pad_{name}"])


@in_every_way
@each_prep
@each_kernel
@pytest.mark.parametrize("name", ["w13", "s13", "w2", "s2"])
def test_preparation_golden_and_back(golden, prep, layout, name, way):
    data, gated = golden(prep), PREP[prep]
    dtype = E4M3 if name[0] == "s" else np.uint8
    source = data[name].view(dtype)
    expected = data[f"{KERNEL_LAYOUTS[layout]}_{name}"].view(dtype)
    sizes = layouts.padded_sizes(layout, 192, 48, gated=gated)

    def there(x):
        return to_kernel(x, name, layout, sizes, gated=gated)

    def back(x):
        return from_kernel(x, name, layout, source.shape, sizes, gated=gated)

    assert_same_bits(run(way, there, source), expected)
    assert_same_bits(run(way, back, expected), source)


# Negative controls: each mistake a layout invites is visible in the goldens.


@each_prep
@each_kernel
@pytest.mark.parametrize("name", ["s13", "s2"])
def test_linear_scales_differ_from_golden(golden, prep, layout, name):
    data, gated = golden(prep), PREP[prep]
    expected = data[f"{KERNEL_LAYOUTS[layout]}_{name}"]
    sizes = layouts.padded_sizes(layout, 192, 48, gated=gated)
    swizzled = to_kernel(data[name], name, layout, sizes, gated=gated)
    linear = layouts.unswizzle_scales(swizzled, rows=swizzled.shape[-2], cols=swizzled.shape[-1])
    assert_same_bits(swizzled, expected)
    assert linear.shape == expected.shape
    assert not np.array_equal(linear, expected)


@each_kernel
@pytest.mark.parametrize("name", ["w13", "s13"])
def test_up_before_gate_differs_from_golden(golden, layout, name):
    data = golden("prep_gated")
    sizes = layouts.padded_sizes(layout, 192, 48, gated=True)
    swapped = to_kernel(swap_halves(data[name]), name, layout, sizes, gated=True)
    assert not np.array_equal(swapped, data[f"{KERNEL_LAYOUTS[layout]}_{name}"])


@each_prep
@pytest.mark.parametrize("name", ["w13", "s13", "w2", "s2"])
def test_rows_without_the_shuffle_differ_from_golden(golden, prep, name):
    data = golden(prep)
    sizes = layouts.padded_sizes("trtllm", 192, 48, gated=PREP[prep])
    # CuTe-DSL's layout is the one without a shuffle.
    unshuffled = to_kernel(data[name], name, "cute_dsl", sizes, gated=PREP[prep])
    assert not np.array_equal(unshuffled, data[f"trt_{name}"])


def test_padding_both_halves_at_once_differs_from_golden(golden):
    data = golden("prep_gated")
    hidden, intermediate = (int(n) for n in data["padded"])
    together = layouts.pad_w2(data["reord_w13"], rows=2 * intermediate, cols=hidden // 2)
    assert not np.array_equal(together, data["pad_w13"])


# Closed forms, element by element.


@SHORT
@given(rows=st.integers(1, 300), cols=st.integers(1, 21), lead=st.sampled_from([(), (2,), (2, 3)]))
def test_swizzle_places_every_scale(rows, cols, lead):
    scales = np.random.default_rng(rows * 32 + cols).integers(0, 256, (*lead, rows, cols), np.uint8)
    swizzled = layouts.swizzle_scales(scales)
    tall, wide = swizzled.shape[-2:]
    assert (tall, wide) == (layouts.round_up(rows, 128), layouts.round_up(cols, 4))

    i, j = np.ogrid[:rows, :cols]
    at = ((i // 128) * (wide // 4) + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4
    flat = swizzled.reshape(*lead, tall * wide)
    np.testing.assert_array_equal(flat[..., at], scales)
    padding = np.delete(flat, at.ravel(), axis=-1)
    assert padding.size == np.prod(lead, dtype=int) * (tall * wide - rows * cols)
    assert not padding.any()
    assert_same_bits(layouts.unswizzle_scales(swizzled, rows=rows, cols=cols), scales)


def trtllm_shuffle(n):
    return 32 * (n // 32) + (n % 8) * 4 + (n % 32) // 8


@pytest.mark.parametrize("intermediate", [64, 192, 704])
def test_trtllm_gated_closed_form(intermediate):
    # FlashInfer's form speaks of [up ; gate]; the linear layout is [gate ; up].
    up_gate = np.roll(np.arange(2 * intermediate), intermediate)
    stored = (trtllm_shuffle(n) for n in range(2 * intermediate))
    expected = [up_gate[s // 2 + s % 2 * intermediate] for s in stored]
    order = layouts.w13_row_order("trtllm", intermediate, gated=True)
    np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("size", [128, 384, 2816])
def test_trtllm_not_gated_and_w2_closed_form(size):
    expected = [trtllm_shuffle(n) for n in range(size)]
    np.testing.assert_array_equal(layouts.w2_row_order("trtllm", size), expected)
    np.testing.assert_array_equal(layouts.w13_row_order("trtllm", size, gated=False), expected)


@pytest.mark.parametrize("interleave", [16, 32, 64])
@pytest.mark.parametrize("intermediate", [64, 192, 704])
def test_cute_interleave_width(intermediate, interleave):
    expected = []
    for start in range(0, intermediate, interleave):
        group = range(start, start + interleave)
        expected += [intermediate + row for row in group]  # up
        expected += group  # gate
    order = layouts.w13_row_order("cute_dsl", intermediate, gated=True, interleave=interleave)
    np.testing.assert_array_equal(order, expected)
    default = layouts.w13_row_order("cute_dsl", intermediate, gated=True)
    assert np.array_equal(order, default) == (interleave == 64)


@gated_or_not
def test_orders_that_keep_rows_in_place(gated):
    np.testing.assert_array_equal(
        layouts.w13_row_order("linear", 48, gated=gated), np.arange(96 if gated else 48)
    )
    np.testing.assert_array_equal(layouts.w2_row_order("linear", 192), np.arange(192))
    np.testing.assert_array_equal(layouts.w2_row_order("cute_dsl", 256), np.arange(256))
    np.testing.assert_array_equal(
        layouts.w13_row_order("cute_dsl", 128, gated=False), np.arange(128)
    )


# Inverses.


@SHORT
@given(
    layout=st.sampled_from(["linear", "trtllm", "cute_dsl"]),
    gated=st.booleans(),
    tiles=st.integers(1, 40),
    interleave=st.sampled_from([16, 32, 64]),
)
def test_orders_are_int32_permutations(layout, gated, tiles, interleave):
    size = tiles * (64 if gated else 128)
    w13 = layouts.w13_row_order(layout, size, gated=gated, interleave=interleave)
    assert w13.shape == (2 * size if gated else size,)
    for order in (w13, layouts.w2_row_order(layout, 128 * tiles)):
        identity = np.arange(len(order))
        inverse = layouts.inverse_order(order)
        assert order.dtype == inverse.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), identity)
        np.testing.assert_array_equal(order[inverse], identity)
        np.testing.assert_array_equal(inverse[order], identity)


@SHORT
@given(
    gated=st.booleans(),
    intermediate=st.integers(1, 60),
    cols=st.integers(1, 40),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    dtype=st.sampled_from([np.uint8, E4M3, np.float32]),
)
def test_padding_is_zero_and_trims_away(gated, intermediate, cols, more, lead, dtype):
    parts = 2 if gated else 1
    rows, wide = intermediate + more[0], cols + more[1]
    count = int(np.prod(lead, dtype=int)) * parts * intermediate * cols
    w = (np.arange(count) % 100 + 1).astype(np.uint8)  # never zero, so that padding shows
    w = (w.astype(dtype) if dtype is np.float32 else w.view(dtype)).reshape(
        *lead, parts * intermediate, cols
    )
    padded = layouts.pad_w13(w, gated=gated, rows=rows, cols=wide)
    assert padded.dtype == w.dtype
    halves = padded.reshape(*lead, parts, rows, wide)
    assert np.count_nonzero(halves.astype(np.float32)) == count
    assert not halves[..., intermediate:, :].any()
    assert not halves[..., cols:].any()
    assert_same_bits(layouts.trim_w13(padded, gated=gated, rows=intermediate, cols=cols), w)
    if not gated:
        assert_same_bits(padded, layouts.pad_w2(w, rows=rows, cols=wide))
        assert_same_bits(layouts.trim_w2(padded, rows=intermediate, cols=cols), w)


@in_every_way
@gated_or_not
@each_kernel
def test_random_weights_there_and_back(rng, layout, gated, way):
    shapes = {"w13": (2, 96 if gated else 48, 104), "s13": (2, 96 if gated else 48, 13)}
    shapes |= {"w2": (2, 208, 24), "s2": (2, 208, 3)}
    sizes = layouts.padded_sizes(layout, 208, 48, gated=gated)
    for name, shape in shapes.items():
        source = rng.integers(0, 256, shape, np.uint8).view(E4M3 if name[0] == "s" else np.uint8)

        def there_and_back(x, name=name, shape=shape):
            stored = to_kernel(x, name, layout, sizes, gated=gated)
            return from_kernel(stored, name, layout, shape, sizes, gated=gated)

        assert_same_bits(run(way, there_and_back, source), source)


def test_bits_survive_every_code(rng):
    """All 256 codes of e4m3, NaNs and negative zero among them, under jit."""
    scales = rng.permutation(np.arange(256, dtype=np.uint8)).reshape(64, 4).view(E4M3)
    swizzled = run("jit", layouts.swizzle_scales, scales)
    assert_same_bits(layouts.unswizzle_scales(swizzled, rows=64, cols=4), scales)


# Sizes.


def test_round_up():
    assert [layouts.round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


@pytest.mark.parametrize(
    ("layout", "gated", "per_token", "expected"),
    [
        ("linear", True, False, (2880, 720)),
        ("linear", False, True, (2880, 720)),
        ("trtllm", True, False, (3072, 768)),
        ("trtllm", True, True, (3072, 768)),
        ("trtllm", False, False, (3072, 768)),
        ("trtllm", False, True, (3072, 768)),
        ("cute_dsl", True, False, (3072, 768)),
    ],
)
def test_padded_sizes(layout, gated, per_token, expected):
    sizes = layouts.padded_sizes(layout, 2880, 720, gated=gated, per_token=per_token)
    assert sizes == expected


def test_padded_sizes_depend_on_gated_and_per_token():
    assert layouts.padded_sizes("trtllm", 768, 704, gated=True) == (768, 704)
    assert layouts.padded_sizes("trtllm", 768, 704, gated=False) == (768, 768)
    assert layouts.padded_sizes("trtllm", 768, 704, gated=True, per_token=True) == (768, 704)
    assert layouts.padded_sizes("trtllm", 768, 704, gated=False, per_token=True) == (1024, 768)


@SHORT
@given(
    hidden=st.integers(1, 512),
    intermediate=st.integers(1, 512),
    gated=st.booleans(),
    per_token=st.booleans(),
    layout=st.sampled_from(list(KERNEL_LAYOUTS)),
)
def test_padded_sizes_satisfy_the_kernels(hidden, intermediate, gated, per_token, layout):
    hidden, intermediate = 16 * hidden, 16 * intermediate
    h, i = layouts.padded_sizes(layout, hidden, intermediate, gated=gated, per_token=per_token)
    rows13 = (2 if gated else 1) * i
    assert h >= hidden
    assert i >= intermediate
    # CuTe-DSL's default tactic has N tiles of 128 in both GEMMs and a cluster of one along N
    # (flashinfer-python@0.6.13: fused_moe/cute_dsl/tuner.py:199-206); it needs whole ones.
    assert rows13 % 128 == 0
    assert h % 128 == 0
    # K: 32 elements for CuTe-DSL; 64, a whole tile of scales, for both; 256 for the routed
    # TRTLLM-Gen GEMM1.
    assert h % 256 == 0
    assert i % 64 == 0
    # Every order and swizzle takes the result as it is.
    assert len(layouts.w13_row_order(layout, i, gated=gated)) == rows13
    assert len(layouts.w2_row_order(layout, h)) == h
    # Nothing is padded twice.
    assert layouts.padded_sizes(layout, h, i, gated=gated, per_token=per_token) == (h, i)


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layouts.padded_sizes("trt", 256, 64, gated=True),  # pyright: ignore
            r"layout must be one of \('linear', 'trtllm', 'cute_dsl'\), got 'trt'",
        ),
        (
            lambda: layouts.padded_sizes("linear", 100, 64, gated=True),
            r"hidden_size=100: .* multiple of 16; nearest above: 112",
        ),
        (
            lambda: layouts.padded_sizes("trtllm", 256, 0, gated=True),
            r"intermediate_size=0: .* positive multiple of 16; nearest above: 16",
        ),
        (
            lambda: layouts.w13_row_order("trtllm", 96, gated=True),
            r"intermediate_size=96: the trtllm layout needs .* of 64; nearest above: 128",
        ),
        (
            lambda: layouts.w13_row_order("trtllm", 192, gated=False),
            r"intermediate_size=192: .* of 128; nearest above: 256",
        ),
        (
            lambda: layouts.w13_row_order("cute_dsl", 48, gated=True, interleave=16),
            r"intermediate_size=48: .* of 64; nearest above: 64",
        ),
        (
            lambda: layouts.w13_row_order("cute_dsl", 64, gated=True, interleave=128),
            r"intermediate_size=64: .* of 128; nearest above: 128",
        ),
        (
            lambda: layouts.w13_row_order("cute_dsl", 64, gated=True, interleave=0),
            r"interleave=0: .* positive multiple of 1",
        ),
        (
            lambda: layouts.w2_row_order("cute_dsl", 192),
            r"hidden_size=192: the cute_dsl layout needs .* of 128; nearest above: 256",
        ),
        (
            lambda: layouts.w2_row_order("linear", 0),
            r"hidden_size=0: .* nearest above: 1",
        ),
        (
            lambda: layouts.inverse_order(np.array([0, 2, 2], np.int32)),
            r"order must hold each of 0\.\.2 exactly once",
        ),
        (
            lambda: layouts.pad_w13(np.zeros((3, 5, 4)), gated=True, rows=8, cols=8),
            r"even number of rows when gated, got shape \(3, 5, 4\)",
        ),
        (
            lambda: layouts.pad_w13(np.zeros((3, 6, 4)), gated=True, rows=2, cols=8),
            r"cannot pad \(3, 2, 3, 4\) to rows=2, cols=8: need at least 3, 4",
        ),
        (
            lambda: layouts.pad_w2(np.zeros((6, 4)), rows=6, cols=3),
            r"cannot pad \(6, 4\) to rows=6, cols=3",
        ),
        (
            lambda: layouts.trim_w2(np.zeros((6, 4)), rows=7, cols=4),
            r"cannot trim \(6, 4\) to rows=7, cols=4: need at most 6, 4",
        ),
        (
            lambda: layouts.trim_w13(np.zeros((6, 4)), gated=True, rows=-1, cols=4),
            r"cannot trim .* rows=-1",
        ),
        (
            lambda: layouts.pad_w2(np.zeros(4), rows=6, cols=4),
            r"w must have at least two dimensions, got shape \(4,\)",
        ),
        (
            lambda: layouts.swizzle_scales(np.zeros((128, 4), np.float32)),
            r"scales must be one byte each .* got float32",
        ),
        (
            lambda: layouts.unswizzle_scales(np.zeros((128, 4), np.uint8), rows=100, cols=5),
            r"swizzled must end in \[128, 8\] for rows=100, cols=5: \(128, 4\)",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refusals_while_tracing():
    scales = jax.ShapeDtypeStruct((128, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match="one byte each"):
        jax.eval_shape(layouts.swizzle_scales, scales)


# FlashInfer's own functions, those that run on a CPU.


@pytest.fixture
def flashinfer():
    """FlashInfer's functions on numpy bytes. Its cached index functions are left out: their keys
    forget whether the weights are gated."""
    reason = (
        "needs flashinfer-python==0.6.13 and torch "
        "(pip install torch==2.13.0 flashinfer-python==0.6.13)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=reason)
        pytest.importorskip("flashinfer", reason=reason)
        if metadata.version("flashinfer-python") != "0.6.13":
            pytest.skip(reason)
        from flashinfer import fp4_quantization, utils
        from flashinfer.cute_dsl.utils import convert_sf_to_mma_layout
        from flashinfer.fused_moe import core

        class FlashInfer:
            @staticmethod
            def alternate(w):
                return core.reorder_rows_for_gated_act_gemm(torch.from_numpy(w.copy())).numpy()

            @staticmethod
            def shuffle(w):
                return fp4_quantization.shuffle_matrix_a(torch.from_numpy(w.copy()), 128).numpy()

            @staticmethod
            def scale_rows(s):
                s = torch.from_numpy(s.copy())
                return utils.get_shuffle_matrix_sf_a_row_indices(s, 128, 16).numpy()

            @staticmethod
            def mma_view(s, experts, rows, k):
                return convert_sf_to_mma_layout(torch.from_numpy(s), rows, k, experts).numpy()

        yield FlashInfer


@pytest.mark.flashinfer
@pytest.mark.parametrize("intermediate", [64, 128, 192, 704, 1536])
def test_flashinfer_gated_w13(flashinfer, rng, intermediate):
    linear = rng.integers(0, 256, (2 * intermediate, 8), np.uint8)
    alternated = flashinfer.alternate(swap_halves(linear))
    ours = linear[layouts.w13_row_order("trtllm", intermediate, gated=True)]
    assert_same_bits(ours, flashinfer.shuffle(alternated))
    assert_same_bits(ours, alternated[flashinfer.scale_rows(alternated)])
    assert not np.array_equal(ours, flashinfer.shuffle(flashinfer.alternate(linear)))  # no swap


@pytest.mark.flashinfer
@pytest.mark.parametrize("rows", [128, 256, 384, 2816])
def test_flashinfer_not_gated_w13_and_w2(flashinfer, rng, rows):
    linear = rng.integers(0, 256, (rows, 8), np.uint8)
    shuffled = flashinfer.shuffle(linear)
    assert_same_bits(linear[layouts.w2_row_order("trtllm", rows)], shuffled)
    assert_same_bits(linear[layouts.w13_row_order("trtllm", rows, gated=False)], shuffled)
    assert_same_bits(linear[flashinfer.scale_rows(linear)], shuffled)
    inverse = layouts.inverse_order(layouts.w2_row_order("trtllm", rows))
    assert_same_bits(shuffled[inverse], linear)


@pytest.mark.flashinfer
@pytest.mark.parametrize(
    ("experts", "rows", "k"), [(1, 128, 64), (3, 256, 192), (2, 100, 80), (4, 384, 1024)]
)
def test_flashinfer_mma_scales(flashinfer, rng, experts, rows, k):
    linear = rng.integers(0, 256, (experts, rows, k // 16), np.uint8)
    view = flashinfer.mma_view(layouts.swizzle_scales(linear), experts, rows, k)
    e, i, j = np.ogrid[:experts, :rows, : k // 16]
    actual = view[i % 32, i % 128 // 32, i // 128, j % 4, j // 4, e]
    assert_same_bits(actual, linear)
