"""QuantLinear: a linear layer whose weight is stored in 8 or 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from . import ops, reference
from .errors import UnsupportedError
from .formats import Scheme, WeightFormat, check_int8_inputs
from .grid import DEFAULT_ZERO_POINT
from .packed_weight import PackedWeight
from .packing import LAYOUTS, pack_groups
from .quantized_input import QuantizedInput
from .quantizer import QuantizedWeight, quantize_weight
from .replaced_weight import ReplacedWeight
from .stored_part import StoredPart
from .weight_view import WeightView

_NOT_ASSIGNED = (
    "the weight of a quantized layer cannot be assigned: change the model before it is quantized, or call the layer's "
    "requantize(weight)"
)
_QUANTIZED_AGAIN = (
    "the weight of a layer quantized to {scheme} was changed, as by fusing an adapter, and is quantized again, to "
    "nearest: what the change has below half a step of the scheme is lost, and so is what compensated rounding gained. "
    "An adapter that stays unfused costs none of that; unfusing brings the bits before back"
)
REPLACED_KEPT = 8  # adapters merged one after another that unmerge to the bits before


class SharedInput(Protocol):
    """What joins a layer with others, a :class:`ditq_kernels.layer.shared_input.SharedInput`."""

    def join(self) -> bool: ...

    def forget(self) -> None: ...


class RequantizationWarning(UserWarning):
    """A stored weight was changed and quantized again."""


def _packed(quantized: QuantizedWeight, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """qweight, scale and group_code."""
    groups = pack_groups(quantized.multiplier, quantized.zero_point) if fmt.two_level else None
    return LAYOUTS[fmt.layout].pack(quantized.codes), quantized.scale, groups


def _alone(part: torch.Tensor) -> torch.Tensor:
    """``part``, or what it is a copy of in memory that holds nothing else."""
    if part.untyped_storage().nbytes() == part.numel() * part.element_size():
        return part
    copied = part.detach().clone(memory_format=torch.contiguous_format)
    return type(part)(copied, part.requires_grad) if isinstance(part, nn.Parameter) else copied


class QuantLinear(nn.Linear):
    """``nn.Linear`` on a packed weight; made by :meth:`from_linear`, or empty (to load a checkpoint into) by
    :meth:`empty`.

    Parameters, none of them trainable but the bias:
        qweight: the codes, in the layout of ``scheme.weight``.
        scale: fp32 [N], or [groups, N]; stays fp32 whatever dtype the module is cast to.
        group_code: uint8 [groups, N] for two-level formats, else None.
        input_amax: fp32 [1] for static schemes, else None.
        bias: [N] or None.
    """

    _EXACT = ("qweight", "scale", "group_code", "input_amax")  # never cast
    shared_input: SharedInput | None = None  # with layers that this one is joined with

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError("a QuantLinear is made from a linear layer: QuantLinear.from_linear(layer, scheme)")

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: str | Scheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """A layer with the right shapes and uninitialised values; ``dtype`` is the bias's and that of
        :attr:`weight`.

        Raises:
            ValueError: for an unknown scheme, or one whose int32 sums so many inputs would overflow.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.scheme = Scheme.parse_for_layer(scheme)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        fmt = self.scheme.weight
        if self.scheme.activation.bits == 8:
            check_int8_inputs(in_features, fmt)
        layout = LAYOUTS[fmt.layout]
        self.qweight = StoredPart(
            torch.empty(out_features, layout.columns(in_features), dtype=layout.dtype, device=device)
        )
        self.scale = StoredPart(
            torch.empty(fmt.scale_shape(out_features, in_features), dtype=torch.float32, device=device)
        )
        groups = (fmt.group_count(in_features), out_features)
        self.group_code = StoredPart(torch.empty(groups, dtype=torch.uint8, device=device)) if fmt.two_level else None
        self.input_amax = StoredPart(torch.empty(1, dtype=torch.float32, device=device)) if self.scheme.static else None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self._replaced: list[ReplacedWeight] = []  # what requantize may have to bring back, the last one last
        return self

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str | Scheme,
        input_amax: float | torch.Tensor | None = None,
        input_moment: torch.Tensor | None = None,
        clip: float | str | None = None,
        zero_point: str = DEFAULT_ZERO_POINT,
    ) -> QuantLinear:
        """Quantize and pack ``linear``; ``linear`` is left as it is, and its bias is shared.

        Args:
            scheme: a :class:`Scheme` or its name.
            input_amax: the calibrated largest input magnitude, needed by static schemes.
            input_moment: fp32 [K, K], the sum of ``x x^T`` over observed tokens; rounds with error compensation.
            clip, zero_point: see :func:`ditq_kernels.layer.quantizer.quantize_weight`.

        Raises:
            TypeError: if ``linear`` is not an ``nn.Linear``, or is quantized already.
            ValueError: for a static scheme without a finite, positive ``input_amax``, and as ``quantize_weight`` does.
        """
        scheme = Scheme.parse_for_layer(scheme)
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantLinear):
            raise TypeError(f"QuantLinear.from_linear takes an unquantized nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        self = cls.empty(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=linear.bias is not None,
            dtype=weight.dtype,
            device=torch.device("meta"),
        )
        if scheme.static:
            if input_amax is None:
                dynamic = scheme.name.removesuffix("_static")
                raise ValueError(f"{scheme} needs a calibrated input_amax: run ditq.calibrate first, or use {dynamic}")
            amax = torch.as_tensor(input_amax, dtype=torch.float32).reshape(1)
            if not (bool(torch.isfinite(amax)) and amax > 0):
                raise ValueError(f"input_amax must be finite and positive, got {amax.item()}")
            self.input_amax = StoredPart(amax.to(weight.device))
        fmt = scheme.weight
        quantized = quantize_weight(weight, fmt, input_moment=input_moment, clip=clip, zero_point=zero_point)
        for name, part in zip(("qweight", "scale", "group_code"), _packed(quantized, fmt), strict=True):
            setattr(self, name, part if part is None else StoredPart(part))
        self.bias = linear.bias
        self.train(linear.training)
        return self

    def forward(self, x: torch.Tensor | QuantizedInput) -> torch.Tensor:
        """``x`` [..., K] to [..., N] in ``x.dtype`` (under autocast, in autocast's dtype).

        Args:
            x: a tensor; or one that the pass before has quantized, for inference with a scheme of int8 activations.

        Raises:
            ValueError: if the last dimension of ``x`` is not K, or ``x`` is on another device than the weights.
            TypeError: if ``x`` is not floating-point, or quantized and the scheme does not quantize activations.
        """
        self._check_width(x)
        if isinstance(x, QuantizedInput):
            return self._product_of_codes(x)
        operands = self._operands(x)
        y = ops.product_again(operands)
        if y is not None:
            return y
        self._check(x)
        # Meta has no autocast; to ask which device has it breaks the graphs of PyTorch 2.11's compiler.
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return ops.product(x, *operands[1:])

    def _operands(self, x: torch.Tensor) -> tuple:
        """What :func:`ops.product` takes."""
        stored, scheme = self._stored, self.scheme
        weight = stored("qweight"), *self._of_groups()
        return x, stored("bias"), stored("input_amax"), *weight, scheme.weight.name, scheme.activation.bits == 8

    def _check(self, x: torch.Tensor) -> None:
        self._check_width(x)
        if not x.dtype.is_floating_point:
            raise TypeError(f"the input must be floating-point, got {x.dtype}")
        if x.device != self.qweight.device:
            raise ValueError(f"the layer is on {self.qweight.device} but the input is on {x.device}; move one of them")

    def _check_width(self, x: torch.Tensor | QuantizedInput) -> None:
        if not x.shape:
            raise ValueError(f"a single number given to a layer of K = {self.in_features}")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input of width {x.shape[-1]} given to a layer of K = {self.in_features}")

    def _product_of_codes(self, x: QuantizedInput) -> torch.Tensor:
        if self.scheme.activation.bits != 8:
            raise TypeError(f"a layer in {self.scheme} multiplies activations as they are, and was given int8 codes")
        weight = self.qweight, *self._of_groups(), self.bias
        return ops.product_of_codes(x, *weight, weight_format=self.scheme.weight.name)

    def added_to(self, residual: torch.Tensor, gate: torch.Tensor, x: torch.Tensor | QuantizedInput) -> torch.Tensor:
        """``residual + gate * layer(x)``, for inference; where activations are quantized, of the product's own pass.

        Args:
            residual: [B, T, N], in the dtype of ``x``.
            gate: [B, N].
            x: [B, T, K], or quantized already.

        Raises:
            ValueError: for inputs of other shapes.
        """
        if len(x.shape) != 3:
            raise ValueError(f"what a residual is added to must be [B, T, K], got {list(x.shape)}")
        if self.scheme.activation.bits != 8:
            return torch.addcmul(residual, gate.unsqueeze(1), self(x))
        if not isinstance(x, QuantizedInput):
            self._check(x)
            x = QuantizedInput(*ops.quantize_activation(x, self.input_amax), x.shape, x.dtype)
        self._check_width(x)
        weight = self._stored("qweight"), *self._of_groups(), self._stored("bias")
        return ops.product_of_codes(x, *weight, weight_format=self.scheme.weight.name, residual=residual, gate=gate)

    def of_silu(self, x: torch.Tensor) -> torch.Tensor:
        """The layer of ``silu(x)``, in one pass, for inference with a scheme of 16-bit activations.

        Raises:
            TypeError: if the scheme quantizes activations.
        """
        if self.scheme.activation.bits == 8:
            raise TypeError(f"a layer in {self.scheme} quantizes its input: give it silu(x)")
        weight = self.qweight, *self._of_groups(), self.bias
        return ops.product_of_silu(x, *weight, weight_format=self.scheme.weight.name)

    @property
    def packed_weight(self) -> PackedWeight:
        """The stored weight in one value, as backends are given it."""
        return PackedWeight(self.qweight, *self._of_groups(), self.scheme.weight, self.in_features)

    def _stored(self, name: str) -> torch.Tensor | None:
        """The attribute ``name``, without the places where a module looks for one before its parameters."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def _of_groups(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """scale and group_code as kernels read them: in a layer that is joined with others, they are not contiguous."""
        scale, group_code = self._stored("scale"), self._stored("group_code")
        return (
            scale if scale.is_contiguous() else scale.contiguous(),
            group_code if group_code is None or group_code.is_contiguous() else group_code.contiguous(),
        )

    def dequantized_weight(self) -> torch.Tensor:
        """fp32 [N, K]: exactly the values that the kernels multiply by."""
        return reference.dequantize(self.packed_weight)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K] in the layer's dtype, decoded when it is read. Writing to it raises UnsupportedError; writing to
        its ``.data`` quantizes the layer again, see :meth:`requantize`.
        """
        if torch.compiler.is_compiling():  # a compiler drops what is decoded in vain
            return self.dequantized_weight().to(self.dtype)
        return WeightView(self)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise UnsupportedError(_NOT_ASSIGNED)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of ``nn.Module``; UnsupportedError for a weight, which would stand beside the stored one, unused."""
        if name == "weight":
            raise UnsupportedError(_NOT_ASSIGNED)
        if name in self._EXACT and param is not None and not isinstance(param, StoredPart):
            before = self._parameters.get(name)
            whole = before is not None and not before.is_floating_point()
            # Loaders make parameters of their own, and older ones cast codes to floats, which hold them exactly.
            param = StoredPart(param.detach().to(before.dtype) if whole else param.detach())
        super().register_parameter(name, param)
        if self.shared_input is not None:
            self.shared_input.forget()

    @torch.no_grad()
    def requantize(self, weight: torch.Tensor) -> None:
        """Replace the stored weight by ``weight``, rounded to nearest in the layer's own scheme, with a
        :class:`RequantizationWarning`.

        The last :data:`REPLACED_KEPT` weights are kept on the CPU. One that differs from ``weight`` by no more than
        rounding did when it was replaced is what is meant (an adapter was merged, and is unmerged): it comes back, bit
        for bit.

        Args:
            weight: [N, K], of any floating dtype and on any device.

        Raises:
            ValueError: if the shape is another, the weight is not finite, or the layer is on the meta device; the layer
                is then as it was.
        """
        shape = [self.out_features, self.in_features]
        if list(weight.shape) != shape:
            raise ValueError(f"the layer's weight is {shape}, and {list(weight.shape)} cannot replace it")
        if self.qweight.is_meta:
            raise ValueError("the layer is offloaded, or empty: bring its weight back before it is changed")
        weight = weight.decoded() if isinstance(weight, WeightView) else weight.detach()
        wanted = weight.to(self.qweight.device, torch.float32)
        if not bool(torch.isfinite(wanted).all()):
            raise ValueError("the weight holds NaN or infinite values and cannot be quantized; the layer is as it was")
        fmt, before = self.scheme.weight, self.packed_weight
        before = PackedWeight(*(part if part is None else part.clone() for part in before[:3]), *before[3:])
        known = next((one for one in reversed(self._replaced) if one.is_meant_by(wanted)), None)
        if known is not None:
            self._replaced.remove(known)
            self._overwrite(known.packed)
        else:
            self._overwrite(PackedWeight(*_packed(quantize_weight(wanted, fmt), fmt), fmt, self.in_features))
            warnings.warn(_QUANTIZED_AGAIN.format(scheme=self.scheme), RequantizationWarning, stacklevel=2)
        self._replaced.append(ReplacedWeight.by(before, wanted, self.dequantized_weight(), self.dtype))
        del self._replaced[:-REPLACED_KEPT]

    def _overwrite(self, weight: PackedWeight) -> None:
        # In place: captured graphs and layers that share the weight see it, as they would see an nn.Linear's.
        for stored, part in zip((self.qweight, self.scale, self.group_code), weight[:3], strict=True):
            if stored is not None:
                stored.data.copy_(part)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the weight: codes, scales, group parameters and activation scale; the bias not counted."""
        parts = (self.qweight, self.scale, self.group_code, self.input_amax)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / (self.in_features * self.out_features)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shared_input is not None and not keep_vars:
            for name in self._parameters:  # views are stored with all that they are of, or taken for the same
                if prefix + name in destination:
                    destination[prefix + name] = _alone(destination[prefix + name])

    def __getstate__(self) -> dict:
        if self.shared_input is None:
            return self.__dict__
        parts = {name: part if part is None else _alone(part) for name, part in self._parameters.items()}
        return {**self.__dict__, "_parameters": parts, "shared_input": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )

    def reset_parameters(self) -> None:
        raise TypeError("a QuantLinear has no weights to initialise; load a checkpoint, or make it from a linear layer")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # Detached: a cast replaces the data inside the parameter itself.
        exact = {name: getattr(self, name).detach() for name in self._EXACT if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, StoredPart(before.to(after.device)))
            elif not isinstance(after, StoredPart):  # from and to the meta device, a parameter becomes another
                setattr(self, name, StoredPart(after.detach()))
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.dtype = dtype if dtype.is_floating_point else self.dtype
        if self.shared_input is not None:
            self.shared_input.join()
        return self
