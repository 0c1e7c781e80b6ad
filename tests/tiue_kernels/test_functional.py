"""Every operator against its textbook form, which repeats and concatenates everything."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from testing.tolerances import EXACT_RELATIVE, relative_error
from tiue_kernels import functional
from tiue_kernels.cpu.conv2d import LEAST_BYTES, MOST_PIXELS
from tiue_kernels.ops.geglu_feed_forward import CHUNK
from tiue_kernels.ops.upsample_conv2d import LEAST_PIXELS

Tensors = tuple[torch.Tensor, ...]
K, B = 3, 2


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def check(actual: Callable[..., Tensors], textbook: Callable[..., Tensors], *tensors) -> None:
    """Outputs and every gradient, in float64."""
    results = []
    for function in (actual, textbook):
        inputs = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*inputs)
        loss = sum((o * noise(*o.shape, seed=9)).sum() for o in outputs)
        results.append((outputs, torch.autograd.grad(loss, inputs)))
    (outputs, gradients), (expected, expected_gradients) = results
    for value, reference in zip(
        (*outputs, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert value.shape == reference.shape
        assert relative_error(value, reference) <= EXACT_RELATIVE


SPLITS = {  # hidden channels, skip channels, groups, c0
    "aligned": (16, 8, 6, 16),
    "straddling": (20, 10, 3, 20),
    "straddling_inside": (18, 12, 3, 20),
    "one_group": (6, 3, 1, 9),
    "a_group_a_channel": (3, 5, 8, 3),
    "wide_skip": (4, 20, 3, 8),
}


@pytest.mark.parametrize("timesteps", [1, K])
@pytest.mark.parametrize("split", SPLITS)
def test_shared_skip_group_norm_silu(split: str, timesteps: int) -> None:
    hidden_channels, skip_channels, groups, border = SPLITS[split]
    channels = hidden_channels + skip_channels

    def actual(hidden, skip, weight, bias) -> Tensors:
        front, back = functional.shared_skip_group_norm_silu(hidden, skip, groups, weight, bias)
        assert front.shape[:2] == (timesteps * B, border)
        assert back.shape[:2] == (B, channels - border)
        return front, back.repeat(timesteps, 1, 1, 1)

    def textbook(hidden, skip, weight, bias) -> Tensors:
        joined = torch.cat([hidden, skip.repeat(timesteps, 1, 1, 1)], dim=1)
        out = F.silu(F.group_norm(joined, groups, weight, bias))
        return out[:, :border], out[:, border:]

    check(
        actual,
        textbook,
        noise(timesteps * B, hidden_channels, 4, 3),
        noise(B, skip_channels, 4, 3),
        noise(channels),
        noise(channels, seed=1),
    )


def test_geglu_feed_forward() -> None:
    def textbook(x, up, up_bias, down, down_bias) -> Tensors:
        first, second = F.linear(x, up, up_bias).chunk(2, dim=-1)
        return (F.linear(first * F.gelu(second), down, down_bias),)

    tokens = CHUNK // 2 + 1  # two rows of them: more than a chunk, and no whole number of chunks
    tensors = (noise(2, tokens, 3), noise(8, 3), noise(8), noise(5, 4), noise(5))
    check(lambda *t: (functional.geglu_feed_forward(*t),), textbook, *tensors)
    with torch.no_grad():
        out = functional.geglu_feed_forward(*tensors)
    assert relative_error(out, textbook(*tensors)[0]) <= EXACT_RELATIVE


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), (1, 0), (3, (2, 1))])
def test_conv2d(
    kernel: int, padding: int | tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 rows of 3 x 3 are few pixels, 2 rows of 16 x 16 are not; a small weight is no product.
    monkeypatch.setattr("tiue_kernels.cpu.conv2d.LEAST_BYTES", 0)
    assert (2 * size * size <= MOST_PIXELS) == (size == 3)
    check(
        lambda x, w, b: (functional.conv2d(x, w, b, padding),),
        lambda x, w, b: (F.conv2d(x, w, b, padding=padding),),
        noise(2, 5, size, size),
        noise(4, 5, kernel, kernel),
        noise(4),
    )


@pytest.mark.parametrize("least_bytes", [0, LEAST_BYTES], ids=["product", "convolution"])
@pytest.mark.parametrize("skip_channels", [0, 5])
@pytest.mark.parametrize("kernel", [1, 3])
def test_split_conv2d(
    kernel: int, skip_channels: int, least_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = kernel // 2
    monkeypatch.setattr("tiue_kernels.cpu.conv2d.LEAST_BYTES", least_bytes)

    def actual(hidden, skip, weight, bias) -> Tensors:
        rows, shared = functional.split_conv2d(hidden, skip, weight, bias, padding)
        assert shared.shape == (B, *rows.shape[1:])
        return (rows + shared.repeat(K, 1, 1, 1),)

    def textbook(hidden, skip, weight, bias) -> Tensors:
        joined = torch.cat([hidden, skip.repeat(K, 1, 1, 1)], dim=1)
        return (F.conv2d(joined, weight, bias, padding=padding),)

    skip = noise(B, skip_channels, 4, 3)
    weight = noise(7, 6 + skip_channels, kernel, kernel)
    tensors = (noise(K * B, 6, 4, 3), skip, weight, noise(7))
    if skip_channels:
        check(actual, textbook, *tensors)
    else:
        assert relative_error(actual(*tensors)[0], textbook(*tensors)[0]) <= EXACT_RELATIVE


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("with_hidden", [False, True])
def test_broadcast_add_group_norm_silu(with_hidden: bool, scale_shift: bool) -> None:
    def actual(shared, temb, weight, bias, *hidden) -> Tensors:
        first = hidden[0] if with_hidden else None
        return (
            functional.broadcast_add_group_norm_silu(
                first, shared, temb, 4, weight, bias, 1e-6, scale_shift
            ),
        )

    def textbook(shared, temb, weight, bias, *hidden) -> Tensors:
        rows = shared.repeat(K, 1, 1, 1) + (hidden[0] if with_hidden else 0)
        temb = temb[:, :, None, None]
        if not scale_shift:
            rows = rows + temb
        rows = F.group_norm(rows, 4, weight, bias, 1e-6)
        if scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            rows = rows * (1 + scale) + shift
        return (F.silu(rows),)

    temb = noise(K * B, 8 * (1 + scale_shift))
    hidden = (noise(K * B, 8, 3, 5),) if with_hidden else ()
    check(actual, textbook, noise(B, 8, 3, 5), temb, noise(8), noise(8, seed=1), *hidden)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [B, K * B], ids=["text", "self"])
def test_cross_timestep_attention(rows: int, masked: bool) -> None:
    heads, tokens, keys, channels = 2, 6, 4, 8
    bias = None
    if masked:
        bias = torch.zeros(rows, 1, keys, dtype=torch.float64)
        bias[0, 0, 2:] = -10000.0

    def actual(query, key, value) -> Tensors:
        out = functional.cross_timestep_attention(query, key, value, heads, None, bias)
        return (out,)

    def textbook(query, key, value) -> Tensors:
        def split(x: torch.Tensor) -> torch.Tensor:
            x = x.repeat(K * B // len(x), 1, 1)
            return x.unflatten(2, (heads, -1)).transpose(1, 2)

        scores = split(query) @ split(key).transpose(2, 3) * (channels // heads) ** -0.5
        if bias is not None:
            scores = scores + bias.repeat(K * B // rows, 1, 1)[:, None]
        return ((scores.softmax(-1) @ split(value)).transpose(1, 2).flatten(2),)

    check(
        actual,
        textbook,
        noise(K * B, tokens, channels),
        noise(rows, keys, channels),
        noise(rows, keys, channels, seed=1),
    )


def test_scale_of_attention() -> None:
    query, key, value = noise(2, 3, 4), noise(1, 5, 4), noise(1, 5, 4, seed=1)
    uniform = functional.cross_timestep_attention(query, key, value, 2, scale=0.0)
    assert relative_error(uniform, value.mean(1, keepdim=True).expand(2, 3, 4)) <= EXACT_RELATIVE


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 11)], ids=str)
def test_upsample_conv2d(size: tuple[int, int]) -> None:
    def textbook(x, weight, bias) -> Tensors:
        doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return (F.conv2d(doubled, weight, bias, padding=1),)

    # (9, 11) has pixels enough for the four phases, the others take the plain way.
    assert (K * B * size[0] * size[1] >= LEAST_PIXELS) == (size == (9, 11))
    check(
        lambda *tensors: (functional.upsample_conv2d(*tensors),),
        textbook,
        noise(K * B, 5, *size),
        noise(4, 5, 3, 3),
        noise(4),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_slices_in_reused_memory_are_fresh_at_every_call(memory_format) -> None:
    hidden, skip = noise(2, 6, 17, 17), noise(1, 5, 17, 17)
    for seed in range(3):
        for width in (7, 3):  # a smaller slice in the larger buffer
            weight = noise(width, 11, 3, 3, seed=seed).contiguous(memory_format=memory_format)
            rows, shared = functional.split_conv2d(hidden, skip, weight, padding=1)
            expected = F.conv2d(torch.cat([hidden, skip.repeat(2, 1, 1, 1)], 1), weight, padding=1)
            assert relative_error(rows + shared, expected) <= EXACT_RELATIVE


def test_geglu() -> None:
    def textbook(x) -> Tensors:
        hidden, gate = x[..., :5], x[..., 5:]
        return (hidden * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)),)

    check(lambda x: (functional.geglu(x),), textbook, noise(2, 3, 10))


def test_timestep_sum_group_norm_silu() -> None:
    coefficients = noise(K)

    def actual(hidden, weight, bias) -> Tensors:
        return (functional.timestep_sum_group_norm_silu(hidden, coefficients, 2, weight, bias),)

    def textbook(hidden, weight, bias) -> Tensors:
        active = F.silu(F.group_norm(hidden, 2, weight, bias)).unflatten(0, (K, B))
        return ((coefficients[:, None, None, None, None] * active).sum(0),)

    check(actual, textbook, noise(K * B, 6, 3, 4), noise(6), noise(6, seed=1))


def test_one_pass_combine() -> None:
    coefficients = noise(K)

    def textbook(latents, noise_pred) -> Tensors:
        return (2.5 * latents + sum(e * n for e, n in zip(coefficients, noise_pred, strict=True)),)

    check(
        lambda z, n: (functional.one_pass_combine(z, n, 2.5, coefficients),),
        textbook,
        noise(B, 4, 3, 3),
        noise(K, B, 4, 3, 3),
    )


def test_noise_kl() -> None:
    def textbook(maps) -> Tensors:
        flat = maps.flatten(2)
        mean = flat.mean(-1)
        variance = (flat - mean[..., None]).square().sum(-1) / (flat.shape[-1] - 1)
        return (0.5 * (mean**2 + variance - 1 - torch.log(variance)),)

    check(lambda maps: (functional.noise_kl(maps),), textbook, noise(K, B, 4, 3, 3))
    # The divergence of a standard normal sample is that of its moments: near nothing.
    assert functional.noise_kl(noise(1, 4, 64, 64)).abs().max() < 1e-3


def test_the_gate_and_the_weight_of_a_branch_in_several_chunks(monkeypatch) -> None:
    """Rows that share x, weights as large as a chunk of them, and a last chunk that is shorter."""

    def textbook(x, gate, tokens, weight, bias) -> Tensors:
        return (x.repeat(K, 1, 1) + gate[:, None] * F.linear(tokens, weight, bias),)

    monkeypatch.setattr("tiue_kernels.ops.linear_gated_residual.MOST_PRODUCTS", 4 * 5 * 3)
    check(
        lambda *tensors: (functional.linear_gated_residual(*tensors),),
        textbook,
        *(noise(B, 4, 5), noise(K * B, 5), noise(K * B, 4, 3), noise(5, 3), noise(5)),
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_adaptive_feed_forward(approximate: str) -> None:
    def textbook(x, scale, shift, gate, up, down) -> Tensors:
        tokens = F.layer_norm(x, (5,), eps=1e-6).repeat(K, 1, 1)
        tokens = tokens * (1 + scale[:, None]) + shift[:, None]
        active = F.gelu(F.linear(tokens, up), approximate=approximate)
        return (x.repeat(K, 1, 1) + gate[:, None] * F.linear(active, down),)

    check(
        lambda *tensors: (
            functional.adaptive_feed_forward(
                *tensors[:5], None, tensors[5], approximate=approximate
            ),
        ),
        textbook,
        *(noise(B, 4, 5), noise(K * B, 5), noise(K * B, 5, seed=1), noise(K * B, 5, seed=2)),
        *(noise(7, 5), noise(5, 7)),
    )


@pytest.mark.parametrize("trained", [(), (0,), (3,), (4, 5), (6, 7)], ids=str)
def test_what_is_frozen_of_a_feed_forward_gets_no_gradient(trained: tuple[int, ...]) -> None:
    """Each gradient alone is what it is beside the others."""
    rows = (noise(B, 4, 5), *(noise(K * B, 5, seed=seed) for seed in range(3)))
    tensors = [*rows, noise(7, 5), noise(7), noise(5, 7), noise(5)]
    every = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(functional.adaptive_feed_forward(*every).square().sum(), every)
    some = [x.clone().requires_grad_(place in trained) for place, x in enumerate(tensors)]
    out = functional.adaptive_feed_forward(*some)
    assert out.requires_grad == bool(trained)
    if trained:
        out.square().sum().backward()
    for place, (tensor, wanted) in enumerate(zip(some, expected, strict=True)):
        assert (tensor.grad is not None) == (place in trained)
        if place in trained:
            assert relative_error(tensor.grad, wanted) <= EXACT_RELATIVE


def test_an_empty_batch_passes_through() -> None:
    hidden, skip, norm = noise(0, 6, 4, 4), noise(0, 2, 4, 4), (noise(8), noise(8))
    front, back = functional.shared_skip_group_norm_silu(hidden, skip, 4, *norm)
    rows, shared = functional.split_conv2d(front, back, noise(4, 8, 3, 3), noise(4), 1)
    temb = noise(0, 4)
    out = functional.broadcast_add_group_norm_silu(rows, shared, temb, 2, noise(4), noise(4))
    assert out.shape == functional.conv2d(out, noise(4, 4, 1, 1)).shape == (0, 4, 4, 4)
    assert functional.upsample_conv2d(out, noise(4, 4, 3, 3)).shape == (0, 4, 8, 8)
    total = functional.timestep_sum_group_norm_silu(out, noise(3), 2, noise(4), noise(4))
    assert total.shape == (0, 4, 4, 4)
    text = noise(0, 5, 8)
    assert functional.cross_timestep_attention(noise(0, 3, 8), text, text, 2).shape == (0, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = functional.noise_kl(noise(3, 0, 4, 2, 2).requires_grad_())
    assert empty.shape == (3, 0)
    empty.sum().backward()
    rows, (weight, bias) = noise(0, 8), (noise(8, 8), noise(8))
    (out,) = functional.adaptive_layer_norm_linear(text, rows, rows, [weight], [bias])
    out = functional.linear_gated_residual(text, rows, out, weight, bias)
    out = functional.adaptive_feed_forward(out, rows, rows, rows, weight, bias, weight, bias)
    assert out.shape == (0, 5, 8)
    combined = functional.one_pass_combine(noise(0, 4), noise(3, 0, 4), 1.0, noise(3))
    assert combined.shape == (0, 4)


def test_sliced_inputs_need_not_be_contiguous() -> None:
    hidden, skip = noise(4, 12, 8, 8)[:, ::2, :, ::2], noise(2, 4, 4, 8).transpose(2, 3)
    weights = (noise(10), noise(10, seed=1))
    results = functional.shared_skip_group_norm_silu(hidden, skip, 5, *weights)
    expected = functional.shared_skip_group_norm_silu(
        hidden.contiguous(), skip.contiguous(), 5, *weights
    )
    assert all(
        relative_error(a, b) <= EXACT_RELATIVE for a, b in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    # 2048 + 1 - 2048 is 1, but 0 where sums are kept in 8 or 11 bits.
    maps = torch.tensor([2048.0, 1.0, -2048.0], dtype=dtype).reshape(3, 1, 1, 1, 1)
    total = functional.one_pass_combine(torch.zeros(1, 1, 1, 1, dtype=dtype), maps, 1.0,
                                        torch.ones(3, dtype=torch.float64))  # fmt: skip
    assert total.dtype == dtype
    assert total.item() == 1.0
    assert functional.noise_kl(maps.flatten()[None, None, None]).dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.shared_skip_group_norm_silu(
            noise(5, 4, 2, 2), noise(2, 4, 2, 2), 2, noise(8), noise(8)
        ),
        lambda: functional.shared_skip_group_norm_silu(
            noise(4, 4, 2, 2), noise(2, 4, 2, 3), 2, noise(8), noise(8)
        ),
        lambda: functional.shared_skip_group_norm_silu(
            noise(4, 4, 2, 2), noise(2, 4, 2, 2), 3, noise(8), noise(8)
        ),
        lambda: functional.shared_skip_group_norm_silu(
            noise(4, 4, 2, 2), noise(2, 4, 2, 2), 2, noise(7), noise(8)
        ),
        lambda: functional.split_conv2d(
            noise(4, 4, 2, 2), noise(2, 4, 2, 2), noise(3, 9, 1, 1)
        ),
        lambda: functional.broadcast_add_group_norm_silu(
            None, noise(2, 4, 2, 2), noise(4, 5), 2, noise(4), noise(4)
        ),
        lambda: functional.broadcast_add_group_norm_silu(
            noise(6, 4, 2, 2), noise(2, 4, 2, 2), noise(4, 4), 2, noise(4), noise(4)
        ),
        lambda: functional.cross_timestep_attention(
            noise(4, 3, 8), noise(3, 3, 8), noise(3, 3, 8), 2
        ),
        lambda: functional.cross_timestep_attention(
            noise(4, 3, 8), noise(2, 3, 8), noise(2, 2, 8), 2
        ),
        lambda: functional.cross_timestep_attention(
            noise(4, 3, 8), noise(2, 3, 8), noise(2, 3, 8), 3
        ),
        lambda: functional.geglu(noise(2, 3)),
        lambda: functional.conv2d(noise(1, 4, 2, 2), noise(3, 5, 1, 1)),
        lambda: functional.upsample_conv2d(noise(1, 4, 2, 2), noise(3, 4, 2, 2)),
        lambda: functional.timestep_sum_group_norm_silu(
            noise(4, 4, 2, 2), noise(3), 2, noise(4), noise(4)
        ),
        lambda: functional.one_pass_combine(noise(2, 4), noise(3, 2, 5), 1.0, noise(3)),
        lambda: functional.noise_kl(noise(4, 4)),
        lambda: functional.adaptive_layer_norm_linear(
            noise(2, 3, 4), noise(5, 4), noise(5, 4), [noise(6, 4)]
        ),
        lambda: functional.adaptive_layer_norm_linear(noise(2, 3, 4), noise(4, 4), noise(4, 4), []),
        lambda: functional.adaptive_layer_norm_linear(
            noise(2, 3, 4), noise(4, 4), noise(4, 4), [noise(6, 4)] * 2, [noise(6)]
        ),
        lambda: functional.linear_gated_residual(
            noise(2, 3, 4), noise(4, 4), noise(4, 3, 6), noise(5, 6)
        ),
        lambda: functional.linear_gated_residual(
            noise(2, 3, 4), noise(4, 4), noise(3, 3, 6), noise(4, 6)
        ),
        lambda: functional.linear_gated_residual(
            noise(2, 3, 4), noise(2, 4), noise(4, 3, 6), noise(4, 6)
        ),
        lambda: functional.adaptive_feed_forward(
            noise(2, 3, 4), *[noise(4, 4)] * 3, noise(9, 4), None, noise(4, 8)
        ),
        lambda: functional.adaptive_feed_forward(
            noise(2, 3, 4), *[noise(4, 4)] * 3, noise(8, 4), None, noise(4, 8), approximate="sin"
        ),
        lambda: functional.noise_kl(noise(2, 1, 1, 1)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must|need|no multiple|do not|weight takes|halves"):
        call()


def test_a_strided_scale_and_shift() -> None:
    weight, bias = noise(32)[::2], noise(32, seed=1)[::2]
    x = noise(2, 16, 4, 4)
    out = functional.broadcast_add_group_norm_silu(None, x, torch.zeros(2, 16), 4, weight, bias)
    expected = F.silu(F.group_norm(x, 4, weight.contiguous(), bias.contiguous()))
    assert relative_error(out, expected) <= EXACT_RELATIVE


def test_tensors_without_data() -> None:
    with torch.no_grad():
        for device in ("meta", "fake"):
            mode = FakeTensorMode() if device == "fake" else torch.device("meta")
            with mode:
                x, weight = torch.empty(4, 64, 32, 32), torch.empty(64, 80, 3, 3)
                assert functional.split_conv2d(x, x[:1, :16], weight)[0].shape == (4, 64, 30, 30)
                assert functional.geglu(x).shape == (4, 64, 32, 16)
        # Nothing of it is left behind in a buffer.
        real = functional.split_conv2d(
            noise(4, 64, 32, 32), noise(1, 16, 32, 32), noise(64, 80, 3, 3)
        )
    assert type(real[0]) is torch.Tensor
