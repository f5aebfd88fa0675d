"""The kernels of decoding, interpreted, against float64 at awkward sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.inference.model import serve_model
from mmfree_jax.ops.fast.checks import Use, check
from mmfree_jax.ops.fast.hopper import decode_attention, dense_product, few_rows, packed_product
from mmfree_jax.ops.fast.verification import kernels_assumed
from mmfree_jax.ops.packed import pack_planes
from tests.inference.small import made

EPS = 1e-6


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(few_rows, "INTERPRET", True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def input_of(kind, sources, inner):
    if kind == "swiglu":
        return sources[0] * sigmoid(sources[0]) * sources[1]
    if kind == "plain":
        return sources[0]
    v = rms(sources[0]) * inner
    return v * sources[1] * sigmoid(sources[1]) if kind == "gated" else v


@pytest.mark.parametrize(
    ("kind", "M", "K", "N", "G", "gains", "addend"),
    [
        ("norm", 1, 2048, 24, 3, 3, True),
        ("norm", 2, 1040, 8, 2, 1, False),
        ("gated", 3, 2064, 40, 1, 1, False),
        ("swiglu", 4, 16, 16, 1, 1, False),
        ("plain", 1, 4112, 8, 1, 0, True),
        ("plain", 2, 2832, 64, 2, 2, False),
    ],
)
def test_normed_product_is_the_bit_linear_of_its_sources(kind, M, K, N, G, gains, addend):
    rng = np.random.default_rng(K)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    sources = [draw(M, K) for _ in range(2 if kind in ("gated", "swiglu") else 1)]
    inner = None if kind in ("plain", "swiglu") else (1 + draw(K) / 4)
    outer = 1 + draw(gains, K) / 4 if gains else None
    codes = rng.integers(-1, 2, (G, N, K)).astype(np.int8)
    scales = [rng.uniform(0.5, 2, N if g == 1 else 1).astype(np.float32) for g in range(G)]
    added = draw(M, K) if addend else None

    ys, total = packed_product.normed_product(
        kind, sources, inner, outer, [pack_planes(c) for c in codes], scales, EPS, added, 0.5
    )

    exact = [np.float64(s) for s in sources]
    if addend:
        exact[0] = exact[0] + 0.5 * added
        np.testing.assert_allclose(total, exact[0], rtol=1e-6, atol=1e-6)
    u = input_of(kind, exact, inner)
    for g in range(G):
        z = rms(u) * outer[g % gains] if gains else u
        most = np.maximum(np.abs(z).max(-1, keepdims=True), 1e-5)
        step = most / 127 * scales[g]
        want = np.rint(z * 127 / most) @ codes[g].T.astype(np.float64) * step
        off = np.abs(ys[g] - want) / step  # in codes: one whose rounding fell the other way is one off
        assert off.max() <= 1.01
        assert np.mean(off) < 0.02


def test_a_row_of_zeros_gives_zeros():
    weights = [pack_planes(np.ones((8, 64), np.int8))]
    ys, _ = packed_product.normed_product(
        "norm",
        [np.zeros((1, 64), np.float32)],
        np.ones(64, np.float32),
        np.ones(64, np.float32),
        weights,
        [np.ones(1, np.float32)],
        EPS,
    )
    np.testing.assert_array_equal(ys[0], np.zeros((1, 8)))


@pytest.mark.parametrize(("M", "K", "N"), [(1, 128, 32), (5, 384, 96), (64, 256, 64), (77, 640, 32)])
def test_codes_product_is_exact(M, K, N):
    rng = np.random.default_rng(M)
    q = rng.integers(-128, 128, (M, K)).astype(np.int8)
    codes = rng.integers(-1, 2, (N, K)).astype(np.int8)
    by_row, by_column = np.exp2(rng.integers(-3, 3, M)).astype(np.float32), np.exp2(rng.integers(-3, 3, N))
    y = packed_product.codes_product(q, by_row, pack_planes(codes), by_column.astype(np.float32), jnp.float32)
    want = q.astype(np.int64) @ codes.T.astype(np.int64) * by_row[:, None] * by_column
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("kernel", ["normed_product", "dense_product"])
@pytest.mark.parametrize(("processors", "ahead"), [(1, 1), (2, 4096), (3, 10**6)])
@pytest.mark.parametrize("columns", [8, 40, 104])
def test_blocks_of_many_tiles_compute_every_column_once(kernel, processors, ahead, columns, monkeypatch):
    """However many tiles a block has, and are loaded ahead of it; the last tile of the last block may be half empty."""
    module = {"normed_product": packed_product, "dense_product": dense_product}[kernel]
    monkeypatch.setattr(few_rows, "PROCESSORS", processors)
    monkeypatch.setattr(module, "BYTES_AHEAD", ahead)
    monkeypatch.setattr(packed_product, "MANY_COLUMNS", 100)  # 104 columns in tiles of 16
    dense, packed = ("norm", 2, "float32", "float32", True), ("norm", 2, 1, "float32", True, True, "planes")
    use = Use(kernel, (2, 128, columns), dense if module is dense_product else packed)
    jax.clear_caches()  # what is traced depends on the constants
    found = check(use)
    jax.clear_caches()
    assert found.passed, found.worst


USES = [
    Use("normed_product", (2, 48, 24), ("norm", 3, 3, "float32", True, True, "planes")),
    Use("normed_product", (2, 48, 24), ("norm", 3, 3, "float32", True, True, "trits")),
    Use("normed_product", (1, 2603, 16), ("swiglu", 1, 1, "float32", False, False, "trits")),
    Use("normed_product", (1, 2080, 8), ("gated", 1, 1, "bfloat16", False, False, "planes")),
    Use("normed_product", (3, 128, 8), ("plain", 2, 0, "float32", False, False, "planes")),
    Use("normed_product", (4, 64, 16), ("swiglu", 1, 1, "bfloat16", False, False, "planes")),
    Use("codes_product", (17, 128, 32), (True,)),
    Use("dense_product", (2, 192, 64), ("norm", 2, "float32", "bfloat16", True)),
    Use("dense_product", (1, 512, 32), ("swiglu", 1, "bfloat16", "bfloat16", False)),
    Use("dense_product", (4, 64, 96), ("plain", 1, "float32", "float32", False)),
    Use("decode_attention", (3, 77, 6, 2, 32), ("float32",)),
    Use("decode_attention", (9, 32, 2, 2, 64), ("bfloat16",)),
    Use("decode_attention", (1, 1, 1, 1, 32), ("float32",)),
]


@pytest.mark.parametrize("use", USES, ids=str)
def test_checks_pass_and_see_a_wrong_column(use, monkeypatch):
    assert check(use).passed, check(use).worst
    modules = {"decode_attention": decode_attention, "dense_product": dense_product}
    module = modules.get(use.kernel, packed_product)
    kernel = getattr(module, use.kernel)
    if use.kernel == "codes_product":
        broken = lambda *a: kernel(*a).at[:, -1].add(2.0)
    elif use.kernel == "decode_attention":
        broken = lambda *a: (kernel(*a)[0].at[:, -1].add(2.0), kernel(*a)[1])
    else:
        broken = lambda *a: ([y.at[-1, -1].multiply(1.2) for y in kernel(*a)[0]], kernel(*a)[1])
    monkeypatch.setattr(module, use.kernel, broken)
    assert not check(use).passed


@pytest.mark.parametrize(
    ("family", "batch", "products", "sums"),
    [("matmul-free", 1, 9, 4), ("matmul-free-rwkv4", 3, 13, 3), ("bitnet", 3, 10, 3), ("transformer++", 2, 10, 3)],
)
def test_a_model_decodes_as_without_kernels(family, batch, products, sums, monkeypatch):
    """Every BitLinear of the model goes through the kernel, with the residual added in it; the logits stay."""
    model = serve_model(made(family, width=128, glu_width=320, tokenizer_vocab=304))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (batch, 2))

    def logits():
        state = model.start(batch, 8)
        step = jax.jit(lambda tokens, state: model.extend(tokens, state))
        out = []
        for t in range(tokens.shape[1]):
            y, state = step(tokens[:, t : t + 1], state)
            out.append(y[:, 0])
        return np.stack(out)

    expected = logits()
    addends = []
    for module, name, place in ((packed_product, "normed_product", 7), (dense_product, "dense_product", 5)):
        kernel = getattr(module, name)
        counted = lambda *a, kernel=kernel, place=place, **k: addends.append(a[place]) or kernel(*a, **k)
        monkeypatch.setattr(module, name, counted)
    with kernels_assumed():
        jax.eval_shape(model.extend, tokens[:, :1], model.start(batch, 8))
        assert len(addends) == products
        assert sum(addend is not None for addend in addends) == sums
        found = logits()
    np.testing.assert_allclose(found, expected, atol=2e-4)
