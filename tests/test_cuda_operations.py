"""The kernels as operations of torch, simulated: values and gradients.

The oracle is torch's autograd in float64 on formulas of torch's own, from the very
numbers the operations get. ``torch.autograd.gradcheck`` is of no use here: it needs
float64 inputs (in float32 its differences are mostly rounding), and the kernels take
none. Bounds: float32 within 2^-19, thirty-two roundings, of the largest number of the
result; bfloat16 within 2^-8 of it, one rounding of a kernel's and, where torch adds two
gradients, one more.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv3.primitives import cuda_kernels as ops
from minidsv3.primitives.torch_port import rotate

BOTH = [torch.float32, torch.bfloat16]
EPS = 1e-5
BOUND = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8}


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_close(got: Tensor, exact: Tensor) -> None:
    assert got.shape == exact.shape
    off = (got.double() - exact).abs()
    bound = BOUND[got.dtype] * exact.abs().max().clamp_min(1e-30)
    assert (off <= bound).all(), f"off by {off.max() / exact.abs().max():.1e}"


def against_autograd(ours, theirs, *inputs: Tensor) -> None:
    """Values, and gradients of a sum weighed at random, in all inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    given = [x.detach().requires_grad_() for x in inputs]
    expected, got = theirs(*exact), ours(*given)
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = got if isinstance(got, tuple) else (got,)
    loss = loss_exact = 0
    for n, (y, y_exact) in enumerate(zip(got, expected, strict=True)):
        assert_close(y.detach(), y_exact.detach())
        weights = draw(*y.shape, dtype=y.dtype, seed=n)
        loss = loss + (y * weights).sum()
        loss_exact = loss_exact + (y_exact * weights.double()).sum()
    loss.backward()
    loss_exact.backward()
    for x, x_exact in zip(given, exact, strict=True):
        assert x.grad.dtype == x.dtype
        assert_close(x.grad, x_exact.grad)


def norm(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, g.shape, g, EPS)


def add_norm(x: Tensor, residual: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return x + residual, norm(x + residual, g)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.fixture
def launched(monkeypatch) -> list:
    """The kernels that are launched, by name."""
    names, right = [], ops.launch

    def noting(kernel, *args, **kwargs):
        names.append(kernel.__qualname__.split(".")[0])  # the kernel, or its maker
        return right(kernel, *args, **kwargs)

    monkeypatch.setattr(ops, "launch", noting)
    return names


# --- values and gradients -----------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(8,), (3, 7), (2, 3, 48), (0, 16), (2, 0, 5)])
def test_rmsnorm(shape, dtype) -> None:
    x, g = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    if x.numel():
        against_autograd(lambda x, g: ops.rmsnorm(x, g, EPS), norm, x, g)
    else:
        x, g = x.requires_grad_(), g.requires_grad_()
        y = ops.rmsnorm(x, g, EPS)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        assert g.grad.tolist() == [0] * len(g)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(8,), (3, 7), (2, 3, 48)])
def test_add_rmsnorm(shape, dtype) -> None:
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    if dtype == torch.bfloat16:  # the norm is of the sum as it is rounded: here exact
        x, residual = x.round(), residual.round()
    g = draw(shape[-1], dtype=dtype, seed=1)
    against_autograd(
        lambda x, r, g: ops.add_rmsnorm(x, r, g, EPS), add_norm, x, residual, g
    )


def test_a_weight_of_another_dtype() -> None:
    x, g = draw(2, 16, dtype=torch.bfloat16), draw(16, seed=1).requires_grad_()
    y = ops.rmsnorm(x, g, EPS)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and g.grad.dtype == torch.float32
    exact = g.detach().double().requires_grad_()
    norm(x.double(), exact).sum().backward()
    assert_close(g.grad, exact.grad)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 48), (0,), (4, 0)])
def test_swiglu(shape, dtype) -> None:
    gate, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    if gate.numel():
        against_autograd(ops.swiglu, gated, gate, up)
    else:
        assert ops.swiglu(gate.requires_grad_(), up).shape == shape


