"""What differs between the versions of Triton that the executor of compiled kernels knows."""

import numpy as np
import pytest
import triton

from ditq_kernels.inspect import execution
from ditq_kernels.inspect.executor.clocks import Clocks
from ditq_kernels.inspect.executor.faults import SHARED_BASE, UNSIGNED, Fault
from ditq_kernels.inspect.executor.integers import INTEGER, of_halves
from ditq_kernels.inspect.executor.shared_memory import SharedMemory

LANE, PLACE = np.array([0]), np.array([0])


def shared_memory(copies_need_fence):
    """64 bytes of one warpgroup, the first 16 of them about to be written."""
    clocks = Clocks(1, 4, 0)
    return SharedMemory(1, 64, 128, 16, clocks, copies_need_fence)


def copy_16_bytes(shared):
    shared.start_copy(PLACE, 16, LANE)
    shared.arrive(PLACE, 16, np.zeros(1, UNSIGNED[16]), LANE)


def read_by_a_matrix_instruction(shared):
    shared.read_by_engine(PLACE[None], np.array([0]), np.array([1]))


def test_matrix_instructions_read_copies_behind_a_proxy_fence():
    shared = shared_memory(True)
    copy_16_bytes(shared)
    shared.clocks.meet_blocks()
    with pytest.raises(Fault, match=r"copies by cp\.async that no fence\.proxy\.async has shown"):
        read_by_a_matrix_instruction(shared)
    shared.clocks.fence(shared.clocks.rows)
    shared.clocks.meet_blocks()
    read_by_a_matrix_instruction(shared)
    assert shared.unfenced_copies == 0


def test_where_copies_need_no_fence_they_are_counted_and_stores_still_need_one():
    shared = shared_memory(False)
    copy_16_bytes(shared)
    with pytest.raises(Fault, match="race"):  # without a barrier, others do not know of it
        read_by_a_matrix_instruction(shared)
    shared.clocks.meet_blocks()
    read_by_a_matrix_instruction(shared)
    assert shared.unfenced_copies >= 4  # one of each warp
    stored = shared_memory(False)
    stored.store(np.array([SHARED_BASE], np.uint64), 16, np.zeros(1, UNSIGNED[16]), LANE)
    stored.clocks.meet_blocks()
    with pytest.raises(Fault, match=r"stores that no fence\.proxy\.async has shown"):
        read_by_a_matrix_instruction(stored)


@pytest.mark.parametrize("version, strict", [("3.6.0", False), ("3.7.0", True), ("3.7.1", True), ("4.0.0+git", True)])
def test_only_old_versions_are_let_off_the_fence(version, strict, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    assert execution.copies_need_fence() is strict


def test_what_was_let_through_is_said():
    outcome = execution.Outcome(90, "product", "a", execution.OK, "equal", 1.0, 1, 1, 10, unfenced=1)
    assert any("1 cases" in line and "fence.proxy.async" in line for line in execution.summary([outcome]))
    assert not any(
        "fence" in line for line in execution.summary([execution.Outcome(*list(vars(outcome).values())[:-1])])
    )


def test_arithmetic_on_halves_of_a_register():
    a = np.array([0xFFFF_7FFF, 0x0001_8000], np.uint32)
    one = np.array([0x0001_0001], np.uint32)
    assert of_halves(INTEGER["add"], np.int16)(a, one).tolist() == [0x0000_8000, 0x0002_8001]
    assert of_halves(INTEGER["max"], np.int16)(a, one).tolist() == [0x0001_7FFF, 0x0001_0001]
    assert of_halves(INTEGER["max"], np.uint16)(a, one).tolist() == [0xFFFF_7FFF, 0x0001_8000]
