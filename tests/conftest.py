"""Where the tests run: offline, and on a machine without a GPU with the kernels in Triton's interpreter."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before rosa_kernels is imported

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: it runs the compiled kernels"))


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(HAS_GPU, reason="the GPU runs these tests")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request):
    """Where the Triton backend runs: compiled on a GPU, in the interpreter on the CPU."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
