"""What loads tokenizers, in functions for fresh processes (see fresh_process.py): they note what would be asked."""

import builtins


def _noting_questions() -> list[str]:
    questions: list[str] = []
    builtins.input = lambda prompt="": questions.append(prompt) or "n"
    return questions


def load(folder: str, text: str) -> dict:
    questions = _noting_questions()
    from calm.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    return {"class": type(tokenizer).__name__, "decoded": decoded, "questions": questions}


def train(arguments: list[str]) -> dict:
    questions = _noting_questions()
    from calm.training.train import main

    return {"code": main(arguments), "questions": questions}
