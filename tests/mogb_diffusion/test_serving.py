"""Rewards over HTTP: the numbers of a local call, batches, limits, and clients that mean no good."""

import base64
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mogb_diffusion import config
from mogb_diffusion.cli import main
from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import Prompt
from mogb_diffusion.rewards import _http, load
from mogb_diffusion.rewards._http import RemoteError, as_png
from mogb_diffusion.rewards.throughput import examples, measure
from mogb_diffusion.scoring import Scorer
from mogb_diffusion.serving import Batcher, Limits, RequestError, RewardServer, Settings
from mogb_diffusion.serving.messages import decode_png, parse_json
from mogb_diffusion.world.captions import sample_prompts

pytest.importorskip("PIL")
sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import _hostile

TOKEN = "a-token-of-tests-only"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("MOGB_REWARD_TOKEN", raising=False)


def brightness(images, prompts):
    return images.double().mean((1, 2, 3))


class Recorder:
    """Brightness; keeps the sizes of its batches, takes its time, and fails where the prompt says so."""

    def __init__(self, seconds=0.0):
        self.batches, self.seconds = [], seconds
        self.go = threading.Event()
        self.go.set()

    def __call__(self, images, prompts):
        self.batches.append(len(prompts))
        self.go.wait(10)
        time.sleep(self.seconds)
        for prompt in prompts:
            if prompt.text == "burst":
                raise MemoryError("no room")
            if prompt.text == "refuse":
                raise ValueError("no such thing")
        return brightness(images, prompts)


class Picky(Recorder):
    specialist = True

    def applies(self, prompt):
        return prompt.text.startswith("a")


def pictures(count, side=8, seed=0):
    numbers = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return numbers.to(torch.uint8)


def serving(reward, name="test", settings=None, **options):
    return RewardServer(reward, name, settings=settings, **options)


def ask(server, path="/score", payload=None, method=None, headers=None):
    """Status, payload and headers of one plain request."""
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    body = None if payload is None else json.dumps(payload)
    headers = {"Content-Type": "application/json"} | (headers or {})
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    answer = connection.getresponse()
    result = answer.status, json.loads(answer.read()), answer.headers
    connection.close()
    return result


def items(images, prompts):
    return {
        "items": [
            {"png": base64.b64encode(as_png(image)).decode(), "text": prompt.text, "metadata": prompt.metadata}
            for image, prompt in zip(images, prompts, strict=True)
        ]
    }


