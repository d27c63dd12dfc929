"""What 'equal' means, promise by promise: generation against transformers' own `generate`, the cached loop against one
uncached pass, a row of a batch against the row alone, every shortcut against the dense arithmetic, and sampling against
a plain loop and transformers' own scores."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fixtures_edits import GREEDY, generated, longer, random_lab
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lancet.algebra import Direction
from lancet.architectures import ARCHITECTURES as KINDS
from lancet.architectures import Pursuit
from lancet.edit import RowChange, Step
from lancet.generate import Sampling, choose, draw, logits, rows
from lancet.lab import Lab
from lancet.loading import open_model
from lancet.sae import ARCHITECTURES, NORMALISATIONS, Sae, random_sae
from lancet.site import Site
from lancet.tokens import Tokens

PROMPT = "The Golden Gate Bridge is in San Francisco, and the cat sat on the"
NEW = 8
EXACT, CLOSE, APART, KL = 0.0, 1e-4, 1e-3, 1e-3


@pytest.fixture(scope="module")
def labs(tiny_gpt2: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[[str], Lab]:
    """`labs("smollm2 bfloat16")`: a model with a random SAE, opened once. The GPT-2 has the real one's proportions."""
    made: dict[str, Lab] = {}

    def get(name: str) -> Lab:
        if name not in made:
            model, dtype = name.split()
            if model == "smollm2":
                opened = request.getfixturevalue({"float32": "smollm2_f32", "bfloat16": "smollm2_bf16"}[dtype])
            else:
                opened = tiny_gpt2(n_layer=6, n_embd=192, n_head=6, activation_function="gelu_new")
                opened = opened if dtype == "float32" else open_model(opened.name, "cpu", dtype)
            made[name] = random_lab(opened)
        return made[name]

    return get


FLOAT32 = ["gpt2 float32", "smollm2 float32"]
BFLOAT16 = ["gpt2 bfloat16", "smollm2 bfloat16"]
everywhere = pytest.mark.parametrize("where", FLOAT32 + BFLOAT16)


def theirs(lab: Lab, prompts: Sequence[Tokens], new: int = NEW, **settings: Any) -> tuple[list[list[int]], Tensor]:
    """transformers' own greedy generation of prompts of one length: ids, and the logits [rows, new, vocab]."""
    ids = torch.tensor([prompt.ids for prompt in prompts])
    out = lab.model.hf.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **({"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": -1} | settings),
    )
    return out.sequences[:, ids.shape[1] :].tolist(), torch.stack(out.logits, 1)


def lit(lab: Lab, prompt: Tokens) -> int:
    """A feature that fires on many tokens of the prompt."""
    value = lab.model.values(lab.model.batch([prompt]), [lab.saes[0].site])[lab.saes[0].site][0, 1:]
    return int((lab.saes[0].encode(value) > 0).float().mean(0).argmax())


# ---- edits that change nothing ---------------------------------------------------------------------------------------

NOTHING = [None, "#3 += 0", "#3 *= 1", "#3 += 50 @ 500:", ["(#3 - #5) += 0", "#7 = 9 @ 700, 900:"]]


@everywhere
def test_nothing_changes_nothing(where: str, labs: Callable[[str], Lab]) -> None:
    lab = labs(where)
    prompt = lab.tokenize(PROMPT)
    attention = lab.model.hf.config._attn_implementation
    ids, expected = theirs(lab, [prompt])
    for edits, keep_error in itertools.product(NOTHING, (True, False)):
        if not keep_error and (edits is None or where.startswith("smollm2")):
            continue
        made, found = generated(lab.model, [prompt], [lab.changes(edits, prompt, len(prompt) + NEW, keep_error)], NEW)
        assert made == ids, edits
        assert torch.equal(found, expected.to(found.dtype)), edits
    assert lab.model.hf.config._attn_implementation == attention


