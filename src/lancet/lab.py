"""The Lab: a model with its SAEs, and the verbs of the product.

lab = lancet.open("smollm2")
lab.read("The Golden Gate Bridge is located in San Francisco.").at("Bridge").top(5)
lab.generate("I went to the grocery store to buy", "#123 += 0.5rn")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from lancet import facts as facts_module
from lancet.algebra import Direction, Expression, Ref, evaluate
from lancet.continuation import Comparison, Continuation
from lancet.edit import Edit, RowChange, Step
from lancet.errors import UnknownName, UsageError
from lancet.generate import Sampling, rows
from lancet.site import Site

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lancet.effect import Effect
    from lancet.facts import Facts
    from lancet.model import Model
    from lancet.reading import Reading
    from lancet.sae import Sae
    from lancet.tokens import Tokens

Edits: TypeAlias = str | Edit | Sequence[str | Edit] | None
Prompt: TypeAlias = "str | Sequence[dict[str, str]] | Tokens"
ROWS_AT_ONCE = 32
MOST_HOOKED = 1 << 16  # tokens after the prompt that hooks of a model without a context length reach


@dataclass(frozen=True)
class Feature:
    """One latent of one SAE.

    Attributes:
        sae: the SAE's name.
        site: where it lives.
        index: its number.
        name: what it is called, "" where it has no name.
        maximum: its largest activation over the measured text, 0 where it never fired.
        density: share of all tokens on which it fires.
        fires: the tokens that it fires on, "" where it never fired.
        says: what it makes the model say, "" where not measured.
        url: its public page, "" where it has none.
    """

    sae: str
    site: Site
    index: int
    name: str = ""
    maximum: float = 0.0
    density: float = 0.0
    fires: str = ""
    says: str = ""
    url: str = ""

    def __str__(self) -> str:
        return f"#{self.index}" + (f" {self.name}" if self.name else "") + (f" ({self.says})" if self.says else "")


class Lab:
    """A model and one or more SAEs of it.

    Args:
        model: an opened Model, or what you hold already: a transformers model (with its tokenizer as a pair), a
            HookedTransformer or a TransformerBridge. It is used as it is; nothing is copied.
        saes: the SAE or SAEs, the default one first; sae-lens' own are taken too.
        facts: site -> path of the facts that ship with the SAE there; others are measured when first needed.
        basis: "plain" or "centred", for SAEs of sae-lens that do not state how their model was loaded.
    """

    def __init__(
        self,
        model: Any,
        saes: Any = (),
        facts: Mapping[Site, Path | None] | None = None,
        basis: str | None = None,
    ) -> None:
        from lancet import friends

        self.model: Model = friends.model_of(model)
        held = list(saes) if isinstance(saes, (list, tuple)) else [saes]
        self.saes: list[Sae] = [friends.sae_of(sae, self.model, basis) for sae in held]
        self.names: dict[str, Ref | Direction] = {}
        self._shipped = dict(facts or {})
        self._facts: dict[Site, Facts] = {}  # by site: two folders may bear one name
        sites = [sae.site for sae in self.saes]
        if len(set(sites)) < len(sites):
            raise UsageError(f"two SAEs at one site ({', '.join(map(str, sites))}); open them in separate labs")

    # ---- facts and names ---------------------------------------------------------------------------------------

    def sae(self, which: str | Site | None = None) -> Sae:
        """The SAE at a site; the default one where none is named.

        Raises:
            UsageError: no SAE is open, or none at that site.
        """
        if not self.saes:
            raise UsageError("no SAE is open in this lab; open one with sae=...")
        if which is None:
            return self.saes[0]
        site = Site.parse(which)
        for sae in self.saes:
            if sae.site == site:
                return sae
        written = [sae for sae in self.saes if sae.writes == site]
        if len(written) == 1:
            return written[0]
        raise UsageError(f"no SAE at {site} is open; open are {', '.join(str(sae.site) for sae in self.saes)}")

    def facts(self, sae: Sae | None = None) -> Facts:
        """Maxima, densities, typical norm and effects of an SAE, measured when first needed and kept."""
        sae = sae or self.sae()
        if sae.site not in self._facts:
            self._facts[sae.site] = facts_module.of(self.model, sae, self._shipped.get(sae.site))
        return self._facts[sae.site]

    def _norm(self, site: Site) -> float:
        """The typical norm at a site, from the facts of an SAE that writes there."""
        for sae in self.saes:
            if sae.writes == site:
                return self.facts(sae).norm
        raise UsageError(f"no open SAE writes {site}, and its typical norm is not known; give a raw amount")

    def feature(self, which: int | str, sae: str | Site | None = None) -> Feature:
        """A feature by number or name, with what is known of it.

        Raises:
            UnknownName, UsageError: there is no such feature.
        """
        ref = Ref(index=which) if isinstance(which, int) else self._named(which)
        if not isinstance(ref, Ref):
            raise UsageError(f"{which!r} is a direction ({ref.recipe}), not a single feature")
        owner = self.sae(ref.site or sae)
        index = owner.check_feature(ref.index)
        known = self.facts(owner)
        name = which if isinstance(which, str) else next((n for n, r in self.names.items() if r == ref), "")
        return Feature(
            sae=owner.name,
            site=owner.site,
            index=index,
            name=name,
            maximum=float(known.maximum[index]),
            density=float(known.density[index]),
            fires=self.fires(index, owner),
            says=self.says(index, owner),
            url=f"{owner.page}/{index}" if owner.page else "",
        )

    def fires(self, index: int, sae: Sae | None = None, count: int = 3) -> str:
        """The tokens on which most of a feature's activation lies, "" where it never fired."""
        ids = self.facts(sae).fires_ids
        if ids is None:
            return ""
        pieces = (self.model.decode([i]).strip() for i in ids[index].tolist() if i >= 0)
        return ", ".join([piece for piece in dict.fromkeys(pieces) if piece and "\ufffd" not in piece][:count])

    def says(self, index: int, sae: Sae | None = None, count: int = 3) -> str:
        """The words that a feature makes likelier, "" where the effect lens has not been run over all features."""
        from lancet.effect import words

        known = self.facts(sae)
        if known.effect_ids is None or known.effect_values is None or float(known.effect_values[index][0]) <= 0:
            return ""
        return words((self.model.decode([i]) for i in known.effect_ids[index].tolist()), count)

    def name(self, name: str, target: int | str | Direction) -> None:
        """Gives a feature, an expression or a Direction a name that edits may use.

        Raises:
            UsageError: not a name (letters, digits and _), or the target does not exist.
        """
        if not name.isidentifier():
            raise UsageError(f"{name!r} is not a name; use letters, digits and _, beginning with a letter")
        if isinstance(target, Direction):
            self.names[name] = target
        else:
            from lancet.grammar import parse_expression

            found = self._target(Ref(index=target) if isinstance(target, int) else parse_expression(target))
            if isinstance(found, Ref):
                self.sae(found.site).check_feature(found.index)
            self.names[name] = found

    def _named(self, name: str) -> Ref | Direction:
        if name.startswith("#") and name[1:].isdigit():
            return Ref(index=int(name[1:]))
        if name in self.names:
            return self.names[name]
        known: dict[str, Any] = {}
        for sae in self.saes:
            if self._shipped.get(sae.site) is None and sae.site not in self._facts:
                continue  # measured facts have no concepts: nothing need be measured to tell a mistyped name
            known |= {concept: (sae, entry) for concept, entry in self.facts(sae).concepts.items()}
        if name not in known:
            raise UnknownName("feature name", name, [*self.names, *known], "or give its number, such as #12")
        sae, entry = known[name]
        blend = entry.get("blend")
        if blend:
            total: Direction | None = None
            for index, weight in blend:
                part = self._row(sae, index) * weight
                total = part if total is None else total + part
            assert total is not None
            return Direction(total.site, total.vector, name)
        return Ref(index=entry["feature"], site=sae.site)

    def _row(self, sae: Sae, index: int) -> Direction:
        import torch

        vector = sae.rows(torch.tensor([sae.check_feature(index)]))[0]
        several = len(self.saes) > 1
        return Direction(sae.writes, vector, f"{sae.site if several else ''}#{index}")

    def direction(self, expression: str | Expression | Direction) -> Direction:
        """The Direction of an expression such as `love - romance` or `0.6 * #12 + 0.4 * #77`.

        Raises:
            UsageError, UnknownName: it cannot be read, or names something unknown.
        """
        if isinstance(expression, Direction):
            return expression
        if isinstance(expression, str):
            from lancet.grammar import parse_expression

            expression = parse_expression(expression)

        def resolve(ref: Ref) -> Direction:
            found = self._named(ref.name) if ref.name else ref
            if isinstance(found, Direction):
                return found
            return self._row(self.sae(found.site), found.index)

        return evaluate(expression, resolve)

    # ---- the verbs ---------------------------------------------------------------------------------------------

    def tokenize(self, prompt: Prompt) -> Tokens:
        """Text, chat messages or ready Tokens, as Tokens."""
        from lancet.tokens import Tokens

        if isinstance(prompt, Tokens):
            return prompt
        return self.model.tokenize(prompt) if isinstance(prompt, str) else self.model.tokenize_chat(prompt)

    def read(
        self,
        text: Prompt,
        top: int = 5,
        sae: str | Site | None = None,
        dense: bool = False,
    ) -> Reading:
        """Reads which features fire on which token.

        Args:
            text: plain text or chat messages.
            top: how many features a token lists.
            sae: the site of the SAE; the default one where none is named.
            dense: also list features that fire on more than a tenth of all tokens.

        Raises:
            UsageError: empty text, or longer than the context.
        """
        from lancet.reading import read

        if top < 1:
            raise UsageError(f"top must be at least 1, got {top}")
        chosen = self.sae(sae)
        reading = read(self.model, chosen, self.facts(chosen), self.tokenize(text))
        reading.top, reading.dense = top, dense
        lit = reading.features.feature.unique().tolist()
        reading.labels = {f: (self.fires(f, chosen), self.says(f, chosen)) for f in lit}
        return reading

    def effect(
        self, targets: int | str | Direction | Sequence[int | str | Direction], strength: float = 0.35, count: int = 20
    ) -> list[Effect]:
        """The effect lens: what features or directions make the model say.

        Args:
            targets: one or many: numbers, names, expressions, Directions.
            strength: what is added, in units of the site's typical norm.
            count: tokens listed on each side.
        """
        import torch

        from lancet import effect as lens

        if isinstance(targets, (int, str, Direction)):
            targets = [targets]
        directions = [self.direction(f"#{t}" if isinstance(t, int) else t) for t in targets]
        decode = self.model.decode
        found: dict[int, Effect] = {}
        for site in dict.fromkeys(direction.site for direction in directions):
            chosen = [i for i, direction in enumerate(directions) if direction.site == site]
            known = next((self.facts(sae) for sae in self.saes if sae.writes == site), None)
            length, against = strength * self._norm(site), None
            if known and known.effect_mean is not None and known.effect_deviation is not None:
                against = lens.Baseline(known.effect_mean.float(), known.effect_deviation.float())
            vectors = torch.stack([directions[i].unit().vector * length for i in chosen])
            for change, i in zip(
                (row for part in lens.changes(self.model, site, vectors) for row in part), chosen, strict=True
            ):
                sides = (lens.strongest(change[None], count, against, largest) for largest in (True, False))
                up, down = (
                    tuple((decode([t]), v) for t, v in zip(ids[0].tolist(), nats[0].tolist(), strict=True))
                    for ids, nats in sides
                )
                found[i] = lens.Effect(directions[i].recipe, strength, up, down)
        return [found[i] for i in range(len(directions))]

    def steps(self, edits: Edits, prompt: Tokens, length: int) -> list[Step]:
        """Edits made ready for one prompt: targets found, amounts raw, spans as masks over `length` positions.

        Raises:
            UsageError, UnknownName: an edit that cannot be read or does not apply.
        """
        steps = []
        for edit in map(Edit.parse, _listed(edits)):
            target: tuple[Sae, int] | Direction
            found = self._target(edit.target)
            if isinstance(found, Direction):
                sae, target = None, found
                size, maximum = found.norm, None
                if size == 0:
                    raise UsageError(f"{found.recipe} is the zero vector and points nowhere; choose other parts")
                norm = self._norm(found.site) if edit.amount.unit == "rn" else None
            else:
                sae = self.sae(found.site)
                target = (sae, sae.check_feature(found.index))
                known = self.facts(sae) if edit.amount.unit != "raw" else None
                size = float(self._row(sae, found.index).norm)
                maximum = float(known.maximum[found.index]) if known else None
                norm = known.norm if known else None
                if norm and sae.normalises_tokens:  # there a unit of activation writes scale(x) * d
                    size *= norm / sae.d_in**0.5
            steps.append(
                Step(
                    site=sae.writes if sae else found.site,  # type: ignore[union-attr,arg-type]
                    target=target,
                    operation=edit.operation,
                    amount=edit.amount.raw(maximum, norm, size),
                    mask=edit.span.mask(prompt, length),
                )
            )
        return steps

    def _target(self, expression: Expression) -> Ref | Direction:
        if isinstance(expression, Ref):
            return self._named(expression.name) if expression.name else expression
        return self.direction(expression)

    def changes(self, edits: Edits, prompt: Tokens, length: int, keep_error: bool = True) -> dict[Site, RowChange]:
        """For each site the change that one row's edits make there."""
        by_site: dict[Site, list[Step]] = {}
        for step in self.steps(edits, prompt, length):
            by_site.setdefault(step.site, []).append(step)
        return {site: RowChange(steps, keep_error) for site, steps in by_site.items()}

    def fwd_hooks(
        self, edits: Edits, prompt: Prompt, keep_error: bool = True
    ) -> list[tuple[str, Callable[..., Tensor | None]]]:
        """TransformerLens' (name, function) pairs: `with model.hooks(fwd_hooks=lab.fwd_hooks("#12 += 80", prompt))`.

        They may be used for passes over the prompt, over longer texts that begin with it, and for `model.generate` with
        its cache or without, any number of rows of the same length. The lab must hold the TransformerLens model.

        Args:
            prompt: the text that spans are about; the model must be given the very same tokens.

        Raises:
            UsageError: see `friends.fwd_hooks`.
        """
        from lancet import friends
        from lancet.edit import BatchEdits, hooks

        tokens = self.tokenize(prompt)
        changes = self.changes(edits, tokens, min(self.model.context, len(tokens) + MOST_HOOKED), keep_error)
        ready = {site: BatchEdits([change]) for site, change in changes.items() if change}

        def place(rows: int, first: int, columns: int) -> None:
            for site, edit in ready.items():
                edit.rows = [changes[site]] * rows
                edit.place([first] * rows, columns)

        return friends.fwd_hooks(self.model, hooks(ready), place, len(tokens))

    def logits(self, text: str | Tokens, edits: Edits = None, keep_error: bool = True) -> Tensor:
        """[seq, vocab] next-token logits of a whole text under edits, in one uncached pass."""
        from lancet.generate import logits

        tokens = self.tokenize(text)
        return logits(self.model, [tokens], [self.changes(edits, tokens, len(tokens), keep_error)])[0]

    def stream(
        self,
        prompt: Prompt,
        edits: Edits = None,
        tokens: int = 40,
        sampling: Sampling | None = None,
        keep_error: bool = True,
    ) -> Iterator[str]:
        """Generates one continuation and yields its text as it is made, whole characters at a time."""
        _check_count(tokens)
        ready = self.tokenize(prompt)
        sampling = sampling or Sampling()
        changes = self.changes(edits, ready, len(ready) + tokens, keep_error)
        ids: list[int] = []
        told = ""
        for (token,) in rows(self.model, [ready], [changes], tokens, sampling, [sampling.seed]):
            if token is None:
                break
            ids.append(token)
            text = self.model.decode(ids)
            if not text.endswith("\ufffd"):  # the rest of a character is still to come
                yield text[len(told) :]
                told = text
        if len(text := self.model.decode(ids)) > len(told):
            yield text[len(told) :]

    def generate(
        self,
        prompt: Prompt,
        edits: Edits = None,
        tokens: int = 40,
        sampling: Sampling | None = None,
        keep_error: bool = True,
    ) -> Continuation:
        """One continuation under edits; Ctrl-C ends it early with what was written so far."""
        return self.run([(prompt, edits, (sampling or Sampling()).seed, "")], tokens, sampling, keep_error)[0]

    def compare(
        self,
        prompt: Prompt,
        edits: Mapping[str, Edits],
        tokens: int = 40,
        sampling: Sampling | None = None,
        keep_error: bool = True,
    ) -> Comparison:
        """Continues one prompt under several sets of edits, all rows in one batch with the same random draws.

        Args:
            edits: name -> edits; None for the plain row.
        """
        seed = (sampling or Sampling()).seed
        jobs = [(prompt, row, seed, name) for name, row in edits.items()]
        return Comparison({row.name: row for row in self.run(jobs, tokens, sampling, keep_error)})

    def run(
        self,
        jobs: Sequence[tuple[Prompt, Edits, int, str]],
        tokens: int = 40,
        sampling: Sampling | None = None,
        keep_error: bool = True,
        rows_at_once: int = ROWS_AT_ONCE,
    ) -> list[Continuation]:
        """Many continuations, each (prompt, edits, seed, name), in as few batches as `rows_at_once` allows."""
        _check_count(tokens)
        sampling = sampling or Sampling()
        out: list[Continuation] = []
        for first in range(0, len(jobs), rows_at_once):
            part = jobs[first : first + rows_at_once]
            prompts = [self.tokenize(prompt) for prompt, *_ in part]
            changes = [
                self.changes(edits, ready, len(ready) + tokens, keep_error)
                for (_, edits, _, _), ready in zip(part, prompts, strict=True)
            ]
            ids: list[list[int]] = [[] for _ in part]
            ended = ["length"] * len(part)
            interrupted = False
            try:
                for made in rows(self.model, prompts, changes, tokens, sampling, [seed for *_, seed, _ in part]):
                    for i, token in enumerate(made):
                        if token is None:
                            ended[i] = "end of text"
                        else:
                            ids[i].append(token)
            except KeyboardInterrupt:
                interrupted = True
                ended = ["interrupted" if e == "length" else e for e in ended]
            for (_, edits, seed, name), ready, row, end in zip(part, prompts, ids, ended, strict=True):
                out.append(
                    Continuation(
                        name=name,
                        prompt=ready,
                        ids=tuple(row),
                        text=self.model.decode(row),
                        edits=tuple(str(edit) for edit in _listed(edits)),
                        sampling=replace(sampling, seed=seed),
                        ended=end,
                        recipe=self.recipe(),
                    )
                )
            if interrupted:
                break
        return out

    def recipe(self) -> dict[str, Any]:
        """What, beside edits, sampling and prompt, decides the text: model, SAEs, device, dtype, versions."""
        from importlib.metadata import version

        return {
            "model": self.model.name,
            "saes": [sae.name for sae in self.saes],
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": {package: version(package) for package in ("lancet-sae", "torch", "transformers")},
        }


