"""UnifiedReward against a server of our own that answers well, badly, late, or not at all."""

import base64
import contextlib
import io
import json
import math
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from mogb_diffusion import config
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import _http, load
from mogb_diffusion.rewards._http import Client, RemoteError
from mogb_diffusion.scoring import Scorer

PIL = pytest.importorskip("PIL.Image")


class Judge(BaseHTTPRequestHandler):
    """Answers as the text of the prompt says: ``say 4``, ``garbage``, ``busy twice``, ...; keeps what it was asked."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        text = asked["messages"][0]["content"][1]["text"]
        caption = text.rsplit("[", 1)[1].rstrip("]")
        with server.lock:
            server.asked.append((self.path, dict(self.headers), asked, time.monotonic()))
            server.seen[caption] += 1
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            self.answer(caption, server.seen[caption])
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, caption, time_of_asking):
        if caption.startswith("say"):
            time.sleep(0.02)
            self.reply(200, {"choices": [{"message": {"content": caption.removeprefix("say ").replace("@", "\n")}}]})
        elif caption == "busy twice" and time_of_asking <= 2:
            self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
        elif caption == "wait" and time_of_asking == 1:
            self.reply(503, {"error": "later"}, {"Retry-After": "1"})
        elif caption == "broken":
            self.reply(500, {"error": "no memory"})
        elif caption == "forbidden":
            self.reply(401, {"error": {"message": "wrong key"}})
        elif caption == "moved":
            self.reply(302, {}, {"Location": "http://127.0.0.1:1/elsewhere"})
        elif caption == "slow":
            self.server.leave.wait(5)
        elif caption == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(40):
                if self.server.leave.wait(0.05):
                    break
                self.wfile.write(b" ")
        elif caption == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
        elif caption == "garbage":
            self.raw(200, b"<html>")
        elif caption == "other":
            self.reply(200, {"choices": []})
        elif caption == "parts":
            self.reply(200, {"choices": [{"message": {"content": [{"type": "text"}]}}]})
        else:
            self.reply(200, {"choices": [{"message": {"content": "Final Score: 4"}}]})

    def reply(self, status, payload, headers=None):
        self.raw(status, json.dumps(payload).encode(), headers)

    def raw(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the client has left
            super().handle()


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    made.daemon_threads = True
    made.asked, made.seen, made.lock = [], Counter(), threading.Lock()
    made.busy = made.busiest = 0
    made.leave = threading.Event()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.leave.set()
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_PAUSE", 0.01)


def made(server, **options):
    return load("unifiedreward", url=f"http://127.0.0.1:{server.server_address[1]}/v1", **{"timeout": 5.0} | options)


def score(reward, *captions):
    return reward(torch.rand(len(captions), 3, 8, 8), [Prompt(caption) for caption in captions]).tolist()


def test_points_are_read_off_and_divided_by_five(server):
    found = score(
        made(server), "say Final Score: 4", "say well. Final Score:@ 3.25.", "say Final Score: 5 Final Score: 1"
    )
    assert found == pytest.approx([0.8, 0.65, 1.0])


def test_what_is_asked_is_what_the_reference_asks(server, monkeypatch):
    monkeypatch.setenv("UNIFIEDREWARD_KEY", "secret")
    picture = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    made(server)(picture, [Prompt("a dog")])
    path, headers, asked, _ = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (asked["model"], asked["temperature"]) == ("UnifiedReward-7b-v1.5", 0)
    image, text = asked["messages"][0]["content"]
    assert text["text"].startswith("<image>\nYou are given a text caption and a generated image")
    assert text["text"].endswith("assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\n"
                                 "Text Caption: [a dog]")  # fmt: skip
    prefix, data = image["image_url"]["url"].split(",")
    assert prefix == "data:image/png;base64"
    sent = PIL.open(io.BytesIO(base64.b64decode(data)))
    eight = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(sent), np.asarray(PIL.fromarray(eight).resize((512, 512))))


def test_answers_without_points_are_nan_and_counted(server):
    reward = made(server)
    captions = ["say 4", "garbage", "other", "parts", "fine", "say Final Score: 7", "say Final"]
    found = score(reward, *captions)
    assert [math.isnan(number) for number in found] == [True, True, True, True, False, True, True]
    assert reward.counts["unread"] == 6
    assert reward.counts["requests"] == 7  # the same question would get the same answer: none is asked again


def test_busy_servers_are_asked_again(server):
    reward = made(server)
    assert score(reward, "busy twice") == pytest.approx([0.8])
    assert (reward.counts["requests"], reward.counts["retries"]) == (3, 2)


def test_retry_after_is_heeded(server):
    assert score(made(server), "wait") == pytest.approx([0.8])
    (_, _, _, first), (_, _, _, second) = server.asked
    assert second - first >= 1


@pytest.mark.parametrize(
    ("caption", "kind", "requests"),
    [("broken", "status", 3), ("forbidden", "status", 1), ("moved", "status", 1), ("half", "connection", 3)],
)
def test_what_fails_costs_its_own_picture_alone(server, caption, kind, requests):
    reward = made(server, retries=2)
    found = score(reward, "fine", caption, "fine")
    assert found[0] == found[2] == pytest.approx(0.8)
    assert math.isnan(found[1])
    assert reward.counts == {"requests": requests + 2, **({"retries": requests - 1} if requests > 1 else {}),
                             f"failed {kind}": 1}  # fmt: skip


@pytest.mark.parametrize("caption", ["slow", "drip"])
def test_slow_answers_are_given_up(server, caption):
    reward = made(server, retries=0, timeout=0.3)
    begun = time.monotonic()
    found = score(reward, caption, "fine")
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.8)
    assert time.monotonic() - begun < 2
    assert reward.counts["failed timeout"] == 1


def test_if_everything_fails_the_call_fails_and_says_why(server):
    with pytest.raises(RemoteError, match="answered 401: wrong key") as caught:
        score(made(server), "forbidden", "forbidden")
    assert caught.value.status == 401
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    reward = load("unifiedreward", url=url, retries=1)
    with pytest.raises(RemoteError, match=r"cannot be reached.*refused"):
        score(reward, "fine")
    assert reward.counts == {"requests": 2, "retries": 1, "failed connection": 1}


def test_requests_are_many_at_once_but_not_too_many(server):
    found = score(made(server, concurrency=4), *["say Final Score: 3"] * 24)
    assert found == pytest.approx([0.6] * 24)
    assert 2 <= server.busiest <= 4


def test_several_scores_and_another_scale(server):
    pattern = r"(?:Alignment|Coherence|Style) Score \(1-5\):\s*([0-9.]+)"
    reward = made(server, pattern=pattern, matches=3, low=1.0)
    all_three = "say Alignment Score (1-5): 4 Coherence Score (1-5): 3.5 Style Score (1-5): 3"
    found = score(reward, all_three, "say Alignment Score (1-5): 4", "say " + " ".join(["Style Score (1-5): 9"] * 3))
    assert found[0] == pytest.approx((3.5 - 1) / 4)
    assert math.isnan(found[1])
    assert found[2] == 1  # clamped


def test_a_caption_with_braces_is_left_as_it_is(server):
    score(made(server, template="{prompt} {x} [{prompt}]"), "say {0} Final Score: 2")
    assert server.asked[0][2]["messages"][0]["content"][1]["text"].startswith("say {0} Final Score: 2 {x} [say")


def test_the_scorer_counts_what_is_nan(server):
    scorer = Scorer({"judge": made(server, size=None)}, config.Scoring())
    scorer.submit(torch.rand(3, 3, 8, 8), [Prompt("fine"), Prompt("garbage"), Prompt("fine")])
    values = scorer.collect()
    scorer.close()
    assert values.isnan().tolist() == [[False, True, False]]
    assert scorer.counts["judge"]["nan"] == 1


def test_pauses_grow_with_jitter_from_a_generator_of_its_own():
    first, again, other = (Client("http://127.0.0.1:1", seed=seed) for seed in (0, 0, 1))
    pauses = [[client._pause(attempt) for attempt in range(12)] for client in (first, again, other)]
    assert pauses[0] == pauses[1] != pauses[2]
    for attempt, pause in enumerate(pauses[0]):
        longest = min(_http.FIRST_PAUSE * 2**attempt, _http.LONGEST_PAUSE)
        assert longest / 2 <= pause <= longest


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("3", 3, 3), ("-3", 0, 0), (None, 0, 0), ("soon", 0, 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
     ("Fri, 01 Jan 2500 00:00:00 GMT", 1e9, 1e12)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value, low, high):
    assert low <= _http._retry_after(value) <= high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x"}, "url must be http://HOST:PORT"),
        ({"template": "no place"}, r"template must hold \{prompt\}"),
        ({"pattern": "("}, "is none"),
        ({"pattern": r"\d"}, "must have one group.*has 0"),
        ({"matches": 0}, "matches must be a positive"),
        ({"concurrency": True}, "concurrency must be a positive"),
        ({"size": -1}, "size must be a positive"),
        ({"timeout": 0}, "timeout must be a finite number > 0"),
        ({"retries": -1}, "retries must be a whole number"),
        ({"high": 0.0}, "high must be a finite number > 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        load("unifiedreward", **options)