class TestNumbers:
    @pytest.mark.parametrize("name", ["world_preference", "world_alignment", "world_text", "world_composition"])
    def test_they_are_exactly_those_of_a_local_call(self, name):
        reward = load(name)
        prompts = sample_prompts(12, torch.Generator().manual_seed(0))
        images = examples(prompts, 16).mul(255).round().to(torch.uint8)
        with serving(reward, name) as server:
            remote = load("remote", url=server.url, batch=5)
            assert (remote.name, remote.specialist) == (name, reward.specialist)
            assert [remote.applies(prompt) for prompt in prompts] == [reward.applies(prompt) for prompt in prompts]
            local = reward(images.float() / 255, prompts).double()
            for given in (images, images.float() / 255):
                assert torch.equal(remote(given, prompts).nan_to_num(-9), local.nan_to_num(-9))
        assert local.isfinite().any()

    def test_floats_are_rounded_to_8_bits(self):
        images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        prompts = [Prompt("a")] * 3
        with serving(brightness) as server:
            found = load("remote", url=server.url)(images, prompts)
        assert torch.equal(found, brightness((images * 255).round() / 255, prompts))
        assert not torch.equal(found, brightness(images, prompts))

    def test_a_reward_without_applies_has_none_here(self):
        with serving(brightness) as server:
            assert not hasattr(load("remote", url=server.url), "applies")

    def test_what_a_prompt_says_arrives(self):
        seen = []

        def reward(images, prompts):
            seen.extend(prompts)
            return torch.zeros(len(prompts))

        prompt = Prompt(
            'a é\n"x" 文', metadata={"include": [{"class": "dog", "count": 1}], "tag": "x"}, target_text="x"
        )
        with serving(reward) as server:
            load("remote", url=server.url)(pictures(2), [prompt, Prompt("b", rewards=("other",))])
        assert seen == [prompt, Prompt("b")]
        assert seen[0].metadata == prompt.metadata

    def test_what_is_not_finite_is_null_and_nan(self):
        def reward(images, prompts):
            return torch.tensor([float("nan"), float("inf"), 0.1 + 0.2])

        with serving(reward) as server:
            assert ask(server, payload=items(pictures(3), [Prompt("a")] * 3))[1] == {
                "rewards": [None, None, 0.30000001192092896]
            }
            found = load("remote", url=server.url)(pictures(3), [Prompt("a")] * 3)
        assert found.isnan().tolist() == [True, True, False]

    def test_pictures_of_many_sizes_in_one_request(self):
        first, second = pictures(2, 8), pictures(2, 12, seed=1)
        given = [first[0], second[0], first[1], second[1]]
        with serving(brightness) as server:
            status, answer, _ = ask(server, payload=items(given, [Prompt("a")] * 4))
        assert status == 200
        assert answer["rewards"] == [float(brightness(image[None].float() / 255, 0)) for image in given]

    def test_large_calls_are_split_by_the_limits_of_the_server(self):
        reward = Recorder()
        settings = Settings(limits=Limits(pictures=7, pixels=4 * 64))
        with serving(reward, settings=settings) as server:
            remote = load("remote", url=server.url, batch=50)
            found = remote(pictures(10), [Prompt("a")] * 10)
            assert torch.equal(found, brightness(pictures(10) / 255, 0))
            assert remote.counts["requests"] == 4  # the question for /info, and 4 + 4 + 2 pictures
            with pytest.raises(InputError, match=r"400 pixels is larger than the server takes: 256"):
                remote(pictures(1, 20), [Prompt("a")])


