"""The commands and their options. What they do lies in one file each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lancet.cli import eval as evaluation
from lancet.cli.names import names
from lancet.cli.opening import Choice
from lancet.cli.options import names_pair, opens
from lancet.cli.publish import run as publish
from lancet.cli.train import run as train
from lancet.errors import UsageError

app = typer.Typer(
    name="lancet",
    help="A home lab for dissecting language models with sparse autoencoders (SAEs). 柳叶刀：在家解剖语言模型。",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md has its shape).")]


def given(text: str) -> str:
    """The argument itself, or standard input for `-`: UTF-8, else what the console's encoding makes of it."""
    if text != "-":
        return text
    raw = sys.stdin.buffer.read()
    for encoding in ("utf-8-sig", sys.stdin.encoding or "ascii"):
        try:
            return raw.decode(encoding).replace("\r\n", "\n").rstrip("\n")
        except UnicodeDecodeError:
            continue
    raise UsageError("standard input is not text in UTF-8; convert it first")


def _version(asked: bool) -> None:
    if asked:
        from lancet import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


@app.command()
@opens
def read(
    text: Annotated[str, typer.Argument(help="The text to read; - reads standard input.")],
    at: Annotated[str | None, typer.Option(help="Show the recipe of these characters alone, such as Bridge.")] = None,
    top: Annotated[int, typer.Option(help="Features listed a token.")] = 5,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also list features that fire on over a tenth of tokens.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Take the text as a user's turn of a chat.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the score (or, with --at, the spectrum) to this file.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="Read this direction, such as 'love - romance', instead of features.")
    ] = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Which features fire on which token, and how much of the vector they explain."""
    from lancet.cli.read import run, run_direction

    if direction is not None:
        if at is not None or plot is not None:
            raise UsageError("--direction tells every token in a table; leave --at and --plot out")
        run_direction(given(text), direction, chat, choice, json)
    else:
        run(given(text), at, top, dense, chat, plot, choice, json)


@app.command()
@opens
def steer(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    edits: Annotated[list[str], typer.Argument(help="Edits such as '#123 += 0.5rn', 'bridge = 2x @ generated'.")],
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 40,
    plain: Annotated[bool, typer.Option("--plain/--no-plain", help="Show the unedited continuation beside it.")] = True,
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a user's turn of a chat.")] = False,
    samples: Annotated[int, typer.Option(help="Continuations, each with its own seed.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.1,
    seed: Annotated[int, typer.Option(help="Same seed, same draws for every row.")] = 0,
    blunt: Annotated[bool, typer.Option("--blunt", help="Replace the vector by the decoded features.")] = False,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Continue a prompt with features forced on, held or switched off, beside the plain continuation."""
    from lancet.cli.steer import run
    from lancet.generate import Sampling

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    run(given(prompt), edits, tokens, plain, chat, samples, sampling, blunt, choice, json)


