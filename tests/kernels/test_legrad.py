"""legrad: the reference against loops; then the op and the kernel against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from cammask_fast.kernels.legrad import legrad as kernel_legrad
from cammask_fast.kernels.legrad import legrad_ineligible, plan_legrad
from cammask_fast.kernels.reference import legrad
from tests.kernels.test_cls_relevance import DTYPES, assert_twice_as_good


def layer(
    count: int, heads: int, length: int, width: int, *, dtype: torch.dtype, last: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, v, grad_out); v is a view of a packed projection, grad_out of (N, L, A, d), as the model has them."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(count, length, 3 * heads * width, generator=generator).to(dtype)
    v = packed.chunk(3, -1)[2].unflatten(-1, (heads, width)).transpose(1, 2)
    grad_out = torch.randn(count, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
    total = torch.rand(count, heads, length, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return total, v, grad_out[:, :, :1] if last else grad_out


def by_loops(v: Tensor, grad_out: Tensor) -> Tensor:
    """Sum over queries of relu(dP), one key of one head at a time."""
    out = torch.zeros(v.shape[:3], dtype=torch.float64)
    for n, a, j in torch.cartesian_prod(*(torch.arange(size) for size in v.shape[:3])).tolist():
        out[n, a, j] = sum(max(0.0, float((row * v[n, a, j]).sum())) for row in grad_out[n, a])
    return out


@pytest.mark.parametrize("last", [False, True])
def test_equals_loops_and_adds_to_the_layers_before(last: bool) -> None:
    total, v, grad_out = layer(2, 3, 5, 4, dtype=torch.float64, last=last)
    for function in (legrad, kernel_legrad):
        torch.testing.assert_close(function(None, v, grad_out), by_loops(v, grad_out), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(function(total, v, grad_out), total + by_loops(v, grad_out), rtol=1e-12, atol=1e-12)


def test_inputs_stay_as_they_are_and_16_bits_are_summed_in_float32() -> None:
    inputs = layer(2, 2, 40, 8, dtype=torch.bfloat16)
    copies = [tensor.clone() for tensor in inputs]
    out = kernel_legrad(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(copies, inputs, strict=True))
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out.double(), copies[0].double() + by_loops(*(x.double() for x in copies[1:])), rtol=2e-2, atol=0
    )


def check_kernel(inputs: tuple[Tensor, Tensor, Tensor], device: torch.device) -> None:
    """Against float64, beside PyTorch's error with the channels of a head in several orders."""
    gold = legrad(*(x.double() for x in inputs))
    total, v, grad_out = (x.to(device) for x in inputs)
    orders = [torch.randperm(v.shape[-1], generator=torch.Generator().manual_seed(n)).to(device) for n in range(32)]
    pytorch = [legrad(total, v[..., order], grad_out[..., order]) for order in orders]
    ours = kernel_legrad(total, v, grad_out)
    assert ours.dtype == torch.float32
    assert_twice_as_good(ours, pytorch, gold)
    assert_twice_as_good(kernel_legrad(None, v, grad_out), [x - total for x in pytorch], gold - inputs[0].double())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("count", "heads", "length", "width"), [(1, 2, 50, 64), (3, 1, 65, 32), (1, 2, 64, 32), (1, 1, 197, 64), (1, 1, 257, 64)]
)
def test_kernel_is_as_exact_as_pytorch(
    triton_backend: torch.device, dtype: torch.dtype, last: bool, count: int, heads: int, length: int, width: int
) -> None:
    check_kernel(layer(count, heads, length, width, dtype=dtype, last=last), triton_backend)


@pytest.mark.triton
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(2, 70),
    width=st.sampled_from([32, 64]),
    dtype=st.sampled_from(DTYPES),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_at_any_shape(
    triton_backend: torch.device, count: int, heads: int, length: int, width: int, dtype: torch.dtype, last: bool, seed: int
) -> None:
    check_kernel(layer(count, heads, length, width, dtype=dtype, last=last, seed=seed), triton_backend)


@pytest.mark.triton
def test_kernel_at_the_greatest_length(triton_backend: torch.device) -> None:
    check_kernel(layer(1, 1, 577, 32, dtype=torch.float16), triton_backend)


@pytest.mark.triton
@pytest.mark.parametrize("last", [False, True])
def test_negative_gradients_add_nothing_and_equal_inputs_give_equal_bits(triton_backend: torch.device, last: bool) -> None:
    total, v, grad_out = (x.to(triton_backend) for x in layer(2, 2, 50, 32, dtype=torch.float16, last=last))
    assert torch.equal(kernel_legrad(total, v.abs(), -grad_out.abs()), total)
    assert torch.equal(kernel_legrad(total, v, grad_out), kernel_legrad(total, v, grad_out))
    strided = torch.stack([total, total], -1)[..., 0]
    padded = torch.nn.functional.pad(v, (0, 5))[..., :32]
    assert torch.equal(kernel_legrad(strided, padded, grad_out.contiguous()), kernel_legrad(total, v, grad_out))


