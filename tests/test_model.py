"""Sites, positions and values against transformers' own hidden states and TransformerLens' centred ones; token pieces
against the text they come from; chats against what the user typed; and files that must be refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lancet.errors import DamagedError, UnknownName, UsageError
from lancet.files import check_safetensors
from lancet.loading import open_model
from lancet.model import Model
from lancet.site import Site
from lancet.tokens import Tokens

SENTENCE = "The Golden Gate Bridge is located in San Francisco."


def close(ours: Tensor, theirs: Tensor, relative: float) -> bool:
    """Whether no entry differs by more than `relative` of the largest."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= relative * theirs.abs().max())


# ---- sites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("blocks.6.hook_resid_pre", Site(6)),
        ("resid_pre.6", Site(6)),
        ("hidden_states.6", Site(6)),
        ("hidden_states[6]", Site(6)),
        ("model.layers.6.input", Site(6)),
        ("transformer.h.6.input", Site(6)),
        ("  blocks.6.hook_resid_pre\n", Site(6)),
        ("blocks.11.hook_resid_post", Site(11, "resid_post")),
        ("resid_post.11", Site(11, "resid_post")),
        ("model.layers.11.output", Site(11, "resid_post")),
        ("transformer.h.11.output", Site(11, "resid_post")),
        ("blocks.3.hook_resid_mid", Site(3, "resid_mid")),
        ("blocks.3.hook_attn_out", Site(3, "attn_out")),
        ("attn_out_post.3", Site(3, "attn_out")),
        ("blocks.3.hook_mlp_out", Site(3, "mlp_out")),
        ("model.layers.3.post_feedforward_layernorm.output", Site(3, "mlp_out")),
        ("blocks.3.attn.hook_z", Site(3, "z")),
        ("z.3", Site(3, "z")),
        ("model.layers.3.self_attn.o_proj.input", Site(3, "z")),
        ("transformer.h.3.attn.c_proj.input", Site(3, "z")),
        ("gpt_neox.layers.3.attention.dense.input", Site(3, "z")),
        ("blocks.3.ln2.hook_normalized", Site(3, "ln2.hook_normalized")),
        ("blocks.3.mlp.hook_in", Site(3, "mlp.hook_in")),
        ("mlp_in.3", Site(3, "mlp.hook_in")),
        ("model.layers.3.pre_feedforward_layernorm.output", Site(3, "mlp.hook_in")),
        ("transformer.h.3.mlp.output", Site(3, "mlp.hook_out")),
        ("blocks.3.mlp.hook_out", Site(3, "mlp.hook_out")),
    ],
)
def test_spellings(text: str, site: Site) -> None:
    assert Site.parse(text) == site
    assert Site.parse(str(site)) == Site.parse(site) == site


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write one as blocks.6.hook_resid_pre"),
        ("layer six", "write one as blocks.6.hook_resid_pre"),
        ("blocks.-1.hook_resid_pre", "write one as blocks.6.hook_resid_pre"),
        ("blocks.6", "supported: blocks.6.hook_resid_pre, blocks.6.attn.hook_z"),
        ("blocks.6.attn.hook_q", "'attn.hook_q' are not supported"),
        ("blocks.6.ln1.hook_normalized", "'ln1.hook_normalized' are not supported"),
        (
            "blocks.6.hook_mlp_in",
            "has two meanings: TransformerLens means the stream before the MLP's norm (blocks.6.hook_resid_mid)",
        ),
        ("attn_out.6", "TransformerLens what is added to the stream (blocks.6.hook_attn_out, attn_out_post.6)"),
        (
            "model.layers.6.post_attention_layernorm.output",
            "in Gemma 2 and 3 that is blocks.6.hook_attn_out, in Llama and its kin blocks.6.mlp.hook_in",
        ),
        ("model.layers.6.self_attn.output", "'self_attn.output' are not supported"),
        ("model.layers.6.weird", "write one as blocks.6.hook_resid_pre"),
    ],
)
def test_bad_sites(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Site.parse(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


def test_site_that_the_model_has_not(smollm2_f32: Model) -> None:
    with pytest.raises(UsageError, match="has blocks 0 to 29"):
        smollm2_f32.values(smollm2_f32.batch([[0, 5]]), [Site(30)])


# ---- values ----------------------------------------------------------------------------------------------------------


def hidden_states(model: Model, tokens: Tokens) -> tuple[Tensor, ...]:
    """transformers' own, of one text alone."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([tokens.ids]), output_hidden_states=True, use_cache=False).hidden_states


def test_values_are_transformers_own_bit_for_bit(smollm2_f32: Model) -> None:
    model = smollm2_f32
    tokens = model.tokenize(SENTENCE)
    hidden = hidden_states(model, tokens)
    sites = [Site(i, kind) for i in (0, 1, 12, 29) for kind in ("resid_pre", "resid_post")]
    found = model.values(model.batch([tokens]), sites)
    assert set(found) == set(sites)
    for site in sites[:-1]:
        assert torch.equal(found[site], hidden[site.depth]), site
    assert torch.equal(model.hf.model.norm(found[sites[-1]]), hidden[-1])  # transformers gives the last one normalised


def test_gpt2_values_are_transformers_own_bit_for_bit(tiny_gpt2: Callable[..., Model]) -> None:
    model = tiny_gpt2()
    tokens = model.tokenize("The cat sat on the mat.")
    hidden = hidden_states(model, tokens)
    found = model.values(model.batch([tokens]), [Site(2), Site(2, "resid_post")])
    assert torch.equal(found[Site(2)], hidden[2])
    assert torch.equal(found[Site(2, "resid_post")], hidden[3])


TEXTS = ["Rome.", "The cat sat on the mat and the dog sat on the cat.", "Where is the list?"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("which", ["smollm2_f32", "tiny_gpt2"])
def test_a_padded_row_equals_the_row_alone(which: str, side: str, request: pytest.FixtureRequest) -> None:
    opened = request.getfixturevalue(which)
    model: Model = opened if isinstance(opened, Model) else opened()
    site = Site(model.n_layers // 2)
    rows = [model.tokenize(text) for text in TEXTS]
    batch = model.batch(rows, side)
    together = model.values(batch, [site])[site]
    for i, row in enumerate(rows):
        assert close(together[i][batch.mask[i]], model.values(model.batch([row]), [site])[site][0], 1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_know_their_starts(tiny_gpt2: Callable[..., Model], side: str) -> None:
    model = tiny_gpt2()
    rows = [model.tokenize(text) for text in TEXTS]
    batch = model.batch(rows, side)
    for i, row in enumerate(rows):
        assert tuple(batch.ids[i][batch.mask[i]].tolist()) == row.ids
        assert tuple(batch.ids[i][batch.content[i]].tolist()) == row.ids[1:]
        assert batch.ids[i, batch.start[i]] == 0
        assert batch.mask[i, batch.start[i]]


def test_the_forward_pass_stops_after_the_deepest_site(smollm2_f32: Model) -> None:
    ran: list[int] = []
    blocks = smollm2_f32.arch.decoder_layers
    handles = [blocks[i].register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i in range(30)]
    try:
        batch = smollm2_f32.batch([[0, 5, 6]])
        smollm2_f32.values(batch, [Site(3), Site(1, "resid_post")])
        assert ran == [0, 1, 2, 3]  # block 3 is entered, where its input is read, and not computed
        ran.clear()
        smollm2_f32.values(batch, [Site(3, "resid_post"), Site(0)])
        assert ran == [0, 1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()


def test_nothing_stays_hooked(tiny_gpt2: Callable[..., Model]) -> None:
    model = tiny_gpt2()
    batch = model.batch([[0, 5, 6]])
    before = model.hf(input_ids=batch.ids).logits
    with pytest.raises(ZeroDivisionError), model.at(Site(1), lambda value: value / (1 // 0)):
        model.hf(input_ids=batch.ids)
    with model.at(Site(2, "resid_post"), lambda value: value + 1):
        assert not torch.equal(model.hf(input_ids=batch.ids).logits, before)
    model.values(batch, [Site(0), Site(3, "resid_post")])
    assert torch.equal(model.hf(input_ids=batch.ids).logits, before)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_post"])
def test_a_function_at_a_site_changes_what_later_blocks_read(tiny_gpt2: Callable[..., Model], kind: str) -> None:
    model = tiny_gpt2()
    batch, site = model.batch([[0, 5, 6, 7]]), Site(1, kind)  # type: ignore[arg-type]
    plain = model.values(batch, [Site(site.depth)])[Site(site.depth)]
    with model.at(site, lambda value: value + 1):
        moved = model.values(batch, [Site(site.depth)])[Site(site.depth)]
    assert torch.equal(moved, plain + 1)


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_centred_values_are_transformer_lens_own(tiny_gpt2: Callable[..., Model]) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    model = tiny_gpt2(n_layer=6, n_embd=192, n_head=6, n_positions=128, vocab_size=500, activation_function="gelu_new")
    config = HookedTransformerConfig(
        n_layers=6, d_model=192, n_heads=6, d_head=32, d_mlp=768, n_ctx=128, d_vocab=500, act_fn="gelu_new",
        eps=model.hf.config.layer_norm_epsilon, normalization_type="LN", device="cpu",
    )  # fmt: skip
    hooked = HookedTransformer(config)
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in convert_gpt2_weights(model.hf, config).items()}
    hooked.load_and_process_state_dict(state, fold_ln=True)
    ids = torch.randint(1, 500, (3, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = hooked.run_with_cache(ids, return_type=None)
    sites = [Site(i) for i in range(6)] + [Site(5, "resid_post")]
    for site, value in model.values(model.batch(ids.tolist()), sites).items():
        assert value.mean(-1).abs().max() > 1e-2  # the centring has something to do
        assert close(value - value.mean(-1, keepdim=True), cache[str(site)], 1e-4), site


# ---- text ------------------------------------------------------------------------------------------------------------

PIECES = {
    "English": "The Golden Gate Bridge, built in 1937, isn't in Rome.",
    "code": "def f(xs):\n\tfor x in xs:\n        if x > 10:\n            return [x, {}]\n\n\n    return None\n",
    "Chinese": "你好，世界。今天天气很好；我们去公园散步吧！柳叶刀",
    "emoji": "I 🦙 the 👩‍🚀, naïve café 🇫🇷🏳️‍🌈 ok",
    "spaces": "  two  spaces \n and\r\n lines  ",
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("which", ["smollm2_f32", "tiny_gpt2"])
def test_pieces_give_back_the_text(which: str, name: str, request: pytest.FixtureRequest) -> None:
    opened = request.getfixturevalue(which)
    model: Model = opened if isinstance(opened, Model) else opened()
    tokens = model.tokenize(PIECES[name])
    assert "".join(tokens.piece(i) for i in range(len(tokens))) == tokens.text == PIECES[name]
    assert model.tokenizer.decode(list(tokens.ids[1:])) == PIECES[name]
    assert len(tokens.spans) == len(tokens.roles) == len(tokens)
    assert tokens.piece(0) == ""
    for character in range(len(tokens.text)):  # every character is in some token's span
        assert any(begin <= character < end for begin, end in tokens.spans)


def user_text(model: Model, content: str) -> str:
    """What of a chat with a system prompt is marked as the user's."""
    system = {"role": "system", "content": "Be kind to users."}
    tokens = model.tokenize_chat([system, {"role": "user", "content": content}])
    return "".join(tokens.piece(i) for i in range(len(tokens)) if tokens.roles[i] == "user")


# Some of them occur in the template's own words, before the user's turn.
@pytest.mark.parametrize("content", ["Where is Rome?", "a", "user", "system", "kind", "你好吗", "🦙", "x\n\ny = 1"])
def test_only_the_users_characters_are_the_users(smollm2_f32: Model, content: str) -> None:
    assert user_text(smollm2_f32, content) == content


def test_roles_of_a_longer_chat(smollm2_f32: Model) -> None:
    turns = [("user", "Hi"), ("assistant", "Hi there, user!"), ("user", "Hi"), ("assistant", "assistant")]
    tokens = smollm2_f32.tokenize_chat([{"role": role, "content": content} for role, content in turns], answer=False)
    runs: list[list[str]] = []
    for i, role in enumerate(tokens.roles):
        if runs and runs[-1][0] == role:
            runs[-1][1] += tokens.piece(i)
        else:
            runs.append([role, tokens.piece(i)])
    assert [tuple(run) for run in runs if run[0] not in ("start", "marker")] == turns
    assert "".join(tokens.piece(i) for i in range(len(tokens))) == tokens.text
    assert {text for role, text in runs if role == "start"} == {"<|im_start|>"}


TRIMMING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
CHOOSY = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no system role here') }}{% endif %}hi"


def test_a_template_that_trims(tiny_gpt2: Callable[..., Model]) -> None:
    assert user_text(tiny_gpt2(chat_template=TRIMMING), "  yes \n") == "yes"


def test_templates_that_refuse_or_rewrite(tiny_gpt2: Callable[..., Model]) -> None:
    with pytest.raises(UsageError, match="refuses this chat: no system role here"):
        user_text(tiny_gpt2(chat_template=CHOOSY), "yes")
    with pytest.raises(UsageError, match=r"rewrites 'Be kind to users\.'"):
        user_text(tiny_gpt2(chat_template=TRIMMING.replace("trim", "upper")), "yes")
    with pytest.raises(UsageError, match="no chat template"):
        user_text(tiny_gpt2(), "yes")


def test_empty_text(smollm2_f32: Model) -> None:
    with pytest.raises(UsageError, match="at least one character"):
        smollm2_f32.tokenize("")
    for messages in ([], [{"role": "user", "content": ""}]):
        with pytest.raises(UsageError, match="empty message"):
            smollm2_f32.tokenize_chat(messages)


def test_text_longer_than_the_context(tiny_gpt2: Callable[..., Model], smollm2_f32: Model) -> None:
    model = tiny_gpt2()
    assert len(model.tokenize("1" * 255)) == model.context == 256
    with pytest.raises(UsageError, match=r"has 301 tokens, .* takes at most 256"):
        model.tokenize("1" * 300)
    with pytest.raises(UsageError, match="has 9001 tokens, smollm2 takes at most 8192"):
        smollm2_f32.tokenize("1" * 9000)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_gpt2: Callable[..., Model], tmp_path: Path) -> Path:
    """A copy of a good model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_gpt2().name, tmp_path / "model"))


def test_only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin")
    with pytest.raises(DamagedError, match=r"no \.safetensors weights; pickles .* are never opened"):
        open_model(str(folder), "cpu")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_another_name(folder: Path, zipped: bool) -> None:
    torch.save({"a": torch.zeros(300)}, folder / "model.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DamagedError, match="is a pickle under another name and was not opened"):
        open_model(str(folder), "cpu")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=r"truncated|damaged") as caught:
        open_model(str(folder), "cpu")
    assert str(weights) in str(caught.value)


def test_corrupt_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20] + b"\x00" + weights.read_bytes()[21:])
    with pytest.raises(DamagedError, match="corrupt header"):
        open_model(str(folder), "cpu")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    """Lengths of 640, 896, ... bytes begin with a pickle's first two bytes and are quite ordinary."""
    from safetensors.torch import load_file

    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "sae.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + b"\0" * 4)
    assert set(check_safetensors(path)) == set(load_file(path)) == {"a"}


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_model(str(tmp_path), "cpu")


def test_unknown_model() -> None:
    with pytest.raises(UnknownName, match="nearest: smollm2") as caught:
        open_model("smolm2", "cpu")
    assert caught.value.nearest[0] == "smollm2" and len(caught.value.nearest) == 5


def test_unknown_device_and_dtype() -> None:
    with pytest.raises(UsageError, match="use one of auto, cuda, mps, cpu"):
        open_model("smollm2", device="gpu")
    with pytest.raises(UsageError, match="use one of auto, float32, bfloat16, float16"):
        open_model("smollm2", device="cpu", dtype="int4")