@everywhere
def test_a_plain_row_beside_edited_rows(where: str, labs: Callable[[str], Lab]) -> None:
    lab = labs(where)
    prompt = lab.tokenize(PROMPT)
    edits = ["#3 += 60", None, "#5 = 80 @ generated", "(#7 - #8) *= 3 @ 4:"]
    ids, expected = theirs(lab, [prompt] * 4)
    made, found = generated(lab.model, [prompt] * 4, [lab.changes(e, prompt, len(prompt) + NEW) for e in edits], NEW)
    assert made[1] == ids[1]
    assert torch.equal(found[1], expected[1].to(found.dtype))
    for edited in (0, 2, 3):
        assert not torch.equal(found[edited], expected[edited].to(found.dtype))


@everywhere
def test_unedited_logits_of_a_whole_text(where: str, labs: Callable[[str], Lab]) -> None:
    lab = labs(where)
    prompt = lab.tokenize(PROMPT)
    ids = torch.tensor([prompt.ids])
    with torch.inference_mode():
        expected = lab.model.hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    for edits in NOTHING:
        assert torch.equal(lab.logits(PROMPT, edits), expected)


@pytest.mark.parametrize("where", FLOAT32)
def test_text_equals_generate_until_the_end(
    where: str, labs: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` ends rows where `generate` does, at any of several end tokens, with the text that it has there."""
    lab = labs(where)
    prompt = lab.tokenize(PROMPT)
    plain, _ = theirs(lab, [prompt])
    end = next(i for i in range(3, NEW) if plain[0][i] not in plain[0][:i])
    ends = [plain[0][end], lab.model.hf.config.vocab_size - 1]
    ids, _ = theirs(lab, [prompt], eos_token_id=ends)
    assert ids[0] == plain[0][: end + 1]
    monkeypatch.setattr(lab.model.hf.generation_config, "eos_token_id", ends)
    row = lab.generate(prompt, tokens=NEW, sampling=GREEDY)
    assert row.ended == "end of text"
    assert list(row.ids) == ids[0][:-1]
    assert row.text == lab.model.tokenizer.decode(ids[0][:-1])
    assert "".join(lab.stream(prompt, tokens=NEW, sampling=GREEDY)) == row.text


# ---- cached against uncached -----------------------------------------------------------------------------------------

SPANS = ["all", "prompt", "generated", "last", "3", "2:9", ":6", "-5:", "-6:-2", "5:, 2", "17:"]
CHAT_SPANS = ["system", "user", "assistant", "user, last", "assistant, 0:3"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Rome?"},
    {"role": "assistant", "content": "In Italy."},
    {"role": "user", "content": "And Paris?"},
]


ROWS: list[tuple[str, Any]] = [
    ("Rome", None),
    (PROMPT, "#3 += 25 @ generated"),
    ("The cat sat on the mat and the dog", "#5 = 30 @ 2:4, last"),
    ("I think that you and the other people of the list are", ["#7 *= -2 @ prompt", "#8 >= 20"]),
    ("My friend told me that", "#3 <= -20 @ -2:"),
    ("return the value", "(#3 - #5) = 25 @ all"),
]


def every_edit(feature: int, spans: Sequence[str], size: float) -> list[str]:
    """All five operations on a lit feature, at every span."""
    signs = [f"+= {size:g}", f"= {size:g}", "*= -2", f">= {size:g}", f"<= {-size:g}"]
    return [f"#{feature} {sign} @ {span}" for sign in signs for span in spans]


def divergence(ours: Tensor, other: Tensor) -> Tensor:
    """KL(other || ours) at each position."""
    p, q = other.float().log_softmax(-1), ours.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def hold(found: Tensor, expected: Tensor, own: float, what: Sequence[Any]) -> None:
    """The tolerances of the table for logits [rows, steps, vocab].

    Args:
        own: in bfloat16, by how much transformers' own arithmetic misses (see `plainly`).
    """
    if found.dtype == torch.bfloat16:
        assert float(divergence(found, expected).mean()) <= max(KL, 1.5 * own)
        return
    for row, ours, other in zip(what, found, expected, strict=True):
        assert float((ours - other).abs().max()) <= CLOSE * float(other.abs().max()), row
        best = other.topk(2, dim=-1).values
        sure = best[:, 0] - best[:, 1] > APART
        assert bool((ours.argmax(-1) == other.argmax(-1))[sure].all()), row


def alone_and_together(lab: Lab, edits: Sequence[Any]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Logits [rows, NEW, vocab] of ROWS' texts under edits in one batch and each alone, on the tokens written alone."""
    prompts = [lab.tokenize(text) for text, _ in ROWS]
    assert len({len(prompt) for prompt in prompts}) > 3
    changes = [lab.changes(e, p, len(p) + NEW) for p, e in zip(prompts, edits, strict=True)]
    alone = [generated(lab.model, [p], [c], NEW) for p, c in zip(prompts, changes, strict=True)]
    forced = [ids[0] for ids, _ in alone]
    return generated(lab.model, prompts, changes, NEW, forced)[1], torch.cat([row for _, row in alone]), forced


@pytest.fixture(scope="module")
def plainly(labs: Callable[[str], Lab]) -> Callable[[str], float]:
    """How far unedited rows of a batch are from themselves alone in bfloat16: transformers' own arithmetic, as the
    tests above prove bit for bit. On smollm2, whose start token's values reach 20,000, it is 1.6e-3 and not 1e-3."""
    measured: dict[str, float] = {}

    def get(where: str) -> float:
        if where.endswith("float32"):
            return 0.0
        if where not in measured:
            found, expected, _ = alone_and_together(labs(where), [None] * len(ROWS))
            measured[where] = float(divergence(found, expected).mean())
        return measured[where]

    return get


def cached_and_uncached(
    lab: Lab, prompt: Tokens, edits: Sequence[Any], keep: Sequence[bool], new: int = NEW
) -> tuple[Tensor, Tensor]:
    """Logits behind each new token, [rows, new, vocab], from the loop with a cache and from one pass over the text."""
    n = len(prompt)
    changes = [lab.changes(edit, prompt, n + new, k) for edit, k in zip(edits, keep, strict=True)]
    ids, found = generated(lab.model, [prompt] * len(edits), changes, new)
    parts = []
    for first in range(0, len(edits), 16):
        part = slice(first, first + 16)
        whole = [longer(prompt, row[:-1]) for row in ids[part]]
        parts.append(logits(lab.model, whole, changes[part])[:, n - 1 :].clone())
    return found, torch.cat(parts)


@everywhere
def test_cached_equals_uncached(where: str, labs: Callable[[str], Lab], plainly: Callable[[str], float]) -> None:
    lab = labs(where)
    prompt = lab.tokenize(PROMPT)
    feature = lit(lab, prompt)
    edits = [None, *every_edit(feature, SPANS, 25.0)]
    keep = [True] * len(edits)
    blunt = [e for e in edits[1:] if where.startswith("gpt2") or e.split("@ ")[1] in ("all", "last", "2:9")]
    found, expected = cached_and_uncached(lab, prompt, edits + blunt, keep + [False] * len(blunt))
    hold(found, expected, plainly(where), edits + blunt)
    for edit, row in zip(edits[1:] + blunt, found[1:], strict=True):
        assert float((row - found[0]).abs().max()) > 1e-2, f"{edit} did nothing"


@pytest.mark.parametrize("where", ["smollm2 float32", "smollm2 bfloat16"])
def test_cached_equals_uncached_in_a_chat(
    where: str, labs: Callable[[str], Lab], plainly: Callable[[str], float]
) -> None:
    lab = labs(where)
    prompt = lab.tokenize(CHAT)
    edits = every_edit(lit(lab, prompt), CHAT_SPANS, 25.0)
    found, expected = cached_and_uncached(lab, prompt, edits, [True] * len(edits), new=4)
    hold(found, expected, plainly(where), edits)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "standard" and KINDS[a].editable])
def test_cached_equals_uncached_for_other_architectures(architecture: str, labs: Callable[[str], Lab]) -> None:
    model = labs("gpt2 float32").model
    lab = random_lab(model, architecture, normalize="layer_norm")
    prompt = lab.tokenize(PROMPT)
    edits = every_edit(lit(lab, prompt), ["all", "generated", "2:9", "-5:"], 5.0)
    blunt = edits if KINDS[architecture].transcoder else []
    found, expected = cached_and_uncached(lab, prompt, edits + blunt, [True] * len(edits) + [False] * len(blunt))
    hold(found, expected, 0, edits + blunt)


def test_cached_equals_uncached_at_two_sites_and_directions(labs: Callable[[str], Lab]) -> None:
    model = labs("gpt2 float32").model
    early, late = random_sae(192, 256, site=Site(1)), random_sae(192, 256, site=Site(4, "resid_post"), seed=1)
    lab = Lab(model, [early, dataclasses.replace(late, name="late")])
    prompt = lab.tokenize(PROMPT)
    pre, post = "blocks.1.hook_resid_pre", "blocks.4.hook_resid_post"
    edits: list[Any] = [
        [f"{pre}#3 += 9 @ 2:9", f"{post}#5 = 7 @ generated"],
        [f"({post}#3 - {post}#4) = 8", f"{post}#5 >= 7 @ last", f"{pre}#3 *= 3"],
        [f"{pre}#3 = 9", f"{pre}#3 += 4 @ generated", f"{pre}#3 <= 11 @ -4:"],
    ]
    found, expected = cached_and_uncached(lab, prompt, edits, [True] * len(edits))
    hold(found, expected, 0, edits)


# ---- a row of a batch against the row alone --------------------------------------------------------------------------


@everywhere
def test_a_row_of_a_batch_equals_the_row_alone(
    where: str, labs: Callable[[str], Lab], plainly: Callable[[str], float]
) -> None:
    lab = labs(where)
    found, expected, forced = alone_and_together(lab, [edits for _, edits in ROWS])
    hold(found, expected, plainly(where), ROWS)
    if where.endswith("float32"):
        free = lab.run([(text, edits, 0, "") for text, edits in ROWS], NEW, GREEDY)
        for row, other, scores in zip(free, forced, expected, strict=True):
            best = scores.topk(2, dim=-1).values
            sure = (best[:, 0] - best[:, 1] > APART).tolist()
            first_unsure = sure.index(False) if False in sure else NEW  # from there on the text may rightly differ
            assert list(row.ids)[:first_unsure] == other[: min(first_unsure, len(row.ids))]


def test_a_row_of_an_uncached_batch_equals_the_row_alone(labs: Callable[[str], Lab]) -> None:
    lab = labs("smollm2 float32")
    prompts = [lab.tokenize(text) for text, _ in ROWS]
    changes = [lab.changes(e, p, len(p)) for p, (_, e) in zip(prompts, ROWS, strict=True)]
    together = logits(lab.model, prompts, changes)
    for i, (prompt, (text, edits)) in enumerate(zip(prompts, ROWS, strict=True)):
        alone = lab.logits(text, edits)
        hold(together[i : i + 1, : len(prompt)], alone[None], 0, [text])


# ---- shortcut against full computation -------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "add": lambda f, a: f + a,
    "set": lambda f, a: a,
    "scale": lambda f, a: f * a,
    "at_least": max,
    "at_most": min,
}


@dataclasses.dataclass
class Case:
    """Steps at one site, values there, and values where the SAE reads; every position has a token."""

    sae: Sae
    x: Tensor
    read: Tensor
    steps: list[Step]

    def __repr__(self) -> str:
        steps = [
            (s.target[1] if isinstance(s.target, tuple) else "v", s.operation, s.amount, s.mask.tolist())
            for s in self.steps
        ]
        return f"{self.sae!r} normalize={self.sae.normalize} centred={self.sae.centred} {steps}"

    def new_value(self, change: RowChange, positions: list[int]) -> Tensor:
        read = {self.sae.site: self.read[positions]} if self.sae.kind.transcoder else {}
        assert change.reads <= set(read)
        return change.new_value(self.x[positions], torch.tensor(positions), read)


@st.composite
def cases(draw: st.DrawFn, directions: bool = True, editable: bool = False) -> Case:
    architecture = draw(st.sampled_from([a for a in ARCHITECTURES if KINDS[a].editable or not editable]))
    kind = KINDS[architecture]
    d_in, d_sae, seed = draw(st.integers(8, 24)), 4 * draw(st.integers(2, 12)), draw(st.integers(0, 10_000))
    kwargs: dict[str, Any] = {
        "normalize": draw(st.sampled_from(normalisations(architecture))),
        "centred": draw(st.booleans()),
        "apply_b_dec_to_input": draw(st.booleans()),
    }
    if architecture in ("topk", "abstopk"):
        kwargs |= {"k": draw(st.integers(1, d_sae)), "rescale_by_decoder_norm": draw(st.booleans())}
    if architecture == "matching_pursuit":
        kwargs |= {"pursuit": Pursuit(max_iterations=4)}
    if kwargs["normalize"] == "constant_scalar_rescale":
        kwargs |= {"scalar": draw(st.floats(0.1, 3))}
    if kind.transcoder:
        kwargs |= {"d_out": draw(st.integers(8, 24)), "centred_out": draw(st.booleans())}
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        kwargs |= {"offset": torch.randn(d_in, generator=generator)}
    sae = random_sae(d_in, d_sae, architecture, seed=seed, **kwargs)
    length = draw(st.integers(1, 6))

    def values(width: int) -> Tensor:
        size = torch.rand(length, 1, generator=generator).mul(3).exp()
        return (torch.randn(length, width, generator=generator) + 0.5) * size

    read = values(d_in)
    x = values(sae.d_out) if kind.transcoder else read
    few = draw(st.lists(st.integers(0, d_sae - 1), min_size=1, max_size=3, unique=True))
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        target: Any = (sae, draw(st.sampled_from(few)))
        if directions and draw(st.integers(0, 4)) == 0:
            target = Direction(sae.writes, torch.randn(sae.d_out, generator=generator), "v")
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        possible = kind.editable or isinstance(target, Direction)
        operation = draw(st.sampled_from(sorted(OPERATIONS))) if possible else "add"
        steps.append(Step(sae.writes, target, operation, draw(st.floats(-30, 30, width=32)), mask))  # type: ignore[arg-type]
    return Case(sae, x, read, steps)


def normalisations(architecture: str) -> list[str]:
    """What goes with an architecture."""
    unknown = "covariance_whitening" if architecture == "temporal" else "constant_scalar_rescale"
    return [name for name in NORMALISATIONS if name != unknown]


def edited(case: Case, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """At one position, dense and one step after another: decode(f), decode(f'), and how the directions move x."""
    sae, x = case.sae, case.x[position]
    f = sae.encode(case.read)  # of the whole text, which temporal SAEs need
    after = f.clone()
    moved = torch.zeros_like(x)
    for step in case.steps:
        if step.mask[position] and isinstance(step.target, tuple):
            feature = step.target[1]
            after[position, feature] = OPERATIONS[step.operation](float(after[position, feature]), step.amount)
        elif step.mask[position]:
            v = step.target.vector  # type: ignore[union-attr]
            coordinate = float(x @ v / (v @ v))
            moved += (OPERATIONS[step.operation](coordinate, step.amount) - coordinate) * v
    return sae.decode(f, case.read)[position], sae.decode(after, case.read)[position], moved


def unclear(case: Case, position: int) -> bool:
    """Whether an activation that the steps read is nearer than 1e-5 (of the largest) to its threshold."""
    sae = case.sae
    if not sae.kind.editable:  # nothing is read
        return False
    pre = sae._normalised(case.read[position]) @ sae.W_enc
    near = 1e-5 * max(1.0, float(pre.abs().max()))
    features = [step.target[1] for step in case.steps if isinstance(step.target, tuple)]
    if sae.threshold is not None:
        return bool(((pre + sae.b_enc - sae.threshold)[features].abs() < near).any())
    if sae.architecture == "gated":
        return bool(((pre + sae.b_gate)[features].abs() < near).any())
    if sae.architecture in ("topk", "abstopk") and sae.k < sae.d_sae:
        pre = (pre + sae.b_enc) * (sae.decoder_norm if sae.rescale_by_decoder_norm else 1)
        pre = pre.abs() if sae.architecture == "abstopk" else pre
        last_in, first_out = pre.sort(descending=True).values[sae.k - 1 : sae.k + 1].tolist()
        return last_in - first_out < near
    return False


def positions_of(change: RowChange, case: Case) -> list[int]:
    return [p for p in range(len(case.x)) if p < len(change.any) and change.any[p] and not unclear(case, p)]


@settings(max_examples=400, deadline=None)
@given(cases())
def test_shortcuts_equal_the_full_computation(case: Case) -> None:
    change = RowChange(case.steps)
    covered = torch.stack([step.mask for step in case.steps if not step.idle] or [torch.zeros(len(case.x)) > 0]).any(0)
    assert (change.any.tolist() or [False] * len(case.x)) == covered.tolist()
    positions = positions_of(change, case)
    if not positions:
        return
    found = case.new_value(change, positions)
    for row, position in zip(found, positions, strict=True):
        x = case.x[position]
        before, after, moved = edited(case, position)
        expected = x + (after - before) + moved
        largest = max(float(t.abs().max()) for t in (x, before, after, moved, expected))
        assert float((row - expected).abs().max()) <= 1e-5 * largest


@settings(max_examples=150, deadline=None)
@given(cases(directions=False, editable=True))
def test_the_blunt_form_is_the_decoding_of_the_edited_features(case: Case) -> None:
    change = RowChange(case.steps, keep_error=False)
    positions = positions_of(change, case)
    if not positions or case.sae.threshold is not None or case.sae.architecture == "gated":
        return  # there all features' thresholds would count
    found = case.new_value(change, positions)
    sae = case.sae
    for row, position in zip(found, positions, strict=True):
        x = case.x[position]
        _, after, _ = edited(case, position)
        centred, shift = sae.centred, torch.zeros(sae.d_out) if sae.offset is None else sae.offset
        if sae.kind.transcoder:
            centred, shift = sae.centred_out, torch.zeros(sae.d_out)
        mean = (x - shift).mean() if centred else 0.0
        largest = max(float(t.abs().max()) for t in (after, x, case.read[position]))
        assert float((row - (after + shift + mean)).abs().max()) <= 1e-5 * largest


# ---- between tokens --------------------------------------------------------------------------------------------------


def test_the_model_is_left_alone_between_tokens(labs: Callable[[str], Lab]) -> None:
    """Two edited generations and a read, interleaved: each as if it were alone."""
    lab = labs("gpt2 float32")
    prompt, sampling = lab.tokenize(PROMPT), Sampling(temperature=1.5)
    jobs: list[Any] = ["#3 += 60", "#5 = 80 @ generated", None]

    def started(edits: Any) -> Any:
        return rows(lab.model, [prompt], [lab.changes(edits, prompt, len(prompt) + 12)], 12, sampling, [0], stop=False)

    alone = [list(started(edits)) for edits in jobs]
    assert alone[0] != alone[1] != alone[2] != alone[0]
    plain = lab.logits(prompt)
    together = []
    for tokens in zip(*map(started, jobs), strict=True):
        together.append(tokens)
        assert torch.equal(lab.logits(prompt), plain)
        assert not torch.is_inference_mode_enabled()
    assert [list(row) for row in zip(*together, strict=True)] == alone


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_the_batch(labs: Callable[[str], Lab]) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    for where, tokens, count in (("gpt2 float32", 24, 6), ("smollm2 float32", 6, 3)):
        lab = labs(where)
        jobs = [(text, edits, seed, "") for seed, (text, edits) in enumerate(ROWS)][:count]
        together = lab.run(jobs, tokens, sampling)
        backwards = lab.run(jobs[::-1], tokens, sampling, rows_at_once=2)[::-1]
        for job, row, other in zip(jobs, together, backwards, strict=True):
            assert row.ids == other.ids == lab.run([job], tokens, sampling)[0].ids
        twice = lab.run([jobs[1], jobs[2], jobs[1]], tokens, sampling)
        assert twice[0].ids == twice[2].ids
        hot = lab.run([(PROMPT, None, seed, "") for seed in range(4)], 3, Sampling(temperature=2.0))
        assert len({row.ids for row in hot}) > 1


def by_hand(scores: list[float], uniform: float) -> int:
    """The first token at which the cumulative probability exceeds the uniform number."""
    import math

    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    goal, total = uniform * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        total += weight
        if total > goal:
            return token
    raise AssertionError("the uniform number is below 1")


def test_choose_follows_the_cumulative_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 50, generator=generator) * 3
    scores[torch.rand(40, 50, generator=generator) < 0.5] = -torch.inf
    seeds = [seed % 13 for seed in range(40)]
    for step in range(5):
        found = choose(scores, seeds, step, greedy=False).tolist()
        assert found == [by_hand(row.tolist(), draw(seed, step)) for row, seed in zip(scores, seeds, strict=True)]
        assert choose(scores, seeds, step, greedy=True).tolist() == scores.argmax(-1).tolist()


def test_draws_are_uniform_and_the_same_everywhere() -> None:
    drawn = [draw(seed, step) for seed in range(50) for step in range(100)]
    assert all(0 <= u < 1 for u in drawn)
    assert len(set(drawn)) == len(drawn)
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.02
    assert [round(draw(0, step), 6) for step in range(3)] == [0.342684, 0.75579, 0.773251]  # on every machine


def test_chosen_tokens_have_their_probabilities() -> None:
    scores = torch.tensor([0.5, 0.3, 0.0, 0.2]).log().expand(4000, 4)
    counts = torch.bincount(choose(scores, range(4000), 3, greedy=False), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=0.03)
    assert counts[2] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_scores_are_transformers_own(settings: dict[str, float], labs: Callable[[str], Lab]) -> None:
    lab = labs("gpt2 float32")
    sampling = Sampling(**({"repetition_penalty": 1.0} | settings))  # type: ignore[arg-type]
    prompt = lab.tokenize(PROMPT)
    ids = torch.tensor([prompt.ids])
    warped = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "do_sample": True}
    out = lab.model.hf.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=sampling.repetition_penalty,
        **(warped if sampling.temperature else {"do_sample": False}),
    )
    found = sampling.processors()(ids, out.logits[0].clone())
    assert torch.equal(found, out.scores[0])
    assert not torch.equal(found, out.logits[0])  # the setting does something


def test_the_repetition_penalty_sees_no_padding(labs: Callable[[str], Lab]) -> None:
    """Greedy with a strong penalty, where the padding's token would otherwise be the likeliest."""
    lab = labs("gpt2 float32")
    model, sampling = lab.model, Sampling(temperature=0, repetition_penalty=5.0)
    prompts = [model.tokenize(text) for text in ("Rome", PROMPT, "the list of")]
    seen: list[Tensor] = []
    original = Sampling.processors

    class Spy:
        def __init__(self, processors: Any) -> None:
            self.processors = processors

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(ids)
            return self.processors(ids, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampling, "processors", lambda self: Spy(original(self)))
        together = list(zip(*rows(model, prompts, [{}] * 3, 12, sampling, [0] * 3, stop=False), strict=True))
    for i, prompt in enumerate(prompts):
        assert set(seen[0][i].tolist()) == set(prompt.ids)
        assert list(zip(*rows(model, [prompt], [{}], 12, sampling, [0], stop=False), strict=True)) == [together[i]]
