"""What every test shares: one thread, seeded draws, property tests that replay the same examples, and the devices."""

import os
import warnings

import pytest
import torch
from cases import DEVICES
from hypothesis import settings

torch.set_num_threads(1)
if torch.cuda.is_available():
    # the first product of a thread, of autograd's too, warns that it makes the context, and warnings are errors here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1, device="cuda", requires_grad=True).mm(torch.zeros(1, 1, device="cuda")).sum().backward()
else:
    # test_kernels.py interprets the kernels: triton's own functions must have been imported for that, whoever asks first
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
# the same examples on every run and every machine; nothing is written beside the code
settings.register_profile("steady", derandomize=True, deadline=None, database=None, max_examples=150)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in DEVICES.items()])
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return request.param
