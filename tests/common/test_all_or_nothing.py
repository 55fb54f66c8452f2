import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from torchao_superblock.common.all_or_nothing import all_or_nothing


class Failure(Exception):
    pass


class Halve(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda *_: None)
    return model


def test_classes_and_parametrizations_go_back(model):
    kind, weight = type(model[0]), model[0].weight
    with pytest.raises(Failure), all_or_nothing(model):
        parametrize.register_parametrization(model[0], "weight", Halve())
        assert type(model[0]) is not kind
        raise Failure
    assert type(model[0]) is kind
    assert model[0].weight is weight
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


def test_hooks_go_back(model):
    hooks = dict(model[0]._forward_hooks)
    with pytest.raises(Failure), all_or_nothing(model):
        model[0]._forward_hooks.clear()
        model.register_load_state_dict_pre_hook(lambda *_: None)
        model[1].register_full_backward_hook(lambda *_: None)
        model[1].register_buffer("more", torch.ones(1), persistent=False)
        raise Failure
    assert dict(model[0]._forward_hooks) == hooks
    assert not model._load_state_dict_pre_hooks
    assert not model[1]._backward_hooks
    assert not model[1]._non_persistent_buffers_set


def test_the_random_state_goes_back(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(Failure), all_or_nothing(model):
        torch.rand(100)
        raise Failure
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
def test_the_random_state_of_a_gpu_goes_back(model):
    model.cuda()
    torch.manual_seed(0)
    expected = torch.rand(3, device="cuda")
    torch.manual_seed(0)
    with pytest.raises(Failure), all_or_nothing(model):
        torch.rand(100, device="cuda")
        raise Failure
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_contents_go_back_although_one_tensor_cannot_be_written(model):
    with torch.inference_mode():
        made_there = torch.ones(3)
    tensors = [model[0].bias, torch.zeros(1).expand(4), torch.full((2,), float("nan")), made_there]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(Failure) as caught, all_or_nothing(model, tensors):
        with torch.no_grad():
            tensors[0].fill_(7)
            tensors[2].fill_(7)
        with torch.inference_mode():
            tensors[3].fill_(7)
        raise Failure
    assert not hasattr(caught.value, "__notes__")
    for tensor, content in zip(tensors, before, strict=True):
        assert torch.allclose(tensor, content, equal_nan=True)


def test_success_stays(model):
    with all_or_nothing(model, [model[0].bias]):
        with torch.no_grad():
            model[0].bias.fill_(7)
        model.append(nn.ReLU())
    assert len(model) == 3 and (model[0].bias == 7).all()
