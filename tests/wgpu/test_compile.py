"""Kernels are compiled by threads of their own, and faults in them are told before anything runs."""

from tests.wgpu import device_work


def test_several_kernels_are_compiled_at_once(gpu):
    names, made, error = gpu(device_work.compiled_beside, 3)
    assert names == {"compile"}
    assert made
    assert error == "GPUValidationError"


def test_the_matrices_of_a_layer_share_a_buffer(gpu):
    assert gpu(device_work.shared_buffers) == [1] * 6