class TestBatching:
    def test_requests_are_scored_together(self):
        reward = Recorder()
        reward.go.clear()
        with serving(reward, settings=Settings(batch=8)) as server, ThreadPoolExecutor(9) as pool:
            payloads = [items(pictures(2, seed=n), [Prompt("a")] * 2) for n in range(9)]
            answers = [pool.submit(ask, server, payload=payloads[0])]
            wait_for(lambda: reward.batches)
            answers += [pool.submit(ask, server, payload=payload) for payload in payloads[1:]]
            wait_for(lambda: server.batcher.waiting == 18)
            reward.go.set()
            for seed, answer in enumerate(answers):
                status, payload, _ = answer.result()
                assert status == 200
                assert payload["rewards"] == brightness(pictures(2, seed=seed) / 255, 0).tolist()
        assert reward.batches[0] == 2
        assert sum(reward.batches) == 18
        assert max(reward.batches) == 8

    def test_a_picture_that_fails_costs_the_others_nothing(self):
        reward = Recorder()
        reward.go.clear()
        texts = ["a", "burst", "a", "refuse", "a"]
        with serving(reward) as server, ThreadPoolExecutor(6) as pool:
            first = pool.submit(ask, server, payload=items(pictures(1), [Prompt("a")]))
            wait_for(lambda: reward.batches)
            answers = [pool.submit(ask, server, payload=items(pictures(1), [Prompt(text)])) for text in texts]
            wait_for(lambda: server.batcher.waiting == 6)
            reward.go.set()
            assert first.result()[0] == 200
            assert [answer.result()[0] for answer in answers] == [200, 500, 200, 422, 200]
            assert answers[1].result()[1]["error"] == {
                "code": "failed",
                "message": "The reward failed: MemoryError: no room",
            }
            assert "ValueError: no such thing" in answers[3].result()[1]["error"]["message"]

    def test_a_full_queue_says_when_to_come_again(self):
        reward = Recorder()
        reward.go.clear()
        with serving(reward, settings=Settings(queue=3)) as server, ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, server, payload=items(pictures(3), [Prompt("a")] * 3))
            wait_for(lambda: reward.batches)
            status, payload, headers = ask(server, payload=items(pictures(1), [Prompt("a")]))
            assert (status, payload["error"]["code"]) == (503, "busy")
            assert int(headers["Retry-After"]) >= 1
            assert ask(server, "/health")[1] == {"status": "ok", "waiting": 3}
            reward.go.set()
            assert first.result()[0] == 200
            assert ask(server, payload=items(pictures(1), [Prompt("a")]))[0] == 200

    def test_a_queue_that_is_shorter_than_a_request_is_advertised_and_too_many_are_refused_for_good(self):
        reward = Recorder()
        with serving(reward, settings=Settings(queue=3)) as server:
            assert ask(server, "/info")[1]["limits"]["pictures"] == 3
            status, payload, headers = ask(server, payload=items(pictures(4), [Prompt("a")] * 4))
            assert (status, payload["error"]["code"], headers["Retry-After"]) == (413, "too_many", None)
            remote = load("remote", url=server.url, batch=16, concurrency=1, retries=0)
            assert torch.equal(remote(pictures(7), [Prompt("a")] * 7), brightness(pictures(7) / 255, 0))
        assert reward.batches == [3, 3, 1]
        with pytest.raises(InputError, match="queue must be a positive whole number, but got 0"):
            Batcher(reward, queue=0)

    def test_a_reward_that_hangs_is_said_and_its_queue_is_cleared(self):
        reward = Recorder()
        reward.go.clear()
        with serving(reward, settings=Settings(reward_timeout=0.3)) as server:
            status, payload, _ = ask(server, payload=items(pictures(1), [Prompt("a")]))
            assert (status, payload["error"]["code"]) == (504, "too_slow")
            wait_for(lambda: server.batcher.busy_for > 0.3)
            status, payload, _ = ask(server, "/health")
            assert (status, payload["error"]["code"]) == (503, "stuck")
            assert ask(server, payload=items(pictures(1), [Prompt("a")]))[0] == 504
            assert (server.batcher.waiting, len(server.batcher._items)) == (0, 0)
            reward.go.set()
            wait_for(lambda: server.batcher.busy_for == 0)
            assert ask(server, payload=items(pictures(1), [Prompt("a")]))[0] == 200

    def test_a_wrong_number_of_rewards_is_a_failure(self):
        with serving(lambda images, prompts: torch.zeros(7)) as server:
            status, payload, _ = ask(server, payload=items(pictures(1), [Prompt("a")]))
        assert status == 500
        assert "gave [7] numbers for 1 pictures" in payload["error"]["message"]

    def test_where_it_does_not_apply_the_reward_is_not_asked(self):
        reward = Picky()
        with serving(reward) as server:
            remote = load("remote", url=server.url)
            prompts = [Prompt("a"), Prompt("b"), Prompt("a")]
            assert remote(pictures(3), prompts).isnan().tolist() == [False, True, False]
            assert remote(pictures(1), [Prompt("b")]).isnan().tolist() == [True]
            assert reward.batches == [2]
            before = remote.counts["requests"]
            assert [remote.applies(prompt) for prompt in prompts * 5] == [True, False, True] * 5
            assert remote.counts["requests"] == before + 2  # each prompt once


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


