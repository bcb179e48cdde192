"""Experiment d: the layers said to be sensitive: what keeping each kind of layer in 16 bits buys, and what quantizing
the kept ones costs.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...layer.formats import Scheme
from ...model.calibration import DEFAULT_STEP
from ...model.conversion import quantize
from ...model.planning import Plan, plan
from .lab import Case, Lab, Protocol, bits_of_all_layers

PROTOCOL = Protocol()
BLOCK = "transformer_blocks.*."
KINDS: dict[str, tuple[str, ...]] = {
    "modulation": (BLOCK + "norm1.linear", "proj_out_1"),
    "query and key": (BLOCK + "attn1.to_q", BLOCK + "attn1.to_k"),
    "value": (BLOCK + "attn1.to_v",),
    "attention output": (BLOCK + "attn1.to_out.0",),
    "MLP, first product": (BLOCK + "ff.net.0.proj",),
    "MLP, second product": (BLOCK + "ff.net.2",),
    "timestep embedders": (BLOCK + "norm1.emb.timestep_embedder.linear_*",),
    "final layer": ("proj_out_2",),
}
KEPT_BY_THE_RECIPE = ("timestep embedders", "final layer")
TRIED = (("w4a8_g128", "nearest"), ("w4a8_g128", "compensated"), ("w8a8_static", "nearest"))


def cases(lab: Lab) -> Iterator[Case]:
    """For each scheme: the recipe's plan, and the plan with one kind of layer treated otherwise."""

    def case(scheme: str, rounding: str, change: str, chosen: Plan) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(DEFAULT_STEP, moments=True)
            return quantize(lab.copy(), chosen, calibration, rounding=rounding, progress=False)

        facts = dict(scheme=scheme, rounding=rounding, change=change, bits_of_all_layers=bits_of_all_layers(chosen))
        return Case(facts, build)

    def changed(scheme: str, kind: str, treatment: str | None) -> Plan:
        chosen = plan(lab.model, scheme)
        for pattern in KINDS[kind]:
            chosen.set(pattern, treatment)
        return chosen

    for scheme, rounding in TRIED:
        parsed = Scheme.parse(scheme)
        yield case(scheme, rounding, "the recipe's plan", plan(lab.model, scheme))
        for kind in KINDS:
            if kind in KEPT_BY_THE_RECIPE:
                yield case(scheme, rounding, f"{kind} in {scheme}", changed(scheme, kind, scheme))
                weight_only = parsed.weight_only.name
                yield case(scheme, rounding, f"{kind} in {weight_only}", changed(scheme, kind, weight_only))
            else:
                yield case(scheme, rounding, f"{kind} in 16 bits", changed(scheme, kind, None))
        yield case(scheme, rounding, f"modulation in {scheme}", changed(scheme, "modulation", scheme))
        gentler = "w8a8" if scheme != "w8a8" else "w8a16"
        chosen = changed(scheme, "MLP, second product", gentler)
        yield case(scheme, rounding, f"MLP, second product in {gentler}", chosen)