@app.command()
@opens
def find(
    words: Annotated[
        str | None, typer.Argument(help="Words instead of sentences, such as 'golden gate bridge'.")
    ] = None,
    like: Annotated[list[str] | None, typer.Option(help="A sentence about the concept; give several.")] = None,
    like_file: Annotated[Path | None, typer.Option(help="A file of such sentences, one a line.")] = None,
    unlike: Annotated[list[str] | None, typer.Option(help="A sentence like them but for the concept.")] = None,
    unlike_file: Annotated[Path | None, typer.Option(help="A file of such sentences, one a line.")] = None,
    at: Annotated[str | None, typer.Option(help="Characters in every example at which the concept sits.")] = None,
    top: Annotated[int, typer.Option(help="Features listed.")] = 10,
    together: Annotated[int, typer.Option(help="How many features detect it as one.")] = 4,
    blend: Annotated[int, typer.Option(help="The most features of the blend that causes it.")] = 10,
    causes: Annotated[bool, typer.Option("--causes/--no-causes", help="Measure what the features cause.")] = True,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Which features are the concept: those that detect it, those that make the model say it."""
    from lancet.cli.find import run

    files = (like_file, unlike_file)
    run(words, like or [], unlike or [], files, at, top, together, blend, causes, choice, json)


Beside = Annotated[Path | None, typer.Option("--atlas", help="The atlas' folder; left out, that of the SAE.")]


@app.command()
@names_pair
def card(
    features: Annotated[list[str], typer.Argument(help="Numbers or names of features.")],
    atlas: Beside = None,
    examples: Annotated[int, typer.Option(help="Examples of the strongest band; others have at most 4.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page of the cards to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the card to this file.")] = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """What an atlas says about a feature: how often and where it fires, what it says, who its neighbours are."""
    from lancet.cli.card import run

    run(features, atlas, examples, html, png, choice, json)


@app.command()
@opens
def search(
    words: Annotated[str | None, typer.Argument(help="Words, such as bridge or 'golden gate bridge'.")] = None,
    like: Annotated[
        list[str] | None, typer.Option(help="Sentences instead: opens the model and finds what detects them.")
    ] = None,
    top: Annotated[int, typer.Option(help="Features listed.")] = 20,
    atlas: Beside = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Features by words: which fire on them, which say them, which are called so. `lancet find` measures instead."""
    from lancet.cli.search import run

    run(words, like or [], top, atlas, choice, json)


@app.command()
@opens
def watch(
    feature: Annotated[str, typer.Argument(help="A feature's number or name.")],
    file: Annotated[
        Path | None, typer.Option(help="Sentences about what it is for, one a line; else bundled ones are found.")
    ] = None,
    others: Annotated[Path | None, typer.Option(help="Sentences that are not, one a line; else bundled ones.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the feature beside the neurons to this file.")] = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """One feature over many sentences, beside the single neurons that tell the same sentences apart best."""
    from lancet.cli.watch import run

    run(feature, file, others, plot, choice, json)


@app.command()
@opens
def name(
    target: Annotated[
        str | None, typer.Argument(help="A feature's number or an expression; or a name, to see what it stands for.")
    ] = None,
    called: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The name that it is to have.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="All names, yours and those of the SAE's card.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Take this name away.")] = None,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Write your names to a JSON file.")] = None,
    take_in: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="Take in names that --export wrote.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Give a name away that stands for something else.")] = False,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Give a feature, a blend or an expression a name, kept with its SAE and usable wherever a feature is."""
    from lancet.cli.name import Asked, run

    run(target, called, Asked(listing, remove, export, take_in), force, choice, json)


@app.command()
@opens
def mix(
    expression: Annotated[str, typer.Argument(help="Such as 'love - romance' or 'unit(#12) - 0.5 * #77'.")],
    near: Annotated[int, typer.Option(help="Nearest features listed.")] = 8,
    strength: Annotated[float, typer.Option(help="At which its effect is measured, of the typical norm.")] = 0.35,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """What a direction made of features or sentences is: its length, its neighbours, its effect, its parts."""
    from lancet.cli.mix import run

    run(expression, near, strength, choice, json)


@app.command()
@opens
def chat(
    edit: Annotated[list[str] | None, typer.Option(help="An edit, such as 'refusal = 0 @ assistant'.")] = None,
    system: Annotated[str | None, typer.Option(help="A system turn to begin with.")] = None,
    tokens: Annotated[int, typer.Option(help="The most new tokens of an answer.")] = 200,
    plain: Annotated[bool, typer.Option("--plain", help="Also ask the unedited model.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.1,
    seed: Annotated[int, typer.Option(help="Same seed, same draws.")] = 0,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """A conversation with the edited model, in the terminal or from lines of a pipe."""
    from lancet.cli.chat import run
    from lancet.generate import Sampling

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    run(edit or [], system, tokens, plain, sampling, choice, json)


@app.command()
@opens
def check(
    file: Annotated[Path | None, typer.Option(help="Texts to measure on, one a line; left out, bundled ones.")] = None,
    choice: Choice = Choice(anyway=True),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Does this SAE belong to this model, at this place, in this basis, and is the model fed as it was trained?"""
    from lancet.cli.check import run

    run(file, choice, json)