class TestClient:
    def test_it_waits_for_a_busy_server(self):
        reward = Recorder(seconds=0.02)
        with serving(reward, settings=Settings(queue=2, batch=2)) as server:
            remote = load("remote", url=server.url, batch=1, concurrency=8, retries=40)
            server.batcher.room = impatient(server.batcher.room)
            found = remote(pictures(16), [Prompt("a")] * 16)
            assert torch.equal(found, brightness(pictures(16) / 255, 0))
            assert remote.counts["retries"] > 0
            assert remote.counts["requests"] == 17 + remote.counts["retries"]

    def test_a_part_that_fails_is_nan_and_counted(self):
        with serving(Recorder()) as server:
            remote = load("remote", url=server.url, batch=1)
            found = remote(pictures(3), [Prompt("a"), Prompt("refuse"), Prompt("a")])
            assert found.isnan().tolist() == [False, True, False]
            assert remote.counts["failed status"] == 1
            scorer = Scorer({"far": remote}, config.Scoring())
            scorer.submit(pictures(2).float() / 255, [Prompt("a"), Prompt("refuse")])
            assert scorer.collect().isnan().tolist() == [[False, True]]
            assert scorer.counts["far"]["nan"] == 1
            scorer.close()

    def test_a_call_that_fails_as_a_whole_says_why(self):
        with serving(Recorder()) as server:
            remote = load("remote", url=server.url)
            with pytest.raises(RemoteError, match=r"answered 422: The reward refuses this: ValueError: no such thing"):
                remote(pictures(1), [Prompt("refuse")])

    def test_without_an_answer_it_applies_so_that_the_failure_is_counted(self):
        server = serving(Picky()).start()
        remote = load("remote", url=server.url, retries=0)
        server.close()
        assert remote.applies(Prompt("b"))
        with pytest.raises(RemoteError, match="cannot be reached"):
            remote(pictures(1), [Prompt("b")])

    def test_a_server_that_is_not_there_or_another_one_is_said(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot be used.*Is serve-reward running there\?"):
            load("remote", url=url, retries=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"url": "127.0.0.1:80"}, "url must be http"),
            ({"url": "http://127.0.0.1:1", "batch": 0}, "batch must be a positive"),
            ({"url": "http://127.0.0.1:1", "concurrency": 0}, "concurrency must be a positive"),
            ({"url": "http://127.0.0.1:1", "token": "x", "token_file": "y"}, "not both"),
            ({"url": "http://127.0.0.1:1", "token_file": "/nowhere"}, "cannot be read"),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(InputError, match=message):
            load("remote", **options)

    def test_its_throughput_can_be_measured(self):
        with serving(brightness) as server:
            found = measure(load("remote", url=server.url), pictures=2)
        assert found.scores.shape == (2,)
        assert found.pictures_per_second > 0


def impatient(room):
    """Refuses as ever, but asks to be called again at once."""

    def wrapped(count):
        try:
            context = room(count)
            context.__enter__()
        except RequestError as error:
            raise RequestError(error.status, error.code, str(error), {"Retry-After": "0"}) from None

        class Held:
            def __enter__(self):
                return None

            def __exit__(self, *exception):
                return context.__exit__(*exception)

        return Held()

    return wrapped


class TestToken:
    def test_it_is_needed_for_everything_but_health(self, tmp_path, monkeypatch):
        (tmp_path / "token").write_text(TOKEN + "\n")
        with serving(brightness, token=TOKEN) as server:
            assert ask(server, "/health")[0] == 200
            assert ask(server, "/info")[0] == 401
            status, payload, headers = ask(server, payload={}, headers={"Authorization": "Bearer wrong"})
            assert (status, payload["error"]["code"], headers["WWW-Authenticate"]) == (401, "bad_token", "Bearer")
            for options in ({"token": TOKEN}, {"token_file": str(tmp_path / "token")}):
                assert load("remote", url=server.url, **options)(pictures(1), [Prompt("a")]).isfinite()
            with pytest.raises(InputError, match="answered 401: The token is missing or wrong"):
                load("remote", url=server.url)
            monkeypatch.setenv("MOGB_REWARD_TOKEN", TOKEN)
            assert load("remote", url=server.url)(pictures(1), [Prompt("a")]).isfinite()

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
    def test_without_one_the_server_stays_on_this_machine(self, host):
        with pytest.raises(InputError, match="can be reached from other machines: that needs a token"):
            serving(brightness, host=host)

    def test_with_one_it_may_listen_elsewhere(self):
        with serving(brightness, host="0.0.0.0", token=TOKEN) as server:
            url = server.url.replace("0.0.0.0", "127.0.0.1")
            assert load("remote", url=url, token=TOKEN).name == "test"

    @pytest.mark.parametrize("token", ["short", "with a space in it ...", "ünïcödé-and-long-enough"])
    def test_one_that_is_no_token_is_refused(self, token):
        with pytest.raises(InputError, match="The token must have at least 16"):
            serving(brightness, token=token)

    def test_one_of_digits_alone_may_be_a_number_to_yaml(self):
        with serving(brightness, token="1234567890123456") as server:
            assert load("remote", url=server.url, token=1234567890123456).name == "test"

    def test_a_port_that_is_taken_is_said(self):
        with serving(brightness) as server:
            port = int(server.url.rsplit(":", 1)[1])
            with pytest.raises(InputError, match="cannot be listened on"):
                serving(brightness, port=port)