def rotation_of(T: int, half: int, B: int = 0) -> Tensor:
    angles = draw(*([B, 1, T, half] if B else [T, half]), seed=9) * 3
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """`torch_port.rotate` on the last d_R of (B, T, H, d)."""
    d_R = 2 * rotation.shape[-1]
    rest, turns = x.split([x.shape[-1] - d_R, d_R], dim=-1)
    turned = rotate(turns.transpose(1, 2), rotation.double()).transpose(1, 2)
    return torch.cat([rest, turned], dim=-1)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("per_text", [False, True])
@pytest.mark.parametrize(
    ("shape", "d_R"),
    [((2, 3, 2, 24), 8), ((2, 2, 3, 10), 6), ((1, 1, 1, 2), 2), ((1, 2, 40, 64), 64)],
)
def test_rotate(shape, d_R, per_text, dtype) -> None:
    B, T = shape[:2]
    rotation = rotation_of(T, d_R // 2, B * per_text)
    against_autograd(
        lambda x: ops.rotate_(x.clone(), rotation),
        lambda x: rotated(x, rotation),
        draw(*shape, dtype=dtype),
    )


def test_rotate_works_in_place_and_leaves_the_incoming_gradient() -> None:
    x, rotation = draw(1, 2, 2, 16), rotation_of(2, 4)
    place, before = x.data_ptr(), x.clone()
    y = ops.rotate_(x, rotation)
    assert y is x and y.data_ptr() == place
    assert torch.equal(y[..., :8], before[..., :8])
    assert not torch.equal(y[..., 8:], before[..., 8:])
    leaf = before.clone().requires_grad_()
    dy = draw(1, 2, 2, 16, seed=3)
    given = dy.clone()
    ops.rotate_(leaf * 1, rotation).backward(given)
    assert torch.equal(given, dy)


def test_a_rotation_of_no_tokens() -> None:
    x = torch.zeros(1, 0, 2, 8)
    assert ops.rotate_(x, torch.zeros(2, 0, 4)).shape == x.shape


def test_a_rotation_has_no_second_derivative() -> None:
    leaf = draw(1, 2, 1, 8).requires_grad_()
    y = ops.rotate_(leaf * 1, rotation_of(2, 4))
    (first,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_leaf_cannot_be_rotated_in_place() -> None:
    with pytest.raises(RuntimeError, match="leaf Variable"):
        ops.rotate_(draw(1, 1, 1, 8).requires_grad_(), rotation_of(1, 4))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 8), (3, 7), (2, 3, 40), (4, 1)])
def test_cross_entropy(shape, dtype) -> None:
    z = draw(*shape, dtype=dtype)
    targets = torch.arange(z[..., 0].numel()).reshape(shape[:-1]) % shape[-1]

    def theirs(z: Tensor) -> Tensor:
        return F.cross_entropy(z.reshape(-1, shape[-1]), targets.reshape(-1))

    exact = z.double().requires_grad_()
    expected = theirs(exact)
    (3 * expected).backward()
    given = z.clone().requires_grad_()
    loss = ops.cross_entropy_(given * 1, targets.int())
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), expected.detach())
    (3 * loss).backward()
    assert given.grad.dtype == dtype
    if shape[-1] > 1:
        assert_close(given.grad, exact.grad)
    else:
        assert given.grad.abs().max() == 0


def test_weights_of_the_losses_may_be_one_number_in_memory() -> None:
    """The gradient of a sum is an expanded 1, and targets may be a column."""
    z, targets = draw(3, 8), torch.tensor([[1, 0], [7, 0], [2, 0]])[:, 0]
    exact = z.double().requires_grad_()
    F.cross_entropy(exact, targets, reduction="sum").backward()
    given = z.clone().requires_grad_()
    losses, *_ = ops._cross_entropy(given, targets)
    losses.sum().backward()
    assert_close(given.grad, exact.grad)


