import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import activations, linear

import ditq_kernels as ditq
from ditq_kernels import QuantLinear
from ditq_kernels.layer import backend, cpu_extension, extension, ops, reference
from ditq_kernels.layer.formats import WEIGHT_FORMATS
from ditq_kernels.layer.operands import checked_weight
from ditq_kernels.layer.packed_weight import PackedWeight

CPU = torch.device("cpu")
formats = pytest.mark.parametrize("name", WEIGHT_FORMATS)
SAMPLES = ("w8a8", "w8a8_g64", "w4a8_g32_static", "w8a16_g128", "w4a16_g128")


def parts(name, device=CPU):
    layer = QuantLinear.from_linear(linear(24, 150, device), name.replace("w8", "w8a16").replace("w4", "w4a16"))
    return (layer.qweight, layer.scale, layer.group_code), layer.bias.detach()


@formats
def test_ops_keep_their_contracts(name):
    weight, bias = parts(name)
    x = activations(5, 150, torch.bfloat16, CPU)
    qx, sx = torch.ops.ditq.quantize_activation(x, None)
    torch.library.opcheck(torch.ops.ditq.quantize_activation, (x, None))
    torch.library.opcheck(torch.ops.ditq.quantize_activation, (x, torch.tensor([3.0])))
    for out_dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(torch.ops.ditq.linear_a8, (qx, sx, *weight, bias, name, out_dtype))
    torch.library.opcheck(torch.ops.ditq.linear_a16, (x, *weight, None, name))
    torch.library.opcheck(torch.ops.ditq.linear_a16, (x, *weight, bias, name, True))
    torch.library.opcheck(torch.ops.ditq.grad_input, (activations(5, 24, torch.float32, CPU), *weight, name, 150))


@pytest.mark.parametrize("amax", [None, torch.tensor([3.0])], ids=["token", "static"])
def test_fused_ops_keep_their_contracts(amax):
    x = activations(6, 150, torch.bfloat16, CPU).unflatten(0, (2, 3))
    shift, scale = torch.randn(2, 2, 150).to(torch.bfloat16)
    weight, bias = torch.randn(2, 150)
    torch.library.opcheck(torch.ops.ditq.gelu_quantize, (x.flatten(0, 1), amax, "tanh"))
    for parts in ((None, None, None, None), (weight, bias, shift, scale)):
        torch.library.opcheck(torch.ops.ditq.norm_modulate, (x, *parts, 1e-6))
        torch.library.opcheck(torch.ops.ditq.norm_modulate_quantize, (x, *parts, amax, 1e-6))


def test_fused_functions_compile():
    x = activations(6, 64, torch.float32, CPU).unflatten(0, (2, 3))
    shift, scale = torch.randn(2, 2, 64)
    for function, arguments in (
        (ops.gelu_quantize, (x, None, "tanh")),
        (ops.norm_modulate, (x, shift, scale)),
        (ops.norm_modulate_quantize, (x, shift, scale)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual, expected = (f(*arguments) for f in (compiled, function))
        if isinstance(expected, torch.Tensor):
            actual, expected = (actual,), (expected,)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_codes_are_not_activations():
    with pytest.raises(TypeError, match=r"must be floating-point, got torch\.int8"):
        ops.gelu_quantize(torch.zeros(2, 4, dtype=torch.int8))
    weight, _ = parts("w8_g64")
    for quantizes_input in (False, True):
        with pytest.raises(TypeError, match=r"must be floating-point, got torch\.int32"):
            ops.quantized_linear(
                torch.zeros(2, 150, dtype=torch.int32), *weight, weight_format="w8_g64", quantizes_input=quantizes_input
            )


@pytest.mark.parametrize("scheme", SAMPLES)
def test_layers_compile_whole(scheme):
    """No graph break, forward and backward, and one graph for every M."""
    layer = QuantLinear.from_linear(linear(24, 150, CPU), scheme, input_amax=30.0)
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting_backend)
    for rows in (3, 17, 40):
        x = activations(rows, 150, torch.float32, CPU)
        expected_x, x = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, actual = layer(expected_x), compiled(x)
        assert torch.equal(actual, expected)
        expected.sum().backward()
        actual.sum().backward()
        assert torch.equal(x.grad, expected_x.grad)
    assert len(graphs) == 1


def test_quantize_activation_compiles():
    x = activations(6, 64, torch.float32, CPU)
    compiled = torch.compile(ditq.quantize_activation, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), ditq.quantize_activation(x), strict=True):
        assert torch.equal(actual, expected)
    codes, scales = ditq.quantize_activation(x.view(2, 3, 64))
    assert codes.shape == (6, 64) and scales.shape == (6,)