class TestPages:
    """What a page in a browser on this machine may send: it chooses its own name, but not the headers about it."""

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:99", "[::1]:8600", "[::1]", "LocalHost:1"])
    def test_this_machine_may_ask(self, host):
        with serving(brightness) as server:
            assert ask(server, "/info", headers={"Host": host})[0] == 200
            assert ask(server, "/info", headers={"Host": host, "Origin": f"http://{host}"})[0] == 200

    @pytest.mark.parametrize(
        "host", ["rebound.example:8600", "", "127.0.0.1.rebound.example", "localhost@rebound.example", "[::1", "[::2]"]
    )
    def test_a_name_that_points_here_is_refused(self, host):
        reward = Recorder()
        with serving(reward) as server:
            for path, payload in (("/score", items(pictures(1), [Prompt("a")])), ("/info", None), ("/health", None)):
                status, answer, _ = ask(server, path, payload, headers={"Host": host})
                assert (status, answer["error"]["code"]) == (403, "bad_host")
        assert reward.batches == []

    @pytest.mark.parametrize(
        "origin", ["http://rebound.example", "null", "", "file://localhost", "http://localhost.io"]
    )
    def test_another_origin_is_refused(self, origin):
        reward = Recorder()
        with serving(reward) as server:
            payload = items(pictures(1), [Prompt("a")])
            status, answer, _ = ask(server, payload=payload, headers={"Origin": origin})
            assert (status, answer["error"]["code"]) == (403, "bad_origin")
        assert reward.batches == []

    def test_two_names_are_refused_and_none(self):
        with serving(brightness) as server:
            for head in (b"", b"Host: localhost\r\nHost: rebound.example\r\n"):
                request = b"GET /info HTTP/1.1\r\n" + head + b"\r\n"
                assert send(server.url, _hostile.Hostile("names", request, (403,)))[0] == 403

    def test_with_a_token_names_do_not_count(self):
        headers = {"Host": "rewards.example", "Origin": "null", "Authorization": f"Bearer {TOKEN}"}
        with serving(brightness, token=TOKEN) as server:
            assert ask(server, "/info", headers=headers)[0] == 200

    def test_the_address_it_listens_on_is_its_own(self):
        with serving(brightness, host="127.0.0.2") as server:
            assert load("remote", url=server.url, retries=0).name == "test"
            assert ask(server, "/info", headers={"Host": "127.0.0.3"})[0] == 403


class TestSecrets:
    """``load`` tells what it was given, but not its secrets."""

    @pytest.mark.parametrize(
        ("options", "shown"),
        [
            ({"token": "s3cr3t-of-mine", "retries": 0}, "'token': '***', 'retries': 0}"),
            ({"retries": -1, "apiKey": "s3cr3t", "api_keys": ["s3cr3t"], "PASSWORD": 53}, "'PASSWORD': '***'}"),
            ({"deep": [{"secret": {"a": "s3cr3t"}}], "token_file": "file.txt"}, "'token_file': 'file.txt'}"),
            ({"token": "s3cr3t\nmine", "retries": 0}, "'token': '***', 'retries': 0}"),
            ({"token": None, "tokenizer": "words"}, "'token': None, 'tokenizer': 'words'}"),
        ],
    )
    def test_options_that_hold_them_are_hidden(self, options, shown):
        with pytest.raises(InputError, match="cannot be made with") as caught:
            load("remote", url="http://127.0.0.1:1", **options)
        assert shown in str(caught.value)
        assert "s3cr3t" not in str(caught.value)
        assert "53" not in str(caught.value)

    @pytest.mark.parametrize("url", ["http://me:s3cr3t@127.0.0.1:1", "me:s3cr3t@127.0.0.1"])
    def test_a_login_in_a_url_is_hidden(self, url):
        with pytest.raises(InputError, match="url must hold no name and no password") as caught:
            load("remote", url=url, retries=0)
        assert "s3cr3t" not in str(caught.value)

    def test_a_reward_that_quotes_one_is_not_quoted(self):
        with pytest.raises(InputError, match=r"\*\*\*.* is no key") as caught:
            load(f"{__name__}:Quoting", key="s3cr3t of  mine")
        assert "s3cr3t" not in str(caught.value)

    def test_a_function_that_takes_none_does_not_tell_them(self):
        with pytest.raises(InputError, match=r"takes no options, but got \{'token': '\*\*\*'\}"):
            load(f"{__name__}:brightness", token="s3cr3t")

    @pytest.mark.parametrize("option", ["token:s3cr3t", 'token="s3cr3t', "token=s3cr3t"])
    def test_the_command_does_not_print_them(self, option, capsys):
        arguments = ["--option", "url=http://127.0.0.1:1", "--option", "retries=0", "--option", option]
        assert main(["serve-reward", "remote", *arguments]) == 2
        told = capsys.readouterr()
        assert "s3cr3t" not in told.out + told.err
        assert "--option" in told.err or "'token': '***'" in told.err


