"""The smallest run of the commands."""

SINUSOID = "sinusoid_5shot_maml"
SMALL = (
    "--trainer.tasks-per-step",
    "2",
    "--trainer.validate-every",
    "2",
    "--trainer.num-validation-tasks",
    "3",
    "--trainer.log-every",
    "1",
    "--data.num-test-queries",
    "6",
    "--network.arguments.hidden-sizes",
    "6",
    "6",
)


def train(ibaml, folder: object, *arguments: object, recipe: str = SINUSOID, steps: int = 4) -> tuple[int, str, str]:
    return ibaml("train", recipe, "--run-folder", folder, "--steps", steps, *arguments, *SMALL)
