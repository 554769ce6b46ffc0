import math

import pytest
import torch

from ibaml.data import SinusoidTasks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_targets_are_one_sinusoid_within_the_ranges():
    tasks = SinusoidTasks(num_shots=20, num_queries=30)
    assert tasks.input_shape == (1,) and tasks.num_outputs == 1
    episode = tasks.sample(200, generator=generator())
    assert episode.support.x.shape == episode.support.y.shape == (200, 20, 1)
    assert episode.query.x.shape == episode.query.y.shape == (200, 30, 1)
    x = torch.cat([episode.support.x, episode.query.x], dim=1).double()
    y = torch.cat([episode.support.y, episode.query.y], dim=1).double()
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    # A sin(x - phase) is linear in (A cos phase, -A sin phase) over the basis (sin x, cos x).
    basis = torch.cat([x.sin(), x.cos()], dim=-1)
    fit = torch.linalg.lstsq(basis, y).solution
    assert (basis @ fit - y).abs().max() < 1e-5
    amplitude, phase = fit.norm(dim=1).squeeze(), torch.atan2(-fit[:, 1], fit[:, 0]).squeeze()
    assert 0.1 - 1e-4 < amplitude.min() and amplitude.max() < 5 + 1e-4
    assert phase.min() > -1e-4 and phase.max() < math.pi + 1e-4
    assert abs(amplitude.mean() - 2.55) < 5 * 4.9 / math.sqrt(12 * 200)
    assert abs(phase.mean() - math.pi / 2) < 5 * math.pi / math.sqrt(12 * 200)


def test_noise_has_the_stated_spread():
    episode = SinusoidTasks(num_shots=1, num_queries=100, amplitude=(0.0, 0.0), noise_std=0.3).sample(
        200, generator=generator()
    )
    variance = float(episode.query.y.var())
    assert abs(variance - 0.09) < 5 * 0.09 * math.sqrt(2 / 20_000)


def test_seed_alone_decides():
    tasks = SinusoidTasks(num_shots=3, num_queries=3)
    assert torch.equal(tasks.sample(2, generator=generator(1)).query.y, tasks.sample(2, generator=generator(1)).query.y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_shots=0), ValueError, "num_shots must be at least 1"),
        (dict(num_queries=2.5), TypeError, "num_queries must be an int"),
        (dict(amplitude=(5.0, 0.1)), ValueError, r"amplitude must be two finite numbers \(low, high\)"),
        (dict(phase=(0.0, math.inf)), ValueError, "phase must be two finite numbers"),
        (dict(x_range=(1.0,)), ValueError, "x_range must be two finite numbers"),
        (dict(noise_std=-0.1), ValueError, "noise_std must be a finite number of at least 0, got -0.1"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        SinusoidTasks(**(dict(num_shots=2, num_queries=2) | change))


def test_sample_refuses():
    tasks = SinusoidTasks(num_shots=2, num_queries=2)
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        tasks.sample(0, generator=generator())
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        tasks.sample(1, generator=None)
