"""Faults planted by hand: each is what somebody might write, and most went unnoticed once."""

from pathlib import Path

from .mutant import Mutant, changed_lines

NAME = "planted"
_GRID, _OPS, _PLAN, _REFERENCE = "layer/grid.py", "layer/ops.py", "model/planning.py", "layer/reference.py"
_RUN, _SENSITIVITY = "evaluation/run.py", "analysis/sensitivity.py"
_SUITS = "multiplier = torch.where(errors[1] < errors[0], down, up)"
_METRICS, _EVALUATION = ("evaluation_metrics",), ("evaluation_metrics", "evaluation", "evaluation_prompts")
_WITHOUT_MOMENT = "rounding_error(layers[entry.name], name)"
_NOT_SQUARED = "losses[entry.name][scheme].picture_error"
_NEVER_COUNTED = "if False:\n            return"
_OBSERVED = "observe_run(model, draw, None, progress)"
_SX_FIRST = """\
        if sx is not None:
            y = y * tl.load(sx + m)
        if scale is not None:
            y = y * tl.load(scale + n)
"""
_SX_LAST = """\
        if scale is not None:
            y = y * tl.load(scale + n)
        if sx is not None:
            y = y * tl.load(sx + m)
"""
_IN_PLACE = "contextlib.nullcontext(directory) as unfinished"
_FIT_UNCHECKED = "(lambda *_: None)(model, quantized, manifest, {"
_SCALED = "scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t).to(dtype)"
_NOT_CLIPPED = "found[name], args.rounding, clip=None, progress"
_DEFAULT_STEP = "calibrated(model, runs, None, moments)"
# (file, what stands there, what is planted, the tests that should notice)
PLANTED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    # Every group's multiplier as large as it may be; none ever rounded down; no search for a better range.
    (_GRID, _SUITS, "multiplier = limits + 0 * up", ("quantizer",)),
    (_GRID, _SUITS, "multiplier = up", ("quantizer",)),
    (_GRID, 'return CLIP_RATIOS if clip == "search"', 'return (1.0,) if clip == "search"', ("quantizer",)),
    (_GRID, "below * ratio, high", "below, high", ("quantizer",)),
    # A calibrated reach stored doubled, or not used.
    ("layer/linear.py", "dtype=torch.float32).reshape(1)", "dtype=torch.float32).reshape(1) * 2", ("linear",)),
    ("layer/linear.py", 'stored("input_amax"), *weight', "None, *weight", ("linear",)),
    # No gradient of the bias where the input needs none.
    (_OPS, "x.requires_grad or (bias is not None and bias.requires_grad)", "x.requires_grad", ("ops",)),
    # Inputs and gradients that are expanded or transposed.
    ("kernels/gradient.py", "grad if grad.stride(1) == 1 else grad.contiguous()", "grad", ("ops",)),
    ("kernels/dispatch.py", "if x.stride(1) != 1 and x.shape[1] > 1:", "if False:", ("ops",)),
    ("kernels/small_product.py", "x.stride(0),", "x.shape[1],", ("ops",)),
    ("kernels/in_loop_product.py", "x.stride(0),", "x.shape[1],", ("ops",)),
    # Tables that never match.
    (
        "kernels/dispatch.py",
        "return _chosen(row_class(rows), out_features",
        "return _chosen(rows, out_features",
        ("choice",),
    ),
    # A budget that ignores what was calibrated.
    (
        _PLAN,
        "rounding_error(layers[entry.name], name, moments.get(entry.name))",
        _WITHOUT_MOMENT,
        ("budget", "planning"),
    ),
    ("model/budget.py", "(error @ moment * error)", "(error * error)", ("budget", "planning")),
    ("model/budget.py", "if spent + there.bits - here.bits <= budget:", "if True:", ("budget", "planning")),
    # Metrics.
    (_RUN, "(logits.argmax(1) == labels)", "(logits.argmax(1) != labels)", _EVALUATION),
    (_RUN, "logits.softmax(1)", "logits.sigmoid()", _EVALUATION),
    ("demo/classifier.py", "argmax(1) == wanted", "argmax(1) != wanted", _METRICS),
    ("evaluation/metrics.py", "level: float = 0.95", "level: float = 0.90", _METRICS),
    ("evaluation/metrics.py", "level: float = 0.95", "level: float = 0.995", _METRICS),
    ("evaluation/metrics.py", "torch.tensor([0.025, 0.975])", "torch.tensor([0.05, 0.95])", _METRICS),
    ("evaluation/metrics.py", "torch.tensor([0.025, 0.975])", "torch.tensor([0.0025, 0.9975])", _METRICS),
    ("evaluation/metrics.py", "math.sqrt(self.noise / self.signal)", "self.noise / self.signal", _METRICS),
    (
        _RUN,
        "self.settings.calibration_pictures, CALIBRATION_SEED",
        "self.settings.calibration_pictures, 0",
        _EVALUATION,
    ),
    # The analysis: errors that are not relative, or not squared.
    (_SENSITIVITY, ".norm() / original.double().norm())", ".norm())", ("analysis",)),
    (_SENSITIVITY, "loss.picture_error**2", "loss.picture_error", ("budget", "analysis")),
    ("analysis/analyze.py", "losses[entry.name][scheme].picture_error ** 2", _NOT_SQUARED, ("analysis",)),
    # Calls of a step.
    ("model/steps.py", "if self._calls_per_step is not None:\n            return", _NEVER_COUNTED, ("chosen_steps",)),
    ("model/calibration.py", "moment_names, ranges_of=first)", "moment_names, ranges_of=None)", ("chosen_steps",)),
    ("analysis/analyze.py", "observe_run(model, draw, calls_per_step, progress)", _OBSERVED, ("analysis",)),
    ("analysis/analyze.py", "forms, amax, index, calls_per_step)", "forms, amax, index)", ("analysis",)),
    # The order of the scales.
    (_REFERENCE, ".mul_(sx.unsqueeze(1)).mul_(scale)", ".mul_(scale).mul_(sx.unsqueeze(1))", ("reference",)),
    ("kernels/epilogue.py", _SX_FIRST, _SX_LAST, ("kernels",)),
    # Checkpoints that are half there, damaged, or of another version.
    ("checkpoint/store.py", "written_whole(directory) as unfinished", _IN_PLACE, ("checkpoint", "interruption")),
    ("files.py", 'path.with_name(f".{uuid.uuid4().hex}.{path.name}")', "path", ("checkpoint", "interruption")),
    ("files.py", "beside.unlink(missing_ok=True)", "pass", ("files",)),
    ("files.py", "shutil.rmtree(beside, ignore_errors=True)", "pass", ("files",)),
    ("checkpoint/manifest.py", "layout.version != self.layout_version", "False", ("checkpoint",)),
    ("checkpoint/manifest.py", "version > VERSION", "version > VERSION + 1", ("checkpoint",)),
    ("checkpoint/manifest.py", "if sha256(path) != self.tensor_sha256:", "if False:", ("checkpoint",)),
    ("checkpoint/manifest.py", "if size != self.tensor_bytes:", "if False:", ("checkpoint",)),
    ("checkpoint/store.py", "_check_fit(model, quantized, manifest, {", _FIT_UNCHECKED, ("checkpoint",)),
    ("checkpoint/store.py", 'leaf != "bias" and dtype != _FILE_DTYPES[tensor.dtype]', "False", ("checkpoint",)),
    ("model/calibration.py", 'int(header["version"]) > VERSION', "False", ("calibration",)),
    (
        "model/calibration.py",
        'tuple(record.get("moment_steps", ()))',
        'tuple(record["moment_steps"])',
        ("calibration",),
    ),
    # Schedulers that scale their noise, or what the model is given.
    ("integrations/sampling.py", " * scheduler.init_noise_sigma", "", ("sampling",)),
    ("integrations/sampling.py", _SCALED, "(torch.cat([x, x]) if guided else x).to(dtype)", ("sampling",)),
    # The command line.
    ("arguments.py", 'part.removeprefix("-").isdecimal()', "part.isdecimal()", ("cli",)),
    (
        "integrations/command.py",
        "found[name], args.rounding, clip=args.clip, progress",
        _NOT_CLIPPED,
        ("cli",),
    ),
    ("integrations/command.py", "write(path, args.out, models, args.clip)", "write(path, args.out, models)", ("cli",)),
    ("integrations/command.py", "calibrated(model, runs, args.step, moments)", _DEFAULT_STEP, ("cli",)),
    (
        "analysis/command.py",
        "trial=drawing(min(args.trial_steps, args.steps))",
        "trial=drawing(args.steps)",
        ("analysis",),
    ),
    ("analysis/command.py", "step=args.step,", "", ("analysis",)),
)


def mutants(package: Path) -> list[tuple[Mutant, tuple[str, ...]]]:
    """With their tests.

    Raises:
        ValueError: if what an entry replaces does not stand in its file exactly once.
    """
    found = []
    for file, old, new, tests in PLANTED:
        source = (package / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{file} has {old!r} {source.count(old)} times, not once")
        text = source.replace(old, new)
        found.append((Mutant(NAME, file, *changed_lines(source, text), text), tests))
    return found