# --- the logits' memory -------------------------------------------------------------


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    logits, targets = draw(3, 16).requires_grad_() * 1, torch.tensor([0, 15, 7])
    place, before = logits.data_ptr(), logits.detach().clone()
    (dz,) = torch.autograd.grad(ops.cross_entropy_(logits, targets), logits)
    assert dz.data_ptr() == place
    exact = before.double().softmax(-1)
    exact[torch.arange(3), targets] -= 1
    assert_close(logits.detach(), exact / 3)


def test_no_second_array_of_the_logits_size(tmp_path) -> None:
    h, W = draw(4, 8).requires_grad_(), draw(8, 4096, seed=1)
    logits = h @ W  # 64 KB, made by the model: no leaf
    targets = torch.tensor([1, 2, 3, 4])

    def ours() -> None:
        loss = ops.cross_entropy_(logits, targets)
        (dz,) = torch.autograd.grad(loss, logits)
        assert dz.data_ptr() == logits.data_ptr()

    size = logits.numel() * logits.itemsize
    file = tmp_path / "trace.json"
    theirs = largest_allocation(lambda: F.cross_entropy(logits, targets), file)
    assert theirs >= size  # so the measure sees such an array
    assert largest_allocation(ours, file) < size / 100


def largest_allocation(work, file) -> int:
    """Bytes of the largest piece of memory that torch took meanwhile."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profiled:
        work()
    profiled.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    return max(e["args"]["Bytes"] for e in events if e.get("name") == "[memory]")


def test_a_second_backward_is_refused() -> None:
    logits = draw(2, 8).requires_grad_()
    loss = ops.cross_entropy_(logits * 1, torch.tensor([1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("target", [-1, -100, 8, 2**32 + 1, -(2**63)])
def test_a_target_outside_gives_nan_and_spoils_its_row_alone(width, target) -> None:
    leaf, targets = draw(3, width).requires_grad_(), torch.tensor([3, target, 0])
    loss = ops.cross_entropy_(leaf * 1, targets)
    assert math.isnan(loss)
    loss.backward()
    assert leaf.grad[1].isnan().all()
    exact = leaf.detach().double().softmax(-1)
    exact[0, 3] -= 1
    exact[2, 0] -= 1
    assert_close(leaf.grad[::2], exact[::2] / 3)


@pytest.mark.parametrize("width", [8, 7])
def test_a_row_of_minus_infinity_is_nan_as_torchs(width) -> None:
    z = draw(2, width)
    z[1] = -math.inf
    theirs, ours = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = F.cross_entropy(theirs, torch.tensor([3, 0]))
    loss = ops.cross_entropy_(ours * 1, torch.tensor([3, 0]))
    assert math.isnan(expected) and math.isnan(loss)
    expected.backward()
    loss.backward()
    assert (ours.grad.isnan() == theirs.grad.isnan()).all()
    assert_close(ours.grad[0], theirs.grad[0].double())


@pytest.mark.parametrize("width", [1000, 999])
@pytest.mark.parametrize("offset", [0, 100, -1e4, 1e4])
def test_an_offset_of_all_logits_costs_no_digits(offset, width) -> None:
    """The loss within 4e-7 of itself; of torch that much was measured."""
    z, targets = draw(4, width) * 3 + offset, torch.tensor([0, 1, width - 1, 500])
    exact = z.double().requires_grad_()
    expected = F.cross_entropy(exact, targets)
    expected.backward()
    leaf = z.requires_grad_()
    loss = ops.cross_entropy_(leaf * 1, targets)
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) <= 4e-7
    off = (leaf.grad.double() - exact.grad).abs()
    assert (off <= 2e-6 * exact.grad.abs() + 4e-8 * exact.grad.abs().max()).all()


# --- which kernel -------------------------------------------------------------------

IDS = torch.zeros(2, 1, 2, dtype=torch.int64)


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, beginning one element beside a multiple of 16 bytes."""
    room = torch.empty(x.numel() + 8, dtype=x.dtype)
    start = (16 - room.data_ptr() % 16) % 16 // x.itemsize + 1
    beside = room[start : start + x.numel()].view(x.shape)
    beside.copy_(x)
    assert beside.data_ptr() % 16 == x.itemsize
    return beside


