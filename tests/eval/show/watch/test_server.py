"""The page that follows: for this machine alone, with what is new and nothing else."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
from report_folders import monitor_line

from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.watch.server import Watch, hosts_of


@pytest.fixture
def log(tmp_path):
    return tmp_path / "<img src=x onerror=window.hacked=1>.jsonl"


@pytest.fixture
def server(log):
    with Watch(log) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield made
        made.shutdown()


def get(server, path: str, host: str | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_only_who_knows_the_address_on_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 43
    path = f"/{server.token}/"
    answer, body = get(server, path)
    assert answer.status == 200 and b"Watching" in body and b"<img" not in body
    policy = answer.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert get(server, path, host)[0].status == 403, host
    assert get(server, path, f"localhost:{server.server_port}")[0].status == 200
    for other in (
        "/",
        "/data?era=0&since=0",
        f"/{server.token[:-1]}/",
        f"/{server.token}x/data?era=0&since=0",
        "/../etc/passwd",
    ):
        answer, body = get(server, other)
        assert answer.status == 404 and server.token.encode() not in body
    assert get(server, f"{path}other")[0].status == 404 and get(server, f"{path}data?since=x")[0].status == 400


def test_a_target_that_is_no_address_is_answered(server, capfd):
    host = f"127.0.0.1:{server.server_port}"
    for target in ("http://[", "http://[x]/", "http://[::1/"):
        assert get(server, target, host)[0].status == 400, target
    assert get(server, f"http://{host}/{server.token}/", host)[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_browser_leaves_out_the_port_that_is_usual():
    assert hosts_of(8000) == {"127.0.0.1:8000", "localhost:8000"}
    assert hosts_of(80) == {"127.0.0.1:80", "localhost:80", "127.0.0.1", "localhost"}


def test_two_thousand_reports_are_all_counted(server, log):
    """In bursts, with halves of lines between; a poll gets what is new, once."""
    text = "".join(monitor_line(k, 2000) for k in range(2000))
    since, numbers, cuts = 0, [], range(0, len(text) + 1, 9973)
    for start in cuts:
        with log.open("a") as file:
            file.write(text[start : start + 9973])
        _, body = get(server, f"/{server.token}/data?era=0&since={since}")
        news = json.loads(body)
        numbers += [x for x, _ in news["points"]]
        since = news["number"]
    assert since == news["count"] == 2000 and numbers == [256 * (k + 1) for k in range(2000)]
    assert news["verdict"][1].startswith("Of 2000 reports: 667 ok, 667 warning, 666 collapsed")
    log.write_text(monitor_line(0))
    news = json.loads(get(server, f"/{server.token}/data?era=0&since={since}")[1])
    assert news["era"] == 1 and news["fresh"] and len(news["points"]) == news["count"] == 1


def test_a_port_that_is_taken_is_one_line(server, log):
    with pytest.raises(InputError, match=f"cannot listen on port {server.server_port}"):
        Watch(log, server.server_port)


def test_the_page_follows_in_the_browser(server, log, visit):
    """Reports that come while it is open are drawn and counted, switches stay as set, nothing else is asked for."""
    log.write_text("".join(monitor_line(k) for k in range(10)))
    seen = visit()
    tab = seen.open(server.url)
    tab.wait_for_function("() => document.querySelector('dl').textContent.includes('rows10')", timeout=60_000)
    tab.locator("#f0 input[type=checkbox]").first.focus()
    tab.keyboard.press("Space")
    with log.open("a") as file:
        file.writelines(monitor_line(k) for k in range(10, 120))
    tab.wait_for_function(
        "() => document.querySelector('.verdict').textContent.includes('Of 120 reports')", timeout=60_000
    )
    assert tab.locator("#status").inner_text() == "collapsed"
    assert tab.locator(".table tbody tr").count() == 2
    assert "at 30,720" in tab.locator("#f0-words").inner_text()
    assert tab.evaluate("document.getElementById('f0-plot').data[0].x.length") == 120
    assert seen.shown("f0")[0] is False, "the switch is as it was set"
    tab.locator("#f1 details summary").click()
    tab.locator("#f1 details tbody tr").nth(119).wait_for()
    base = server.url.rstrip("/")
    assert all(url.startswith(base) for url in seen.requests) and not seen.errors
    assert tab.evaluate("window.hacked") is None and tab.locator("img").count() == 0
    assert tab.locator("h1").inner_text() == f"Watching {log.name}"


def test_a_ratio_that_is_not_finite_is_drawn_at_the_top(server, log, visit):
    infinite = json.dumps(json.loads(monitor_line(119)) | {"worst": None})
    log.write_text("".join([*(monitor_line(k) for k in range(100)), infinite, "\n"]))
    seen = visit()
    tab = seen.open(server.url)
    tab.wait_for_function("() => document.querySelector('dl').textContent.includes('rows101')", timeout=60_000)
    line, mark = (tab.evaluate(f"document.getElementById('f0-plot').data[{i}]") for i in (0, 3))
    assert line["y"][-1] is None and mark["y"][-1] > max(line["y"][:-1]) and mark["customdata"][-1] == "not finite"
    assert "collapsed: not finite at 30,720" in tab.locator("#f0-words").inner_text() and not seen.errors


def test_a_training_run_is_followed(tmp_path, visit):
    (tmp_path / "log.csv").write_text("step,tokens,loss,passkey_loss,lr,grad_norm\n1,9,4.5,3,0.1,1\n2,18,4.0,2,0.1,1\n")
    with Watch(tmp_path) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        tab = visit("dark", 390).open(server.url)
        tab.wait_for_function(
            "() => document.querySelector('.verdict').textContent.includes('4.250 nats')", timeout=60_000
        )
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        server.shutdown()


def test_a_browser_that_goes_away_is_no_error(server, capsys):
    for error in (BrokenPipeError(), ConnectionResetError(), RuntimeError("seen")):
        try:
            raise error
        except Exception:
            server.handle_error(None, ("127.0.0.1", 1))
    shown = capsys.readouterr().err
    assert "seen" in shown and "BrokenPipe" not in shown and "ConnectionReset" not in shown


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_control_c_ends_it_with_one_line(as_json, quiet, log):
    """Where a document is asked for, the address is on stderr; without it there is no page, so --quiet leaves it."""
    log.write_text(monitor_line(0))
    command = [sys.executable, "-u", "-m", "rnn_longctx.cli", "watch", str(log)]
    command += ["--json"] * as_json + ["--quiet"] * quiet

    def listen():  # a process that a shell began in the background would not hear it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE if as_json else subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, preexec_fn=listen, **pipes) as process:
        try:
            timer = threading.Timer(120, process.kill)  # so that a watch that says nothing ends
            timer.start()
            first = (process.stderr if as_json else process.stdout).readline()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}/ \(Ctrl-C ends it\)\n", first)
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=120)
        finally:
            timer.cancel()
            process.kill()
    rest = said if as_json else out
    assert not as_json or json.loads(out)["tables"] == {}
    assert process.returncode == 0 and rest.strip() == ("" if quiet else f"ended; 0 rows of {log} were read")
