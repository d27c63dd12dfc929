"""Reading a 12-token prompt at layer 6: `lab.read` whole against the tutorial's cache, encode and topk."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import pairs, tutorial
from benchmarks.measure import Figure, Settings, check, in_turns, ratio, remark

BAR = 0.25


def run(settings: Settings) -> Iterator[Figure]:
    import torch

    torch.set_num_threads(settings.threads)
    lab = pairs.gpt2(settings)
    remark("building the HookedTransformer")
    with torch.no_grad():
        model, sae = tutorial.build(*map(str, pairs.gpt2_folders(settings)))
        tokens = torch.tensor([lab.tokenize(pairs.PROMPT).ids])
        check(torch.equal(tokens, model.to_tokens(pairs.PROMPT)) and tokens.shape[1] == 12, "tokens")
        values, features = tutorial.read(model, sae, tokens)
        reading = lab.read(pairs.PROMPT, dense=True)
        for position in reading.read_positions():
            lits = reading.spot([position]).top(5, dense=True)
            ours = torch.tensor([lit.value for lit in lits])
            check(torch.allclose(ours, values[position], rtol=1e-3, atol=1e-3), f"activations at {position}")
            check({lit.feature for lit in lits} == set(features[position].tolist()), f"features at {position}")
        sides = {
            "lab.read": lambda: lab.read(pairs.PROMPT),
            "tutorial": lambda: tutorial.read(model, sae, model.to_tokens(pairs.PROMPT)),
        }
        taken = in_turns(sides, 3 * settings.repeats, warm_up=3)  # short runs, so more of them
    yield ratio("GPT-2 shape, float32: read 12 tokens at layer 6", taken, "lab.read", "tutorial", BAR)