@pytest.mark.triton
@pytest.mark.parametrize("argument", ["total", "v", "grad_out"])
@pytest.mark.parametrize("last", [False, True])
def test_a_nan_reaches_its_image_and_no_other(triton_backend: torch.device, argument: str, last: bool) -> None:
    names = ("total", "v", "grad_out")
    inputs = dict(zip(names, layer(2, 1, 50, 32, dtype=torch.float16, last=last), strict=True))
    inputs = {name: value.clone().to(triton_backend) for name, value in inputs.items()}
    inputs[argument][1][..., 0] = math.nan
    out = kernel_legrad(**inputs)
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


def test_a_layer_is_one_launch_and_a_program_owns_its_keys() -> None:
    lengths = {50: 1, 65: 2, 100: 1, 129: 3, 197: 1, 257: 3, 577: 3}  # programs of 16 bits by tokens
    of_16_bits = [(torch.bfloat16, length, programs) for length, programs in lengths.items()]
    for dtype, length, programs in (*of_16_bits, (torch.float32, 50, 2), (torch.float16, 64, 1)):
        total, v, grad_out = (x.to("meta") for x in layer(2, 3, length, 64, dtype=dtype))
        (launch,) = plan_legrad(total, total, v, grad_out)
        assert launch.grid == (programs * 2 * 3,)
        (launch,) = plan_legrad(total, None, v, grad_out[:, :, :1])
        assert (launch.arguments["ONE_ROW"], launch.arguments["HAS_TOTAL"]) == (True, False)


@pytest.mark.parametrize("last", [False, True])
def test_the_op_is_registered_as_torch_wants_it(last: bool) -> None:
    total, v, grad_out = layer(2, 2, 9, 32, dtype=torch.float32, last=last)
    op = torch.ops.cammask.legrad.default
    torch.library.opcheck(op, (None, v, grad_out))
    torch.library.opcheck(op, (torch.rand(9, 2, 2).permute(2, 1, 0), v, grad_out))
    torch.library.opcheck(op, (total.double(), v.double(), grad_out.double()))


def test_compiles_once_for_every_batch_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: 2 * kernel_legrad(*x), fullgraph=True, dynamic=True, backend=counter)
    for count in (2, 3, 7):
        inputs = tuple(x.contiguous() for x in layer(count, 2, 9, 32, dtype=torch.float32, seed=count))
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(*inputs), 2 * kernel_legrad(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("last", [False, True])
def test_counted_work_is_the_references(last: bool) -> None:
    inputs = layer(2, 3, 9, 32, dtype=torch.float32, last=last)

    def counted(function: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        return int(counter.get_total_flops())

    assert counted(kernel_legrad) == counted(legrad) == 2 * 2 * 3 * (1 if last else 9) * 9 * 32


def test_arguments_that_do_not_fit_are_named() -> None:
    total, v, grad_out = layer(2, 3, 9, 32, dtype=torch.float32)
    for name, arguments in {
        "v: expected float": (total, v[0], grad_out),
        "grad_out: expected \\(2, 3, 9 or 1, 32\\)": (total, v, grad_out[:, :, :2]),
        "grad_out: expected v's dtype": (total, v, grad_out.half()),
        "total: expected torch.float32 \\(2, 3, 9\\), got torch.float32 \\(2, 3, 8\\)": (total[..., :8], v, grad_out),
        "total: expected torch.float64": (total, v.double(), grad_out.double()),
        "grad_out: expected the device of v, cpu, got meta": (total, v, grad_out.to("meta")),
        "total: expected the device of v, cpu, got meta": (total.to("meta"), v, grad_out),
    }.items():
        for function in (legrad, kernel_legrad):
            with pytest.raises(ValueError, match=f"^{name}"):
                function(*arguments)


def test_ineligible_inputs() -> None:
    _, v, grad_out = layer(1, 1, 9, 32, dtype=torch.float32)
    assert legrad_ineligible(v, grad_out) is None
    assert "float64" in str(legrad_ineligible(v.double(), grad_out.double()))
    assert "48 wide" in str(legrad_ineligible(*layer(1, 1, 9, 48, dtype=torch.float32)[1:]))
    assert "578 tokens" in str(legrad_ineligible(*layer(1, 1, 578, 32, dtype=torch.float32)[1:]))
    assert "grad_out has stride 2" in str(legrad_ineligible(v, torch.zeros(1, 1, 9, 64)[..., ::2]))
    assert "v spans 2**31 elements" in str(legrad_ineligible(torch.empty(1, 1, 9, 2**29, device="meta")[..., :32], grad_out))
