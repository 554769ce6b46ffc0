"""Evaluation mode without a change to the module, and digests of weights."""

import copy
import threading

import pytest
import torch
from torch import nn

from ibaml.backbones.frozen import evaluation_mode, module_of, weights_digest, weights_stamp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


class TestEvaluationMode:
    def test_statistics_dropout_and_gradients_are_off_and_modes_come_back(self):
        module = network()
        module[1].eval()
        before = copy.deepcopy(module.state_dict())
        with evaluation_mode(module):
            assert not any(part.training for part in module.modules())
            first, second = module(torch.ones(5, 3)), module(torch.ones(5, 3))
        assert torch.equal(first, second) and not first.requires_grad
        assert [part.training for part in module.modules()] == [True, True, False, True]
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_modes_come_back_after_an_error(self):
        module = network()
        with pytest.raises(RuntimeError), evaluation_mode(module):
            module(torch.ones(5, 99))
        assert all(part.training for part in module.modules())

    def test_threads_leave_no_other_mode_behind(self):
        module, seen = network(), []

        def work():
            for _ in range(50):
                with evaluation_mode(module):
                    seen.append(module.training)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(seen) and len(seen) == 200
        assert all(part.training for part in module.modules())


class TestDigest:
    def test_a_copy_has_the_same_whatever_its_mode(self):
        assert weights_digest(network()) == weights_digest(copy.deepcopy(network()).eval())

    @pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "1.bias"])
    def test_a_tensor_of_another_value(self, name):
        module = network()
        before, stamp = weights_digest(module), weights_stamp(module)
        with torch.no_grad():
            module.state_dict(keep_vars=True)[name].view(-1)[0] += 1e-3
        assert weights_digest(module) != before
        assert weights_stamp(module) != stamp

    def test_another_structure_of_the_same_weights(self):
        linear = nn.Linear(3, 4)
        assert weights_digest(nn.Sequential(linear, nn.ReLU())) != weights_digest(nn.Sequential(linear, nn.GELU()))


def test_module_of_a_method():
    module = network()
    assert module_of(module) is module
    assert module_of(module.forward) is module
    assert module_of(lambda x: x) is None
    assert module_of([].append) is None
