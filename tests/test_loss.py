"""Promises of the chunked head and loss: torch's numbers and gradients, without the logits of all tokens."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from xattn.nn.loss import linear_cross_entropy, token_cross_entropy


def draws(t=53, m=11, v=31, dtype=torch.float64):
    x, weight = torch.randn(t, m, dtype=dtype, requires_grad=True), torch.randn(v, m, dtype=dtype, requires_grad=True)
    target = torch.randint(0, v, (t,))
    target[::7] = -100
    return x, weight, target


@pytest.mark.parametrize("chunk", [1, 7, 53, 1000, None])
def test_loss_and_gradients_equal_torchs_for_any_chunk(chunk):
    x, weight, target = draws()
    expected = cross_entropy(x @ weight.T, target)
    loss = linear_cross_entropy(x, weight, target, chunk=chunk)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(3 * expected, (x, weight))
    for got, want in zip(torch.autograd.grad(3 * loss, (x, weight)), theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradient_reaches_only_what_asks_for_it():
    x, weight, target = draws()
    linear_cross_entropy(x, weight.detach(), target).backward()
    assert x.grad is not None and weight.grad is None
    assert not linear_cross_entropy(x.detach(), weight.detach(), target).requires_grad


def test_no_target_that_counts_gives_zero_loss_and_zero_gradient():
    x, weight, _ = draws()
    loss = linear_cross_entropy(x, weight, torch.full((53,), -100))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and (weight.grad == 0).all()


def test_token_losses_average_to_the_loss():
    x, weight, target = draws(dtype=torch.float32)
    target = target.clamp(min=0)
    nll = token_cross_entropy(x, weight, target)
    assert nll.shape == target.shape and not nll.requires_grad
    torch.testing.assert_close(nll.mean(), linear_cross_entropy(x, weight, target))


def test_logits_of_all_tokens_never_exist_at_once():
    t, m, v = 256, 8, 1000
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            biggest = max([biggest, *(o.numel() for o in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(o))])
            return out

    x, weight = torch.randn(t, m, requires_grad=True), torch.randn(v, m, requires_grad=True)
    target = torch.randint(0, v, (t,))
    with Watch():
        linear_cross_entropy(x, weight, target, chunk=16).backward()
    assert biggest == 16 * v
