"""lm-evaluation-harness: generate_until tasks; likelihood tasks with heads that know probabilities, else an error."""

import functools
import json

import pytest
import torch
import yaml
from model_copies import ROOT
from tiny import tiny_model, tiny_tokenizer

from calm_transformers.loading import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.transformers

pytest.importorskip("lm_eval", reason="lm_eval (extra [clients]) is not installed")

COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
GENERATION_TASK = {
    **{**COMMON, "task": "continues", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]},
    "generation_kwargs": {"until": ["."], "max_gen_toks": 16, "do_sample": False, "num_candidates": 20},
}
CHOICE_TASK = {**COMMON, "task": "chooses", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
CHOICE_TASK |= {"doc_to_choice": ["yes", "no"]}


@functools.cache
def task_manager():
    """Returns a TaskManager without the built-in tasks, which take seconds to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def evaluate(model, task: dict, folder, answers: dict[str, str], **kwargs):
    import lm_eval

    rows = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in answers.items())
    (folder / "test.jsonl").write_text(rows)
    task = {**task, "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
    return lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, task_manager=task_manager(), **kwargs)


def wrapped(model, tokenizer, batch_size: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=64)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generations_equal_the_model_s_own_and_are_scored(batch_size, tmp_path):
    """Prompts differ in length, so batches of 2 are padded. One answer is made wrong, so the score is 2/3."""
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    questions, settings = ("once", "a longer question", "the dog"), GENERATION_TASK["generation_kwargs"]
    answers = {}
    for question in questions:
        ids = tokenizer(question, return_tensors="pt")
        options = {"do_sample": False, "num_candidates": settings["num_candidates"]}
        output = model.generate(**ids, max_new_tokens=settings["max_gen_toks"], **options)
        text = tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        answers[question] = text.partition(".")[0]
    wrong = answers | {"the dog": answers["the dog"] + "not"}
    results = evaluate(wrapped(model, tokenizer, batch_size), GENERATION_TASK, tmp_path, wrong)
    assert results["results"]["continues"]["exact_match,none"] == pytest.approx(2 / 3)
    assert {s["doc"]["question"]: s["filtered_resps"][0] for s in results["samples"]["continues"]} == answers


def test_a_task_file_by_likelihood(tmp_path):
    """The demo prefers the sentence of a story to one of words that no story has there."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = {"Once upon a time, there was a little": "girl", "Lily and her mom went to the": "park"}
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows.items()]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    choices = ["girl named Lily.", "park to play.", "of and because."]
    task = CHOICE_TASK | {"doc_to_choice": choices, "doc_to_target": "{{['girl', 'park'].index(answer)}}"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    (tmp_path / "chooses.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model_args = {"pretrained": str(ROOT), "trust_remote_code": True, "dtype": "float32"}
    options = {"model_args": model_args, "batch_size": 2, "device": "cpu", "bootstrap_iters": 0}
    results = lm_eval.simple_evaluate(model="hf", tasks=["chooses"], task_manager=manager, **options)
    assert results["results"]["chooses"]["acc,none"] == 1
    model, tokenizer = load_causal_lm(str(ROOT), torch.float32, "cpu"), load_tokenizer(ROOT)
    for sample in results["samples"]["chooses"]:
        for choice, ((found, _),) in zip(choices, sample["resps"], strict=True):
            question = tokenizer(sample["doc"]["question"]).input_ids
            ids = torch.tensor([tokenizer(f"{sample['doc']['question']} {choice}").input_ids])
            log_p = model(ids).logits[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            assert float(found) == pytest.approx(log_p[len(question) - 1 :].sum().item(), abs=1e-3)


@pytest.mark.parametrize("question", ["a dog?", "a do?", "a d?"])
def test_likelihood_tasks_raise(question, tmp_path):
    """For any prompt length, divisible by the patch size or not."""
    with pytest.raises((AttributeError, ValueError), match="CALM has no logits"):
        evaluate(wrapped(tiny_model(), tiny_tokenizer(), 1), CHOICE_TASK, tmp_path, {question: "yes"})
