"""Tokenises a recipe's text before its training: `calm tokenize --recipe calm-m --train_files text.jsonl`.

The tokens go to the cache that the training reads (`cache_dir`, by default calm/tokens in the cache of Hugging Face),
so give both commands the same fields.
"""

import sys

from calm_transformers.command_line import InputError, Parser, command, known_errors
from calm_transformers.training.data import load_token_file, token_cache_dir
from calm_transformers.training.recipe import load_recipe, parse_command_line
from calm_transformers.training.train import config_with_notes, load_recipe_tokenizer


@command
def main(argv: list[str] | None = None) -> None:
    epilog = "Every field of the recipe can be given as --field value."
    parser = Parser("calm tokenize", __doc__, epilog=epilog)
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    options, fields = parser.parse_known_args(argv)
    with known_errors():
        recipe = load_recipe(options.recipe, parse_command_line(fields))
        if recipe.kind == "tokenizer" or recipe.data.streaming:
            raise InputError(f"the recipe {options.recipe!r} reads text while it trains: nothing to tokenise.")
        tokenizer, data, folder = load_recipe_tokenizer(recipe), recipe.data, token_cache_dir(recipe.data)
        config, _ = config_with_notes(recipe)
        patch_size = getattr(config, "patch_size", 1)
        for part in ["train", *(["validation"] if data.validation_files or data.validation_split else [])]:
            file = load_token_file(data, part, tokenizer, patch_size, folder)
            print(f"{part}: {len(file.tokens):,} tokens of {len(file.document_starts):,} documents in {folder}")


if __name__ == "__main__":
    sys.exit(main())
