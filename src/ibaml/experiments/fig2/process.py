"""The process that measures one point of Fig. 2.

``"count"`` on its standard input gives memory and counts and warms up, ``"time"`` the times of one repeat.
"""

import contextlib
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, cast

import torch

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.gradient_based import GradientBased
from ibaml.algorithms.model import Model, build_model
from ibaml.experiments.fig2.cost import HypergradientProblem, PassCounter, peak_bytes_of
from ibaml.experiments.fig2.settings import AlgorithmName, Fig2Settings, curve_name
from ibaml.experiments.report import describe_device
from ibaml.likelihoods import Categorical
from ibaml.networks import Conv4
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train.devices import resolve_device
from ibaml.types import Batch, Episode

# The cost of a step does not depend on these, but conjugate gradients stop early where the curvature is negative, and
# an untrained network has negative curvature: the pull towards the prior has to outweigh it. It must not do so by
# orders of magnitude either, or the residual underflows before the last step.
INNER_LEARNING_RATE = 0.005
PROXIMAL_STRENGTH = 30.0
TEMPERATURE = 0.01

# What a measuring process runs; the request follows as the last argument.
COMMAND = (sys.executable, "-m", "ibaml.experiments.fig2.process")


@contextlib.contextmanager
def measuring_process(
    settings: Fig2Settings, algorithm: AlgorithmName, num_inner_steps: int, num_linear_steps: int | None
) -> Generator[Callable[[str], dict[str, Any]]]:
    """Starts a process for one point and gives a function that sends it a command and returns its answer."""
    request = json.dumps([dataclasses.asdict(settings), algorithm, num_inner_steps, num_linear_steps])
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*COMMAND, request], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):

        def ask(command: str) -> dict[str, Any]:
            assert process.stdin is not None and process.stdout is not None
            answer = ""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{command}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            if answer:
                return json.loads(answer)
            code = process.wait()
            errors.seek(0)
            raise RuntimeError(
                f"the process that measures {curve_name(algorithm, num_linear_steps)} at K = {num_inner_steps} ended "
                f"with code {code}:\n{errors.read()[-2000:]}"
            )

        try:
            yield ask
        finally:
            process.kill()
            # What a broken pipe still holds cannot be delivered, and closing it would say so again.
            with contextlib.suppress(BrokenPipeError):
                cast(Any, process.stdin).close()


def build_problem(
    settings: Fig2Settings,
    algorithm: AlgorithmName,
    num_inner_steps: int,
    num_linear_steps: int | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[HypergradientProblem, Model]:
    """Builds network, algorithm and a random task.

    Args:
        settings: Sizes and seed.
        algorithm: Which algorithm.
        num_inner_steps: K.
        num_linear_steps: L; None for an explicit algorithm.
        device: Where everything lies.
        dtype: Floating-point type of everything.

    Returns:
        The problem, and the model whose nll it uses.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    network = Conv4(
        settings.num_ways,
        in_channels=3,
        image_size=settings.image_size,
        channels=settings.num_channels,
        downsample="max_pool",
        generator=generator,
    )
    model = build_model(network.to(dtype), Categorical()).to(torch.device(device))

    def batch(num_each: int) -> Batch:
        size = (settings.num_ways * num_each, *network.input_shape)
        images = torch.randn(size, generator=generator, dtype=dtype)
        return Batch(images.to(device), torch.arange(settings.num_ways, device=device).repeat_interleave(num_each))

    chosen: dict[str, Any] = {"inner": GradientDescent(num_steps=num_inner_steps, learning_rate=INNER_LEARNING_RATE)}
    if num_linear_steps is not None:
        # A tolerance of zero is never met, so that every solve takes L steps.
        chosen["linear"] = CG(max_steps=num_linear_steps, rtol=0.0)
    if algorithm == "imaml":
        chosen["proximal_strength"] = PROXIMAL_STRENGTH
    if algorithm in ("abml", "ibaml"):
        chosen |= {"num_samples": settings.num_samples, "temperature": TEMPERATURE}
    built = make_algorithm(algorithm, **chosen)
    assert isinstance(built, GradientBased)
    meta = built.init(model.adapted, model.shared, generator=generator)
    noise = built.draw_noise(meta, generator=generator)
    episode = Episode(batch(settings.num_shots), batch(settings.num_queries))
    return HypergradientProblem(built, model, meta, episode, noise), model


def serve(request: str, commands: Iterable[str], answer: Callable[[str], object]) -> None:
    """What a measuring process does: builds its problem, then measures once per command.

    "count" gives memory and counts and warms up; "time" gives the times of one repeat.
    """
    fields, algorithm, num_inner_steps, num_linear_steps = json.loads(request)
    # JSON knows no tuples.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    settings = Fig2Settings(**cast(dict[str, Any], fields))
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = resolve_device(settings.device)
    problem, model = build_problem(settings, algorithm, num_inner_steps, num_linear_steps, device=device)
    for command in commands:
        answered = _count(problem, model, device) if command.strip() == "count" else _time(problem, device)
        answer(json.dumps(answered))


def _count(problem: HypergradientProblem, model: Model, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        # CUDA's libraries allocate workspaces with the first call and keep them.
        problem.hypergradient()
    counter = PassCounter()
    forward_gradients = 0

    def on_forward() -> None:
        nonlocal forward_gradients
        forward_gradients = counter.num_gradients

    counted = problem._replace(nll=counter.nll(model))
    peak_bytes = peak_bytes_of(lambda: counted.hypergradient(on_forward), device)
    point = {
        "peak_bytes": peak_bytes,
        "num_forward_gradients": forward_gradients,
        "num_backward_gradients": counter.num_gradients - forward_gradients,
        "num_hvps": counter.num_hvps,
    }
    return {"device": f"{describe_device(device)}, torch {torch.__version__}", "point": point}


def _time(problem: HypergradientProblem, device: torch.device) -> dict[str, float]:
    gc.collect()
    if device.type == "cuda":
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(device)
        start.record()
        problem.hypergradient(middle.record)
        end.record()
        torch.cuda.synchronize(device)
        return {"forward": start.elapsed_time(middle) / 1e3, "backward": middle.elapsed_time(end) / 1e3}
    marks = [time.perf_counter()]
    problem.hypergradient(lambda: marks.append(time.perf_counter()))
    return {"forward": marks[-1] - marks[0], "backward": time.perf_counter() - marks[-1]}


if __name__ == "__main__":
    serve(sys.argv[1], sys.stdin, partial(print, flush=True))