@pytest.mark.parametrize("dtype", BOTH)
def test_wide_rows_take_the_fast_kernels(dtype, launched) -> None:
    x = draw(2, 1, 2, 16, dtype=dtype)
    g, up = draw(16, dtype=dtype), draw(2, 1, 2, 16, dtype=dtype, seed=1)
    ops.rmsnorm(x, g, EPS)
    total, _ = ops.add_rmsnorm(x.clone().requires_grad_(), up, g, EPS)
    total.sum().backward()
    ops.swiglu(x.clone().requires_grad_(), up).sum().backward()
    ops.cross_entropy_(x.clone().requires_grad_() * 1, IDS).backward()
    ops.rotate_(x, rotation_of(1, 4))
    assert launched == [
        "rmsnorm_fast", "add_rmsnorm_fast", "rmsnorm_backward_fast", "swiglu_fast",
        "swiglu_backward_fast", "cross_entropy_fast", "cross_entropy_backward_fast",
        "rope_fast",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("change", [misaligned, lambda x: x[..., :15].contiguous()])
def test_others_take_the_plain_kernels(dtype, change, launched) -> None:
    x = change(draw(1, 1, 1, 16, dtype=dtype))
    g, up = change(draw(16, dtype=dtype)), x
    ops.rmsnorm(x, g, EPS)
    ops.add_rmsnorm(x, up, g, EPS)[1].sum()
    leaf = x.detach().requires_grad_()
    ops.rmsnorm(leaf, g, EPS).sum().backward()
    ops.swiglu(leaf, up).sum().backward()
    ops.cross_entropy_(change(leaf * 1), IDS[:1, :, :1]).backward()
    ops.rotate_(x.detach(), rotation_of(1, 4))
    assert launched and not [name for name in launched if name.endswith("_fast")]


@pytest.mark.parametrize("beside", range(3))
def test_one_misaligned_tensor_is_enough(beside, launched) -> None:
    inputs = [draw(2, 16), draw(2, 16, seed=1), draw(16, seed=2)]
    inputs[beside] = misaligned(inputs[beside])
    against_autograd(lambda *i: ops.add_rmsnorm(*i, EPS), add_norm, *inputs)
    assert launched[:2] == ["add_plain", "rmsnorm_plain"]


def test_columns_and_slices_are_made_contiguous() -> None:
    x, g = draw(6, 5).T, draw(12)[::2]
    assert not x.is_contiguous() and not g.is_contiguous()
    against_autograd(lambda x, g: ops.rmsnorm(x, g, EPS), norm, x, g)
    gate, up = draw(3, 32).chunk(2, dim=-1)
    against_autograd(ops.swiglu, gated, gate, up)
    against_autograd(ops.swiglu, gated, draw(4, 8).T, draw(8, 4))
    against_autograd(
        lambda x, r, g: ops.add_rmsnorm(x, r, g, EPS), add_norm, x, draw(5, 6), g
    )


def test_gradients_that_are_not_contiguous() -> None:
    x, g = draw(3, 8), draw(8, seed=1)
    against_autograd(
        lambda x, g: ops.rmsnorm(x, g, EPS).T, lambda x, g: norm(x, g).T, x, g
    )
    against_autograd(
        lambda a, b: ops.swiglu(a, b).T, lambda a, b: gated(a, b).T, x, x + 1
    )
    rotation = rotation_of(3, 4)
    against_autograd(
        lambda x: ops.rotate_(x.clone(), rotation).permute(3, 2, 1, 0),
        lambda x: rotated(x, rotation).permute(3, 2, 1, 0), draw(1, 3, 2, 8),
    )  # fmt: skip


@pytest.mark.parametrize("per", [4, 8])
@pytest.mark.parametrize("kept", [16, 32])
def test_rows_are_shared_out_well(per, kept) -> None:
    most = 512 * kept
    for width in [*range(per, 3000, per), 7168, most - per, most]:
        threads, vectors = ops.row_plan(width, per, kept)
        assert threads % 32 == 0 and 32 <= threads <= 512
        assert per * threads * (vectors - 1) < width <= per * threads * vectors
        assert vectors * per <= kept
        assert (threads - 32) * kept < width  # a warp less would keep too much
    for width in (most + per, 2 * most, 129_280):
        assert ops.row_plan(width, per, kept) is None


@pytest.fixture
def planned(monkeypatch) -> list[tuple]:
    """Kernels that would be launched, by name, with their grids, blocks and arguments;
    none is run."""
    plans: list[tuple] = []

    def planning(kernel, grid, block, *args):
        plans.append((kernel.__qualname__.split(".")[0], grid, block, args))

    monkeypatch.setattr(ops, "launch", planning)
    return plans


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (8192, ["rmsnorm_fast", "rmsnorm_backward_fast"]),
        (8200, ["rmsnorm_fast", "rmsnorm_backward_plain"]),
        (16384, ["rmsnorm_fast", "rmsnorm_backward_plain"]),
        (16392, ["rmsnorm_plain", "rmsnorm_backward_plain"]),
    ],
)
def test_rows_that_no_block_keeps_take_the_plain_kernels(
    width, expected, dtype, planned
) -> None:
    x, g = torch.ones(1, width, dtype=dtype), torch.ones(width, dtype=dtype)
    ops.rmsnorm(x.requires_grad_(), g, EPS).sum().backward()
    assert [name for name, *_ in planned] == expected
    planned.clear()
    ops.add_rmsnorm(x.detach(), x.detach(), g, EPS)
    if width <= 16384:
        assert [name for name, *_ in planned] == ["add_rmsnorm_fast"]
    else:
        assert [name for name, *_ in planned] == ["add_plain", "rmsnorm_plain"]


