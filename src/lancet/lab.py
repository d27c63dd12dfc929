"""The Lab: a model with its SAEs, and the verbs of the product.

lab = lancet.open("smollm2")
lab.read("The Golden Gate Bridge is located in San Francisco.").at("Bridge").top(5)
lab.generate("I went to the grocery store to buy", "#123 += 0.5rn")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from lancet import facts as facts_module
from lancet import namefile, naming
from lancet.algebra import Call, Direction, Expression, Ref, evaluate
from lancet.continuation import Comparison, Continuation
from lancet.edit import Edit, RowChange, Step
from lancet.errors import UnknownName, UsageError
from lancet.generate import Sampling, rows
from lancet.site import Site
from lancet.span import Gate

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lancet.ablate import Ablation, Ranking
    from lancet.atlas.atlas import Atlas
    from lancet.atlas.rows import Encoded
    from lancet.dose import Dose
    from lancet.effect import Effect
    from lancet.evaluation.scores import Evaluation
    from lancet.facts import Facts
    from lancet.find import Found
    from lancet.mix import Mix
    from lancet.model import Model
    from lancet.projection import Projection
    from lancet.reading import Reading
    from lancet.sae import Sae
    from lancet.tokens import Tokens
    from lancet.units import Amount
    from lancet.watch import Watch

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
        name: what it is called, "" where it has no name; described: the best description kept of it, or "".
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
    described: str = ""

    def __str__(self) -> str:
        return f"#{self.index}" + (f" {self.name}" if self.name else "") + (f" ({self.says})" if self.says else "")


class Lab:
    """A model and one or more SAEs of it.

    That they belong together is the caller's word: nothing is tested here. `open_lab` tests what it opens by name or
    from a folder, and `lancet.check.check` tests any pair.

    Args:
        model: an opened Model, or what you hold already: a transformers model (with its tokenizer as a pair), a
            HookedTransformer or a TransformerBridge. It is used as it is; nothing is copied.
        saes: the SAE or SAEs, the default one first; sae-lens' own are taken too.
        facts: site -> path of the facts that ship with the SAE there; others are measured when first needed.
        basis: "plain" or "centred", for SAEs of sae-lens that do not state how their model was loaded.
        say: told of what takes long, such as measuring the facts; see `lancet.telling`.
    """

    def __init__(
        self,
        model: Any,
        saes: Any = (),
        facts: Mapping[Site, Path | None] | None = None,
        basis: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        from lancet import friends

        self.say = say
        self.model: Model = friends.model_of(model)
        held = list(saes) if isinstance(saes, (list, tuple)) else [saes]
        self.saes: list[Sae] = [friends.sae_of(sae, self.model, basis) for sae in held]
        self._shipped = dict(facts or {})
        self._facts: dict[Site, Facts] = {}  # by site: two folders may bear one name
        self._own_facts: dict[Site, Facts] = {}  # the same without any atlas'
        self._atlas: Atlas | None = None
        self._means: dict[tuple[Any, ...], Tensor] = {}  # mean differences of sentences
        self.opened: dict[str, Any] | None = None  # arguments of open_lab with which another process opens the same
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

    def facts(self, sae: Sae | None = None, harvested: bool = True) -> Facts:
        """Maxima, densities, typical norm and effects of an SAE: those that ship with it, else those of its atlas, else
        measured on a bundled text when first needed, and kept.

        Args:
            harvested: take those of an atlas; a harvest itself must not depend on an earlier one.
        """
        sae = sae or self.sae()
        known = self._facts if harvested else self._own_facts
        if sae.site not in known:
            shipped = self._shipped.get(sae.site)
            if harvested and not (shipped and shipped.is_file()):
                from lancet.atlas import which

                shipped = which.facts(self.model, sae, shipped) or shipped
            known[sae.site] = facts_module.of(self.model, sae, shipped, self.say)
        return known[sae.site]

    @property
    def atlas(self) -> Atlas | None:
        """What a corpus says about the features of the default SAE: the atlas that ships with it, else the one that was
        harvested for it; None where there is neither."""
        if self._atlas is None and self.saes:
            from lancet.atlas import which

            self._atlas = which.of(self.sae(), self._shipped.get(self.sae().site))
        return self._atlas

    def harvested(self, sae: Sae) -> None:
        """Looks facts and atlas up anew when they are next asked for: a harvest has written some."""
        self._facts.pop(sae.site, None)
        self._atlas = None

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
        ref = Ref(index=which) if isinstance(which, int) else self._named(Ref(name=which))
        if not isinstance(ref, Ref):
            raise UsageError(f"{which!r} is a direction ({ref.recipe}), not a single feature")
        owner = self.sae(ref.site or sae)
        index = owner.check_feature(ref.index)
        known = self.facts(owner)
        name = which if isinstance(which, str) and which[:1] != "#" else naming.load(owner).of_feature(index)
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
            described=self.described([index], owner).get(index, ""),
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

    def described(self, features: Iterable[int], sae: Sae | None = None) -> dict[int, str]:
        """Feature -> the best description kept of it (`lancet names`), of those features that have one."""
        from lancet.atlas import explanations

        found = explanations.of(namefile.key(sae or self.sae()), features)
        return {f: best.text for f, some in found.items() if (best := explanations.best(some))}

    @property
    def names(self) -> dict[str, Ref | Direction]:
        """The names that the user gave to features of the open SAEs, and what each stands for."""
        return {
            name: self._meaning(name, kept, sae)
            for sae in reversed(self.saes)  # the first SAE's stand where several have one name
            for name, kept in naming.load(sae).entries.items()
        }

    def name(self, name: str, target: int | str | Direction | Sequence[tuple[int, float]], force: bool = False) -> str:
        """Gives a feature, a blend, an expression or a Direction a name that edits may use, here and in later sessions.

        Args:
            target: a feature's number; (feature, weight) pairs of the default SAE; an expression; a Direction.
            force: give the name away where it stands for something else.

        Returns:
            what the name hides from now on (a concept of the SAE's card), in words; "" where it hides nothing.

        Raises:
            UsageError: not a name (letters, digits and _), or taken; or the target does not exist.
        """
        naming.check_name(name)
        owner, kept = naming.kept_of(self, target)
        naming.give(owner, name, kept, force)
        hidden = self.concepts().get(naming.normal(name))
        if hidden is None:
            return ""
        blend = hidden[1].get("blend")
        meant = f"a blend of {len(blend)} features" if blend else f"#{hidden[1]['feature']}"
        return f"{name} was a concept of the SAE's card, {meant}"

    def forget(self, name: str) -> str:
        """Takes a name away, and returns what it stood for.

        Raises:
            UnknownName: no open SAE has it.
        """
        for sae in self.saes:
            if naming.normal(name) in naming.load(sae).entries:
                return str(naming.remove(sae, name))
        raise UnknownName("name", name, self.names, "`lancet name --list` shows yours")

    def concepts(self, saes: Sequence[Sae] = ()) -> dict[str, tuple[Sae, dict[str, Any]]]:
        """The concepts of the SAEs' cards (of all open SAEs where none is given), whose names are names too.

        Returns:
            concept -> the SAE, the first that has it, and the entry of `Facts.concepts`.
        """
        known: dict[str, tuple[Sae, dict[str, Any]]] = {}
        for sae in reversed(saes or self.saes):
            if self._shipped.get(sae.site) is None and sae.site not in self._facts:
                continue  # measured facts have no concepts: nothing need be measured to tell a mistyped name
            known |= {concept: (sae, entry) for concept, entry in self.facts(sae).concepts.items()}
        return known

    def _named(self, ref: Ref) -> Ref | Direction:
        if ref.name[:1] == "#" and ref.name[1:].isdigit():
            return Ref(index=int(ref.name[1:]))
        sae, kept = naming.find(self, ref)
        return self._meaning(ref.name, kept, sae)

    def _meaning(self, name: str, kept: naming.Kept, sae: Sae) -> Ref | Direction:
        if kept.feature is not None:
            return Ref(index=kept.feature, site=sae.site)
        if kept.vector:
            import torch

            return Direction(sae.writes, torch.tensor(kept.vector, device=sae.b_dec.device), name)
        found = self.direction(kept.expressed, sae)
        return Direction(found.site, found.vector, name)

    def _row(self, sae: Sae, index: int) -> Direction:
        import torch

        vector = sae.rows(torch.tensor([sae.check_feature(index)]))[0]
        several = len(self.saes) > 1
        return Direction(sae.writes, vector, f"{sae.site if several else ''}#{index}")

    def direction(self, expression: str | Expression | Direction, sae: Sae | None = None) -> Direction:
        """The Direction of an expression such as `love - romance` or `0.6 * #12 + 0.4 * #77`.

        Args:
            sae: whose features bare numbers are; the default one's where none is given.

        Raises:
            UsageError, UnknownName: it cannot be read, or names something unknown.
        """
        if isinstance(expression, Direction):
            return expression
        if isinstance(expression, str):
            from lancet.grammar import parse_expression

            expression = parse_expression(expression)

        def resolve(part: Ref | Call) -> Direction:
            if isinstance(part, Call):
                from lancet.mix import mean_difference

                return mean_difference(self, part, expression)
            found = self._named(part) if part.name else part
            if isinstance(found, Direction):
                return found
            return self._row(self.sae(found.site) if found.site else sae or self.sae(), found.index)

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
        own = naming.load(chosen)
        reading.names = {f: name for f in lit if (name := own.of_feature(f))}
        reading.described = self.described(lit, chosen)
        return reading

    def features(
        self,
        texts: str | Sequence[str],
        pool: str | None = None,
        length: int | None = None,
        sae: str | Site | None = None,
    ) -> Encoded:
        """The active features of texts as a sparse matrix, of every token or pooled; see `lancet.atlas.rows.features`.

        Args:
            pool: "max", "mean" or "count" over each text's tokens; None for a row of each token.
            sae: the site of the SAE; the default one where none is named.
        """
        from lancet.atlas.rows import features

        return features(self.model, self.sae(sae), texts, pool, length)

    def read_direction(self, text: Prompt, direction: str | Direction) -> Projection:
        """Reads how far each token reaches along a direction, as `read` does for features."""
        from lancet.projection import project

        return project(self, text, direction)

    def find(
        self, like: Sequence[str] | str, unlike: Sequence[str] = (), at: str | None = None, **settings: Any
    ) -> Found:
        """The features of a concept, from sentences about it or from words; see `lancet.find.find`."""
        from lancet.find import find

        return find(self, like, unlike, at, **settings)

    def mix(self, expression: str | Expression | Direction, **settings: Any) -> Mix:
        """What the direction of an expression such as `love - romance` is; see `lancet.mix.mix`."""
        from lancet.mix import mix

        return mix(self, expression, **settings)

    def watch(
        self, feature: int | str, texts: Sequence[str] | None = None, others: Sequence[str] | None = None
    ) -> Watch:
        """One feature over many sentences, beside the single neurons that tell them apart; see `lancet.watch.watch`."""
        from lancet.watch import watch

        return watch(self, feature, texts, others)

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

    def ablate(self, prompt: Prompt, targets: int | str | Direction | Sequence[Any], **how: Any) -> Ablation:
        """Cuts features out of a text, beside random controls; see `lancet.ablate.ablate` for what may be said."""
        from lancet.ablate import ablate

        return ablate(self, prompt, targets, **how)

    def ablate_each(self, prompt: Prompt, at: str | None = None, **how: Any) -> Ranking:
        """Cuts the features of a place one at a time and ranks them by what that changes; see `lancet.ablate.each`."""
        from lancet.ablate import each

        return each(self, prompt, at, **how)

    def dose(self, target: int | str | Direction | None = None, prompts: Sequence[Prompt] = (), **how: Any) -> Dose:
        """Finds the strength at which a target makes the model speak of a concept; see `lancet.dosing.dose`."""
        from lancet.dosing import dose

        return dose(self, target, prompts, **how)

    def evaluate(self, text: Sequence[str | Path] | None = None, **how: Any) -> Evaluation:
        """How good the open SAEs are, on held-out text and against the concept bench; see
        `lancet.evaluation.evaluate.evaluate`, which also takes several SAEs of one site."""
        from lancet.evaluation.evaluate import evaluate

        names = [sae.name for sae in self.saes]
        named = {sae.name if names.count(sae.name) == 1 else str(sae.site): sae for sae in self.saes}
        how.setdefault("say", self.say)
        return evaluate(self.model, named, text, **how)

    def steps(self, edits: Edits, prompt: Tokens, length: int) -> list[Step]:
        """Edits made ready for one prompt: targets found, amounts raw, spans as masks over `length` positions.

        Raises:
            UsageError, UnknownName: an edit that cannot be read or does not apply.
        """
        steps = []
        for edit in self.settled(edits):
            target, amount = self.ready(edit.target, edit.amount)
            where = edit.span.where
            steps.append(
                Step(
                    site=target.site if isinstance(target, Direction) else target[0].writes,
                    target=target,
                    operation=edit.operation,
                    amount=amount,
                    mask=edit.span.mask(prompt, length),
                    gate=Gate(*self.ready(where.target, where.amount), where.above) if where else None,
                )
            )
        return steps

    def settled(self, edits: Edits) -> list[Edit]:
        """Edits with every `auto` replaced by the amount that it stands for.

        Raises:
            UsageError: an edit cannot be read, or no dose of its target is known.
        """
        from lancet.doses import recommended

        parsed = [Edit.parse(edit) for edit in _listed(edits)]
        return [replace(e, amount=recommended(self, e)) if e.amount.unit == "auto" else e for e in parsed]

    def ready(self, expression: Expression, amount: Amount) -> tuple[tuple[Sae, int] | Direction, float]:
        """What an edit or a condition is about, and its amount as a raw one.

        Raises:
            UsageError, UnknownName: there is no such target, or its unit cannot be had.
        """
        found = self._target(expression)
        if isinstance(found, Direction):
            if found.norm == 0:
                raise UsageError(f"{found.recipe} is the zero vector and points nowhere; choose other parts")
            norm = self._norm(found.site) if amount.unit == "rn" else None
            return found, amount.raw(None, norm, found.norm)
        sae = self.sae(found.site)
        index = sae.check_feature(found.index)
        if amount.unit == "raw":
            return (sae, index), amount.value
        known, size = self.facts(sae), float(self._row(sae, index).norm)
        if sae.normalises_tokens:  # there a unit of activation writes scale(x) * d
            size *= known.norm / sae.d_in**0.5
        return (sae, index), amount.raw(float(known.maximum[index]), known.norm, size)

    def _target(self, expression: Expression) -> Ref | Direction:
        if isinstance(expression, Ref):
            return self._named(expression) if expression.name else expression
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
                        edits=tuple(map(str, self.settled(edits))),  # what makes it again, whatever dose is found later
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
    quantize: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Lab:
    """Opens a model and its SAEs, and refuses a pair that does not belong together.

    Each pair is tested once, at its first opening (`check.first`), but for those that ship with the package and for an
    SAE that was trained here on this very model: it may be a weak one, and is no other model's.

    Args:
        model: a name (`smollm2`, `gpt2-small`), owner/name on the hub, or a folder in transformers' layout.
        sae: `release/id` of a published SAE, a site of a bundled SAE or of the model's default release, a folder in
            sae-lens' layout, or several; the model's default where none is named.
        device: "auto" takes CUDA, then Apple's MPS, then the CPU.
        dtype: "auto", "float32", "bfloat16" or "float16".
        say: called with a line of text when something takes long; see `loading.open_model`.
        basis: "plain" or "centred", for SAEs of which nothing states it.
        anyway: open SAEs that were trained on another model, or that fail the self-test, too.
        sae_memory: "auto" (half of what is free) or a size such as "2GB" that the SAEs' matrices may take on a card. An
            SAE that takes more stays on the CPU, mapped, and only the rows and columns that are needed go over.
        quantize: "8bit" or "4bit" weights, where the libraries are installed; see `precision.choose`.
        device_map: spreads the model over devices through accelerate; see `precision.choose`.

    Raises:
        UnknownName, MissingError, MismatchError, DamagedError: see `lancet.errors`.
    """
    opened, pairs = open_parts(model, sae, device, dtype, say, basis, anyway, sae_memory, quantize, device_map)
    lab = Lab(opened, [sae for sae, _ in pairs], {sae.site: facts for sae, facts in pairs}, say=say)
    how = {"device": device, "dtype": dtype, "basis": basis, "sae_memory": sae_memory, "quantize": quantize}
    lab.opened = {"model": model, "sae": sae, "device_map": device_map, "anyway": True} | how  # it was tested here
    return lab


def open_parts(
    model: str,
    sae: str | Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Any = lambda line: None,
    basis: str | None = None,
    anyway: bool = False,
    sae_memory: str = "auto",
    quantize: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[Model, list[tuple[Sae, Path | None]]]:
    """A model and SAEs of it, each with the path of its shipped facts, opened and tested like those of a lab; here
    several may be of one site.

    Args and raises: see `open_lab`.
    """
    from lancet import fingerprint
    from lancet.loading import bundled, open_model, open_sae
    from lancet.units import size

    left = size(sae_memory)
    opened = open_model(model, device, dtype, say, quantize, device_map)
    names: Sequence[str | None] = [sae] if sae is None or isinstance(sae, str) else list(sae)
    pairs = []
    for name in names:
        pairs.append(open_sae(opened, name, basis, anyway, say, left))
        if left is not None:
            left = max(0, left - pairs[-1][0].bytes_on(opened.device))
    if not anyway:
        from lancet import check

        ours = bundled(opened.name).values()
        for chosen, facts in pairs:
            is_ours = facts is not None and facts.parent in ours  # facts may have been copied with the folder
            if not is_ours and chosen.trained_on != fingerprint.of_model(opened):
                check.first(opened, chosen, say).refuse()
    return opened, pairs
