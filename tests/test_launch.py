"""A second launch of the same goes to what was compiled for the first, and only where it is the same."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# Kernels are compiled to PTX, which the executor runs in place of a GPU: a process of its own, without the interpreter.
PROGRAM = """
import tempfile, torch, triton
from triton.runtime.jit import JITFunction
from ditq_kernels import QuantLinear, use_backend
from ditq_kernels.inspect import execution
from ditq_kernels.inspect.bounds import GPUS
from ditq_kernels.inspect.executor import driver
from ditq_kernels.kernels import activation, launch
from ditq_kernels.kernels.config import shared_memory
from ditq_kernels.kernels.device import Device, standing_in
from ditq_kernels.layer import backend, reference

asked, run = [], JITFunction.run
JITFunction.run = lambda self, *args, **kwargs: asked.append(self) or run(self, *args, **kwargs)

def quantized(x, amax=None):
    "How often Triton was asked; the codes are the reference's."
    asked.clear()
    found, expected = activation.quantize_activation(x, amax), reference.quantize_activation(x, amax)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    return len(asked)

with tempfile.TemporaryDirectory() as cache, standing_in(Device("counted", 90, GPUS[90].multiprocessors)):
    session = driver.Session(90, shared_memory(90), copies_need_fence=execution.copies_need_fence())
    driver.install(session, cache)
    backend.why_unavailable = lambda name, device_type: None
    x = torch.randn(6, 160)
    assert [quantized(x), quantized(torch.randn(6, 160)), quantized(torch.randn(9, 160))] == [1, 0, 0]
    # Other dtypes, strides and columns are others, and so is an argument that was not there.
    assert [quantized(x.bfloat16()), quantized(x.bfloat16())] == [1, 0]
    assert [quantized(x[:, ::2]), quantized(x[:, 80:]), quantized(x[:, 80:])] == [1, 1, 0]
    reach = torch.tensor([2.0])
    assert [quantized(x, reach), quantized(x, reach), quantized(x, 2 * reach)] == [1, 0, 0]
    # Addresses that are no multiples of 16 are left to Triton every time.
    assert [quantized(x[:, 1:81]), quantized(x[:, 1:81]), quantized(x[:, :80])] == [1, 1, 0]
    # Who wants to hear of launches hears of every one, by Triton.
    hook = print
    triton.knobs.runtime.launch_enter_hook.add(hook)
    assert [quantized(x), quantized(x)] == [1, 1]
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert quantized(x) == 0
    # What is kept is bounded.
    launch.MOST_KEPT = len(launch._kept)
    assert [quantized(torch.randn(2, 96)), len(launch._kept), quantized(x), quantized(x)] == [1, 1, 1, 0]
    # Products by descriptors.
    layer, wide = QuantLinear.from_linear(torch.nn.Linear(128, 96).bfloat16(), "w8a8"), torch.randn(200, 128).bfloat16()
    expected = reference.quantized_linear(wide, None, layer.packed_weight, layer.bias.detach())
    with use_backend("triton"), torch.no_grad():
        launch.MOST_KEPT = 100
        for launches in (2, 0):
            asked.clear()
            assert torch.equal(layer(wide), expected) and len(asked) == launches
print("done")
"""


def test_launches_of_the_same_go_to_what_was_compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "done", done.stdout + done.stderr
