"""Training by others' loops: transformers' Trainer with its own collator, and trl's SFTTrainer."""

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


def moved_by_one_step(trainer) -> dict[str, torch.Tensor]:
    """How far a step of SGD at learning rate 1 moves each parameter: its gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
OURS = PatchCollator(K, pad_token_id=PAD, end_token_id=EOS)


def token_rows() -> list[dict]:
    return [{"input_ids": ids} for ids in tiny_tokenizer()(TEXTS).input_ids]


def own_loss(model, batch) -> torch.Tensor:
    """Of the bare model, the mean over targets. The token-chain head's loss draws nothing."""
    return model.forward(**batch).loss


class TestTrainer:
    def test_upstreams_collator_needs_one_setting_which_the_model_names(self, tmp_path):
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
        own_loss(model, OURS(token_rows())).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        trainer = Trainer(tiny_model("token_chain"), args, data_collator=OURS, train_dataset=token_rows())
        moved = moved_by_one_step(trainer)
        for name, gradient in gradients.items():
            assert torch.allclose(moved[name], gradient, rtol=1e-3, atol=1e-5), name
        assert not any(moved[name].any() for name in moved.keys() - gradients.keys())


class TestSFTTrainer:
    @pytest.fixture(autouse=True)
    def _trl(self):
        pytest.importorskip("trl", reason="trl (extra [clients]) is not installed")

    @staticmethod
    def trainer(folder, dataset=None, model=None, collator=None, **settings):
        """With the subclass of docs/clients.md."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class CALMSFTTrainer(SFTTrainer):
            compute_loss, prediction_step = Trainer.compute_loss, Trainer.prediction_step

        return CALMSFTTrainer(
            model or tiny_model("token_chain"),
            args_for(SFTConfig, folder, bf16=False, **settings),  # its default would round
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
            {"collator": OURS},
        ],
        ids=["padded", "packed", "our collator"],
    )
    def test_it_trains_evaluates_and_its_loss_is_the_models_own(self, settings, tmp_path):
        model = tiny_model("token_chain")
        if "collator" not in settings:  # then Trainer would divide by labels that are no targets, too
            model.accepts_loss_kwargs = False
        trainer = self.trainer(tmp_path, model=model, **settings)
        losses = losses_of(trainer)
        assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch))
            assert torch.allclose(loss, own_loss(trainer.model, batch))
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.model.eval()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(own_loss(trainer.model, batch)), rel=1e-5)

    def test_with_our_collator_accumulated_gradients_are_exact(self, tmp_path):
        moved = []
        for batch_size in (6, 1):
            steps = {"gradient_accumulation_steps": 6 // batch_size, "per_device_train_batch_size": batch_size}
            moved.append(moved_by_one_step(self.trainer(tmp_path, collator=OURS, **steps, **SGD)))
        assert any(step.any() for step in moved[0].values())
        for name in moved[0]:
            assert torch.allclose(moved[0][name], moved[1][name], rtol=1e-3, atol=1e-5), name

    def test_completions_alone_are_learnt(self, tmp_path):
        """The prompt's patches carry no label, and the end is a target."""
        from datasets import Dataset

        dataset = Dataset.from_dict({"prompt": ["abcde"] * 2, "completion": ["fghijk"] * 2})  # 1 + 5, 6 and </s>
        trainer = self.trainer(tmp_path, dataset, collator=OURS)
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        written = tiny_tokenizer()("hijk").input_ids[1:]
        assert labels[0].tolist() == [-100] * 8 + [*written, EOS, EOS, EOS, EOS][:8]

    def test_a_lora_adapter_is_trained(self, tmp_path):
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=r"autoencoder\..*"
        )
        model = peft.get_peft_model(tiny_model("token_chain"), adapter)
        moved = moved_by_one_step(self.trainer(tmp_path, model=model, pad_to_multiple_of=K, **SGD))
        assert {name for name, step in moved.items() if step.any()} == {n for n in moved if "lora_B" in n}

    def test_rows_without_padding_are_refused_in_a_sentence(self, tmp_path):
        trainer = self.trainer(tmp_path, packing=True, max_length=4 * K, pad_to_multiple_of=K)
        with pytest.raises(ValueError, match="positions count patches"):
            trainer.train()
