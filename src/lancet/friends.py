"""What the user already holds, taken as it is: models of transformers and TransformerLens, SAEs of sae-lens.

Nothing is copied or saved: the same weights, run by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lancet.basis import put_in_basis
from lancet.errors import MissingError, UsageError
from lancet.hooked import BridgeModel, HookedModel, lens_function
from lancet.model import Model
from lancet.sae import Sae
from lancet.site import Site

if TYPE_CHECKING:
    from torch import Tensor

MODELS = (
    "a lancet Model, a transformers causal language model or (model, tokenizer), a HookedTransformer or a "
    "TransformerBridge of TransformerLens"
)
SAES = "a lancet Sae or a sae-lens SAE"


def model_of(model: Any) -> Model:
    """The Model of what the user holds.

    Args:
        model: one of MODELS. A transformers model without its tokenizer must have been loaded by a name or from a
            folder whose tokenizer is on this machine.

    Raises:
        UsageError: anything else.
        MissingError: its tokenizer is not known, or is not a fast one, which positions need.
    """
    if isinstance(model, Model):
        return model
    held: Any
    tokenizer: Any
    held, tokenizer = model if isinstance(model, tuple) and len(model) == 2 else (model, None)
    ancestors = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(held).__mro__}
    if ancestors & {"transformer_lens.HookedTransformer", "transformer_lens.TransformerBridge"}:
        kind = BridgeModel if "transformer_lens.TransformerBridge" in ancestors else HookedModel
        tokenizer = tokenizer or held.tokenizer
        _check_tokenizer(held.cfg.model_name, tokenizer)
        start = tokenizer.bos_token_id
        return kind(str(held.cfg.model_name), held, tokenizer, start, start, ["run by TransformerLens"])
    if "transformers.PreTrainedModel" in ancestors and held.get_output_embeddings() is not None:
        name = held.config.name_or_path or type(held).__name__
        tokenizer = tokenizer or _tokenizer(name)
        _check_tokenizer(name, tokenizer)
        start = tokenizer.bos_token_id
        return Model(str(name), held, tokenizer, start, start, ["a transformers model that was open already"])
    raise UsageError(f"a Lab cannot be made of a {type(held).__module__}.{type(held).__name__}; give {MODELS}")


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    if tokenizer is None:
        raise MissingError(f"{name} comes without a tokenizer; give both: lancet.Lab((model, tokenizer), sae)")
    if not getattr(tokenizer, "is_fast", False):
        raise MissingError(f"{name} has no fast tokenizer, which positions need; give one with it")


def sae_of(sae: Any, model: Model, basis: str | None = None) -> Sae:
    """The Sae of what the user holds, in the basis that it was trained in.

    Args:
        sae: one of SAES; a lancet Sae is taken as it is.
        model: the model that it reads.
        basis: "plain" or "centred", where nothing states it.

    Raises:
        UsageError: anything else, or a basis that nothing states and no measurement tells.
        MismatchError: it belongs to another model.
    """
    if isinstance(sae, Sae):
        return sae
    ancestors = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(sae).__mro__}
    if "sae_lens.SAE" not in ancestors:
        raise UsageError(f"a {type(sae).__module__}.{type(sae).__name__} is no SAE for a Lab; give {SAES}")
    from lancet import loading, pairing

    config = sae.cfg.to_dict()
    config["metadata"] = dict(config.get("metadata") or {})
    name = str(config["metadata"].get("neuronpedia_id") or f"sae-lens-{type(sae).__name__}")
    tensors = {key: tensor.detach() for key, tensor in sae.state_dict().items()}
    found = loading.sae_from_parts(name, loading.modern_config(config), tensors)
    told = config["metadata"]
    kwargs = told.get("model_from_pretrained_kwargs") or None
    about = pairing.About(models=(str(told.get("model_name")),), kwargs=kwargs)
    pairing.check_model(model, found, about)
    if basis is None and about.kwargs is None and isinstance(model, HookedModel):
        return put_in_basis(found, model, model.processed)  # what the user runs it on is what it reads
    return pairing.in_its_basis(model, found, about, basis)


def fwd_hooks(
    model: Model,
    hooks: Iterable[tuple[Site, Callable[[Tensor], Tensor | None]]],
    place: Callable[[int, int, int], None],
    length: int,
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """TransformerLens' (name, function) pairs for functions at sites, each told which positions its columns are.

    A pass over `length` tokens or more is the whole text, a pass over one token the next of a cached generation. Where
    the model shows its attention scores, whose width is all that the cache holds, the two must agree.

    Args:
        model: the TransformerLens model that they are for.
        hooks: (site, function of values [batch, seq, width]); of one site in the order in which they are to run.
        place: called with (batch, first position, columns) when a pass begins.
        length: of the prompt, the start token counted.

    Raises:
        UsageError: the model is not TransformerLens', has no such hook, or the prompt is a single token, which cannot
            be told from the next of a generation.
    """
    if not isinstance(model, HookedModel):
        raise UsageError(
            f"{model.name} is run by transformers and has no hook points; make the lab of the TransformerLens model "
            f"that the hooks are for: lancet.Lab(model, sae)"
        )
    if length < 2:
        raise UsageError("hooks need a prompt of two tokens or more, the start token counted; give a longer one")
    hooks = sorted(hooks, key=lambda pair: pair[0])
    for site, _ in hooks:
        if str(site) not in model.points:
            raise UsageError(f"{model.name} has no hook point {site}; edit there through the lab (lab.generate)")
    state = {"first": 0, "columns": 0}

    def begin(tensor: Tensor, *, hook: Any) -> None:
        columns = tensor.shape[1]
        after = state["first"] + state["columns"]
        if columns >= length:
            state["first"] = 0
        elif columns == 1 and after >= length:
            state["first"] = after
        else:
            raise UsageError(
                f"these hooks were made for a prompt of {length} tokens, and the model is given {columns}; make them "
                f"for the very text, with the start token that TransformerLens puts before it (prepend_bos=True)"
            )
        state["columns"] = columns
        place(tensor.shape[0], state["first"], columns)

    def check(tensor: Tensor, *, hook: Any) -> None:
        first = tensor.shape[-1] - tensor.shape[-2]
        if first != state["first"]:
            raise UsageError(
                f"these hooks took a token for position {state['first']}, and the model's cache holds {first} tokens "
                f"before it; make new hooks for each generation"
            )

    def within(function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def placed(value: Tensor) -> Tensor | None:
            if value.shape[1] != state["columns"]:
                raise UsageError(
                    "these hooks did not see this pass begin; start it at the first block (start_at_layer=0)"
                )
            return function(value)

        return placed

    # Not at the embedding: TransformerLens' generate embeds by itself and enters at the first block.
    pairs: list[tuple[str, Callable[..., Tensor | None]]] = [(str(Site(0)), begin)]
    if (scores := "blocks.0.attn.hook_attn_scores") in model.points:
        pairs.append((scores, check))
    return pairs + [(str(site), lens_function(site, within(function))) for site, function in hooks]
