"""Training with transformers' Trainer and its own collator, and with trl's SFTTrainer."""

import pytest
import torch
from tiny import EOS, PAD, tiny_model, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from calm_transformers.training.data import PatchCollator

pytestmark = pytest.mark.transformers

K = 4
TEXTS = [
    "once upon a time there was a cat",
    "the dog ran",
    "a b c d e f g h i j k",
    "hello world!",
    "no",
    "yes and no",
]


def args_for(cls, folder, **overrides):
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    fields = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "max_grad_norm": 0.0, **quiet}
    return cls(output_dir=str(folder), **{**fields, **overrides})


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def change_by_one_step(trainer) -> dict[str, torch.Tensor]:
    """Returns the change of each parameter by one step, which for `SGD` is its gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
CALM_COLLATOR = PatchCollator(K, pad_token_id=PAD, end_token_id=EOS)


def token_rows() -> list[dict]:
    return [{"input_ids": ids} for ids in tiny_tokenizer()(TEXTS).input_ids]


class TestTrainer:
    def test_transformers_collator_needs_pad_to_multiple_of_as_the_error_says(self, tmp_path):
        args = args_for(TrainingArguments, tmp_path)
        for setting in ({"pad_to_multiple_of": K}, {}):
            collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False, **setting)
            trainer = Trainer(tiny_model(), args, data_collator=collator, train_dataset=token_rows()[:1] * 6)
            if setting:
                losses = losses_of(trainer)
                assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
            else:
                with pytest.raises(ValueError, match="pad_to_multiple_of=4"):
                    trainer.train()

    @pytest.mark.parametrize("batch_size", [6, 2, 1])
    def test_with_our_collator_accumulated_gradients_are_exact(self, batch_size, tmp_path):
        steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 6 // batch_size}
        args = args_for(TrainingArguments, tmp_path, **steps, **SGD)
        model = tiny_model("token_chain")
        model(**CALM_COLLATOR(token_rows())).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        trainer = Trainer(tiny_model("token_chain"), args, data_collator=CALM_COLLATOR, train_dataset=token_rows())
        moved = change_by_one_step(trainer)
        for name, gradient in gradients.items():
            assert torch.allclose(moved[name], gradient, rtol=1e-3, atol=1e-5), name
        assert not any(moved[name].any() for name in moved.keys() - gradients.keys())


class TestSFTTrainer:
    @pytest.fixture(autouse=True)
    def _trl(self):
        pytest.importorskip("trl", reason="trl (extra [clients]) is not installed")

    @staticmethod
    def trainer(folder, dataset=None, model=None, collator=None, **settings):
        """Builds the subclass in docs/guides/finetune.md."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class CALMSFTTrainer(SFTTrainer):
            compute_loss, prediction_step = Trainer.compute_loss, Trainer.prediction_step

        return CALMSFTTrainer(
            model or tiny_model("token_chain"),
            args_for(SFTConfig, folder, bf16=False, **settings),  # the default would round
            data_collator=collator,
            train_dataset=dataset or Dataset.from_dict({"text": TEXTS}),
            eval_dataset=Dataset.from_dict({"text": TEXTS[:2]}),
            processing_class=tiny_tokenizer(),
        )

    @pytest.mark.parametrize(
        "settings",
        [
            {"pad_to_multiple_of": K},
            {"packing": True, "packing_strategy": "wrapped", "max_length": 4 * K, "pad_to_multiple_of": K},
            {"collator": CALM_COLLATOR},
        ],
        ids=["padded", "packed", "CALM collator"],
    )
    def test_it_trains_evaluates_and_returns_the_models_loss(self, settings, tmp_path):
        """The mean over targets; the autoregressive patch head's loss is deterministic."""
        model = tiny_model("token_chain")
        if "collator" not in settings:  # otherwise Trainer would also count labels that are no targets
            model.accepts_loss_kwargs = False
        trainer = self.trainer(tmp_path, model=model, **settings)
        losses = losses_of(trainer)
        assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch))
            assert torch.allclose(loss, trainer.model(**batch).loss)
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.model.eval()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(trainer.model(**batch).loss), rel=1e-5)

    def test_with_our_collator_accumulated_gradients_are_exact(self, tmp_path):
        moved = []
        for batch_size in (6, 1):
            steps = {"gradient_accumulation_steps": 6 // batch_size, "per_device_train_batch_size": batch_size}
            moved.append(change_by_one_step(self.trainer(tmp_path, collator=CALM_COLLATOR, **steps, **SGD)))
        assert any(step.any() for step in moved[0].values())
        for name in moved[0]:
            assert torch.allclose(moved[0][name], moved[1][name], rtol=1e-3, atol=1e-5), name

    def test_only_completions_are_learnt(self, tmp_path):
        """The prompt's patches have no labels, and EOS has one."""
        from datasets import Dataset

        dataset = Dataset.from_dict({"prompt": ["abcde"] * 2, "completion": ["fghijk"] * 2})  # 1 + 5, 6 and </s>
        trainer = self.trainer(tmp_path, dataset, collator=CALM_COLLATOR)
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        completion = tiny_tokenizer()("hijk").input_ids[1:]
        assert labels[0].tolist() == [-100] * 8 + [*completion, EOS, EOS, EOS, EOS][:8]

    def test_a_lora_adapter_is_trained(self, tmp_path):
        peft = pytest.importorskip("peft")
        modules = {"target_modules": "all-linear", "exclude_modules": r"autoencoder\..*"}
        model = peft.get_peft_model(tiny_model("token_chain"), peft.LoraConfig(task_type="CAUSAL_LM", **modules))
        moved = change_by_one_step(self.trainer(tmp_path, model=model, pad_to_multiple_of=K, **SGD))
        assert {name for name, step in moved.items() if step.any()} == {n for n in moved if "lora_B" in n}