def test_the_backend_is_chosen_by_context_then_environment_then_device(monkeypatch):
    monkeypatch.delenv(backend.BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for reason, own in (("no such instructions", "reference"), (None, "cpu")):
        monkeypatch.setattr(cpu_extension, "why_no_products", lambda reason=reason: reason)
        assert backend.selected_backend("cpu") == own
    assert backend.selected_backend("mps") == "reference"
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "triton")
    assert backend.selected_backend("cpu") == "triton"
    with ditq.use_backend("reference"):
        assert backend.selected_backend("cpu") == "reference"
        with ditq.use_backend("triton"):
            assert backend.selected_backend("cpu") == "triton"
        assert backend.selected_backend("cpu") == "reference"
    assert backend.selected_backend("cpu") == "triton"


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch, device):
    from ditq_kernels import kernels

    calls = []
    original = kernels.quantize_activation
    monkeypatch.setattr(kernels, "quantize_activation", lambda *a: calls.append(a) or original(*a))
    x = activations(3, 64, torch.float32, device)
    with ditq.use_backend("reference"):
        ditq.quantize_activation(x)
    assert not calls
    with ditq.use_backend("triton"):
        ditq.quantize_activation(x)
    assert len(calls) == 1


def test_unsupported_combinations_say_what_would_work(monkeypatch):
    x = activations(3, 64, torch.float32, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with ditq.use_backend("triton"), pytest.raises(ditq.UnsupportedError, match=r"TRITON_INTERPRET=1.*use reference"):
        ditq.quantize_activation(x)
    monkeypatch.setattr(cpu_extension, "why_no_products", lambda: "this CPU has no avx2 instructions")
    with ditq.use_backend("cpu"), pytest.raises(ditq.UnsupportedError, match="no avx2 instructions"):
        ditq.quantize_activation(x)
    for reason, said in ((None, "takes CUDA tensors, and these are cpu; use reference"), ("not built", "not built")):
        monkeypatch.setattr(extension, "why_unavailable", lambda reason=reason: reason)
        with ditq.use_backend("cuda"), pytest.raises(ditq.UnsupportedError, match=said):
            ditq.quantize_activation(x)
    with pytest.raises(ValueError, match="unknown backend 'gpu'; allowed: reference, cpu, triton, cuda"):
        ditq.use_backend("gpu")
    weight, _ = parts("w8_g64")
    qx, sx = ditq.quantize_activation(activations(3, 150, torch.float32, CPU))
    with pytest.raises(ditq.UnsupportedError, match="w8_g64 has no single int32 accumulator"):
        torch.ops.ditq.linear_a8(qx, sx, *weight, None, "w8_g64", torch.int32)


def test_parts_that_do_not_fit_are_named():
    (qweight, scale, group_code), _ = parts("w4_g32")
    x = activations(3, 150, torch.float32, CPU)
    linear_a16 = torch.ops.ditq.linear_a16
    with pytest.raises(ValueError, match="unknown weight format 'w5'"):
        linear_a16(x, qweight, scale, group_code, None, "w5")
    with pytest.raises(ValueError, match=r"qweight of a w4_g32 weight with K = 300 must be torch.uint8 \[24, 192\]"):
        linear_a16(torch.zeros(3, 300), qweight, scale, group_code, None, "w4_g32")
    with pytest.raises(ValueError, match=r"scale of a w4_g32 weight .* must be torch.float32 \[24\]"):
        linear_a16(x, qweight, scale.double(), group_code, None, "w4_g32")
    with pytest.raises(ValueError, match="w4_g32 weights need group_code"):
        linear_a16(x, qweight, scale, None, None, "w4_g32")
    with pytest.raises(ValueError, match="group_code of a w4_g64 weight"):
        linear_a16(x, qweight, scale, group_code, None, "w4_g64")
    with pytest.raises(ValueError, match=r"bias must be \[24\], one value per output, got \[23\]"):
        linear_a16(x, qweight, scale, group_code, torch.ones(23), "w4_g32")
    codes, scales = ditq.quantize_activation(x)
    for qx, sx in ((codes, scales[:2]), (codes, scales.double()), (codes.int(), scales), (codes, scales.unsqueeze(1))):
        with pytest.raises(ValueError, match=r"codes must be torch.int8 \[M, K\] and their scales torch.float32 \[M\]"):
            torch.ops.ditq.linear_a8(qx, sx, qweight, scale, group_code, None, "w4_g32", x.dtype)


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
def test_what_an_op_is_given_is_checked_before_it_is_read(implementation, device):
    reason = backend.why_unavailable(implementation, device.type)
    if reason:
        pytest.skip(reason)
    weight, bias = parts("w8", device)
    x = activations(3, 150, torch.float32, device)
    codes, scales = torch.ops.ditq.quantize_activation(x, None)
    group_code = torch.zeros(1, 24, dtype=torch.uint8, device=device)
    calls = (
        (
            lambda op: op.linear_a8(codes, scales, *weight[:2], group_code, bias, "w8", x.dtype),
            "w8 weights have no group",
        ),
        (lambda op: op.linear_a16(x, *weight[:2], group_code, bias, "w8"), "w8 weights have no group"),
        (lambda op: op.quantize_activation(x.unsqueeze(0), None), r"must be \[M, K\], got \[1, 3, 150\]"),
        (lambda op: op.linear_a8(codes[0], scales, *weight, bias, "w8", x.dtype), r"must be \[M, K\], got \[150\]"),
        (lambda op: op.linear_a16(x[0], *weight, bias, "w8"), r"must be \[M, K\]"),
        (lambda op: op.linear_a8(codes, scales, *weight, bias.to("meta"), "w8", x.dtype), "bias is on meta"),
        (lambda op: op.linear_a8(codes, scales.to("meta"), *weight, bias, "w8", x.dtype), "sx is on meta"),
        (lambda op: op.quantize_activation(x, torch.ones(1, device="meta")), "amax is on meta"),
        (lambda op: op.linear_a16(x, weight[0].to("meta"), *weight[1:], bias, "w8"), "qweight is on meta"),
        (
            lambda op: op.linear_a8(codes, scales, weight[0], weight[1].to("meta"), None, bias, "w8", x.dtype),
            "scale is",
        ),
        (lambda op: op.grad_input(x[:, :24], weight[0].to("meta"), *weight[1:], "w8", 150), "qweight is on meta"),
    )
    with ditq.use_backend(implementation):
        for call, said in calls:
            with pytest.raises(ValueError, match=said):
                call(torch.ops.ditq)
        reach = torch.tensor([[1.7]], dtype=torch.bfloat16, device=device)
        for one, other in zip(
            torch.ops.ditq.quantize_activation(x, reach),
            torch.ops.ditq.quantize_activation(x, reach.float().reshape(1)),
            strict=True,
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_autocast_ends_at_an_op(implementation):
    if backend.why_unavailable(implementation, "cpu"):
        pytest.skip(backend.why_unavailable(implementation, "cpu"))
    weight, bias = parts("w8", CPU)
    x = activations(3, 150, torch.float32, CPU)

    def results():
        codes, scales = torch.ops.ditq.quantize_activation(x, None)
        yield torch.ops.ditq.linear_a8(codes, scales, *weight, bias, "w8", torch.float32)
        yield torch.ops.ditq.linear_a16(x, *weight, bias, "w8")
        yield torch.ops.ditq.grad_input(torch.ones(3, 24), *weight, "w8", 150)

    with ditq.use_backend(implementation):
        expected = list(results())
        with torch.autocast("cpu", torch.bfloat16):
            found = list(results())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_smallest_variance_that_a_norm_divides_by():
    """1e-6 unless another is given, as the norms of diffusion transformers have it."""
    x = torch.tensor([-1.0, 1.0]).repeat(20).expand(1, 1, 40) * 1e-3
    expected = x / (1e-6 + 1e-6) ** 0.5
    torch.testing.assert_close(ops.norm_modulate(x), expected)
    codes, scales = ops.norm_modulate_quantize(x)
    torch.testing.assert_close(codes * scales.unsqueeze(1), expected[0])
    torch.testing.assert_close(ops.norm_modulate(x, eps=3e-6), expected / 2**0.5)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_parts_of_a_norm_that_do_not_fit_are_named(implementation, device):
    reason = backend.why_unavailable(implementation, device.type)
    if reason:
        pytest.skip(reason)
    x = torch.zeros(2, 3, 40, device=device)
    cases = [
        (dict(x=x[0]), r"x must be \[batch, tokens, channels\], got \[3, 40\]"),
        (dict(x=x.unsqueeze(0)), r"x must be \[batch, tokens, channels\]"),
        *(
            (dict({name: torch.zeros(41)}), rf"{name} must be \[40\] for x .* got \[41\]")
            for name in ("weight", "bias")
        ),
        *((dict({name: torch.zeros(39)}), rf"{name} must be \[40\]") for name in ("weight", "bias")),
        *((dict({name: torch.zeros(3, 40)}), rf"{name} must be \[2, 40\]") for name in ("shift", "scale")),
        *((dict({name: torch.zeros(1, 40)}), rf"{name} must be \[2, 40\]") for name in ("shift", "scale")),
        *((dict({name: torch.zeros(2, 40, device="meta")}), f"{name} is on meta") for name in ("shift", "scale")),
    ]
    with ditq.use_backend(implementation):
        for parts, said in cases:
            for call in (ops.norm_modulate, ops.norm_modulate_quantize):
                with pytest.raises(ValueError, match=said):
                    call(
                        **(
                            dict(x=x)
                            | {name: part if part.is_meta else part.to(device) for name, part in parts.items()}
                        )
                    )


def test_layers_on_meta_say_shapes():
    layer = QuantLinear.from_linear(linear(24, 64, CPU), "w4a8_g32").to("meta")
    assert layer(torch.zeros(2, 5, 64, device="meta")).shape == (2, 5, 24)


def spread(tensor):
    """The same values with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, 77)), -1)[..., 0]


@pytest.mark.parametrize("name", ["w8", "w8_g64", "w4_g64"])
def test_a_weight_whose_parts_are_not_contiguous_is_refused(name):
    weight, _ = parts(name)
    x = activations(3, 150, torch.bfloat16, CPU)
    codes, grad = torch.ops.ditq.quantize_activation(x, None), activations(3, 24, torch.float32, CPU)
    for place, (part, tensor) in enumerate(zip(("qweight", "scale", "group_code"), weight, strict=True)):
        if tensor is None:
            continue
        bad = (*weight[:place], spread(tensor), *weight[place + 1 :])
        for call in (
            lambda bad=bad: torch.ops.ditq.linear_a16(x, *bad, None, name),
            lambda bad=bad: torch.ops.ditq.linear_a8(*codes, *bad, None, name, torch.bfloat16),
            lambda bad=bad: torch.ops.ditq.grad_input(grad, *bad, name, 150),
        ):
            with pytest.raises(ValueError, match=rf"{part} must be contiguous.*keep {part}\.contiguous"):
                call()


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
def test_vectors_may_have_any_stride(implementation, device):
    reason = backend.why_unavailable(implementation, device.type)
    if reason:
        pytest.skip(reason)
    weight, bias = parts("w8", device)
    x = activations(3, 150, torch.bfloat16, device)
    codes, scales = torch.ops.ditq.quantize_activation(x, None)
    batch, norm = x.unflatten(0, (1, 3)), torch.randn(150, device=device)
    with ditq.use_backend(implementation):
        for call, vector in (
            (lambda b: torch.ops.ditq.linear_a16(x, *weight, b, "w8"), bias),
            (lambda b: torch.ops.ditq.linear_a8(codes, scales, *weight, b, "w8", torch.float32), bias),
            (lambda sx: torch.ops.ditq.linear_a8(codes, sx, *weight, bias, "w8", torch.float32), scales),
            (lambda w: ops.norm_modulate(batch, weight=w), norm),
            (lambda b: ops.norm_modulate_quantize(batch, bias=b)[0], norm),
        ):
            assert torch.equal(call(spread(vector)), call(vector))


def test_a_calibrated_reach_is_one_number():
    x, amax = activations(3, 150, torch.bfloat16, CPU), torch.ones(3)
    for call in (
        lambda: ditq.quantize_activation(x, amax),
        lambda: ops.gelu_quantize(x, amax),
        lambda: ops.norm_modulate_quantize(x.unflatten(0, (1, 3)), amax=amax),
    ):
        with pytest.raises(ValueError, match="amax must hold one number"):
            call()


def test_importing_the_package_loads_neither_triton_nor_diffusers():
    absent = ("triton", "diffusers", "matplotlib", "ditq_kernels.model", "ditq_kernels.checkpoint")
    program = f"import sys, ditq_kernels; print([m for m in {absent} if m in sys.modules])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["w8", "w4_g64"])
def test_gradients_of_known_values(name, dtype, implementation, device):
    """Of a sum, whose gradient is one number expanded, of a transposed one, and of either operand alone."""
    reason = backend.why_unavailable(implementation, device.type)
    if reason:
        pytest.skip(reason)
    (qweight, scale, group_code), bias = parts(name, device)
    weight = dict(qweight=qweight, scale=scale, group_code=group_code, weight_format=name, quantizes_input=False)
    dense = reference.dequantize(PackedWeight(qweight, scale, group_code, WEIGHT_FORMATS[name], 150))
    values = activations(6, 150, dtype, device)
    ones, by_row = torch.ones((), device=device, dtype=dtype), torch.arange(1, 7, device=device, dtype=dtype)
    with ditq.use_backend(implementation):
        for needs_x, needs_bias in ((True, True), (True, False), (False, True)):
            x, b = values.clone().requires_grad_(needs_x), bias.clone().requires_grad_(needs_bias)
            for gradient in (ones.expand(6, 24), by_row.expand(24, 6).T):
                x.grad = b.grad = None
                ops.quantized_linear(x, bias=b, **weight).backward(gradient)
                if needs_x:
                    error = (x.grad.float() - gradient.float() @ dense).norm() / (gradient.float() @ dense).norm()
                    assert error < 4 * torch.finfo(dtype).eps
                if needs_bias:
                    assert b.grad.tolist() == [float(gradient[:, 0].sum())] * 24
                assert (x.grad is None, b.grad is None) == (not needs_x, not needs_bias)


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("quantizes_input", [True, False])
def test_inputs_may_have_any_strides(rows, quantizes_input, implementation, device):
    """Transposed, every second row and column, the same row again and again: the bits are those of a copy."""
    reason = backend.why_unavailable(implementation, device.type)
    if reason:
        pytest.skip(reason)
    (qweight, scale, group_code), bias = parts("w4_g32", device)
    weight = dict(qweight=qweight, scale=scale, group_code=group_code, bias=bias, weight_format="w4_g32")
    wide = activations(2 * rows, 300, torch.bfloat16, device)
    with ditq.use_backend(implementation):
        for x in (wide[:rows, :150].T.contiguous().T, wide[::2, ::2], wide[:1, :150].expand(rows, 150)):
            found = ops.quantized_linear(x, quantizes_input=quantizes_input, **weight)
            assert torch.equal(found, ops.quantized_linear(x.contiguous(), quantizes_input=quantizes_input, **weight))


def test_a_weight_on_another_device_is_said_before_a_kernel_reads_it():
    """An operand on meta is met elsewhere; one that exists, here."""
    layer = QuantLinear.from_linear(linear(8, 150, torch.device("cpu")), "w4a8_g32")
    parts = layer.qweight, layer.scale, layer.group_code
    assert checked_weight(150, torch.device("cpu"), *parts, "w4_g32").in_features == 150
    with pytest.raises(ValueError, match="qweight is on cpu but the input is on cuda; move the layer or the input"):
        checked_weight(150, torch.device("cuda"), *parts, "w4_g32")


def test_names_that_are_imported_when_asked_for_are_those_that_type_checkers_see():
    tree = ast.parse(Path(ditq.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: f".{node.module}" for node in block.body for alias in node.names}
    assert seen == ditq._IMPORTED_FROM
    assert set(ditq.__all__) <= set(dir(ditq)) and all(hasattr(ditq, name) for name in ditq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        ditq.unheard_of  # noqa: B018
