"""The way that the field's tutorials read features: a HookedTransformer, its whole cache, sae-lens, topk.

As a program (`python -m benchmarks.tutorial MODEL_FOLDER SAE_FOLDER TEXT`) it does all of it in a fresh process.
`HookedTransformer.from_pretrained` wants a hub, so its steps are taken here by hand on a local folder: its
configuration for GPT-2, its own conversion of the weights, its own folding and centring.
"""

from __future__ import annotations

import sys
from typing import Any


def build(model_folder: str, sae_folder: str) -> tuple[Any, Any]:
    """(HookedTransformer, sae-lens SAE) out of local folders, in float32 on the CPU."""
    import torch
    from sae_lens import SAE
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_grad_enabled(False)  # as the tutorials do
    hf: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    config = HookedTransformerConfig(
        d_model=hf.config.n_embd,
        d_head=hf.config.n_embd // hf.config.n_head,
        n_heads=hf.config.n_head,
        d_mlp=hf.config.n_embd * 4,
        n_layers=hf.config.n_layer,
        n_ctx=hf.config.n_positions,
        eps=hf.config.layer_norm_epsilon,
        d_vocab=hf.config.vocab_size,
        act_fn=hf.config.activation_function,
        original_architecture="GPT2LMHeadModel",
        normalization_type="LNPre",
        init_weights=False,
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf, config),
        fold_ln=True,
        center_unembed=True,
        center_writing_weights=True,
        fold_value_biases=True,
    )
    return model, SAE.load_from_disk(sae_folder, device="cpu")


def read(model: Any, sae: Any, tokens: Any, top: int = 5) -> tuple[Any, Any]:
    """(values, features), [seq, top] each: the strongest features of every token, the start token included."""
    _, cache = model.run_with_cache(tokens)
    best = sae.encode(cache[sae.cfg.metadata.hook_name]).topk(top)
    return best.values[0], best.indices[0]


if __name__ == "__main__":
    opened, autoencoder = build(sys.argv[1], sys.argv[2])
    print(read(opened, autoencoder, opened.to_tokens(sys.argv[3]))[1].tolist())
