"""Names from a model at a server, against a real server on the loopback and all that goes wrong with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import Chat, serving
from fixtures_atlas import KEY, SILENT, write_atlas
from fixtures_names import lancet

from lancet.atlas import asking, explanations
from lancet.atlas.atlas import Atlas
from lancet.atlas.completions import Answer, Budget, BudgetReached, Server, ServerError, address, key_from
from lancet.atlas.survey import Answers, Survey, answers, survey
from lancet.errors import LancetError, UsageError

ENTRY = "from lancet.cli import main; main()"
SECRET = "sk-very-secret-0123456789"
HELLO = [{"role": "system", "content": "Say hello."}, {"role": "user", "content": "{}"}]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(write_atlas(tmp_path_factory.mktemp("atlas"), 64))


def server(chat: Chat, **more: Any) -> Server:
    return Server(chat.url, "tiny", **({"wait": 0.01, "timeout": 5.0} | more))


def go(atlas: Atlas, features: list[int], chat: Chat, most: int = 256, at: Server | None = None, **more: Any) -> Survey:
    with answers(KEY) as held:
        return survey(atlas, features, at or server(chat), held, most, **more)


# ---- the client ------------------------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert address("http://localhost:8000") == "http://localhost:8000/v1/chat/completions"
    assert address("https://a.b/openai/v1/") == "https://a.b/openai/v1/chat/completions"
    assert address("https://a.b/x/chat/completions?v=1") == "https://a.b/x/chat/completions?v=1"
    for wrong in ("localhost:8000", "ftp://a.b", "http://", "", "file:///etc/passwd"):
        with pytest.raises(UsageError, match="http://localhost"):
            address(wrong)
    with pytest.raises(UsageError, match="api-key-env") as caught:
        address(f"https://me:{SECRET}@a.b")
    assert SECRET not in str(caught.value)


def test_faults_that_pass_are_waited_out() -> None:
    with serving(faults=[500, 503, "drop", "html", (429, "0")]) as chat:
        told: list[str] = []
        at = server(chat, say=told.append)
        assert "Here it is" in at.ask(HELLO, 50).text
        assert len(chat.asked) == 6
        assert at.budget.requests == 1
        # A request that was dropped or answered with rubbish may have been worked on, one turned away was not.
        assert at.budget.spent > chat.tokens


def test_a_pause_that_is_asked_for_holds_every_question_back() -> None:
    with serving(faults=[(429, "1")]) as chat:
        told: list[str] = []
        at = server(chat, say=told.append)
        at.ask(HELLO, 50)
        assert chat.at[1] - chat.at[0] >= 0.95
        assert told == [f"127.0.0.1:{chat.port} asks to wait 1 seconds"]
        chat.faults = [(429, "86400")]
        with pytest.raises(ServerError, match="asks to wait 86,400 seconds"):
            at.ask(HELLO, 50)


def test_a_date_says_how_long_to_wait_too() -> None:
    from lancet.atlas.completions import _seconds

    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _seconds("tomorrow") is None
    assert _seconds("1.5") == 1.5


def test_silence_is_tried_again() -> None:
    with serving(faults=["silence"]) as chat:
        at = server(chat, timeout=0.3)
        assert at.ask(HELLO, 50).text
        assert len(chat.asked) == 2


def test_what_does_not_pass_is_told_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_MINE", SECRET)
    with serving(faults=[401]) as chat:
        at = server(chat, key=key_from("KEY_OF_MINE"))
        with pytest.raises(ServerError, match=r"status 401: told Bearer \*\*\*; name the variable") as caught:
            at.ask(HELLO, 50)
        assert chat.keys == [f"Bearer {SECRET}"]
        assert SECRET not in str(caught.value)
        assert len(chat.asked) == 1
        chat.faults = [500] * 9
        with pytest.raises(ServerError, match="failed 6 times, at last: status 500") as caught:
            at.ask(HELLO, 50)
        assert SECRET not in str(caught.value)
    with pytest.raises(UsageError, match="NO_SUCH is not set"):
        key_from("NO_SUCH")
    with pytest.raises(ServerError, match=r"no server answers at .*; start it"):
        server(chat).ask(HELLO, 50)


def test_redirects_are_not_followed() -> None:
    with serving(faults=[307]) as chat, pytest.raises(ServerError, match="redirects are not followed"):
        server(chat).ask(HELLO, 50)


def test_parameters_that_a_server_lacks_are_left_out() -> None:
    with serving(refused={"max_tokens", "temperature"}) as chat:
        at = server(chat)
        assert at.ask(HELLO, 50).text
        assert at.ask(HELLO, 50).text
        assert chat.asked[-1].keys() == {"model", "messages", "stream", "max_completion_tokens"}
        assert len(chat.asked) == 4


def test_a_budget_is_not_exceeded() -> None:
    budget = Budget(100)
    _, held = budget.hold(HELLO, 40)
    budget.settle(held, 90)
    with pytest.raises(BudgetReached):
        budget.hold(HELLO, 40)
    learning = Budget(None)
    before = learning.hold(HELLO, 0)[0]
    learning.counted(HELLO, 100)
    assert learning.hold(HELLO, 0)[0] > before


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_json_is_found_in_what_stands_around_it() -> None:
    assert asking.json_in('So: {"name": "a"} or rather {"name": "b {c}"} I think.') == {"name": "b {c}"}
    assert asking.json_in('<think>{"name": "x"}</think>```json\n{"name": "y"}\n```') == {"name": "y"}
    assert asking.json_in('<think>{"name": "cut') is None
    assert asking.json_in("[1, 2]") is None
    assert asking.name_in('{"name": " the  Golden\\nGate. "}') == "the Golden Gate"
    for wrong in ("bridge", '{"name": 3}', '{"name": ""}', '{"title": "x"}', json.dumps({"name": "x" * 200})):
        with pytest.raises(ValueError):
            asking.name_in(wrong)


def test_every_window_must_have_a_verdict() -> None:
    assert asking.verdicts_in('{"1": true, "2": "no", "3": 1}', 3) == [True, False, True]
    for wrong, why in (
        ('{"1": true}', "2 of the 3 pieces had no answer"),
        ('{"1": true, "2": false, "3": true, "4": true}', "do not exist"),
        ('{"1": true, "2": "perhaps", "3": true}', "not true or false"),
        ("all of them", "no JSON"),
    ):
        with pytest.raises(ValueError, match=why):
            asking.verdicts_in(wrong, 3)


def test_balanced_accuracy_is_a_half_by_chance() -> None:
    true = [True, True, False, False, False, False]
    assert asking.balanced_accuracy([True] * 6, true) == 0.5
    assert asking.balanced_accuracy([False] * 6, true) == 0.5
    assert asking.balanced_accuracy(true, true) == 1.0
    assert asking.balanced_accuracy([True, False, False, False, False, True], true) == 0.625


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_no_window_of_the_score_was_shown(atlas: Atlas) -> None:
    about = asking.evidence(atlas, atlas.feature(3), atlas.examples(3))
    again = asking.evidence(atlas, atlas.feature(3), atlas.examples(3))
    assert about == again
    assert {band for band, _ in about.shown} == set(range(6))
    shown = {text.replace("[[*", "").replace("*]]", "").replace("[[", "").replace("]]", "") for _, text in about.shown}
    assert len(about.windows) == 18
    assert sum(fires for _, fires in about.windows) == 9
    assert not shown & {text for text, _ in about.windows}
    assert all("[[" not in text for text, _ in about.windows)
    assert [fires for _, fires in about.windows] != sorted((fires for _, fires in about.windows), reverse=True)
    question = asking.name_question(about)[1]["content"]
    assert "[[* bridge*]]" in question and '" river"' in question and "(0 to 20 %)" in question
    other = asking.evidence(atlas, atlas.feature(3), atlas.examples(3), seed=1)
    assert other.windows != about.windows


def test_names_and_scores_of_a_whole_run(atlas: Atlas) -> None:
    with serving(thinking=True) as chat:
        found = go(atlas, [3, 5, 10, SILENT], chat)
    assert [named.feature for named in found.named] == [3, 5, 10]
    assert found.silent == [SILENT] and not found.stopped and not found.left
    kept = explanations.load(KEY)
    assert kept[3][0].source == "ask: tiny"
    assert set(kept[3][0].text.split()) == {"bridge", "bridges"}
    assert kept[5][0].score is not None and kept[5][0].score > 0.9 and kept[5][0].asked == 18
    assert kept[10][0].text == "大桥 桥"


def test_questions_are_on_their_way_together(atlas: Atlas) -> None:
    with serving(delay=0.05) as chat:
        go(atlas, list(range(12, 24)), chat, concurrency=4)
        assert 2 <= chat.most_together <= 4


def test_nonsense_is_told_and_asked_again_and_then_given_up(atlas: Atlas) -> None:
    with serving(faults=["nonsense", None, "short"]) as chat:
        found = go(atlas, [3], chat, concurrency=1)
        assert found.named[0].score is not None
        assert "cannot be used: there was no JSON" in chat.asked[1]["messages"][-1]["content"]
        assert "17 of the 18 pieces had no answer" in chat.asked[3]["messages"][-1]["content"]
        chat.faults = ["nonsense"] * 3
        found = go(atlas, [5, 7], chat, concurrency=1)
    assert next((named.feature, named.text, named.why) for named in found.named) == (
        5,
        "",
        "there was no JSON object in it",
    )
    assert found.named[1].text and 5 not in explanations.load(KEY)


@pytest.mark.parametrize("usage", [True, False])
def test_a_budget_stops_the_run_and_the_next_goes_on(atlas: Atlas, usage: bool) -> None:
    with serving(usage=usage) as chat:
        budget = Budget(6000)
        found = go(atlas, list(range(12, 40)), chat, at=server(chat, budget=budget))
        assert found.stopped == "the budget"
        assert 0 < len(found.named) < 28 and found.left == 28 - len(found.named)
        assert chat.tokens <= 6000 and budget.spent <= 6000
        assert budget.estimated == (0 if usage else budget.requests)
        found = go(atlas, list(range(12, 40)), chat)
        assert len(found.named) == 28 and not found.stopped
        assert set(chat.answered.values()) == {1}


def test_a_refusal_keeps_what_came(atlas: Atlas) -> None:
    with serving(faults=[None, None, None, 401]) as chat:
        with pytest.raises(ServerError, match="401"):
            go(atlas, list(range(12, 30)), chat, concurrency=1)
        assert [entry.text for entry in explanations.load(KEY)[12]]
        before = sum(chat.answered.values())
        go(atlas, [12], chat)
        assert sum(chat.answered.values()) == before


def test_a_line_that_was_cut_off_costs_one_answer(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    held = Answers(file)
    held.put("a", Answer("first", 1, 2))
    held.put("b", Answer("第二", 1, 2))
    held.close()
    file.write_bytes(file.read_bytes()[:-20])
    held = Answers(file)
    assert held.get("a") == "first" and held.get("b") is None
    held.put("c", Answer("third", 1, 2))
    held.close()
    held = Answers(file)
    assert (held.get("a"), held.get("c")) == ("first", "third")


def test_one_process_asks_at_a_time() -> None:
    with answers(KEY), pytest.raises(LancetError, match="another `lancet names ask`"), answers(KEY):
        pass


# ---- the command -----------------------------------------------------------------------------------------------------


def command(atlas: Atlas, chat: Chat, *more: str) -> list[str]:
    where = ["--atlas", str(atlas.folder), "--endpoint", chat.url, "--model", "tiny"]
    return [sys.executable, "-c", ENTRY, "names", "ask", *where, *more]


def test_a_kill_costs_only_what_was_on_its_way(atlas: Atlas, tmp_path: Path) -> None:
    """The process is killed in the middle; the next one asks nothing that was answered before."""
    env = {**os.environ, "MY_KEY": SECRET}
    more = ["--features", "12-60", "--api-key-env", "MY_KEY", "--concurrency", "2", "--json"]
    with serving(delay=0.01) as chat:
        process = subprocess.Popen(
            command(atlas, chat, *more), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 60
            while sum(chat.answered.values()) < 10 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        before = sum(chat.answered.values())
        assert 10 <= before < 98
        done = subprocess.run(command(atlas, chat, *more), env=env, capture_output=True, check=True, text=True)
        told = json.loads(done.stdout)
        # The answers that were on their way (two at most) were never received.
        assert sum(chat.answered.values()) - 98 <= 2
        assert told["reused"] >= before - 2
        assert len(told["names"]) == 49 and told["left"] == 0 and told["chance"] == 0.5
        assert set(chat.keys) == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr
    for file in (Path(os.environ["LANCET_DATA"]) / "explanations").iterdir():
        assert SECRET not in file.read_text()


def test_the_command_tells_what_it_did(atlas: Atlas) -> None:
    with serving() as chat:
        rest = command(atlas, chat)[3:]
        code, out, err = lancet(*rest, "--top", "3")
        assert code == 0 and out.splitlines()[0] == "feature\tname\tdetection\tsource"
        assert len(out.splitlines()) == 4 and "of 18\task: tiny" in out
        assert "6 answers" in err and "chance is 0.50" in err
        code, out, err = lancet(*rest, "--features", "3-9", "--budget", "1500")
        assert code == 0 and "stopped by the budget" in err
        lancet("names", "auto", "--atlas", str(atlas.folder))
        code, out, err = lancet(*rest, "--score", "auto", "--features", "12-14", "--json")
        assert code == 0, err
        assert [named["asked"] for named in json.loads(out)["names"]] == [18] * 3
        assert explanations.load(KEY)[13][-1].score is not None
    for words, why in (
        (["--features", "1-99"], "#0 to #63"),
        (["--features", "x"], "1,2,5-9"),
        (["--features", str(SILENT), "--top", "3"], "either"),
        (["--api-key-env", "NO_SUCH"], "NO_SUCH is not set"),
        (["--budget", "0"], "above 0"),
        (["--score", "nobody"], "no names of source"),
    ):
        code, out, err = lancet(*rest, *words)
        assert code == 2 and why in err and len(err.splitlines()) == 1, (words, err)
    code, out, err = lancet(*rest, "--features", "20")
    assert code == 1 and "no server answers" in err
