"""The command line of the train_* commands: a recipe, the fields that it changes, and what to do with it."""

from collections.abc import Callable

from calm.command_line import InputError, Parser, command, known_errors
from calm.training.configuration import config_and_notes
from calm.training.cost import print_cost
from calm.training.recipe import Recipe, load_recipe, parse_command_line, recipe_names


def report_cost(recipe: Recipe) -> None:
    """The dry run of a model: the configuration that a run would train now, and what it costs."""
    print_cost(recipe, *config_and_notes(recipe))


@command
def training_command(
    kind: str,
    description: str | None,
    train: Callable[[Recipe, str], Callable[[], None] | None],
    argv: list[str] | None,
    dry_run: Callable[[Recipe], None] = report_cost,
) -> None:
    """Reads the command line and calls `train(recipe, resume)` and what it returns, or `dry_run(recipe)`.

    Until the training itself begins, every error is one of recipe, files or environment.

    Args:
        kind: of the recipes that the command takes.
        description: what `--help` says; the module's docstring.
        train: given the recipe and `--resume`; returns the training where there is more than preparing it.
        argv: the command line; `None` is that of the process.
        dry_run: given the recipe.
    """
    parser = Parser(
        f"python -m calm.training.train_{kind}",
        description,
        epilog=f"Every field of the recipe can be given as --field value. Recipes: {', '.join(recipe_names())}.",
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--dry_run", action="store_true", help="print sizes, FLOPs and memory, and exit")
    parser.add_argument(
        "--resume", default="auto", choices=["auto", "never"], help="auto: go on where output_dir's checkpoints end"
    )
    options, fields = parser.parse_known_args(argv)
    with known_errors():
        recipe = load_recipe(options.recipe, parse_command_line(fields))
        if recipe.kind != kind:
            raise InputError(f"the recipe {options.recipe!r} is for train_{recipe.kind}.")
        training = dry_run(recipe) if options.dry_run else train(recipe, options.resume)
    if training is not None:
        with known_errors(InputError, OSError):
            training()