@pytest.mark.parametrize("width", [16, 15])
@pytest.mark.parametrize(
    ("rows", "blocks"), [(1, 1), (4, 1), (5, 2), (1055, 264), (1056, 264), (5000, 264)]
)
def test_blocks_of_a_norms_gradient(rows, blocks, width, planned) -> None:
    """Four rows each at least, and no more blocks than two a multiprocessor."""
    x, g = torch.ones(rows, width).requires_grad_(), torch.ones(width)
    ops.rmsnorm(x, g, EPS).sum().backward()
    _, grid, _, (*_, partial, _, _, _) = planned[1]
    assert (grid, tuple(partial.shape)) == (blocks, (blocks, width))


@pytest.mark.parametrize(
    ("shape", "d_R"),
    [((1, 1, 1, 8), 8), ((2, 100, 1, 64), 64), ((1, 3, 128, 192), 64),
     ((3, 7, 5, 40), 16), ((1, 2, 3, 1032), 1024), ((1, 1000, 1, 8), 8)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", BOTH)
def test_blocks_of_a_rotation(shape, d_R, dtype, planned) -> None:
    """Every pair, head and token has a thread, and no block is without work."""
    ops.rotate_(torch.ones(shape, dtype=dtype), rotation_of(shape[1], d_R // 2))
    ((name, grid, (across, down, deep), args),) = planned
    tokens = shape[0] * shape[1]
    assert name == "rope_fast" and args[2] == tokens
    assert across * 16 // dtype.itemsize == d_R
    assert 1 <= down <= shape[2] and 1 <= deep <= 64
    assert across * down * deep <= 256
    assert (grid - 1) * deep < tokens <= grid * deep


@pytest.mark.parametrize(
    ("dtype", "d_R"), [(torch.float32, 1028), (torch.bfloat16, 2056)]
)
def test_more_pairs_than_a_block_has_threads_take_the_plain_kernel(
    dtype, d_R, planned
) -> None:
    ops.rotate_(torch.ones(1, 2, 1, d_R, dtype=dtype), rotation_of(2, d_R // 2))
    assert [name for name, *_ in planned] == ["rope_plain"]
