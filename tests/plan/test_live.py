"""The count of live storages, on real tensors of known sizes."""

import torch

from dpo_fast.plan.flops import count_flops
from dpo_fast.plan.live import LiveMemory


def test_storages_count_once_and_leave_when_the_last_view_does() -> None:
    memory = LiveMemory()
    with memory:
        a = torch.zeros(1000)
        view = a.view(10, 100)[2:]
        assert memory.live["activations"] == 4000
        del a
        assert memory.live["activations"] == 4000  # the view holds it
        del view
        assert memory.live["activations"] == 0
    assert memory.peak == {"activations": 4000}


def test_what_autograd_keeps_is_alive_until_the_backward() -> None:
    memory = LiveMemory()
    x = torch.ones(256, requires_grad=True)
    memory.ignore(x)
    with memory:
        with memory.doing("forward"):
            loss = x.exp().sum()  # exp keeps its result
        assert memory.live["activations"] == 1024 + 4
        with memory.doing("backward"):
            loss.backward()
        memory.rename(x.grad, "gradients")
        del loss
        assert memory.live == {"activations": 0, "gradients": 1024}
    assert memory.phase == "backward"


def test_parts_and_peak_belong_together() -> None:
    memory = LiveMemory()
    with memory:
        with memory.part("head"), memory.doing("first"):
            a = torch.zeros(100)
        with memory.doing("second"):
            b = torch.zeros(50)
        del a
        with memory.doing("third"):
            c = torch.zeros(10)
    assert memory.peak == {"head": 400, "activations": 200}
    assert memory.phase == "second"
    assert b.numel() + c.numel() == 60


def test_known_tensors_do_not_count() -> None:
    memory = LiveMemory()
    weight = torch.ones(100)
    memory.ignore(weight)
    with memory:
        same = weight.view(10, 10)
        assert not memory.live["activations"]
    assert same.shape == (10, 10)


def test_products_and_attention_are_counted() -> None:
    memory = LiveMemory(count_flops)
    x, w = torch.ones(8, 16), torch.ones(16, 4, requires_grad=True)
    with memory:
        y = x @ w
        assert memory.flops == 2 * 8 * 16 * 4
        y.sum().backward()
        assert memory.flops == 2 * (2 * 8 * 16 * 4)
    attention = LiveMemory(count_flops)
    q = torch.ones(1, 2, 32, 8, requires_grad=True)
    with attention:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        forward = attention.flops
        assert forward == 2 * (2 * 2 * 32 * 32 * 8) / 2
        out.sum().backward()
    assert attention.flops == forward + 2.5 * forward