class Quoting:
    def __init__(self, key):
        raise ValueError(f"{key!r} is no key")


def send(url, case, seconds=10.0):
    """The status of the answer to these bytes; 0 for a closed connection."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        try:
            connection.sendall(case.request)
            if not case.hold:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has seen enough, and may have answered
        said = b""
        try:
            while part := connection.recv(65536):
                said += part
        except ConnectionError:
            pass
    if not said.startswith(b"HTTP/"):
        return 0 if not said else 400, said  # to what is no HTTP/1, without a head
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize("token", [TOKEN, pytest.param(None, marks=pytest.mark.slow)])
def test_hostile_requests_get_errors_and_nothing_else(tmp_path, token):
    trace = tmp_path / "executed"
    settings = Settings(header_timeout=1.0, body_timeout=1.0)
    with serving(load("world_alignment"), "world_alignment", settings=settings, token=token) as server:
        remote = load("remote", url=server.url, token=token)
        images, prompts = pictures(2, 16), [Prompt("x", target_text="A")] * 2
        before = remote(images, prompts)
        wrong, answered = [], 0
        for case in _hostile.hostile_requests(trace, token):
            status, body = send(server.url, case)
            if status not in case.statuses:
                wrong.append((case.name, status, body[:200]))
                continue
            assert status in (0, 200) or "error" in json.loads(body), case.name
            assert b"Traceback" not in body
            answered += 1
        assert not wrong
        assert answered >= 60
        assert not trace.exists()
        assert server.batcher.waiting == 0
        assert torch.equal(remote(images, prompts), before)
        wait_for(lambda: server.working == 0)


def test_32_clients_among_hostile_ones_lose_nothing(tmp_path):
    over, trace = threading.Event(), tmp_path / "executed"
    cases = [case for case in _hostile.hostile_requests(trace) if len(case.request) < 2**20]
    reward = Recorder(seconds=0.005)
    with serving(reward, settings=Settings(header_timeout=1.0, body_timeout=1.0)) as server:

        def attack(first):
            for number in range(first, 10**6, 4):
                if over.is_set():
                    return
                send(server.url, cases[number % len(cases)])

        def work(number):
            remote = load("remote", url=server.url, retries=20)
            given = pictures(3, 16, seed=number)
            truth = brightness(given / 255, 0)
            return all(torch.equal(remote(given, [Prompt("a")] * 3), truth) for _ in range(3))

        with ThreadPoolExecutor(36) as pool:
            attacks = [pool.submit(attack, first) for first in range(4)]
            try:
                answers = [answer.result() for answer in [pool.submit(work, number) for number in range(32)]]
            finally:
                over.set()
            for ended in attacks:
                ended.result()
        assert answers == [True] * 32
        assert server.counts["200"] >= 32 * 4
        assert sum(number for status, number in server.counts.items() if status[0] == "4") > 10
        assert max(reward.batches) > 3  # requests of several clients together
    assert not trace.exists()


def test_the_pickle_of_the_hostile_client_would_execute(tmp_path):
    import pickle

    pickle.loads(pickle.dumps(_hostile.Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_clients_that_drip_are_given_up_and_others_go_on():
    settings = Settings(header_timeout=0.4, body_timeout=0.4, connections=8)
    with serving(brightness, settings=settings) as server:
        host, port = server.url.removeprefix("http://").rsplit(":", 1)
        slow = [socket.create_connection((host, int(port)), timeout=5) for _ in range(8)]
        for connection in slow:
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            )
        wait_for(lambda: server.working == 8)
        begun = time.monotonic()
        remote = load("remote", url=server.url, retries=50)  # it is refused until one of the slow ones is given up
        assert remote(pictures(1), [Prompt("a")]).isfinite()
        assert server.counts["refused"] >= 1
        assert time.monotonic() - begun < 5
        statuses = [connection.recv(12) for connection in slow]
        assert statuses == [b"HTTP/1.1 408"] * 8
        for connection in slow:
            connection.close()


def test_a_large_body_that_is_refused_still_gets_its_answer():
    with serving(brightness, settings=Settings(limits=Limits(body=1000))) as server:
        remote = load("remote", url=server.url, retries=0)
        with pytest.raises(RemoteError, match="answered 413"):
            remote(pictures(16, 256), [Prompt("a")] * 16)  # megabytes, so that they are still being sent


class TestMessages:
    @pytest.mark.parametrize("color", [0, 2])
    def test_png_of_grey_and_colour(self, color):
        width = 3 if color == 2 else 1
        rows = b"".join(b"\x00" + bytes(range(10 * n, 10 * n + 5 * width)) for n in range(4))
        decoded = decode_png(_hostile.png(5, 4, rows=rows, color=color))
        assert decoded.shape == (3, 4, 5)
        assert decoded[:, 1, 2].tolist() == ([16, 17, 18] if color == 2 else [12, 12, 12])

    def test_what_goes_in_comes_out(self):
        picture = pictures(1, 33)[0]
        assert torch.equal(decode_png(as_png(picture)), picture)

    def test_comments_are_not_looked_at(self):
        broken = _hostile.chunk(b"zTXt", b"x\x00\x00 this is no zlib")
        assert torch.equal(decode_png(_hostile.png(4, 4, extra=broken)), torch.zeros(3, 4, 4, dtype=torch.uint8))

    @pytest.mark.parametrize("text", ["9" * 65, "-" + "9" * 65, "0." + "1" * 65, "1e400", "Infinity", "NaN"])
    def test_numbers_beyond_reason_are_refused(self, text):
        with pytest.raises(RequestError, match="The body is no JSON"):
            parse_json(f'{{"a": {text}}}'.encode())

    @pytest.mark.parametrize("text", ["-12", "1.5", "[1e3]", '{"a": null}', '"x"'])
    def test_json_is_read_as_ever(self, text):
        assert parse_json(text.encode()) == json.loads(text)


class TestCommand:
    @pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
    def test_it_ends_with_0_when_it_is_told_to_and_answers_what_is_there(self, number, tmp_path):
        (tmp_path / "slow_reward.py").write_text(
            "import time\ndef slow(images, prompts):\n    time.sleep(1)\n    return images.mean((1, 2, 3))\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "mogb_diffusion", "serve-reward", "slow_reward:slow", "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        try:
            line = process.stdout.readline()
            assert line.startswith("slow_reward:slow at http://127.0.0.1:"), line + process.stderr.read()
            remote = load("remote", url=line.split(" at ")[1].split(",")[0], retries=0)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(remote, pictures(2), [Prompt("a")] * 2)
                time.sleep(0.3)
                process.send_signal(number)
                assert answer.result().isfinite().all()
            told, complaints = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, complaints
        assert "2 pictures in 1 batches; answers: 200: 2" in told
        assert complaints == ""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing"], "There is no reward 'nothing'"),
            (["world_text", "--host", "0.0.0.0"], "needs a token"),
            (["world_text", "--option", "scale"], "must have the form KEY=VALUE"),
            (["world_text", "--option", "scale=large"], "scale must be one of"),
            (["world_text", "--port", "70000"], "port must be a whole number"),
            (["world_text", "--token-file", "/nowhere"], "cannot be read"),
        ],
    )
    def test_bad_arguments_are_status_2(self, arguments, message, capsys):
        assert main(["serve-reward", *arguments]) == 2
        told = capsys.readouterr()
        assert message in told.err
        assert told.err.count("\n") == 1