@app.command()
@opens
def dose(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts to report the dose on; bundled neutral ones where none is given."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Argument(
            help="What is dosed, such as '#123' or bridge; with examples it may be - for what they suggest."
        ),
    ] = None,
    like: Annotated[list[str] | None, typer.Option(help="A sentence about the concept; give several.")] = None,
    like_file: Annotated[Path | None, typer.Option(help="A file of such sentences, one a line.")] = None,
    keywords: Annotated[str, typer.Option(help="Words of which a text must have one, with commas between.")] = "",
    strengths: Annotated[str, typer.Option(help="Amounts to try, such as 0.2rn,0.4rn,2x; a grid where none.")] = "",
    op: Annotated[str, typer.Option(help="add, set, or both with a comma.")] = "add,set",
    span: Annotated[str, typer.Option(help="Where the edits act, as after the @ of an edit.")] = "all",
    seeds: Annotated[int, typer.Option(help="Continuations of each calibration prompt.")] = 1,
    report_seeds: Annotated[int, typer.Option(help="Continuations of each prompt that is reported on.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.1,
    most_surprise: Annotated[float, typer.Option(help="Nats a token above plain text that a dose may cost.")] = 1.5,
    most_repeats: Annotated[float, typer.Option(help="Share of repeated 3-grams that a dose must stay below.")] = 0.1,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Sweep other methods beside it.")
    ] = True,
    name: Annotated[str, typer.Option(help="Name what is recommended, so that edits can use it.")] = "",
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep the dose, for `+= auto`.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw the dose-response curve to this file.")] = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """How strong an edit must be: the strength that makes the model speak of a concept at the least harm."""
    from lancet.cli.dose import run
    from lancet.dose import Limits
    from lancet.generate import Sampling

    *given_prompts, what = [*(prompts or []), *([target] if target is not None else [])] or ["-"]
    run(
        None if what == "-" else what,
        like_file,
        plot,
        choice,
        json,
        prompts=given_prompts,
        like=like or [],
        keywords=[word.strip() for word in keywords.split(",") if word.strip()],
        strengths=[amount.strip() for amount in strengths.split(",") if amount.strip()],
        operations=[part.strip() for part in op.split(",")],
        span=span,
        seeds=seeds,
        report_seeds=report_seeds,
        tokens=tokens,
        sampling=Sampling(temperature=temperature, repetition_penalty=repetition_penalty),
        limits=Limits(most_surprise, most_repeats),
        baselines=baselines,
        name=name,
        keep=keep,
    )


app.command("eval")(evaluation.command)


@app.command()
@opens
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("lancet-demo"),
    choice: Choice = Choice(model="smollm2"),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """The whole story: read the bridge, find its feature and prove it, force it on. `--model gpt2-small` tells it on
    the pair of the manual that began all this."""
    from lancet.cli.demo import run

    run(out, choice, json)


@app.command()
@opens
def ablate(
    prompt: Annotated[str, typer.Argument(help="The text; - reads standard input.")],
    features: Annotated[
        list[str] | None, typer.Argument(help="What to cut: 123, a name, '(love - romance)'; several count as one.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Rank the features active at a token by what cutting each alone changes.")
    ] = False,
    at: Annotated[str | None, typer.Option(help="Cut at these characters alone, such as Bridge.")] = None,
    span: Annotated[
        str, typer.Option(help="Where to cut, as in edits: all, generated, 'assistant', 'where #77 > 5'.")
    ] = "all",
    to: Annotated[str, typer.Option(help="What activations are set to: 0 is off, -10 or -1x is below zero.")] = "0",
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="Project the directions out of the output of every block.")
    ] = False,
    controls: Annotated[int, typer.Option(help="Sets of random features, as active and moved as far.")] = 10,
    tokens: Annotated[int, typer.Option(help="New tokens of the continuations.")] = 24,
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a user's turn of a chat.")] = False,
    top: Annotated[int, typer.Option(help="Tokens (with --each: features) listed.")] = 10,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the draws, and of the choice of controls.")] = 0,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Cut features out: what the next token, the loss and the text become, beside random features cut as hard."""
    from lancet.cli.ablate import run
    from lancet.generate import Sampling

    sampling = Sampling(temperature=temperature, seed=seed)
    how = (each, at, span, to, everywhere, controls, tokens, chat, top)
    run(given(prompt), features or [], *how, sampling, choice, json)


@app.command()
@opens
def harvest(
    corpus: Annotated[
        list[str],
        typer.Argument(help="Files (.txt, .md, .jsonl, .parquet; .gz, .zst), folders, a data set's name, or -."),
    ],
    tokens: Annotated[str | None, typer.Option(help="Read no more than so many, such as 10M or 250k.")] = None,
    out: Annotated[Path | None, typer.Option(help="The atlas's folder; left out, the SAE's own place.")] = None,
    field: Annotated[str, typer.Option(help="The field or column that holds the text.")] = "text",
    length: Annotated[
        int | None, typer.Option(help="Tokens of a piece; 512, or the model's context where that is less.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for several processes.")] = "local",
    address: Annotated[str | None, typer.Option(help="A running Ray cluster's; left out, one is started here.")] = None,
    workers: Annotated[int, typer.Option(help="Processes of Ray; 0 chooses.")] = 0,
    lenses: Annotated[
        bool, typer.Option("--lenses/--no-lenses", help="Also measure what each feature makes the model say.")
    ] = True,
    examples: Annotated[
        int, typer.Option(help="Kept of the strongest, at most 20; a quarter as many of each fifth of the range.")
    ] = 20,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Read a corpus and write an atlas: when each feature fires, how strongly, on what, with what, and what it says."""
    from lancet.cli.harvest import run

    how = {"column": field, "length": length, "engine": engine, "address": address, "workers": workers}
    run(corpus, out, tokens, choice, json, lenses=lenses, examples=examples, **how)


@app.command()
@opens
def encode(
    corpus: Annotated[
        list[str],
        typer.Argument(help="Files (.txt, .md, .jsonl, .parquet; .gz, .zst), folders, a data set's name, or -."),
    ],
    out: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    pool: Annotated[
        str | None, typer.Option(help="max, mean or count over each text's tokens; left out, a row for each token.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Read no more than so many, such as 10M or 250k.")] = None,
    field: Annotated[str, typer.Option(help="The field or column that holds the text.")] = "text",
    length: Annotated[
        int | None, typer.Option(help="Tokens of a piece; 512, or the model's context where that is less.")
    ] = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Json = False,
) -> None:
    """Features as data: which fire at every token of a corpus, or in each text, as a Parquet file."""
    from lancet.cli.encode import run

    run(corpus, out, tokens, choice, json, pool=pool, column=field, length=length)


app.command(name="train")(train)
app.command(name="publish")(publish)


@app.command()
def saes(
    model: Annotated[str | None, typer.Option(help="Only those of this model, under any of its names.")] = None,
    site: Annotated[str | None, typer.Option(help="blocks.6.hook_resid_pre, resid_pre, or a layer's number.")] = None,
    release: Annotated[str | None, typer.Option(help="Only those of this release.")] = None,
    search: Annotated[str | None, typer.Option(help="Words that all occur in name, model or site.")] = None,
    limit: Annotated[int, typer.Option(help="When more fit, releases are listed instead.")] = 60,
    json: Json = False,
) -> None:
    """The published SAEs: where they read, how wide they are, whether they are here and fit this machine."""
    from lancet.cli.saes import run

    run(model, site, release, search, limit, json)


@app.command()
def use(
    name: Annotated[str | None, typer.Argument(help="A model, as for --model; left out, the choice is shown.")] = None,
    sae: Annotated[list[str] | None, typer.Option(help="Its SAE, as for --sae elsewhere; several times.")] = None,
    json: Json = False,
) -> None:
    """Choose the model (and SAEs) that every command opens where none is named."""
    from lancet.cli.use import run

    run(name, tuple(sae or ()), json)


@app.command()
def get(
    name: Annotated[
        str,
        typer.Argument(
            help="smollm2, gemma3-270m, a model as for --model, or an SAE as RELEASE/ID or hf://USER/REPO/FOLDER."
        ),
    ],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the model's own terms without being asked.")
    ] = False,
) -> None:
    """Fetch a model or an SAE ahead of its use, and make it ready; what is here is checked."""
    from lancet.cli.get import run

    run(name, accept_terms)


app.add_typer(names, name="names")

cache = typer.Typer(invoke_without_command=True)
app.add_typer(cache, name="cache")


@cache.callback()
def cache_root(context: typer.Context, json: Json = False) -> None:
    """What is kept on disk, with sizes; `prune` deletes of it."""
    if context.invoked_subcommand is None:
        from lancet.cli.cache import run

        run(json)


@cache.command()
def prune(
    names: Annotated[list[str] | None, typer.Argument(help="Names as `lancet cache` lists them, or a release.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of Lancet's own cache.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete what can be made or fetched again, after showing it."""
    from lancet.cli.cache import prune as run

    run(names or [], everything, yes, json)


@app.command()
def doctor(json: Json = False) -> None:
    """Versions, devices, memory, caches; what is missing, and the command that mends it."""
    from lancet.cli.doctor import run

    run(json)
