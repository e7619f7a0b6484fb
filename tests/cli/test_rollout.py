"""The rollout and audit commands, as processes, against the admin API."""

from __future__ import annotations

import getpass
import json
import os
import pty
import select
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.rollout_api import Desk
from tests.e2e.deployment import SERVING, free_port, serving


class Cli:
    """Commands against one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.env = {"SERVING_CONTROL_URL": desk.url}

    def __call__(self, *arguments: str | Path, **env: str) -> str:
        done = serving(*arguments, home=self.desk.home, env={**self.env, **env})
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self(*arguments, "--json"))

    def fails(self, *arguments: str | Path, code: int = 1) -> str:
        done = serving(*arguments, home=self.desk.home, env=self.env)
        assert done.returncode == code, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, cli: Cli, *arguments: str) -> None:
        self.output = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, **cli.env, "TERM": "xterm", "COLUMNS": "100"}
            os.execve(SERVING[0], [*SERVING, *arguments], {**environment, "LINES": "50"})

    def read_until(self, text: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            readable, _, _ = select.select([self._fd], [], [], deadline - time.monotonic())
            assert readable, f"no {text!r} in\n{self.output}"
            assert self._read(), f"ended without {text!r}:\n{self.output}"

    def press_ctrl_c(self) -> None:
        os.write(self._fd, b"\x03")

    def wait(self) -> int:
        """Read to the end; the exit status."""
        while self._read():
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:  # how a closed terminal looks on Linux
            return False
        self.output += chunk.decode(errors="replace")
        return bool(chunk)


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Cli]:
    """Version 1 of `digits` answers, and no rollout has been."""
    desk = Desk(tmp_path)
    with desk.serve():
        yield Cli(desk)


@pytest.fixture
def cli(idle: Cli) -> Cli:
    """One rollout (digits:2) is at its first step; one before it was rolled back."""
    desk = idle.desk
    desk.start()
    desk.until("observing")
    desk.until("rolled_back", failing=0.2)
    desk.start()
    desk.until("observing")
    desk.pass_time(2)
    return idle


def test_start_says_who_what_and_why_and_names_the_command_that_watches(idle: Cli) -> None:
    said = idle("rollout", "start", "digits", "--to", "2", "--reason", "better", SERVING_ACTOR="ci")
    # The plan is what the model's configuration says.
    assert "digits: rollout digits:1 from version 1 to 2 by plan fast" in said
    assert "serving rollout watch digits" in said
    assert "before the next apply, let the file ask for version 2 too" in said
    again = idle.fails("rollout", "start", "digits", "--to", "3")
    assert "to version 2 is pending; abort it first" in again
    (start,) = (e for e in idle.json("audit") if e["action"] == "start")
    assert (start["actor"], start["body"]["reason"]) == ("ci", "better")


def test_status_of_everything_shows_a_rollout_and_who_gets_the_requests(cli: Cli) -> None:
    desk = cli.desk
    said = cli("status")
    weight = f"{desk.rollout.weight * 100:.3g}"
    assert (
        f"digits: rollout digits:2 is observing, step 1 of {len(desk.rollout.spec.steps)}" in said
    )
    assert f"{weight} % to version 2; serving rollout status digits says more" in said
    assert f"1 (stable, {100 - float(weight):.3g} %)" in said
    assert f"2 (canary, {weight} %)" in said
    desk.until("baking")
    said = cli("status")
    assert "digits: rollout digits:2 is baking, 100 % to version 2" in said
    assert "1 (stable, 0 %)" in said
    assert "2 (canary, 100 %)" in said
    assert "(default)" not in said
    desk.until("succeeded")
    said = cli("status")
    assert "2 (default)" in said
    assert "rollout" not in said


def test_an_apply_that_is_interrupted_says_that_it_goes_on(idle: Cli) -> None:
    file = idle.desk.home / "serving.yaml"
    models = "models: {digits: {version: '2', rollout: immediate}}"
    file.write_text(f"home: {idle.desk.home}\n{models}\n")
    terminal = Terminal(idle, "apply", "-f", str(file), "--url", idle.desk.url)
    terminal.read_until("digits version 1: ")
    terminal.press_ctrl_c()
    assert terminal.wait() == 130
    said = terminal.output.splitlines()[-1].removeprefix("^C")
    assert said == "the apply goes on; serving status shows how far it is"


def test_start_by_a_plan_of_its_own(idle: Cli) -> None:
    file = idle.desk.home / "slow.yaml"
    file.write_text("plan: fast\nsteps: [{weight: 50, hold: 1m}]\n")
    started = idle.json("rollout", "start", "digits", "--to", "2", "--plan", file)
    assert started["spec"]["plan"] == "slow"
    assert [step["hold_s"] for step in started["spec"]["steps"]] == [60.0]
    assert started["actor"] == f"{getpass.getuser()}@{socket.gethostname()}"


def test_a_plan_file_is_checked_before_anything_is_sent(idle: Cli) -> None:
    file = idle.desk.home / "plan.yaml"
    call = ("rollout", "start", "digits", "--to", "2", "--plan", file)
    assert "plan.yaml: cannot be read" in idle.fails(*call, code=2)
    file.write_text("steps: [{weight: 500, hold: 1m}]\n")
    assert str(file) in (said := idle.fails(*call, code=2))
    assert "weight" in said
    file.write_text("[")
    assert "is not valid YAML" in idle.fails(*call, code=2)
    assert "'no' is no plan; allowed: canary" in idle.fails(*call[:-1], "no", code=2)
    assert idle("rollout", "list") == "no rollout yet\n"
    assert idle("rollout", "status") == "no rollout runs\n"
    assert idle.json("rollout", "status") == []


def test_status_lists_what_runs_or_shows_one(cli: Cli) -> None:
    rows = [row for row in cli("rollout", "status").splitlines() if "digits" in row]
    assert len(rows) == 1
    assert "observing, step 1 of 3" in rows[0]
    one = cli("rollout", "status", "digits")
    assert "digits: version 1 → 2, observing, step 1 of 3, 5 % to version 2" in one
    assert "next: Step 2 (25 %) begins in" in one
    assert cli.json("rollout", "status", "digits:1")["state"] == "rolled_back"
    assert [r["id"] for r in cli.json("rollout", "status")] == ["digits:2"]


def test_list_and_history(cli: Cli) -> None:
    assert [r["id"] for r in cli.json("rollout", "list")] == ["digits:2", "digits:1"]
    assert [r["id"] for r in cli.json("rollout", "list", "--active")] == ["digits:2"]
    lines = cli("rollout", "history", "digits").splitlines()
    running, ended = [line for line in lines if "digits" in line]
    assert [line.split()[0] for line in (running, ended)] == ["digits:2", "digits:1"]
    assert "Step 2 (25 %) begins in" in running
    assert "controller: errors: canary failed" in ended


def test_explain_shows_verdicts_and_the_last_audit_entries(cli: Cli) -> None:
    text = cli("rollout", "explain", "digits:1")
    assert "✗ step 1: 5 % for 5 s" in text
    assert "canary failed 10 of 50" in text
    assert "better on sevens" in text
    found = cli.json("rollout", "explain", "digits")
    assert [v["trigger"] for v in found["verdicts"]][:2] == ["errors", "latency"]
    assert found["audit"][0]["action"] == "start"
    assert {e["subject"] for e in found["audit"]} == {"digits:2"}


def test_plan_says_how_soon_what_is_noticed(idle: Cli) -> None:
    text = idle("rollout", "plan", "digits", "--to", "3", "--plan", "canary")
    assert "digits: version 1 → 3 by plan canary" in text
    assert "step 2: 5 % for 5 min" in text
    assert "noticed at 200 requests a second" in text
    (row,) = (line for line in text.splitlines() if "20% of requests fail" in line)
    assert "errors" in row
    assert "step 1" in row
    found = idle.json("rollout", "plan", "digits", "--to", "3")
    assert found["spec"]["plan"] == "fast"
    assert idle.json("rollout", "list") == []


def test_commands_are_carried_out_once_and_audited(cli: Cli) -> None:
    said = cli("rollout", "pause", "digits", "--reason", "lunch", SERVING_ACTOR="ada")
    assert said.splitlines()[0] == "digits: paused, step 1 of 3, 5 % to version 2"
    assert said.splitlines()[1].startswith("next: Paused (lunch)")
    refused = cli.fails("rollout", "pause", "digits")
    assert "possible now: resume" in refused
    cli("rollout", "resume", "digits")
    assert cli.json("rollout", "promote", "digits")["state"] == "promoting"
    assert "rolling back" in cli("rollback", "digits", "--reason", "no")
    log = [e for e in cli.json("audit") if e["subject"] == "digits:2"]
    assert [e["action"] for e in log][-4:] == ["pause", "resume", "promote", "rollback"]
    pause = log[-4]
    assert (pause["actor"], pause["body"]["reason"]) == ("ada", "lunch")
    text = cli("audit", "--after", str(pause["seq"] - 1), "--limit", "1")
    (row,) = (line for line in text.splitlines() if "digits:2" in line)
    assert row.split()[0] == str(pause["seq"])
    assert row.split()[3:] == ["ada", "pause", "digits:2", "5", "%:", "lunch"]


def test_approve_and_abort(idle: Cli) -> None:
    idle.desk.start(plan={"plan": "fast", "steps": [{"weight": 5, "hold": 1, "gate": {}}]})
    idle.desk.until("awaiting_gate")
    assert "awaiting gate" in idle("rollout", "approve", "digits", "--reason", "looked at it")
    assert "was approved by" in idle.fails("rollout", "approve", "digits")
    assert idle.json("rollout", "abort", "digits")["state"] == "rolling_back"


def test_of_two_operators_at_once_the_second_is_told(cli: Cli) -> None:
    """Both saw "observing"; what the second wants is not done to another state."""
    seen = cli.json("rollout", "status", "digits")["state"]
    cli("rollout", "pause", "digits", "--if-state", seen, "--reason", "odd", SERVING_ACTOR="ada")
    for command in (["rollout", "promote"], ["rollout", "abort"], ["rollback"]):
        said = cli.fails(*command, "digits", "--if-state", seen)
        assert "rollout digits:2 is paused now, not observing (ada: odd); look at it again" in said
    assert cli.json("rollout", "status", "digits")["state"] == "paused"
    assert cli.json("audit")[-1]["action"] == "pause"
    assert cli.json("rollout", "resume", "digits", "--if-state", "paused")["state"] == "observing"
    unknown = cli.fails("rollout", "pause", "digits", "--if-state", "going", code=2)
    assert "'going' is not one of 'pending', 'preparing'" in unknown


def test_rollback_after_success_while_the_old_version_is_kept_and_no_longer(idle: Cli) -> None:
    kept = {"plan": "fast", "bake": {"duration": 1}, "keep_previous": 30}
    idle.desk.start(plan=kept)
    idle.desk.until("succeeded")
    assert "a rollback to it is immediate" in idle("rollout", "status", "digits")
    assert "digits: rolling back" in idle("rollback", "digits", "--reason", "complaints")
    idle.desk.until("rolled_back")
    ended = idle("rollout", "status", "digits")
    assert "next: It is over, with all requests at version 1." in ended
    explained = idle("rollout", "explain", "digits")
    assert "taken back 1000 ms after the verdict" in explained, "the desk's gateway is that slow"
    idle.desk.start(plan={**kept, "keep_previous": 2})
    idle.desk.until("succeeded")
    idle.desk.pass_time(3)
    said = idle.fails("rollback", "digits")
    assert "version 1 is no longer kept" in said
    assert said.endswith("to go back to it: serving rollout start digits --to 1")
    assert "serving rollout start digits --to 1" in idle("rollout", "status", "digits")
    back = idle.json("rollout", "start", "digits", "--to", "1")
    assert (back["stable"], back["canary"]) == ("2", "1")


def switch(cli: Cli, version: str) -> None:
    """Apply another version at once, and wait until it answers."""
    file = cli.desk.home / "switch.yaml"
    model = f"{{version: {version}, replicas: 2, rollout: immediate}}"
    file.write_text(f"home: {cli.desk.home}\nmodels: {{digits: {model}}}\n")
    cli("apply", "-f", file, "--url", cli.desk.url, "--no-wait")
    cli.desk.pass_time(15)


def test_what_was_is_said_in_the_past_tense_after_a_later_apply(idle: Cli) -> None:
    idle.desk.start()
    idle.desk.until("observing")
    idle("rollout", "abort", "digits")
    idle.desk.until("rolled_back")
    assert "next: It is over, with all requests at version 1." in idle(
        "rollout", "status", "digits"
    )
    switch(idle, "2")
    for command in ("status", "explain"):
        said = idle("rollout", command, "digits")
        assert (
            "next: It is over, and left all requests at version 1. Version 2 answers now." in said
        )
    rows = {row[0]: row for line in said.splitlines() if (row := line.split())}
    assert rows["stable"][1:5] == ["1", "0", "%", "0/0"]
    assert rows["canary"][1:5] == ["2", "100", "%", "2/2"]
    switch(idle, "3")
    found = idle.json("rollout", "status", "digits")
    assert found["next"].endswith("Version 3 answers now.")
    assert [found["arms"][arm]["weight"] for arm in ("stable", "canary")] == [0.0, 0.0]
    watched = Terminal(idle, "rollout", "watch", "digits")
    assert watched.wait() == 1
    assert "version 3 answers now" in watched.output
    assert "━" not in watched.output


def test_the_audit_log_shows_what_an_apply_changed(idle: Cli) -> None:
    switch(idle, "2")
    switch(idle, "2")
    first, second, third = idle("audit").splitlines()[-3:]
    assert first.rstrip().endswith("  digits: start 1")
    assert "digits: stop 1, start 2" in second
    assert "nothing changed" in third


def test_audit_verify(cli: Cli) -> None:
    count = cli.json("audit")[-1]["seq"]
    assert f"{count} entries, as written" in (said := cli("audit", "verify"))
    assert f"{count} entries" in cli.json("audit", "verify")["sentence"]
    noted = cli.json("audit", "verify")["end"]
    assert said.endswith(f"{noted}\n")
    cli("rollout", "pause", "digits")
    assert f"{count + 1} entries, as written" in cli("audit", "verify", "--expect", noted)
    digest, _, number = noted.partition("@")
    other = f"{digest[::-1]}@{number}"
    assert "has not the hash that was noted" in cli.fails("audit", "verify", "--expect", other)
    wrong = cli.fails("audit", "verify", "--expect", "12", code=2)
    assert "'12' is no end of a log; allowed: HASH@COUNT" in wrong
    said = cli.fails("audit", "--url", cli.desk.url, "verify", code=2)
    assert "--url stands before 'verify'" in said
    with sqlite3.connect(cli.desk.home / "store.db") as db:
        db.execute(f"DELETE FROM audit WHERE seq > {count}")
    assert f"ends with entry {count}, but once had" in cli.fails("audit", "verify")
    with sqlite3.connect(cli.desk.home / "store.db") as db:
        db.execute("UPDATE audit SET actor = 'mallory' WHERE seq = 2")
    assert "entry 2 was changed" in cli.fails("audit", "verify")


def test_what_is_not_there(idle: Cli) -> None:
    for command in ("explain", "watch", "pause"):
        said = idle.fails("rollout", command, "nobody")
        assert "no rollout 'nobody', and no model of this name is served; served: digits" in said
    said = idle.fails("rollout", "status", "digits")
    assert said == "error: model 'digits' is served, by version 1, and has had no rollout yet"
    assert idle("rollout", "history", "digits") == "digits: no rollout yet\n"
    for call in (["history", "digist"], ["history", "digist", "--json"], ["status", "digist"]):
        said = idle.fails("rollout", *call)
        assert "'digist'" in said
        assert said.endswith("served: digits")
    gone = f"http://127.0.0.1:{free_port()}"
    for call in (["rollout", "status"], ["rollback", "m"], ["audit"], ["audit", "verify"]):
        assert f"no controller answers at {gone}" in idle.fails(*call, "--url", gone)
    assert "Missing option '--to'" in idle.fails("rollout", "start", "digits", code=2)
    assert "'other' is not served" in idle.fails("rollout", "start", "other", "--to", "2")
    assert "no version 9" in idle.fails("rollout", "start", "digits", "--to", "9")


def test_apply_says_that_it_starts_a_rollout(idle: Cli) -> None:
    file = idle.desk.home / "serving.yaml"
    model = "{version: 2, replicas: 2, rollout: fast}"
    file.write_text(f"home: {idle.desk.home}\nmodels: {{digits: {model}}}\n")
    call = ("apply", "-f", file, "--url", idle.desk.url)
    would = idle(*call, "--dry-run")
    assert "digits: this would start a rollout to version 2" in would
    assert idle.json("rollout", "list") == []
    said = idle(*call, "--no-wait", "--reason", "monday", SERVING_ACTOR="ci")
    assert "digits: this starts a rollout to version 2" in said
    assert "watch it: serving rollout watch digits" in said
    (started,) = idle.json("rollout", "list")
    assert (started["actor"], started["reason"]) == ("ci", "monday")


def test_watch_without_a_terminal_prints_a_line_a_change(cli: Cli) -> None:
    cli.desk.a_look = {"seconds": 5}
    lines = cli("rollout", "watch", "digits").splitlines()
    said = [line.split("digits: ", 1)[1] for line in lines]
    states = [line for line in said if " to version 2" in line or line.startswith("succeeded")]
    assert [state.split(" (")[0] for state in states] == [
        "observing, step 2 of 3, 25 % to version 2",
        "observing, step 3 of 3, 50 % to version 2",
        "baking, 100 % to version 2",
        "succeeded",
    ]
    assert any(line.startswith("slo_burn: ") and line.endswith(": passes") for line in said)
    assert len(said) == len(set(said))


def test_watch_of_a_bad_version_ends_with_1_and_says_why(cli: Cli) -> None:
    cli.desk.a_look = {"seconds": 3, "failing": 0.2}
    done = serving("rollout", "watch", "digits", home=cli.desk.home, env=cli.env)
    assert (done.returncode, done.stderr) == (1, "")
    assert "digits: errors: canary failed" in done.stdout
    assert "rolled back (errors: " in done.stdout.splitlines()[-1]
    assert done.stdout.splitlines()[-1].endswith(": fails)")


def watch(cli: Cli, *arguments: str) -> tuple[int, str, str]:
    """Exit code, what it printed last, and its errors."""
    done = serving("rollout", "watch", "digits", *arguments, home=cli.desk.home, env=cli.env)
    return done.returncode, done.stdout.splitlines()[-1], done.stderr


def test_watch_ends_in_a_state_that_it_is_to_wait_for(cli: Cli) -> None:
    cli("rollout", "pause", "digits")
    code, last, errors = watch(cli, "--until", "baking", "--until", "paused")
    assert (code, errors) == (0, "")
    assert "paused" in last
    cli("rollout", "resume", "digits")
    cli.desk.a_look = {"seconds": 3, "failing": 0.2}
    code, last, errors = watch(cli, "--until", "paused")
    assert (code, errors) == (1, "")
    assert "rolled back" in last
    assert watch(cli, "--until", "rolled_back")[0] == 0


def test_watch_gives_up_after_a_while(cli: Cli) -> None:
    """A rollout that waits for somebody would be followed for ever."""
    cli("rollout", "pause", "digits")
    code, last, errors = watch(cli, "--timeout", "0.1s")
    assert code == 124
    assert "paused" in last
    assert errors == (
        "error: digits: not succeeded after 0.1 s but paused, and goes on; "
        "serving rollout watch digits shows it again\n"
    )
    errors = watch(cli, "--timeout", "0", "--until", "baking", "--until", "succeeded", "--json")[2]
    assert errors.startswith("error: digits: not baking or succeeded after 0 s but paused")


def test_watch_wants_a_duration_and_a_state(cli: Cli) -> None:
    line = cli.fails("rollout", "watch", "digits", "--timeout", "soon", code=2)
    assert "'soon' is no duration; allowed: seconds, or a text like" in line
    line = cli.fails("rollout", "watch", "digits", "--until", "done", code=2)
    assert "'done' is not one of" in line


def test_watch_as_json_is_a_document_a_change(cli: Cli) -> None:
    cli.desk.a_look = {"seconds": 5}
    documents = [
        json.loads(line) for line in cli("rollout", "watch", "digits", "--json").splitlines()
    ]
    assert documents[-1]["state"] == "succeeded"
    assert {"arms", "next", "verdicts"} <= documents[0].keys()


def test_watch_waits_for_a_controller_that_is_away(cli: Cli) -> None:
    watching = Terminal(cli, "rollout", "watch", "digits")
    watching.read_until("observing, step 1 of 3")
    cli.desk.away = 2
    watching.read_until("the controller does not answer")
    cli.desk.a_look = {"seconds": 5}
    assert watching.wait() == 0
    assert "succeeded" in watching.output


def test_on_a_terminal_it_is_live_to_the_end(cli: Cli) -> None:
    terminal = Terminal(cli, "rollout", "watch", "digits")
    terminal.read_until("observing, step 1 of 3")
    terminal.read_until("of 10^2.5")
    terminal.read_until("$/1000")
    cli.desk.a_look = {"seconds": 5}
    terminal.read_until("50 % to version 2")
    assert terminal.wait() == 0, terminal.output
    assert "succeeded" in terminal.output
    assert "a rollback to it is immediate" in terminal.output


def test_ctrl_c_ends_the_view_and_not_the_rollout(cli: Cli) -> None:
    terminal = Terminal(cli, "rollout", "watch", "digits")
    terminal.read_until("observing, step 1 of 3")
    terminal.press_ctrl_c()
    assert terminal.wait() == 130
    assert "the rollout goes on; serving rollout watch digits shows it again" in terminal.output
    assert "error" not in terminal.output.split("the rollout goes on")[1]
    assert cli.desk.rollout.state == "observing"
