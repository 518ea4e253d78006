"""Fine-tunes a CALM with LoRA (PEFT) and transformers' Trainer on 25 small stories, and compares its text.

    python examples/finetune_lora.py --output lora

`PatchCollator` completes the last patch and labels exactly the predicted tokens (docs/guides/finetune.md).
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from calm_transformers.training.data import PatchCollator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument("--output", default="lora", help="folder of the adapter")
parser.add_argument("--max_steps", type=int, default=40)
args = parser.parse_args()

PLACES = ("pond", "forest", "garden", "river", "hill")
FINDS = ("red kite", "old drum", "shiny key", "sleepy cat", "lost shoe")
STORY = 'The robot rolled to the {0} and found the {1}. "Beep! Thank you, {0}!" it said, and rolled home with the {1}.'

base = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
stories = [STORY.format(place, find) + tokenizer.eos_token for place in PLACES for find in FINDS]
adapter = LoraConfig(
    task_type="CAUSAL_LM",
    r=16,
    target_modules="all-linear",
    exclude_modules=r"autoencoder\..*",  # frozen, so no adapter there
)
model = get_peft_model(base, adapter)


def continuation() -> str:
    set_seed(0)
    inputs = tokenizer("The robot rolled to the", return_tensors="pt").to(model.device)
    ids = model.eval().generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.5)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


print("Before:", continuation())
K, settings = base.config.patch_size, {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "logging_steps": 5}
arguments = TrainingArguments(args.output, max_steps=args.max_steps, report_to="none", **settings)
collator = PatchCollator(K, pad_token_id=tokenizer.pad_token_id, end_token_id=tokenizer.eos_token_id)
trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict(tokenizer(stories)), data_collator=collator)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"Loss, nats per token: {losses[0]:.2f} → {losses[-1]:.2f}")
print("After:", continuation())
model.save_pretrained(args.output)  # PeftModel.from_pretrained(base, args.output) loads it
