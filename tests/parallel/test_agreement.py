"""Groups that share out the features start alike and step alike."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_sae.parallel import Layout, distribute, local
from lightning_sae.parallel.agreement import average_gradients, start_alike
from tests.helpers.ddp import run_on_two


def agree(process: int, shared_out: bool) -> tuple[list[float], list[float], bool]:
    linear = nn.Linear(2, 3, bias=False)
    nn.init.constant_(linear.weight, process)
    layout = Layout.on_one_device(3)
    if shared_out:
        names = ("data_parallel", "tensor_parallel")
        layout = Layout.on_mesh(3, init_device_mesh("cpu", (2, 1), mesh_dim_names=names))
        distribute(linear, layout.share, replicated=frozenset())
    start_alike(linear, layout)
    local(linear.weight.sum() * (process + 1)).backward()
    before = local(linear.weight.grad)
    average_gradients(linear, layout)
    after = local(linear.weight.grad)
    same = before.data_ptr() == after.data_ptr()  # optimizers and DTensors hold on to it
    return local(linear.weight.detach())[0].tolist(), after[0].tolist(), same


def test_groups_have_the_first_s_weights_and_the_mean_gradient():
    for weights, gradient, in_place in run_on_two(agree, True):
        assert weights == [0.0, 0.0]
        assert gradient == [1.5, 1.5]
        assert in_place


def test_where_features_are_not_shared_out_that_is_left_to_lightning():
    for process, (weights, gradient, _) in enumerate(run_on_two(agree, False)):
        assert weights == [process, process]
        assert gradient == [process + 1.0] * 2


def test_what_has_no_gradient_is_left_alone():
    linear = nn.Linear(2, 3)
    average_gradients(linear, Layout.on_one_device(3))
    assert all(parameter.grad is None for parameter in linear.parameters())
    assert torch.is_grad_enabled()
