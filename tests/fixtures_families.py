"""Tiny random models of eight architectures, as Lancet's and as TransformerLens' models of the same weights."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import torch
import transformers
from conftest import START, small_tokenizer
from transformers import PreTrainedTokenizerFast

from lancet.model import Model

LAYERS, WIDTH, HEADS, HIDDEN, CONTEXT = 4, 32, 4, 80, 64
COMMON: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
    "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GEMMA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}
# Where a family has a window, it is shorter than the texts of the tests.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": CONTEXT, "n_ctx": CONTEXT}),
    "Pythia": ("GPTNeoX", {"use_parallel_residual": True, "rotary_pct": 0.25}),
    "Llama": ("Llama", {"num_key_value_heads": 2}),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 6, "head_dim": 8}),
    "Gemma 2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    "Gemma 3": (
        "Gemma3",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_bidirectional_attention": False},
    ),
    "Qwen 3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "Phi": ("Phi", {"partial_rotary_factor": 0.5}),
}
PARALLEL = ("Pythia", "Phi")


@cache
def family(name: str) -> Model:
    """A Lancet model of a family; shared, so do not change it."""
    kind, settings = FAMILIES[name]
    tokenizer = small_tokenizer()
    config_class = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = config_class(**(COMMON | settings), vocab_size=tokenizer.get_vocab_size(), initializer_range=0.2)
    torch.manual_seed(0)
    hf = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # fresh gains of 1 and biases of 0 would hide mistakes about either
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START, pad_token=START)
    return Model(name, hf, fast, 0, 0)


def hooked(name: str, model: Model | None = None, **processing: bool) -> Any:
    """TransformerLens' HookedTransformer of the same weights, processed as told (not at all by default)."""
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained import weight_conversions

    model = model or family(name)
    config = _config(name, model.hf)
    lens = HookedTransformer(config)
    with torch.no_grad():
        short = {"GPT-2": "gpt2", "Pythia": "neox", "Gemma 2": "gemma", "Gemma 3": "gemma"}.get(name, name.lower())
        convert = getattr(weight_conversions, f"convert_{short.replace(' ', '')}_weights")
        state = {key: tensor.clone() for key, tensor in convert(model.hf, config).items()}
    flags = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    lens.load_and_process_state_dict(state, **(flags | processing))
    return lens.eval()


def _config(name: str, hf: Any) -> Any:
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    said = hf.config
    if name == "Phi":
        return HookedTransformerConfig(
            d_model=WIDTH, d_head=8, n_heads=HEADS, d_mlp=HIDDEN, n_layers=LAYERS, n_ctx=CONTEXT,
            eps=said.layer_norm_eps, d_vocab=said.vocab_size, act_fn=said.hidden_act, normalization_type="LN",
            positional_embedding_type="rotary", rotary_base=said.rope_parameters["rope_theta"], parallel_attn_mlp=True,
            rotary_dim=4, device="cpu",
            original_architecture="PhiForCausalLM",
        )  # fmt: skip
    if not name.startswith("Gemma"):
        with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
            hf.config.architectures = [type(hf).__name__]
            hf.config.save_pretrained(folder)
            config = get_pretrained_model_config(folder, device="cpu")
        config.tokenizer_name = None
        return config
    more: dict[str, Any] = {"rotary_base": said.rope_parameters.get("rope_theta", 10000.0)}
    if name == "Gemma 2":
        more |= {
            "attn_scores_soft_cap": said.attn_logit_softcapping,
            "output_logits_soft_cap": said.final_logit_softcapping,
        }
    if name == "Gemma 3":
        bases = {kind: said.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")}
        more = {
            "use_qk_norm": True,
            "rotary_base": bases["full_attention"],
            "rotary_base_local": bases["sliding_attention"],
        }
    return HookedTransformerConfig(
        d_model=WIDTH, d_head=16, n_heads=HEADS, d_mlp=HIDDEN, n_layers=LAYERS, n_ctx=CONTEXT, eps=said.rms_norm_eps,
        d_vocab=said.vocab_size, act_fn="gelu_pytorch_tanh", normalization_type="RMS",
        positional_embedding_type="rotary", use_local_attn=True,
        n_key_value_heads=2, gated_mlp=True, final_rms=True, use_normalization_before_and_after=True, window_size=6,
        attn_types=["local" if kind.startswith("sliding") else "global" for kind in said.layer_types],
        original_architecture=type(hf).__name__, model_name=name, device="cpu", rotary_dim=16, **more,
    )  # fmt: skip
