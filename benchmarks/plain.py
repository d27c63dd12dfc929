"""The least that any program must do to see a layer: python -m benchmarks.plain FOLDER DTYPE LAYER START TEXT

It imports torch and transformers, opens the folder, and runs one forward pass up to LAYER. No SAE, nothing looked up.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, dtype, layer, start, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
model.model.layers = model.model.layers[: int(layer)]
ids = [tokenizer.convert_tokens_to_ids(start), *tokenizer(text, add_special_tokens=False)["input_ids"]]
with torch.inference_mode():
    value = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
print(tuple(value.shape))