def _listed(edits: Edits) -> list[str | Edit]:
    """No edit, one or several, as a list."""
    if edits is None:
        return []
    return [edits] if isinstance(edits, (str, Edit)) else list(edits)


def _check_count(tokens: int) -> None:
    if tokens < 1:
        raise UsageError(f"the number of new tokens must be at least 1, got {tokens}")


def open_lab(
    model: str = "smollm2",
    sae: str | Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Any = lambda line: None,
    basis: str | None = None,
    anyway: bool = False,
    sae_memory: str = "auto",
) -> Lab:
    """Opens a model and its SAEs.

    Args:
        model: a name (`smollm2`, `gpt2-small`), owner/name on the hub, or a folder in transformers' layout.
        sae: `release/id` of a published SAE, a site of a bundled SAE or of the model's default release, a folder in
            sae-lens' layout, or several; the model's default where none is named.
        device: "auto" takes CUDA, then Apple's MPS, then the CPU.
        dtype: "auto", "float32", "bfloat16" or "float16".
        say: called with a line of text when something takes long; see `loading.open_model`.
        basis: "plain" or "centred", for SAEs of which nothing states it.
        anyway: open SAEs that were trained on another model too.
        sae_memory: "auto" (half of what is free) or a size such as "2GB" that the SAEs' matrices may take on a card. An
            SAE that takes more stays on the CPU, mapped, and only the rows and columns that are needed go over.

    Raises:
        UnknownName, MissingError, MismatchError, DamagedError: see `lancet.errors`.
    """
    from lancet.loading import open_model, open_sae
    from lancet.units import size

    left = size(sae_memory)
    opened = open_model(model, device, dtype, say)
    names: Sequence[str | None] = [sae] if sae is None or isinstance(sae, str) else list(sae)
    pairs = []
    for name in names:
        pairs.append(open_sae(opened, name, basis, anyway, say, left))
        if left is not None:
            left = max(0, left - pairs[-1][0].bytes_on(opened.device))
    return Lab(opened, [sae for sae, _ in pairs], {sae.site: facts for sae, facts in pairs})
